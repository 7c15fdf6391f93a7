"""Measure one checkpoint folder, loading it once."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from slim.checkpoints.checkpoint import Checkpoint, open_checkpoint
from slim.checkpoints.meta_model import auto_class
from slim.checkpoints.tokenizer import load_tokenizer
from slim.checkpoints.writer import copy_companions
from slim.core.console import warn
from slim.core.errors import SlimError
from slim.evaluation.divergence import KeptReference, keep_states
from slim.evaluation.encoder_speed import EncoderSpeed
from slim.evaluation.engines.measure import measure_in_engine
from slim.evaluation.memory import MemoryMeter, release
from slim.evaluation.perplexity import default_batch_size
from slim.evaluation.speed import Speed
from slim.loading.load_model import import_libraries, load_model, use_fast_kernels
from slim.models.spec import FAMILIES

if TYPE_CHECKING:
    from slim.evaluation.evaluation import Evaluation


def measure(
    folder: Path,
    evaluation: Evaluation,
    device: str = "cpu",
    quality: bool = True,
    speed: bool = True,
    file: Path | None = None,
) -> dict[str, dict | None]:
    """Measure a checkpoint.

    Speed comes first, so that the memory it reports is that of loading and generating, not that of
    scoring batches. The model is freed, and loaded a second time only where speed and quality are
    measured in different types, or where the model was changed to be fast.

    Args:
        folder: the checkpoint.
        evaluation: what is measured.
        device: ``"cpu"`` or ``"cuda"``.
        quality: whether what is a fact about the checkpoint alone is measured.
        speed: whether speed and memory are measured.
        file: what the checkpoint was imported from, where it was: an engine reads that itself.

    Returns:
        ``quality`` and ``speed``: each with ``metrics`` (flat name -> float), ``protocol`` and
        ``samples`` as plain JSON values; None for what is not asked for.
    """
    quality = quality and evaluation.has_quality
    speed = speed and evaluation.has_speed
    measured: dict[str, dict | None] = {"quality": None, "speed": None}
    if not quality and not speed:
        return measured
    if evaluation.engine is not None:
        return measure_in_engine(folder, evaluation, device, quality, speed, file)
    tokenizer = load_tokenizer(folder)
    spec = open_checkpoint(folder).spec
    quality_type = evaluation.quality_dtype(spec, device)
    speed_type = evaluation.speed_dtype(spec, device)
    evaluation.check_tokenizer(tokenizer, spec.context_length)
    seed_everything()
    kept = None
    if quality and evaluation.reference is not None:
        kept = kept_reference(evaluation, folder, tokenizer, quality_type, device)
    model = None
    if speed:
        model, measured["speed"] = _measure_speed(folder, evaluation, tokenizer, speed_type, device)
        if model is None or speed_type != quality_type:
            # gone before the other one is loaded: two may not fit
            model = None
            release()
    if quality:
        measured["quality"] = _measure_quality(
            model, folder, evaluation, tokenizer, quality_type, device, kept
        )
    del model
    release()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()  # for other processes on the same GPU
    return measured


def _measure_speed(
    folder: Path, evaluation: Evaluation, tokenizer, dtype: str, device: str
) -> tuple:
    """Return the loaded model (None where it was changed to be fast) and its speed and memory."""
    # outside the meter: tokenising a long text takes memory too
    prompts = evaluation.speed_prompts(tokenizer)
    warm_up(folder, device)
    with MemoryMeter(device) as meter:
        model = load_model(folder, dtype, device)
        # a type that was asked for is kept to the letter
        fast = evaluation.dtype == "auto" or dtype == "bfloat16"
        changed = fast and use_fast_kernels(model, folder)
        measured = evaluation.measure_speed(model, prompts)
    measured["metrics"].update(memory_metrics(meter))
    measured["metrics"].update(evaluation.measure_use(model, prompts))
    # fast kernels compute in other ways than the quality of other checkpoints was measured
    if changed:
        return None, measured
    return model, measured


def _measure_quality(
    model,
    folder: Path,
    evaluation: Evaluation,
    tokenizer,
    dtype: str,
    device: str,
    kept: KeptReference | None,
) -> dict:
    """Return quality of ``model``, loading it first where it is None."""
    import torch

    with torch.inference_mode():
        model = model or load_model(folder, dtype, device)
        return evaluation.measure_quality(model, tokenizer, kept)


def kept_reference(
    evaluation: Evaluation, folder: Path, tokenizer, dtype: str, device: str
) -> KeptReference | None:
    """Return what is kept of the reference, which is made now where it is not there.

    Args:
        evaluation: with a perplexity and a reference.
        folder: the checkpoint that is compared with it.
        tokenizer: of that checkpoint.
        dtype: type to compute in.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        What is kept, or None, which is said, where the two read the text as other tokens.

    Raises:
        SlimError: when the head of the reference is not one matrix that slim knows.
    """
    import torch

    reference, perplexity = evaluation.reference, evaluation.perplexity
    spec = open_checkpoint(folder).spec
    windows = perplexity.windows(tokenizer, spec.context_length)
    path = reference.states_file(windows, dtype, device)
    kept = KeptReference(path, windows)
    with reference.store.lock(path):
        # the name holds the tokens, so a file that is there was made of the same
        if path.is_file():
            return kept
        other = open_checkpoint(reference.folder)
        if other.config.get("model_type") not in FAMILIES:
            raise SlimError(
                f"eval.kl=true: the head of {reference.label} is not known, since no family is "
                f"called {other.config.get('model_type')}. Use eval.kl=false."
            )
        same_words = spec.vocab_size == other.spec.vocab_size
        if not same_words or not torch.equal(
            windows, perplexity.windows(load_tokenizer(reference.folder), other.spec.context_length)
        ):
            warn(
                f"KL is left out: its tokens are not those of {reference.label}.",
                head=f"{Path(folder).name}:",
            )
            return None
        with torch.inference_mode():
            model = load_model(reference.folder, dtype, device)
            batch_size = perplexity.batch_size or default_batch_size(windows)
            keep_states(path, model, windows, batch_size)
        del model
        release()
    return kept


def warm_up(folder: Path, device: str) -> None:
    """Load a minute model of the same family and generate, so that libraries and threads are not
    counted as memory.

    Args:
        folder: the checkpoint that is measured next.
        device: ``"cpu"`` or ``"cuda"``.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    checkpoint = open_checkpoint(folder)
    import_libraries(checkpoint)
    if checkpoint.spec.is_encoder:
        warm_up_encoder(checkpoint, device)
        return
    model_type = checkpoint.config.get("model_type")
    if model_type not in FAMILIES:  # its settings may have other names
        return
    config = AutoConfig.for_model(
        model_type,
        vocab_size=8,
        pad_token_id=0,
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
    )
    disable_progress_bar()
    with TemporaryDirectory() as scratch, MemoryMeter(device):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(scratch)
        copy_companions(Path(folder), Path(scratch))
        Speed(repeats=1, new_tokens=4).measure(load_model(scratch, device=device), [[1] * 16])


def warm_up_encoder(checkpoint: Checkpoint, device: str) -> None:
    """As :func:`warm_up` for an encoder: build a minute one of the same family and let it read.

    Args:
        checkpoint: that is measured next.
        device: ``"cpu"`` or ``"cuda"``.
    """
    import torch
    from transformers import AutoConfig

    spec = checkpoint.spec
    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 1}
    settings = {spec.key(name): value for name, value in sizes.items()}
    config = AutoConfig.for_model(spec.config["model_type"], pad_token_id=0, **settings)
    with MemoryMeter(device):
        model = auto_class(spec).from_config(config, dtype=torch.bfloat16).to(device).eval()
        EncoderSpeed(repeats=1).measure(model, [[1] * 16])


def memory_metrics(meter: MemoryMeter) -> dict[str, float]:
    """Return ``resident_bytes`` and ``peak_bytes`` as far as the machine can tell them."""
    measured = {"resident_bytes": meter.resident, "peak_bytes": meter.peak}
    return {name: float(value) for name, value in measured.items() if value is not None}


def seed_everything(seed: int = 0) -> None:
    """Seed every generator that a task or a model could draw from."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
