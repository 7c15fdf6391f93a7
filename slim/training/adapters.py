"""Low-rank adapters, through PEFT: ``W x`` becomes ``W x + (alpha / r) B A x`` with A (r x in), B (out x r) trained.

Hu et al., LoRA (arXiv:2106.09685). B starts at zero, so the adapted model starts as the base. Afterwards the adapters
are merged into the weights; whether that reproduces the adapted model, and changes the base at all, is measured.
"""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor, nn

from slim.errors import SlimError


def add_adapters(model: nn.Module, r: int, alpha: float, dropout: float, targets: list[str]) -> nn.Module:
    """Return ``model`` wrapped by PEFT, all frozen but float32 adapters on the linear layers named ``targets``."""
    # PEFT looks for quantised layers by importing bitsandbytes, which complains about kernels that are not needed here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
        return get_peft_model(model, config)


@torch.no_grad()
def merge_adapters(model: nn.Module, probe: Tensor) -> tuple[nn.Module, dict[str, float]]:
    """Fold the adapters into the weights and compare outputs before and after.

    probe: int64 tokens of shape [rows, length].
    Returns the plain model and ``merge_error`` (largest difference of a logit between merged and adapted model) and
    ``adapter_effect`` (largest difference between merged model and base).
    Raises ``SlimError`` if merging changed nothing, or something else than the adapters did.
    """
    model.eval()
    adapted = model(input_ids=probe, use_cache=False).logits.float()
    with model.disable_adapter():
        base = model(input_ids=probe, use_cache=False).logits.float()
    plain = model.merge_and_unload(safe_merge=True)
    merged = plain(input_ids=probe, use_cache=False).logits.float()
    error = (merged - adapted).abs().max().item()
    effect = (merged - base).abs().max().item()
    if effect == 0:
        raise SlimError(
            "The adapter had no effect: the merged model's outputs equal the base model's to every digit. "
            "Check tuner.targets, or raise tuner.learning_rate."
        )
    if error >= effect:
        raise SlimError(
            f"Merging does not reproduce the adapters: outputs differ by {error:.2g} where the adapters' own effect is "
            f"{effect:.2g}. The update is smaller than the weights' precision; raise tuner.learning_rate."
        )
    return plain, {"merge_error": error, "adapter_effect": effect}
