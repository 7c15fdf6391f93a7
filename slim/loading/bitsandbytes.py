"""Loading checkpoints of bitsandbytes, and the kernel that it has for CPUs."""

from __future__ import annotations

import torch
from torch import nn

from slim.checkpoints.checkpoint import Checkpoint
from slim.core.errors import SlimError
from slim.quantization.formats.bitsandbytes import KERNEL_ROWS, library
from slim.quantization.storage import packed_schemes

# types in which 4-bit codes may be stored
ITEM_BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}


def load(checkpoint: Checkpoint, dtype: str, device: str, trainable: bool) -> nn.Module:
    """Load a checkpoint of bitsandbytes.

    Args:
        checkpoint: What to load.
        dtype: Type of activations and plain weights.
        device: ``"cpu"`` or ``"cuda"``.
        trainable: Without effect: it can be trained either way.
    """
    if not checkpoint.is_plain:
        raise SlimError(
            f"{checkpoint.folder}: its files are read through transformers, so that their names and "
            "config must be as transformers writes them."
        )
    return load_bitsandbytes(checkpoint, dtype, device)


def load_bitsandbytes(checkpoint: Checkpoint, dtype: str, device: str = "cpu") -> nn.Module:
    """Load a checkpoint of bitsandbytes by transformers, in evaluation mode.

    The model can be trained (adapters): layers keep the layout of the file, see
    :func:`use_fast_kernels`.

    Args:
        checkpoint: Slim's own or another tool's.
        dtype: Type of activations and plain weights, and the one 4-bit layers multiply in, whatever
            the config says.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        SlimError: Tensors are missing or do not fit.
    """
    from transformers import AutoModelForCausalLM

    bnb = library()
    check_tensors(checkpoint)
    wanted = getattr(torch, dtype)
    model, info = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype=wanted, device_map={"": device}, local_files_only=True, use_safetensors=True,
        output_loading_info=True,
    )  # fmt: skip
    missing = sorted(info["missing_keys"])
    if missing:
        raise SlimError(
            f"{checkpoint.folder} lacks {len(missing)} weights its config asks for, first '{missing[0]}'."
        )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = wanted, True
            # of the decoded weights that gradients pass through
            module.weight.quant_state.dtype = wanted
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():  # transformers leaves them in the type of the file
        if parameter.is_floating_point() and not isinstance(parameter, bnb.nn.Params4bit):
            parameter.data = parameter.data.to(wanted)
    model.config.dtype = wanted
    return model.eval()


def check_tensors(checkpoint: Checkpoint) -> None:
    """Raise ``SlimError`` if a quantised layer's codes are missing, or are not as many as the
    config says."""
    spec = checkpoint.spec
    eight = bool(spec.quantization.get("load_in_8bit"))
    for name in packed_schemes(spec) if spec.known else ():
        rows, columns = spec.matrices()[name]
        for end in ("weight", "SCB") if eight else ("weight", "weight.absmax", "weight.quant_map"):
            if f"{name}.{end}" not in checkpoint.tensors:
                raise SlimError(
                    f"{checkpoint.folder} has no tensor '{name}.{end}', which its quantization_config asks for."
                )
        _, dtype, shape = checkpoint.tensors[f"{name}.weight"]
        count = 1 if eight else 2 * ITEM_BYTES.get(dtype, 0)
        for size in shape:
            count *= size
        if count != rows * columns + (0 if eight else rows * columns % 2):
            raise SlimError(
                f"{name}.weight in {checkpoint.folder} is {' x '.join(map(str, shape))} of {dtype}, which is not a layer of "
                f"{rows} x {columns} at {8 if eight else 4} bits. The config and the weights are not of the same model."
            )


def use_fast_kernels(model: nn.Module) -> bool:
    """Let 4-bit layers on a CPU multiply by bitsandbytes' own kernel, where the processor has
    AVX-512 BF16.

    It is much faster for single tokens, and slower for many. It computes in bfloat16, so only
    models loaded in that take it; it rounds scales to bfloat16, and the first forward rearranges
    the weights for good: gradients no longer pass. So nothing but the measuring of speed should ask
    for it.

    Args:
        model: A model from :func:`load_bitsandbytes`.

    Returns:
        Whether any layer of it now uses the kernel.
    """
    bnb = library()
    if not getattr(bnb.functional, "has_avx512bf16", lambda: False)():
        return False
    used = False
    for module in model.modules():
        if not isinstance(module, bnb.nn.Linear4bit) or module.compute_dtype != torch.bfloat16:
            continue
        rows, columns = module.weight.quant_state.shape
        fits = rows % KERNEL_ROWS == 0 and columns % module.weight.quant_state.blocksize == 0
        module.support_avx512bf16_for_cpu = fits and module.weight.device.type == "cpu"
        used = used or module.support_avx512bf16_for_cpu
    return used
