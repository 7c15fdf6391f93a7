"""Sequential calibration: Hessians against hooks on the whole model; memory; what is written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from slim.calibration.hessian import Hessian, precision_of
from slim.calibration.sequential import BlockMethod, SequentialCalibration
from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.meta_model import MetaModel
from slim.checkpoints.shards import ShardWriter
from slim.core.errors import SlimError
from slim.models.spec import FAMILIES
from tests.conftest import build_small

FAMILY_CHANGES = {
    "llama": {},
    "mistral": {"sliding_window": 12},
    "qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 3},
    "qwen3": {
        "head_dim": 32,
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 3,
    },
}


class Spy(BlockMethod):
    """Changes nothing and remembers the Hessians."""

    def __init__(self):
        self.hessians, self.tokens = {}, set()

    def process(self, group):
        self.tokens.add(group.tokens)
        for name in group.linears:
            self.hessians[f"{group.prefix}.{name}"] = group.hessian.clone()
        return dict.fromkeys(group.linears, 0.0)


@pytest.fixture(scope="module", params=FAMILY_CHANGES)
def checkpoint(request, tmp_path_factory):
    changes = {"num_hidden_layers": 4, **FAMILY_CHANGES[request.param]}
    folder = build_small(
        request.param, tmp_path_factory.mktemp("source") / request.param, **changes
    )
    if request.param == "qwen2":  # give the biases, zero when made, something to do
        randomise_biases(folder)
    return open_checkpoint(folder)


def randomise_biases(folder):
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith(".bias"):
            tensors[name] = torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def tokens():
    return torch.randint(3, 1024, (5, 48), generator=torch.Generator().manual_seed(2))


def hessians_by_hooks(model, tokens):
    """Hessians in float64 of every linear layer's input, and the hidden states after each
    block."""
    hessians = {}

    def collect(name):
        def hook(module, inputs):
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            hessians[name] = hessians.get(name, 0) + x.T @ x

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(collect(name))
    last = []
    model.model.norm.register_forward_pre_hook(lambda module, inputs: last.append(inputs[0]))
    with torch.no_grad():
        model(tokens)
    return hessians, last[0]


@pytest.mark.parametrize("cache_bytes", [2**30, 0], ids=["inputs kept", "inputs computed twice"])
def test_hessians_and_outputs_equal_those_of_the_whole_model(
    checkpoint, tokens, cache_bytes, monkeypatch
):
    # batches of 2, 2 and 1 samples
    monkeypatch.setattr("slim.calibration.capture.BATCH_BYTES", 100 * 4 * 128)
    expected, last = hessians_by_hooks(
        AutoModelForCausalLM.from_pretrained(checkpoint.folder), tokens
    )
    spy = Spy()
    calibration = SequentialCalibration(checkpoint, spy, None, tokens, cache_bytes=cache_bytes)
    calibration.run()
    assert spy.hessians.keys() == expected.keys()
    assert spy.tokens == {tokens.numel()}
    for name, hessian in expected.items():
        assert torch.equal(spy.hessians[name], spy.hessians[name].T)
        torch.testing.assert_close(
            spy.hessians[name].double(), hessian, rtol=1e-4, atol=1e-4 * hessian.abs().max().item()
        )
    torch.testing.assert_close(torch.cat(calibration.captured.hidden), last, rtol=1e-4, atol=1e-4)


class Shrink(Spy):
    """Changes every layer, so that later inputs differ; remembers Hessians."""

    def process(self, group):
        result = super().process(group)
        for linear in group.linears.values():
            linear.weight.mul_(0.9)
        return result


def test_every_linear_group_sees_the_changes_before_it(checkpoint, tokens):
    """H of a group comes from a model in which exactly the groups before it are changed."""
    spy = Shrink()
    calibration = SequentialCalibration(checkpoint, spy, None, tokens)
    calibration.run()
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    linear_groups = [
        (block, group) for block in range(4) for group in FAMILIES["llama"].linear_groups
    ]
    for block, group in linear_groups:
        name = f"model.layers.{block}.{group.linears[0]}"
        if block in (0, 3):
            hessian = hessian_of_layer(model, name, tokens)
            torch.testing.assert_close(
                spy.hessians[name].double(),
                hessian,
                rtol=1e-3,
                atol=1e-4 * hessian.abs().max().item(),
            )
        for linear in group.linears:
            model.get_submodule(f"model.layers.{block}.{linear}").weight.data.mul_(0.9)
    _, last = hessians_by_hooks(model, tokens)
    torch.testing.assert_close(torch.cat(calibration.captured.hidden), last, rtol=1e-4, atol=1e-4)


def hessian_of_layer(model, name, tokens):
    found = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda module, inputs: found.append(inputs[0].double())
    )
    with torch.no_grad():
        model(tokens)
    hook.remove()
    x = found[0].flatten(0, 1)
    return x.T @ x


def test_one_block_is_in_memory_at_a_time(checkpoint, tokens, monkeypatch):
    loaded, seen = [], []
    original = MetaModel.load

    def load(self, name):
        module = original(self, name)
        loaded.append(name)
        real = {
            key.split(".")[2]
            for key, value in self.model.named_parameters()
            if ".layers." in key and not value.is_meta
        }
        others = [
            key
            for key, value in self.model.named_parameters()
            if ".layers." not in key and not value.is_meta
        ]
        seen.append((real, others))
        return module

    monkeypatch.setattr(MetaModel, "load", load)
    calibration = SequentialCalibration(checkpoint, Spy(), None, tokens)
    calibration.run()
    assert [name for name in loaded if ".layers." in name] == [
        f"model.layers.{block}" for block in range(4)
    ]
    for name, (real, others) in zip(loaded, seen, strict=True):
        assert len(real) <= 1
        assert not (real and others), name
    assert all(parameter.is_meta for parameter in calibration.meta_model.model.parameters())


def test_without_hessians_nothing_runs_and_everything_is_written(checkpoint, tmp_path, monkeypatch):
    class Blind(BlockMethod):
        needs_hessian = False

        def process(self, group):
            assert group.hessian is None
            return {}

    monkeypatch.setattr("slim.calibration.sequential.capture_inputs", None)
    writer = ShardWriter(tmp_path, shard_bytes=100_000)
    SequentialCalibration(checkpoint, Blind(), writer).run()
    writer.close()
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    written = {name: load_file(tmp_path / file)[name] for name, file in weight_map.items()}
    source = load_file(checkpoint.folder / "model.safetensors")
    assert written.keys() == source.keys()
    assert all(
        torch.equal(written[name], source[name]) and written[name].dtype == source[name].dtype
        for name in source
    )


def test_hessian_tiles(monkeypatch):
    monkeypatch.setattr("slim.calibration.hessian.HESSIAN_TILE", 7)
    x = torch.randn(3, 11, 20, generator=torch.Generator().manual_seed(0))
    hessian = Hessian(20)
    hessian.add(x[:1])
    hessian.add(x[1:])
    flat = x.reshape(-1, 20).double()
    torch.testing.assert_close(hessian.matrix().double(), flat.T @ flat, rtol=1e-5, atol=1e-5)
    assert hessian.rows == 33


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_weights_are_named(small_llama, tmp_path, bad):
    damaged = copy_with(
        small_llama,
        tmp_path / "bad",
        "model.layers.2.mlp.up_proj.weight",
        lambda t: t.index_fill(0, torch.tensor([3]), bad),
    )
    with pytest.raises(
        SlimError, match=r"model\.layers\.2\.mlp\.up_proj\.weight contain NaN or infinity"
    ):
        SequentialCalibration(
            open_checkpoint(damaged), Spy(), None, torch.randint(3, 1024, (2, 16))
        ).run()


def test_overflowing_inputs_are_named(small_llama, tmp_path):
    damaged = copy_with(
        small_llama, tmp_path / "bad", "model.layers.1.mlp.up_proj.weight", lambda t: t * 1e30
    )
    with pytest.raises(
        SlimError, match=r"inputs of model\.layers\.1\.mlp\.down_proj contain NaN or infinity"
    ):
        SequentialCalibration(
            open_checkpoint(damaged), Spy(), None, torch.randint(3, 1024, (2, 16))
        ).run()


def test_missing_and_misshapen_weights(small_llama, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    damaged = copy_with(small_llama, tmp_path / "a", name, lambda t: t[:-1])
    with pytest.raises(SlimError, match=r"model\.layers\.1 do not fit config\.json"):
        SequentialCalibration(
            open_checkpoint(damaged), Spy(), None, torch.randint(3, 1024, (2, 16))
        ).run()
    damaged = copy_with(small_llama, tmp_path / "b", name, lambda t: None)
    with pytest.raises(SlimError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        SequentialCalibration(
            open_checkpoint(damaged), Spy(), None, torch.randint(3, 1024, (2, 16))
        ).run()


def copy_with(source, target, name, change):
    """Copy a checkpoint with one tensor changed, or removed where ``change`` returns None."""
    import shutil

    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed.contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_calibration_runs_at_the_stored_precision_and_nothing_else_does():
    before = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    inputs = torch.randn(300, 64, generator=torch.Generator().manual_seed(2))
    exact = inputs.double().T @ inputs.double()
    found = {}
    for dtype in ("float32", "float16", "bfloat16"):
        hessian = Hessian(64)
        with pytest.raises(KeyError), precision_of(dtype):
            hessian.add(inputs)
            raise KeyError
        found[dtype] = float((hessian.matrix().double() - exact).norm() / exact.norm())
        assert (
            torch.backends.mkldnn.matmul.fp32_precision,
            torch.backends.cuda.matmul.fp32_precision,
        ) == before
    assert found["float32"] < 1e-6 and found["float16"] < 1e-6
    assert found["bfloat16"] < 2**-8  # on a processor that rounds; others stay exact
