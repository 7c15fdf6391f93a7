"""Low-rank adapters, through PEFT: ``W x`` becomes ``W x + s B A x`` with A (r x in), B (out x r)
trained.

Hu et al., LoRA (arXiv:2106.09685): s = alpha / r. rsLoRA (Kalajdzievski, arXiv:2312.03732): s =
alpha / sqrt(r), which keeps the size of the update for large r. DoRA (Liu et al.,
arXiv:2402.09353): rows of W + s B A are brought to a trained length m, ``m (W + s B A) / |W + s B
A|``. B starts at zero and m at the lengths of W, so the adapted model starts as the base.

Afterwards the adapters are merged into the weights they were trained on; for a quantised base these
are the dequantised ones. Whether that reproduces the adapted model, and changes the base at all, is
measured.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slim.core.errors import SlimError
from slim.loading.adapters import quiet_peft, teach_packed_layers
from slim.quantization.kernels.linear import QuantLinear

NO_EFFECT = (
    "The adapter had no effect: {compared} to every digit. "
    "Check tuner.targets, or raise tuner.learning_rate."
)


def add_adapters(
    model: nn.Module,
    r: int,
    alpha: float,
    dropout: float,
    targets: list[str],
    rslora: bool = False,
    dora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
) -> nn.Module:
    """Wrap a model by PEFT: all is frozen but float32 adapters.

    Args:
        model: Plain, or with packed layers of slim or of bitsandbytes.
        r: Rank of the adapters.
        alpha: The adapters' output is scaled by alpha / r.
        dropout: Of the adapters' input, 0 to 1.
        targets: Linear layers with adapters, by whole names or their ends.
        rslora: Scale by alpha / sqrt(r).
        dora: Train the length of every row apart from its direction.
        rank_pattern: Regular expression for names -> rank there, PEFT's own.

    Returns:
        The wrapped model.
    """
    with quiet_peft():
        from peft import LoraConfig

        config = LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=targets,
            use_rslora=rslora,
            use_dora=dora,
            rank_pattern=dict(rank_pattern or {}),
            task_type="CAUSAL_LM",
        )
        return wrap(model, config)


def wrap(model: nn.Module, config) -> nn.Module:
    """Return the model wrapped by PEFT with fresh adapters.

    Args:
        model: As for :func:`add_adapters`.
        config: A ``LoraConfig``.
    """
    from peft import get_peft_model

    teach_packed_layers(config)
    with quiet_peft():
        return get_peft_model(model, config)


@torch.no_grad()
def merge_adapters(
    model: nn.Module, probe: Tensor, dense: nn.Module | None = None
) -> tuple[nn.Module, dict[str, float]]:
    """Fold the adapters into the weights and compare outputs before and after.

    Args:
        model: Wrapped by PEFT.
        probe: int64 [rows, length], tokens to compare the outputs on.
        dense: For a quantised model, the plain model into which to merge; its weights are
            overwritten by the dequantised ones of ``model``.

    Returns:
        The plain model, and ``merge_error`` (largest difference of a logit between merged and
        trained model) and ``adapter_effect`` (largest difference between merged model and base).

    Raises:
        SlimError: Merging changed nothing, or something else than the adapters did.
    """
    model.eval()
    trained = logits(model, probe)
    with model.disable_adapter():
        base = logits(model, probe)
    reference = trained
    if dense is not None:
        model = on_dense_base(model, dense)
        # A quantised layer multiplies differently, and int8 rounds its inputs too: whether merging
        # is exact shows only against the same weights in plain layers.
        reference = logits(model, probe)
    plain = model.merge_and_unload(safe_merge=True)
    merged = logits(plain, probe)
    error = largest(merged - reference)
    effect = largest(merged - base)
    if effect == 0:
        raise SlimError(
            NO_EFFECT.format(compared="the merged model's outputs equal the base model's")
        )
    if error >= effect:
        raise SlimError(
            f"Merging does not reproduce the adapters: outputs differ by {error:.2g} where the "
            f"adapters' own effect is {effect:.2g}.\n"
            "The update is smaller than the weights' precision; raise tuner.learning_rate."
        )
    return plain, {"merge_error": largest(merged - trained), "adapter_effect": effect}


@torch.no_grad()
def adapter_effect(model: nn.Module, probe: Tensor) -> float:
    """Return the largest difference of a logit that the adapters make.

    Args:
        model: Wrapped by PEFT.
        probe: int64 [rows, length], tokens to compare the outputs on.

    Raises:
        SlimError: They make none.
    """
    model.eval()
    adapted = logits(model, probe)
    with model.disable_adapter():
        effect = largest(adapted - logits(model, probe))
    if effect == 0:
        raise SlimError(NO_EFFECT.format(compared="outputs with and without it are equal"))
    return effect


def on_dense_base(model: nn.Module, dense: nn.Module) -> nn.Module:
    """Return the plain model with the dequantised weights and, on top of them, the adapters.

    Args:
        model: Quantised, wrapped by PEFT.
        dense: The plain model; its weights are overwritten.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    for name, module in model.get_base_model().named_modules():
        weight = dequantised(module)
        if weight is not None:
            dense.get_submodule(name.removesuffix(".base_layer")).weight.copy_(weight)
    config = copy.copy(model.peft_config["default"])
    config.base_model_name_or_path = None
    wrapped = wrap(dense.requires_grad_(False), config)
    set_peft_model_state_dict(wrapped, get_peft_model_state_dict(model))
    return wrapped.eval()


def dequantised(module: nn.Module) -> Tensor | None:
    """Return the weight that a packed layer of slim or of bitsandbytes stands for.

    Args:
        module: Any module.

    Returns:
        float32 [out, in]; None for a module that is not packed.
    """
    if isinstance(module, QuantLinear):
        return module.dense_weight()
    weight = module._parameters.get("weight")  # its own: adapters pass on that of the layer below
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        state = weight.quant_state
        # It rounds to the type that layers multiply in, unless told otherwise.
        computed, state.dtype = state.dtype, torch.float32
        try:
            return dequantize_4bit(weight.data, state)
        finally:
            state.dtype = computed
    if kind == "Int8Params":
        # The first forward pass moves the scales into the layer's state.
        scale = module.state.SCB if module.state.SCB is not None else weight.SCB
        return weight.data.float() * (scale.to(weight.device).float() / 127).unsqueeze(-1)
    return None


def logits(model: nn.Module, probe: Tensor) -> Tensor:
    """Return the model's outputs as float32 [rows, length, vocabulary].

    Args:
        model: A causal language model.
        probe: int64 [rows, length].
    """
    return model(input_ids=probe, use_cache=False).logits.float()


def largest(difference: Tensor) -> float:
    """Return the largest magnitude in a tensor.

    Args:
        difference: Of any shape.
    """
    return difference.abs().max().item()
