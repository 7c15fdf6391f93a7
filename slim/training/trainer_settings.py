"""The ``trainer`` group: on which devices and in which precision to train. Of these settings only
the precision changes the result."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from slim.core import processes
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import require_choice, require_flag

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

SPEED_ONLY = {"cache_key": False}
ACCELERATORS = ("auto", "cpu", "gpu")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
DEEPSPEED = ("deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload")
STRATEGIES = ("auto", "ddp", "fsdp", *DEEPSPEED)
# These split or recast the model, so it is loaded again when the training is over.
SHARDED = ("fsdp", *DEEPSPEED)


@dataclass
class TrainerSettings:
    """Where and how the numbers are computed.

    Attributes:
        accelerator: ``auto`` (the device of the run), ``cpu`` or ``gpu``.
        precision: ``32-true``, ``bf16-mixed``, ``16-mixed`` (the loss is scaled), or ``auto``:
            float32 on a CPU, bf16-mixed on a GPU.
        strategy: How the processes that torchrun started share the work, see ``strategies.py``;
            ``auto``: ``ddp`` where there are several. There are as many devices as processes.
        gradient_checkpointing: Compute activations twice instead of keeping them; a third slower,
            far less memory.
    """

    cache_name: ClassVar[str] = "Hardware"

    accelerator: str = field(default="auto", metadata=SPEED_ONLY)
    precision: str = "auto"
    strategy: str = field(default="auto", metadata=SPEED_ONLY)
    gradient_checkpointing: bool = field(default=False, metadata=SPEED_ONLY)

    def __post_init__(self) -> None:
        require_choice("trainer.accelerator", self.accelerator, ACCELERATORS)
        require_choice("trainer.precision", self.precision, PRECISIONS)
        require_choice("trainer.strategy", self.strategy, STRATEGIES)
        require_flag("trainer.gradient_checkpointing", self.gradient_checkpointing)
        if self.strategy == "fsdp" and self.precision == "16-mixed":
            raise SlimError(
                "trainer.strategy=fsdp does not scale losses. "
                "Use trainer.precision=bf16-mixed or 32-true with it."
            )

    def check(self, rows: int, setting: str = "tuner.batch_tokens") -> None:
        """Check that the strategy has what it needs.

        Args:
            rows: Windows per micro-batch, which the processes share.
            setting: The setting to enlarge where they cannot be shared, as the user types it.

        Raises:
            SlimError: A package or further processes are missing, or ``rows`` is no multiple of the
                number of processes.
        """
        if self.strategy in DEEPSPEED and importlib.util.find_spec("deepspeed") is None:
            raise SlimError(
                f"trainer.strategy={self.strategy} needs DeepSpeed. "
                "Install it: pip install 'slim[deepspeed]', or use trainer=fsdp."
            )
        if self.strategy in ("ddp", "fsdp") and not processes.launched():
            raise SlimError(
                f"trainer.strategy={self.strategy} shares the work among processes, one per "
                "device, and there is one. Start them: torchrun --nproc_per_node 2 compress.py ... "
                "(or use trainer=cpu, trainer=gpu)."
            )
        if rows % processes.world_size():
            raise SlimError(
                f"{processes.world_size()} processes cannot share {rows} windows per micro-batch. "
                f"Make {setting} larger, or start fewer processes."
            )

    def device(self, offered: str) -> str:
        """Return the torch device to train on.

        Args:
            offered: The device of the run, ``cpu`` or ``cuda``.

        Raises:
            SlimError: A GPU is asked for and there is none, or there are more processes than GPUs.
        """
        if self.accelerator == "cpu" or (self.accelerator == "auto" and offered == "cpu"):
            return "cpu"
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise SlimError(
                "trainer.accelerator=gpu: torch sees no GPU. Use trainer.accelerator=cpu or auto."
            )
        if processes.world_size() == 1:
            return "cuda"
        if processes.local_world_size() > torch.cuda.device_count():
            raise SlimError(
                f"There are {processes.local_world_size()} processes and "
                f"{torch.cuda.device_count()} GPUs on this machine. "
                "Start one process per GPU: torchrun --nproc_per_node gpu ..."
            )
        return f"cuda:{processes.local_rank()}"

    def resolved_precision(self, device: str) -> str:
        """Return Lightning's name of the precision.

        Args:
            device: Torch's name of the device.
        """
        if self.precision != "auto":
            return self.precision
        return "32-true" if device == "cpu" else "bf16-mixed"

    @property
    def resolved_strategy(self) -> str:
        """The strategy; ``auto`` only where there is one process."""
        if self.strategy == "auto" and processes.world_size() > 1:
            return "ddp"
        return self.strategy

    @property
    def sharded(self) -> bool:
        """Whether the training leaves no process with the model as it was loaded."""
        return self.resolved_strategy in SHARDED
