"""bitsandbytes at work: packing layers on the walk, loading checkpoints, and the kernel that it has for CPUs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import nn

from slim.blockwise import SegmentView, Visitor, relative_error
from slim.errors import SlimError
from slim.quantization.bnb import BLOCK, KERNEL_ROWS, quantised_layers, require_library

if TYPE_CHECKING:
    from slim.checkpoint import Checkpoint

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]  # end of the tensor's name -> tensor; the float32 weights they are
ITEM_BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}  # types in which 4-bit codes may be stored


def library() -> ModuleType:
    """Return bitsandbytes. Raises ``SlimError`` if it is not installed."""
    require_library()
    return importlib.import_module("bitsandbytes")


def pack_int8(weight: torch.Tensor) -> Packed:
    """Quantise a 16- or 32-bit weight [out, in] row by row.

    weight: int8 [out, in]. SCB: float32 [out], max |w| of each row. weight_format: uint8, 0 for "by rows". Raises
    ``SlimError`` for weights that float16 cannot hold, which the library goes through.
    """
    half = weight.to(torch.float16)
    if not torch.isfinite(half).all():
        raise SlimError("quant=int8 takes weights through float16, and some are beyond 65504. Take quant=rtn quant.bits=8.")
    codes, scale, _ = library().functional.int8_vectorwise_quant(half)
    tensors = {"weight": codes, "SCB": scale, "weight_format": torch.zeros((), dtype=torch.uint8)}
    return tensors, codes.float() * (scale / 127).unsqueeze(-1)


def pack_nf4(weight: torch.Tensor, double_quant: bool = True) -> Packed:
    """Quantise a 16- or 32-bit weight [out, in] in blocks of 64 to NF4.

    weight: uint8 [out in / 2, 1], the first of two codes in the high half. weight.absmax: the scale of each block,
    float32, or uint8 with ``double_quant``; then also weight.nested_absmax and weight.nested_quant_map, float32.
    weight.quant_map: the 16 numbers, float32. weight.quant_state.bitsandbytes__nf4: a JSON text, uint8.
    """
    functional = library().functional
    codes, state = functional.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=double_quant, quant_type="nf4")
    tensors = {"weight": codes, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    state.dtype = torch.float32  # of what it is decoded to; the text above names the model's own
    return tensors, functional.dequantize_4bit(codes, state)


class PackingVisitor(Visitor):
    """A method of bitsandbytes on the walk; looks at weights only.

    pack: what is done to a layer. dtype: the model's type, to which weights are brought back first, as the library's
    result depends on it.
    """

    needs_gram = False
    resumable = True

    def __init__(self, pack: Callable[[torch.Tensor], Packed], dtype: str):
        self.pack, self.dtype = pack, getattr(torch, dtype)
        self.done: dict[str, dict[str, torch.Tensor]] = {}  # of the block at hand, by the layer's name within it

    def visit(self, view: SegmentView) -> dict[str, float]:
        errors = {}
        for name, linear in view.linears.items():
            self.done[name], weight = self.pack(linear.weight.to(self.dtype))
            errors[name] = relative_error(weight - linear.weight, linear.weight, None)
            linear.weight.copy_(weight)
        return errors

    def block_tensors(self, block: int, module: nn.Module) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, tensor in module.state_dict().items():
            packed = self.done.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            tensors.update({name: tensor} if packed is None else prefixed(name.removesuffix("weight"), packed))
        self.done = {}
        return tensors


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``tensors`` with ``prefix`` before their names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def load_bitsandbytes(checkpoint: Checkpoint, dtype: str, device: str = "cpu") -> nn.Module:
    """Load a checkpoint of bitsandbytes, slim's own or another tool's, by transformers, in evaluation mode.

    dtype: type of activations and plain weights, and the one 4-bit layers multiply in, whatever the config says. The
    model can be trained (adapters): layers keep the layout of the file, see :func:`use_cpu_kernel`. Raises ``SlimError``
    for tensors that are missing or do not fit.
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
        raise SlimError(f"{checkpoint.folder} lacks {len(missing)} weights its config asks for, first '{missing[0]}'.")
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = wanted, True
            module.weight.quant_state.dtype = wanted  # of the decoded weights that gradients pass through
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():  # transformers leaves them in the type of the file
        if parameter.is_floating_point() and not isinstance(parameter, bnb.nn.Params4bit):
            parameter.data = parameter.data.to(wanted)
    model.config.dtype = wanted
    return model.eval()


def check_tensors(checkpoint: Checkpoint) -> None:
    """Raise ``SlimError`` if a quantised layer's codes are missing, or are not as many as the config says."""
    model = checkpoint.description
    eight = bool(model.quantization.get("load_in_8bit"))
    for name, rows, columns in quantised_layers(model) if model.known else ():
        for end in ("weight", "SCB") if eight else ("weight", "weight.absmax", "weight.quant_map"):
            if f"{name}.{end}" not in checkpoint.tensors:
                raise SlimError(f"{checkpoint.folder} has no tensor '{name}.{end}', which its quantization_config asks for.")
        _, dtype, shape = checkpoint.tensors[f"{name}.weight"]
        count = 1 if eight else 2 * ITEM_BYTES.get(dtype, 0)
        for size in shape:
            count *= size
        if count != rows * columns + (0 if eight else rows * columns % 2):
            raise SlimError(
                f"{name}.weight in {checkpoint.folder} is {' x '.join(map(str, shape))} of {dtype}, which is not a layer of "
                f"{rows} x {columns} at {8 if eight else 4} bits. The config and the weights are not of the same model."
            )


def use_cpu_kernel(model: nn.Module) -> bool:
    """Let 4-bit layers on a CPU multiply by bitsandbytes' own kernel, where the processor has AVX-512 BF16.

    It is much faster for single tokens, and slower for many. It computes in bfloat16, so only models loaded in that take
    it; it rounds scales to bfloat16, and the first forward rearranges the weights for good: gradients no longer pass.
    So nothing but the measuring of speed should ask for it. Returns whether any layer of ``model`` now uses it.
    """
    bnb = library()
    supported = getattr(bnb.functional, "has_avx512bf16", lambda: False)()
    found = False
    for module in model.modules():
        if supported and isinstance(module, bnb.nn.Linear4bit) and module.compute_dtype == torch.bfloat16:
            rows, columns = module.weight.quant_state.shape
            fits = rows % KERNEL_ROWS == 0 and columns % module.weight.quant_state.blocksize == 0
            module.support_avx512bf16_for_cpu = fits and module.weight.device.type == "cpu"
            found = found or module.support_avx512bf16_for_cpu
    return found
