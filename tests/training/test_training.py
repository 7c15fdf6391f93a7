"""Tuning: the objective against its definition, one denominator, best state, merging, interruption,
healing."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slim.checkpoints.checkpoint import checksums, open_checkpoint
from slim.checkpoints.reader import TensorReader
from slim.checkpoints.stage import Context
from slim.checkpoints.tokenizer import load_tokenizer
from slim.checkpoints.writer import write_blocks
from slim.core.errors import SlimError
from slim.data.examples import TextData, TinyChat, TinyText
from slim.data.packing import IGNORE
from slim.loading.load_model import load_model
from slim.quantization.storage import weight_bytes
from slim.training.schedule import learning_rate_factor
from slim.training.trainer_settings import TrainerSettings
from slim.training.tune import Full, Lora
from tests.conftest import build_small

QUICK = dict(steps=6, window=64, batch_tokens=256, validate_every=3, validation_tokens=512)


@pytest.fixture(scope="module")
def little(tmp_path_factory, small_llama) -> Path:
    """A random Llama of two narrow blocks, with the vocabulary of its tokenizer."""
    folder = tmp_path_factory.mktemp("little") / "llama"
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    return build_small("llama", folder, vocab_size=len(load_tokenizer(small_llama)), **sizes)


def run(stage, source: Path, target: Path, metric=None) -> dict:
    target.mkdir(parents=True)
    stage.check(open_checkpoint(source).spec)
    facts = stage.run(source, target, Context(metric=metric or (lambda *_: None)))
    json.dumps(facts)  # plain values only
    return facts


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = TensorReader(open_checkpoint(folder))
    return {name: reader.read(name) for name in reader.checkpoint.tensors}


def windows(source: Path, data, length: int = 64, tokens: int = 1024):
    return data.windows("train", load_tokenizer(source), length, tokens)


def apples(folder: Path, count: int) -> TextData:
    """A small text that ends."""
    path = folder / "apples.jsonl"
    texts = (f"Anna has {n} red apples in the house." for n in range(count))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return TextData(text=str(path), validation_fraction=0.2)


# Schedules


def test_schedules_rise_and_fall_as_told():
    cosine = [learning_rate_factor(step, 100, "cosine", 10) for step in range(100)]
    assert cosine[:10] == [(step + 1) / 10 for step in range(10)]
    for step in (10, 54, 99):
        assert cosine[step] == pytest.approx(0.5 * (1 + math.cos(math.pi * (step - 9) / 90)))
    assert cosine[99] == pytest.approx(0)
    linear = [learning_rate_factor(step, 100, "linear", 0, floor=0.1) for step in range(100)]
    assert linear[49] == pytest.approx(0.55) and linear[99] == pytest.approx(0.1)
    assert learning_rate_factor(99, 100, "constant", 10) == 1


# The objective


@pytest.mark.parametrize("data", [TinyText(), TinyChat()])
def test_loss_and_gradients_equal_the_definition(little, data):
    from slim.training.forward import sequence_nll

    batch = windows(little, data)
    tokens, labels = batch.tokens.long(), batch.labels.long()
    positions = None if batch.positions is None else batch.positions.long()
    model = load_model(little, "float32")
    sequence_nll(model, tokens, labels, positions).backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    total = torch.zeros(())
    for row in range(len(tokens)):
        starts = [0] if positions is None else (positions[row] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], tokens.shape[1]], strict=True):
            logits = model(input_ids=tokens[row : row + 1, start:end]).logits[0].log_softmax(-1)
            for place in range(1, end - start):
                if labels[row, start + place] != IGNORE:
                    total = total - logits[place - 1, tokens[row, start + place]]
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-3)


def test_mean_loss_keeps_the_models_mode(little):
    from slim.training.batches import in_order
    from slim.training.forward import mean_nll, sequence_nll

    found = windows(little, TinyChat(), tokens=2000)
    model = load_model(little, "float32").train()
    whole = sequence_nll(
        model, found.tokens.long(), found.labels.long(), found.positions.long()
    ).item()
    for rows in (1, 3, 100):
        batches = in_order(found, rows)
        assert sum(len(batch["tokens"]) for batch in batches) == len(found)
        assert mean_nll(model, batches) == pytest.approx(
            whole / found.loss_tokens.sum().item(), rel=1e-5
        )
    assert model.training


def test_every_window_comes_once_per_pass_in_another_order():
    from slim.training.batches import window_order

    order = window_order(7, 21, seed=3).view(3, 7)
    assert all(sorted(one.tolist()) == list(range(7)) for one in order)
    assert order[0].tolist() != order[1].tolist()
    assert torch.equal(window_order(7, 21, seed=3), order.flatten())
    assert window_order(7, 3, seed=3).tolist() == order[0, :3].tolist()


@pytest.mark.parametrize("tuner", [Full, Lora])
def test_accumulation_does_not_change_the_result(little, tmp_path, tuner):
    """Answers differ in length between micro-batches, so a denominator per micro-batch would change
    the result."""
    settings = {**QUICK, "learning_rate": 0.01, "data": TinyChat()}
    run(tuner(**settings), little, tmp_path / "one")
    run(tuner(**settings, accumulation=4), little, tmp_path / "four")
    one, four = tensors(tmp_path / "one"), tensors(tmp_path / "four")
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-3, atol=1e-4)
    curves = [
        json.loads((tmp_path / name / "report" / "loss.json").read_text())["train"]
        for name in ("one", "four")
    ]
    assert [p["loss"] for p in curves[0]] == pytest.approx([p["loss"] for p in curves[1]], rel=1e-4)


def test_training_equals_a_plain_loop(little, tmp_path):
    """Two steps of AdamW written out: batches in their order, clipped gradients, warm-up, decay on
    matrices only."""
    from slim.training.batches import window_order

    stage = Full(
        data=TinyChat(),
        **{**QUICK, "steps": 3},
        learning_rate=0.003,
        weight_decay=0.1,
        clip=0.5,
        warmup=0.34,
        seed=5,
    )
    run(stage, little, tmp_path / "ours")

    model = load_model(little, "float32").train()
    found = windows(little, TinyChat(), tokens=3 * 256)
    order = window_order(len(found), 12, seed=5).view(3, 4)
    moments = {
        name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()
    }
    for step, chosen in enumerate(order):
        total, count = torch.zeros(()), 0
        for row in chosen.tolist():
            tokens, labels, positions = (
                x[row].long() for x in (found.tokens, found.labels, found.positions)
            )
            logits = model(
                input_ids=tokens[None], position_ids=positions[None], use_cache=False
            ).logits
            counted = labels[1:] != IGNORE
            picked = logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
            total, count = total - picked[counted].sum(), count + int(counted.sum())
        model.zero_grad()
        (total / count).backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
        rate = 0.003 * learning_rate_factor(step, 3, "cosine", 1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                gradient = p.grad * min(1.0, 0.5 / norm)
                first, second = moments[name]
                first.mul_(0.9).add_(gradient, alpha=0.1)
                second.mul_(0.999).add_(gradient**2, alpha=0.001)
                p.mul_(1 - rate * (0.1 if p.dim() > 1 else 0))
                p -= (
                    rate
                    * (first / (1 - 0.9 ** (step + 1)))
                    / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                )
    ours = tensors(tmp_path / "ours")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.detach(), rtol=1e-3, atol=2e-5)


# The whole stage


@pytest.mark.parametrize("tuner", [Full, Lora])
def test_the_same_call_twice_gives_identical_weights(little, tmp_path, tuner):
    extra = {"dropout": 0.1} if tuner is Lora else {}
    curves = []
    for name in ("one", "two"):
        recorded: list[tuple] = []
        torch.manual_seed(hash(name) % 1000)  # what happened before must not matter
        metric = lambda name, value, step, to=recorded: to.append((name, value, step))  # noqa: E731
        facts = run(tuner(data=TinyText(), **QUICK, **extra), little, tmp_path / name, metric)
        curves.append([entry for entry in recorded if entry[0] != "tokens_per_second"])
    weights = [checksums(tmp_path / name)["model.safetensors"] for name in ("one", "two")]
    assert weights[0] == weights[1] and curves[0] == curves[1]
    assert {name for name, *_ in curves[0]} == {"train_loss", "validation_loss", "learning_rate"}
    assert facts["validation_loss_after"] < facts["validation_loss_before"]
    assert facts["tokens_seen"] == 6 * 256 and facts["weights_changed"] > 0.3
    loaded = tensors(tmp_path / "one")
    assert {n: (t.dtype, t.shape) for n, t in loaded.items()} == {
        n: (t.dtype, t.shape) for n, t in tensors(little).items()
    }


def test_result_is_a_checkpoint_with_curves_and_nothing_else(little, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run(Lora(data=TinyText(), **QUICK), little, tmp_path / "out")
    out, err = capfd.readouterr()
    assert "Tip" not in err and "GPU available" not in err and "warn" not in err.lower() and not out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"report", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if "adapter" in name or "lightning" in name]
    assert {path.name for path in (tmp_path / "out" / "report").iterdir()} == {
        "examples.txt",
        "loss.json",
        "loss.png",
    }
    assert (tmp_path / "out" / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_validation_loss_after_is_that_of_the_saved_weights(tmp_path, little):
    from slim.training.batches import in_order
    from slim.training.forward import mean_nll

    source = tmp_path / "half"
    load_model(little, "float32").to(torch.bfloat16).save_pretrained(source)
    for path in little.glob("*token*"):
        (source / path.name).write_bytes(path.read_bytes())
    stage = Lora(data=TinyText(), **QUICK)
    facts = run(stage, source, tmp_path / "out")
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    held_out = stage.data.windows("validation", load_tokenizer(source), 64, 512)
    saved = mean_nll(load_model(tmp_path / "out", "float32"), in_order(held_out, 4))
    assert facts["validation_loss_after"] == pytest.approx(saved, rel=1e-6)
    before, after = tensors(source), tensors(tmp_path / "out")
    share = sum((before[n] != after[n]).sum().item() for n in before) / sum(
        t.numel() for t in before.values()
    )
    assert facts["weights_changed"] == pytest.approx(share)


def test_a_worse_model_is_not_kept(little, tmp_path, capfd):
    facts = run(
        Full(data=TinyText(), **QUICK, learning_rate=0.9, schedule="constant"),
        little,
        tmp_path / "out",
    )
    assert (
        facts["best_step"] == 0
        and facts["validation_loss_trained"] > facts["validation_loss_before"]
    )
    assert facts["validation_loss_after"] == facts["validation_loss_before"]
    assert "did not lower the validation loss" in capfd.readouterr().err
    before, after = tensors(little), tensors(tmp_path / "out")
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )


def test_the_best_state_is_kept_and_not_the_last(little, tmp_path, monkeypatch):
    """Losses are made up: best at step 4; the saved weights must be those of a training that ends
    there."""
    from slim.training import callbacks

    made_up = iter([30.0, 20.0, 10.0, 25.0])
    monkeypatch.setattr(callbacks, "mean_nll", lambda *_: next(made_up))
    # fewer windows than either training needs, so both read the same ones
    data = apples(tmp_path, 60)
    settings = dict(data=data, learning_rate=0.01, schedule="constant", warmup=0.0)
    facts = run(Full(**{**QUICK, "validate_every": 2}, **settings), little, tmp_path / "best")
    assert facts["best_step"] == 4 and facts["validation_loss_trained"] == 25.0
    monkeypatch.undo()
    run(Full(**{**QUICK, "steps": 4}, **settings), little, tmp_path / "four")
    best, four = tensors(tmp_path / "best"), tensors(tmp_path / "four")
    assert all(torch.equal(best[name], four[name]) for name in best)


def test_adapters_are_merged_into_what_they_computed(little, tmp_path):
    facts = run(Lora(data=TinyText(), **QUICK, learning_rate=0.02), little, tmp_path / "out")
    assert facts["merge_error"] < 1e-4 < 0.1 < facts["adapter_effect"]
    before, after = tensors(little), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    for name in changed:  # W + (alpha / r) B A: the update has rank 8
        assert torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4) == 8


def test_chosen_targets_only_are_changed(little, tmp_path):
    run(
        Lora(data=TinyText(), **QUICK, targets=["q_proj", "mlp.down_proj"]),
        little,
        tmp_path / "out",
    )
    before, after = tensors(little), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name or "down_proj" in name}


def test_an_adapter_that_is_not_applied_is_an_error(little, tmp_path, monkeypatch):
    from peft import PeftModel

    monkeypatch.setattr(
        PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False
    )
    with pytest.raises(SlimError, match="adapter had no effect"):
        run(Lora(data=TinyText(), **QUICK), little, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_an_adapter_that_is_not_trained_is_an_error(little, tmp_path, monkeypatch):
    from slim.training import module

    monkeypatch.setattr(module, "learning_rate_factor", lambda *_: 0.0)
    with pytest.raises(SlimError, match="Training had no effect"):
        run(Lora(data=TinyText(), **QUICK), little, tmp_path / "out")


def test_a_wrong_merge_is_an_error(little):
    from slim.training.adapters import add_adapters, merge_adapters

    torch.manual_seed(0)
    model = add_adapters(load_model(little), 4, 8, 0.0, ["q_proj"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    probe = torch.arange(20)[None]
    unmerged = model.merge_and_unload

    def twice(**_):
        plain = unmerged()
        for block in plain.model.layers:
            block.self_attn.q_proj.weight.data.mul_(-3)
        return plain

    model.merge_and_unload = twice
    with pytest.raises(SlimError, match="does not reproduce the adapters"):
        merge_adapters(model, probe)


def test_a_loss_that_is_not_finite_stops_the_training_and_keeps_the_best_state(
    little, tmp_path, monkeypatch, capfd
):
    from slim.training.module import LanguageModeling

    honest = LanguageModeling.nll
    calls = iter(range(100))
    monkeypatch.setattr(
        LanguageModeling,
        "nll",
        lambda self, batch: honest(self, batch) * (float("nan") if next(calls) == 4 else 1),
    )
    facts = run(Full(data=TinyText(), **QUICK, learning_rate=0.003), little, tmp_path / "out")
    assert (
        facts["stopped"].startswith("The loss is nan at step 5, in windows ")
        and facts["best_step"] == 3
    )
    assert facts["validation_loss_after"] < facts["validation_loss_before"]
    assert "training stopped" in capfd.readouterr().err
    assert all(tensor.isfinite().all() for tensor in tensors(tmp_path / "out").values())


def test_ctrl_c_is_a_keyboard_interrupt_and_leaves_the_signal_as_it_was(little, tmp_path):
    def interrupt(name, value, step):
        if name == "train_loss" and step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(Lora(data=TinyText(), **QUICK), little, tmp_path / "out", interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("tuner", [Full, Lora])
def test_mixed_precision_trains_nearly_the_same(little, tmp_path, tuner):
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        stage = tuner(
            data=TinyText(),
            **QUICK,
            learning_rate=0.01,
            trainer=TrainerSettings(precision=precision),
        )
        facts = run(stage, little, tmp_path / precision)
        losses.append(facts["validation_loss_after"])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0] < facts["validation_loss_before"] - 0.05


def test_gradient_checkpointing_works_and_gives_the_same(little, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls = {"plain": 0, "checkpointed": 0}
    honest = LlamaMLP.forward
    for name in calls:

        def counted(self, states, name=name):
            calls[name] += 1
            return honest(self, states)

        monkeypatch.setattr(LlamaMLP, "forward", counted)
        hardware = TrainerSettings(gradient_checkpointing=name == "checkpointed")
        run(Lora(data=TinyText(), **QUICK, trainer=hardware), little, tmp_path / name)
    assert calls["checkpointed"] == calls["plain"] + 6 * 2  # every block once more in every step
    plain, checkpointed = tensors(tmp_path / "plain"), tensors(tmp_path / "checkpointed")
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], rtol=1e-4, atol=1e-5)


def test_epochs_count_passes_over_the_data(little, tmp_path):
    data = apples(tmp_path, 200)
    settings = {**QUICK, "epochs": 2}
    facts = run(Full(data=data, **settings), little, tmp_path / "out")
    count = len(data.windows("train", load_tokenizer(little), 64))
    assert facts["steps"] == math.ceil(2 * count / 4)


def test_healing_a_pruned_model(ref_llama, shared, tmp_path):
    source, pruned = open_checkpoint(ref_llama), tmp_path / "pruned"
    pruned.mkdir()
    write_blocks(source, pruned, [0, 1, 3, 5])
    data = TextData(text=str(shared / "data" / "wikitext2_tok_valid.txt"))
    stage = Lora(
        data=data, steps=12, window=128, batch_tokens=1024, validate_every=6, validation_tokens=2048
    )
    facts = run(stage, pruned, tmp_path / "healed")
    assert facts["validation_loss_after"] < facts["validation_loss_before"] - 0.2
    assert {tensor.dtype for tensor in tensors(tmp_path / "healed").values()} == {torch.bfloat16}
    with pytest.raises(SlimError, match="no chat template"):
        run(Lora(data=TinyChat(), **QUICK), pruned, tmp_path / "chat")


@pytest.mark.parametrize("tuner", [Full, Lora])
def test_blocks_of_different_sizes_are_tuned(small_llama, tmp_path, tuner):
    sizes = {"0": {"intermediate_size": 32}, "1": {"num_key_value_heads": 1}}
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, per_layer_config=sizes)
    source = build_small(
        "llama", tmp_path / "uneven", vocab_size=len(load_tokenizer(small_llama)), **small
    )
    facts = run(tuner(data=TinyText(), **QUICK, learning_rate=0.01), source, tmp_path / "out")
    assert facts["validation_loss_after"] < facts["validation_loss_before"]
    before, after = tensors(source), tensors(tmp_path / "out")
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert (
        open_checkpoint(tmp_path / "out").spec.differing == open_checkpoint(source).spec.differing
    )
    load_model(tmp_path / "out")


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(steps=0), "tuner.steps=0"),
        (dict(steps=None), "tuner.steps=None"),
        (dict(epochs=0), "tuner.epochs=0"),
        (dict(epochs=1), "The text of the tiny world never ends"),
        (
            dict(batch_tokens=1000),
            "batch_tokens=1000 is no multiple .* = 256. Use for example tuner.batch_tokens=768",
        ),
        (dict(learning_rate=0), "tuner.learning_rate=0"),
        (dict(schedule="cosin"), "tuner.schedule=cosin: must be.*Did you mean cosine"),
        (dict(warmup=2), "tuner.warmup=2"),
        (dict(betas=[0.9]), "tuner.betas"),
        (dict(r=0), "tuner.r=0"),
        (dict(dropout=1), "tuner.dropout=1"),
        (dict(targets=[]), "leaves nothing to train"),
        (dict(data="tiny"), "not a choice of the data group"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(SlimError, match=message):
        Lora(**{"data": TinyText(), **settings})


def test_what_does_not_fit_the_model_is_refused(little):
    spec = open_checkpoint(little).spec
    with pytest.raises(
        SlimError, match="no layer 'q_prj'.*Possible: q_proj, k_proj.*Did you mean q_proj"
    ):
        Lora(data=TinyText(), targets=["q_prj"]).check(spec)
    with pytest.raises(SlimError, match="Use at most 256"):
        Lora(data=TinyText(), window=512).check(spec)
    with pytest.raises(SlimError, match="Tune first and quantise the result"):
        Lora(data=TinyText()).check(spec.with_config(quantization_config={"bits": 4}))
    if not torch.cuda.is_available():
        with pytest.raises(SlimError, match="torch sees no GPU"):
            TrainerSettings(accelerator="gpu").device("cpu")


def test_a_missing_package_is_named(little, monkeypatch):
    import importlib.util

    honest = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else honest(name)
    )
    spec = open_checkpoint(little).spec
    with pytest.raises(SlimError, match="needs the package peft"):
        Lora(data=TinyText()).check(spec)
    Full(data=TinyText()).check(spec)


def test_identity_holds_what_changes_the_result():
    stage = Lora(data=TinyText())
    assert (
        stage.cache_key()
        == Lora(data=TinyText(), trainer=TrainerSettings(accelerator="cpu")).cache_key()
    )
    assert stage.cache_key() == json.loads(json.dumps(stage.cache_key()))
    others = [
        dict(seed=1),
        dict(data=TinyText(seed=1)),
        dict(data=TinyChat()),
        dict(r=4),
        dict(steps=50),
    ]
    different = [Lora(**{"data": TinyText(), **other}).cache_key() for other in others]
    assert all(cache_key != stage.cache_key() for cache_key in different)


def test_expected_memory_grows_with_what_is_trained(little):
    spec = open_checkpoint(little).spec
    lora, full = Lora(data=TinyText()), Full(data=TinyText())
    assert (
        weight_bytes(spec, "float32") < lora.peak_bytes(spec, "cpu") < full.peak_bytes(spec, "cpu")
    )
    assert lora.peak_bytes(spec, "cpu") < Lora(data=TinyText(), r=64).peak_bytes(spec, "cpu")
    assert Lora(data=TinyText(), accumulation=4).peak_bytes(spec, "cpu") < lora.peak_bytes(
        spec, "cpu"
    )


def test_settings_are_checked_without_heavy_imports():
    code = (
        "import sys; from slim.training.tune import Lora, Full; from slim.data.examples import TinyText;"
        "Lora(data=TinyText()).cache_key(); Full(data=TinyText());"
        "heavy = {'torch', 'transformers', 'lightning', 'peft', 'datasets', 'matplotlib'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.slow
def test_healing_reaches_further_with_more_steps(ref_llama, shared, tmp_path):
    source, pruned = open_checkpoint(ref_llama), tmp_path / "pruned"
    pruned.mkdir()
    write_blocks(source, pruned, [0, 1, 3, 5])
    data = TextData(text=str(shared / "data" / "wikitext2_tok_valid.txt"))
    losses = [
        run(Lora(data=data, steps=steps), pruned, tmp_path / str(steps))["validation_loss_after"]
        for steps in (15, 120)
    ]
    assert losses[1] < losses[0] - 0.1


# Weight-pruned sources


@pytest.mark.parametrize("kind", [Lora, Full])
def test_zeros_of_a_weight_pruned_source_stay_zero(little, tmp_path, kind, capsys):
    from slim.chain.pipeline import Pipeline
    from slim.checkpoints.source import Source
    from slim.checkpoints.store import Store
    from slim.pruning.weights import MagnitudeWeights

    tune = kind(data=TinyText(), learning_rate=0.02, **QUICK)
    results = Pipeline(
        Source(str(little)), [MagnitudeWeights(n=2, m=4), tune], None, Store(tmp_path / "runs")
    ).run()
    pruned, tuned = (tensors(result.checkpoint.folder) for result in results[1:])
    linears = [name for name in pruned if "_proj" in name]
    assert len(linears) == 14
    for name in linears:
        assert (tuned[name][pruned[name] == 0] == 0).all(), name
        assert not torch.equal(tuned[name], pruned[name])
    facts = results[-1].metadata
    assert facts["mask"] == results[1].metadata["mask"] and facts["zeros_restored"] > 0
    assert "set back to zero" in " ".join(capsys.readouterr().err.split())
