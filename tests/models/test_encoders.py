"""Encoders of every family go through the stages of decoders."""

from __future__ import annotations

import pytest
import torch

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.meta_model import MetaModel
from slim.checkpoints.stage import Context
from slim.distillation.student import Layers
from slim.loading.check_result import check_result
from slim.loading.load_model import load_model
from slim.quantization.methods.rtn import RTN
from tests.support.encoding import FAMILIES, build_encoder

TOPS = ("classification", "masked", "embedding")
# a post-norm and a pre-norm encoder by default, the others with the slow tests
LIGHT = [
    family if family in ("bert", "modernbert") else pytest.param(family, marks=pytest.mark.slow)
    for family in FAMILIES
]


@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize("family", LIGHT)
def test_config_tells_how_many_parameters_there_are(family, top, tmp_path):
    spec = open_checkpoint(build_encoder(family, tmp_path / "model", top)).spec
    model = load_model(tmp_path / "model")
    assert spec.parameters() == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("family", LIGHT)
def test_config_tells_the_linear_layers_of_the_blocks(family, tmp_path):
    checkpoint = open_checkpoint(build_encoder(family, tmp_path / "model"))
    model = load_model(tmp_path / "model")
    blocks = checkpoint.spec.family.blocks
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith(blocks):
            shapes[name] = tuple(module.weight.shape)
    assert checkpoint.spec.linears() == shapes


@pytest.mark.parametrize("family", LIGHT)
def test_block_by_block_gives_what_the_model_gives(family, tmp_path):
    from slim.calibration.capture import last_hidden

    checkpoint = open_checkpoint(build_encoder(family, tmp_path / "model", "embedding"))
    tokens = torch.arange(3, 23)[None]
    model = load_model(tmp_path / "model")
    wanted = []
    last = model.get_submodule(checkpoint.spec.family.blocks)[-1]
    last.register_forward_hook(lambda module, inputs, output: wanted.append(output))
    with torch.no_grad():
        model(tokens)
    hidden = last_hidden(MetaModel(checkpoint), tokens, range(checkpoint.spec.blocks))
    expected = wanted[0][0] if isinstance(wanted[0], tuple) else wanted[0]
    assert torch.allclose(hidden, expected.reshape(hidden.shape), atol=1e-5)


@pytest.mark.parametrize("family", LIGHT)
def test_quantized_encoder_loads_and_computes_nearly_the_same(family, tmp_path):
    source = build_encoder(family, tmp_path / "model")
    target = tmp_path / "quantized"
    target.mkdir()
    RTN(bits=8, group_size=32, embeddings=True).run(source, target, Context())
    check_result(target)
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        before = load_model(source)(tokens).logits
        after = load_model(target)(tokens).logits
    assert (after - before).norm() < 0.05 * before.norm()


@pytest.mark.parametrize("family", LIGHT)
def test_student_of_every_second_block_is_those_blocks(family, tmp_path):
    source = build_encoder(family, tmp_path / "model")
    target = tmp_path / "student"
    target.mkdir()
    Layers(every=2).run(source, target, Context())
    check_result(target)
    spec = open_checkpoint(target).spec
    assert spec.blocks == 2
    weights = dict(load_model(source).named_parameters())
    layer = next(iter(spec.block_linears()))
    kept = load_model(target).get_submodule(f"{spec.family.blocks}.1.{layer}").weight
    assert torch.equal(kept, weights[f"{spec.family.blocks}.2.{layer}.weight"])
