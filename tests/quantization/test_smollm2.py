"""Methods on a real model: SmolLM2-135M-Instruct, where the embedded model shows too little.

python -m pytest -m slow tests/quantization/test_smollm2.py
"""

from __future__ import annotations

import pytest

from slim.checkpoints.store import Store
from slim.data.calibration import Calibration
from slim.evaluation.divergence import Reference
from slim.evaluation.evaluation import Evaluation
from slim.evaluation.perplexity import Perplexity
from slim.evaluation.run import measure
from slim.quantization.methods.awq import AWQ
from slim.quantization.methods.gptq import GPTQ
from slim.quantization.methods.rtn import RTN
from tests.support.stages import run

TEXT = "wikitext2_tok_valid.txt"
HELD_OUT = "wikitext2_raw_test.txt"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_better_methods_and_more_bits_stay_nearer_to_the_source(smollm2, shared, tmp_path):
    calibration = Calibration(str(shared / "data" / TEXT), samples=16, length=256)
    held_out = Perplexity(str(shared / "data" / HELD_OUT), window=512, limit=8)
    evaluation = Evaluation(held_out, kl=True)
    evaluation.reference = Reference("smollm2", smollm2, "smollm2", Store(tmp_path))

    def kl(name: str, stage) -> float:
        run(stage, smollm2, tmp_path / name)
        return measure(tmp_path / name, evaluation, speed=False)["quality"]["metrics"]["kl"]

    rounded = kl("rtn3", RTN(3, 64))
    scaled = kl("awq3", AWQ(3, 64, calibration=calibration))
    fed_back = kl("gptq3", GPTQ(3, 64, calibration=calibration))
    propagated = kl("propagated3", GPTQ(3, 64, calibration=calibration, propagate=True))
    wider = kl("gptq4", GPTQ(4, 64, calibration=calibration))
    assert propagated < 0.95 * fed_back
    assert wider < 0.5 * fed_back
    assert fed_back < scaled < rounded
