"""Names of settings classes."""

from __future__ import annotations

import pytest

from slim.core.settings import spoken_name


@pytest.mark.parametrize(
    ("name", "spoken"),
    [
        ("WidthActivation", "width_activation"),
        ("WidthL1", "width_l1"),
        ("SparseGPT", "sparsegpt"),
        ("GPTQ", "gptq"),
        ("Taylor", "taylor"),
    ],
)
def test_a_method_is_called_as_its_file_is(name, spoken):
    assert spoken_name(type(name, (), {})()) == spoken
