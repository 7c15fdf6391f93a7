"""Loading checkpoints of bitsandbytes, and the kernel that it has for CPUs."""

from __future__ import annotations

import math

import torch
from torch import nn

from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.meta_model import auto_class
from slim.checkpoints.verify import refuse_missing_tensors
from slim.core.errors import SlimError
from slim.quantization.formats.bitsandbytes import KERNEL_ROWS, library
from slim.quantization.storage import packed_schemes

# ends of the names of a layer's tensors
EIGHT_BITS = ("weight", "SCB")
FOUR_BITS = ("weight", "weight.absmax", "weight.quant_map")
# types in which codes may be stored
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
            f"{checkpoint.folder}: its files are read through transformers, "
            "so that their names and config must be as transformers writes them."
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
    bnb = library()
    check_tensors(checkpoint)
    wanted = getattr(torch, dtype)
    model, info = auto_class(checkpoint.spec).from_pretrained(
        checkpoint.folder, dtype=wanted, device_map={"": device}, local_files_only=True,
        use_safetensors=True, output_loading_info=True,
    )  # fmt: skip
    missing = sorted(info["missing_keys"])
    if missing:
        refuse_missing_tensors(checkpoint, missing)
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
    """Check that every quantized layer's codes are there, and as many as the config says.

    Args:
        checkpoint: A checkpoint of bitsandbytes.

    Raises:
        SlimError: They are not.
    """
    spec = checkpoint.spec
    if not spec.known:
        return
    matrices = spec.matrices()
    ends, bits = FOUR_BITS, 4
    if spec.quantization.get("load_in_8bit"):
        ends, bits = EIGHT_BITS, 8
    for name in packed_schemes(spec):
        for end in ends:
            if f"{name}.{end}" not in checkpoint.tensors:
                raise SlimError(
                    f"{checkpoint.folder} has no tensor '{name}.{end}', which its "
                    "quantization_config asks for."
                )
        rows, columns = matrices[name]
        _, dtype, shape = checkpoint.tensors[f"{name}.weight"]
        stored = math.prod(shape) * ITEM_BYTES.get(dtype, 0)
        if stored != math.ceil(rows * columns * bits / 8):
            shown = " x ".join(map(str, shape))
            raise SlimError(
                f"{name}.weight in {checkpoint.folder} is {shown} of {dtype}, which is not a layer "
                f"of {rows} x {columns} at {bits} bits.\n"
                "The config and the weights are not of the same model."
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
