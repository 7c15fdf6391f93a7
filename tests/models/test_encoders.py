"""Encoders of every family go through the stages of decoders."""

from __future__ import annotations

import pytest
import torch

from slim.calibration.capture import last_hidden
from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.meta_model import MetaModel
from slim.checkpoints.stage import Context
from slim.core.errors import SlimError
from slim.data.labelled import Headlines, LabelledCalibration
from slim.distillation.student import Layers
from slim.loading.check_result import check_result
from slim.loading.load_model import load_model
from slim.pruning.angular import Angular
from slim.pruning.block_influence import BlockInfluence
from slim.pruning.magnitude import Magnitude
from slim.pruning.mlp_channels import MlpChannels, mlp_layers
from slim.pruning.taylor import Taylor
from slim.quantization.methods.awq import AWQ
from slim.quantization.methods.bitsandbytes import Int8
from slim.quantization.methods.hqq import HQQ
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


CALIBRATION = LabelledCalibration(Headlines(count=100), samples=4, length=16)


def depth_pruners():
    return [
        Angular(calibration=CALIBRATION, blocks=1),
        BlockInfluence(calibration=CALIBRATION, blocks=1),
        Magnitude(blocks=1),
    ]


@pytest.mark.parametrize("stage", depth_pruners(), ids=lambda stage: stage.criterion)
def test_depth_pruning_leaves_an_encoder_with_fewer_blocks(stage, tmp_path):
    source = build_encoder("bert", tmp_path / "model")
    target = tmp_path / "pruned"
    target.mkdir()
    stage.check(open_checkpoint(source).spec)
    stage.run(source, target, Context())
    check_result(target)
    assert open_checkpoint(target).spec.blocks == 3


@pytest.mark.parametrize("stage", [HQQ(group_size=32), Int8()], ids=["hqq", "int8"])
def test_other_quantizers_take_an_encoder(stage, tmp_path):
    source = build_encoder("bert", tmp_path / "model", hidden_size=64, intermediate_size=128)
    target = tmp_path / "quantized"
    target.mkdir()
    stage.check(open_checkpoint(source).spec)
    stage.run(source, target, Context())
    check_result(target)
    assert open_checkpoint(target).spec.quantization is not None


def refused():
    return {
        "quant=awq": AWQ(calibration=CALIBRATION, group_size=32),
        "pruner=taylor": Taylor(calibration=CALIBRATION, blocks=1),
        "GGUF": RTN(group_size=32, format="gguf"),
    }


@pytest.mark.parametrize("name", refused())
def test_what_needs_a_decoder_is_refused_by_name(name, tmp_path):
    spec = open_checkpoint(build_encoder("bert", tmp_path / "model")).spec
    with pytest.raises(SlimError, match=f"^{name} needs .* is an encoder. Use "):
        refused()[name].check(spec)


@pytest.mark.parametrize("family", LIGHT)
def test_channels_that_do_nothing_are_those_that_go(family, tmp_path):
    """Half of the channels are made to be zero: without them the model computes the same."""
    from safetensors.torch import load_file, save_file

    source = build_encoder(family, tmp_path / "model")
    spec = open_checkpoint(source).spec
    _, out, _ = mlp_layers(spec)
    file = source / "model.safetensors"
    tensors = load_file(file)
    for block in range(spec.blocks):
        tensors[f"{spec.family.blocks}.{block}.{out}.weight"][:, 1::2] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    target = tmp_path / "pruned"
    target.mkdir()
    stage = MlpChannels(ratio=0.5, multiple=8)
    stage.run(source, target, Context())
    check_result(target)
    assert open_checkpoint(target).spec.intermediate_size == spec.intermediate_size // 2
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        before = load_model(source)(tokens).logits
        after = load_model(target)(tokens).logits
    assert torch.allclose(before, after, atol=1e-5)
