"""Reading single tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.stored import StoredTensor
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

BLOCK = 128  # rows and columns that share a scale in DeepSeek's float8 files


class TensorReader:
    """Reads single tensors of a checkpoint from its safetensors files, without loading the rest.

    Args:
        checkpoint: Where to read.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self._open: dict[str, object] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def read(self, name: str, device: str = "cpu") -> torch.Tensor:
        """Read one tensor under the name it has in the model.

        Args:
            name: Its full name.
            device: Where to put it.

        Raises:
            SlimError: The checkpoint does not have it.
        """
        if name not in self:
            raise SlimError(f"{self.checkpoint.folder} has no tensor '{name}'.")
        stored = self.checkpoint.stored[name]
        tensor = self._raw(stored, device)
        if stored.read_as is not None:
            scale = None
            if stored.scale is not None:
                scale = self._raw(stored.scale, device)
            tensor = from_float8(tensor, scale, name).to(stored_dtype(stored.read_as))
        if stored.rows is not None:
            # a copy: a view would keep the rows that are left out in memory
            tensor = tensor[: stored.rows].clone()
        return tensor

    def _raw(self, stored: StoredTensor, device: str) -> torch.Tensor:
        """Read a tensor as it lies in its file."""
        if stored.file not in self._open:  # opening reads the header, which takes a while
            from safetensors import safe_open

            self._open[stored.file] = safe_open(
                self.checkpoint.folder / stored.file, framework="pt", device=device
            )
        return self._open[stored.file].get_tensor(stored.name)

    def release(self) -> None:
        """Close the files: what was read of them no longer counts as this process's memory."""
        self._open.clear()

    def read_module(self, prefix: str, device: str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
        """Yield all tensors of a module, one at a time.

        Args:
            prefix: Its full name, such as ``"model.layers.3"``.
            device: Where to put them.

        Yields:
            (name relative to ``prefix``, tensor).
        """
        for name in self.checkpoint.tensors:
            if name.startswith(prefix + "."):
                yield name[len(prefix) + 1 :], self.read(name, device)


def from_float8(weight: torch.Tensor, scale: torch.Tensor | None, name: str) -> torch.Tensor:
    """Return float8 weights as float32, each times its scale.

    Args:
        weight: float8 [out, in].
        scale: What each number is multiplied by: a single number, one per row [out] or [out, 1], or
            one per block of 128 x 128; None: 1.
        name: The tensor's name, for messages.

    Raises:
        SlimError: The scales have another shape.
    """
    weight = weight.float()
    if scale is None:
        return weight
    scale = scale.float()
    if scale.numel() == 1:
        return weight * scale.reshape(())
    rows, columns = weight.shape
    if scale.numel() == rows:
        return weight * scale.reshape(rows, 1)
    if tuple(scale.shape) == (-(-rows // BLOCK), -(-columns // BLOCK)):
        # the last blocks may reach beyond the weight
        spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return weight * spread[:rows, :columns]
    raise SlimError(
        f"{name} is float8 {rows} x {columns} with scales {tuple(scale.shape)}. slim reads one "
        f"scale for all, one per row, or one per {BLOCK} x {BLOCK}."
    )


def stored_dtype(name: str) -> torch.dtype:
    """Return the torch type for safetensors' name of it, such as ``"BF16"``."""
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
    return {**names, "BF16": torch.bfloat16}[name]
