"""tuner=scales: gradients against autograd, what changes in the file, where it stands in the chain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slim.chain.build import build_pipeline
from slim.chain.compose import compose
from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.data.examples import TinyText
from slim.distillation import stage as distillation
from slim.gguf.quantizer import Gguf
from slim.loading.load_model import load_model
from slim.quantization.kernels.linear import QuantLinear
from slim.quantization.methods.gptq import GPTQ
from slim.quantization.methods.rtn import RTN
from slim.quantization.scheme import Scheme
from slim.training.forward import mean_nll
from slim.training.scales import Scales
from slim.training.trainer_settings import TrainerSettings
from tests.conftest import build_small
from tests.quantization.test_kernels import layer_of
from tests.support.calibrating import random_calibration
from tests.training.test_training import QUICK, run, tensors

SETTINGS = {**QUICK, "steps": 12, "learning_rate": 0.05}


@pytest.fixture(scope="module")
def little(tmp_path_factory, small_llama) -> Path:
    """A random Llama of two narrow blocks, with the vocabulary of its tokenizer."""
    folder = tmp_path_factory.mktemp("little") / "llama"
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    return build_small("llama", folder, vocab_size=len(load_tokenizer(small_llama)), **sizes)


@pytest.fixture(scope="module")
def packed(little, tmp_path_factory) -> Path:
    """The same with two bits per weight."""
    folder = tmp_path_factory.mktemp("packed")
    run(RTN(2, 32), little, folder / "result")
    return folder / "result"


def gradients(layer: QuantLinear, dense: torch.Tensor, groups: torch.Tensor, x: torch.Tensor):
    """Return (of x, of g) by autograd through whole weights."""
    x = x.clone().requires_grad_()
    growth = (0.1 * torch.ones_like(layer.scale, dtype=torch.float32)).requires_grad_()
    weight = dense * growth.exp()[:, groups]
    (x @ weight.T).square().sum().backward()
    return x.grad, growth.grad


@pytest.mark.parametrize("scheme", [Scheme(2, 32, False), Scheme(3, -1, True)], ids=str)
def test_gradients_are_those_of_whole_weights(scheme, monkeypatch):
    monkeypatch.setattr("slim.quantization.kernels.multiply.CHUNK", 128 * 64)  # several parts
    layer, dense = layer_of(200, 64, scheme, torch.float32)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    groups = torch.arange(64) // scheme.group(64)
    expected = gradients(layer, dense, groups, x)
    layer.train_scale()
    with torch.no_grad():
        layer.growth.fill_(0.1)
    x.requires_grad_()
    layer(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.growth.grad, expected[1], rtol=1e-4, atol=1e-3)


def test_gradients_of_groups_in_activation_order(little, tmp_path):
    stage = GPTQ(
        4, 32, static_groups=False, refine=0, calibration=random_calibration(tmp_path, 999)
    )
    run(stage, little, tmp_path / "ordered")
    model = load_model(tmp_path / "ordered", "float32", trainable=True)
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    assert layer.order is not None
    groups = torch.empty(64, dtype=torch.int64)
    groups[layer.order] = torch.arange(64) // 32
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    expected = gradients(layer, layer.dense_weight(), groups, x)
    layer.train_scale()
    with torch.no_grad():
        layer.growth.fill_(0.1)
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.growth.grad, expected[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "awq"])
def test_only_scales_change_and_the_loss_falls(form, little, tmp_path):
    run(RTN(4, 32, format=form), little, tmp_path / "packed")
    metadata = run(Scales(data=TinyText(), **SETTINGS), tmp_path / "packed", tmp_path / "tuned")
    before, after = tensors(tmp_path / "packed"), tensors(tmp_path / "tuned")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(("weight_scale", "scales"))}
    assert before.keys() == after.keys()
    assert metadata["validation_loss_after"] < metadata["validation_loss_before"]
    count = sum(before[name].numel() for name in changed)
    assert metadata["trained_scales"] == count


def test_the_loss_is_that_of_the_saved_file(packed, tmp_path):
    stage = Scales(data=TinyText(), **SETTINGS)
    metadata = run(stage, packed, tmp_path / "tuned")
    held_out = stage.task(open_checkpoint(packed), "cpu", "32-true").held_out
    loss = mean_nll(load_model(tmp_path / "tuned", "float32"), held_out)
    assert metadata["validation_loss_after"] == pytest.approx(loss, abs=1e-6)


def test_a_worse_model_is_not_kept(packed, tmp_path):
    stage = Scales(
        data=TinyText(), **{**SETTINGS, "learning_rate": 1.0, "steps": 2, "validate_every": 2}
    )
    run(stage, packed, tmp_path / "tuned")
    before, after = tensors(packed), tensors(tmp_path / "tuned")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_teacher_can_be_learned_from():
    config = compose("compress", ["model=tiny", "quant=gptq", "tuner=scales", "teacher=base"])
    stages = build_pipeline(config).stages
    assert isinstance(stages[-1], distillation.Scales)
    assert [stage.kind for stage in stages] == ["prune", "quantize", "distill"]


def test_scales_are_trained_after_the_quantizer():
    config = compose("compress", ["model=tiny", "pruner=none", "quant=gptq", "tuner=scales"])
    assert [stage.kind for stage in build_pipeline(config).stages] == ["quantize", "tune"]


def test_a_plain_model_has_no_scales(little):
    with pytest.raises(SlimError, match="Choose a quantizer: quant=gptq"):
        Scales(data=TinyText(), **SETTINGS).check(open_checkpoint(little).spec)


def test_formats_whose_scales_have_no_tensor_are_refused(little, tmp_path):
    run(Gguf("Q8_0"), little, tmp_path / "packed")
    with pytest.raises(SlimError, match="Use quant.format=compressed-tensors, gptq or awq"):
        Scales(data=TinyText(), **SETTINGS).check(open_checkpoint(tmp_path / "packed").spec)


def test_packed_weights_are_not_split_over_devices(packed):
    stage = Scales(data=TinyText(), trainer=TrainerSettings(strategy="fsdp"), **SETTINGS)
    with pytest.raises(SlimError, match="Use trainer=ddp"):
        stage.check_weights(open_checkpoint(packed).spec)
