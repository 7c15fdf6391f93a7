"""The ``trainer`` group: on what and in which precision to train. Nothing here changes what is learnt but precision."""

from __future__ import annotations

from dataclasses import dataclass, field

from slim.errors import SlimError
from slim.settings import require_choice, require_flag

SPEED_ONLY = {"identity": False}


@dataclass
class Hardware:
    """Where and how the numbers are computed.

    accelerator: ``auto`` (the device of the run), ``cpu`` or ``gpu``. devices: 1.
    precision: ``32-true``, ``bf16-mixed``, or ``auto``: float32 on a CPU, bf16-mixed on a GPU.
    strategy: ``auto``, one device.
    gradient_checkpointing: compute activations twice instead of keeping them; a third slower, far less memory.
    """

    accelerator: str = field(default="auto", metadata=SPEED_ONLY)
    devices: int = field(default=1, metadata=SPEED_ONLY)
    precision: str = "auto"
    strategy: str = field(default="auto", metadata=SPEED_ONLY)
    gradient_checkpointing: bool = field(default=False, metadata=SPEED_ONLY)

    def __post_init__(self) -> None:
        require_choice("trainer.accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        require_choice("trainer.devices", self.devices, (1,))
        require_choice("trainer.precision", self.precision, ("auto", "32-true", "bf16-mixed"))
        require_choice("trainer.strategy", self.strategy, ("auto",))
        require_flag("trainer.gradient_checkpointing", self.gradient_checkpointing)

    def device(self, offered: str) -> str:
        """Return the torch device to train on, given the device of the run. Raises ``SlimError`` without a GPU."""
        if self.accelerator == "auto":
            return offered
        if self.accelerator == "cpu":
            return "cpu"
        import torch

        if not torch.cuda.is_available():
            raise SlimError("trainer.accelerator=gpu: torch sees no GPU. Use trainer.accelerator=cpu or auto.")
        return "cuda"

    def resolved_precision(self, device: str) -> str:
        """Return Lightning's name of the precision on ``device``."""
        if self.precision != "auto":
            return self.precision
        return "32-true" if device == "cpu" else "bf16-mixed"
