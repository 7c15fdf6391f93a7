"""Reading single tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from slim.checkpoints.checkpoint import Checkpoint
from slim.core.errors import SlimError

if TYPE_CHECKING:
    import torch


class TensorReader:
    """Reads single tensors of a checkpoint from its safetensors files, without loading the rest."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self._open: dict[str, object] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def read(self, name: str, device: str = "cpu") -> torch.Tensor:
        """Read one tensor. Raises ``SlimError`` if the checkpoint does not have it."""
        if name not in self:
            raise SlimError(f"{self.checkpoint.folder} has no tensor '{name}'.")
        file = self.checkpoint.tensors[name][0]
        if file not in self._open:
            from safetensors import safe_open

            self._open[file] = safe_open(
                self.checkpoint.folder / file, framework="pt", device=device
            )
        return self._open[file].get_tensor(name)

    def release(self) -> None:
        """Close the files: what was read of them no longer counts as this process's memory."""
        self._open.clear()

    def read_module(self, prefix: str, device: str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name relative to ``prefix``, tensor) for all tensors under it
        (``"model.layers.3"``), one at a time."""
        for name in self.checkpoint.tensors:
            if name.startswith(prefix + "."):
                yield name[len(prefix) + 1 :], self.read(name, device)
