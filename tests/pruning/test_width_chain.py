"""Width pruning in a chain from the command line: prune, heal, quantise a model whose blocks differ
throughout."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from slim.loading.load_model import load_model
from tests.conftest import ROOT

SHORT = [
    "model=tiny", "pruner=width_taylor", "pruner.reconstruct=true", "tuner=lora", "quant=awq", "quant.group_size=64",
    "tuner.steps=4", "calibration.samples=8", "eval=none",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_prune_heal_and_quantise_in_one_command(tmp_path):
    places = [f"store={tmp_path / 'runs'}", f"output={tmp_path / 'out'}"]
    command = [sys.executable, str(ROOT / "compress.py"), *SHORT, *places]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=550)
    assert process.returncode == 0, process.stderr
    folders = {
        path.name.split("-")[0]: path
        for path in (tmp_path / "runs" / "stages").iterdir()
        if path.is_dir()
    }
    facts = json.loads((folders["prune"] / "slim.json").read_text())["facts"]
    assert facts["parameters_after"] < facts["parameters_before"]
    for name in ("prune", "tune", "quantize"):
        config = json.loads((folders[name] / "config.json").read_text())
        assert (
            config["per_layer_config"]["3"]["intermediate_size"] == facts["sizes"]["3"]["channels"]
        )
        assert "import slim" in (folders[name] / "README.md").read_text()
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        logits = [
            load_model(folder)(tokens).logits for folder in (folders["tune"], tmp_path / "out")
        ]
    assert (
        torch.nn.functional.cosine_similarity(*(found.flatten() for found in logits), dim=0) > 0.95
    )
