"""Resuming an interrupted sequential calibration: what is saved between two blocks, and restored.

Saved are the hidden states, the errors so far, the method's state, and how far the output files
have been written (the files themselves stay where they are). A save takes as long as writing the
hidden states, so it is made only when the last one is some seconds ago: a short run never pays for
it, and a killed one loses little more than a block.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from slim.calibration.errors import LayerError
from slim.checkpoints.shards import ShardWriter
from slim.core.console import say
from slim.core.hardware import versions
from slim.core.io import save_tensors, write_json

if TYPE_CHECKING:
    import torch

SAVE_SECONDS = 20.0  # between two saves, at least
HIDDEN = "hidden."
PLAIN = "plain."
PENDING = "pending."  # tensors that the writer has not yet written to a shard


@dataclass
class CalibrationState:
    """What sequential calibration has to know to go on after a block.

    Attributes:
        block: number of the last finished block.
        hidden: input of the next block, float32 [samples, length, hidden] per batch; empty without
            calibration tokens.
        errors: of all layers so far.
        method: the method's state, plain JSON values.
        plain: what ``hidden`` would be in the plain model; empty unless the method propagates.
    """

    block: int
    hidden: list[torch.Tensor]
    errors: list[LayerError]
    method: dict
    plain: list[torch.Tensor] = field(default_factory=list)


class CalibrationProgress:
    """The saved progress of one sequential calibration, in a folder that outlives the process."""

    def __init__(self, folder: Path, device: str = "cpu"):
        """Use a folder, and make it if it is not there.

        Args:
            folder: where progress is saved.
            device: torch device of the run. Results may differ between devices, so progress made on
                another one is not used.
        """
        self.folder = folder
        self.setting = {"versions": versions(), "device": device}
        self._saved = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def _record(self) -> Path:
        return self.folder / "progress.json"

    def save(self, state: CalibrationState, writer: ShardWriter | None) -> None:
        """Save the state after a block, if the last save is at least ``SAVE_SECONDS`` ago.

        Args:
            state: what is saved.
            writer: of the output, whose position is saved too; None: nothing is written.
        """
        if time.monotonic() - self._saved < SAVE_SECONDS:
            return
        tensors = {}
        for prefix, batches in ((HIDDEN, state.hidden), (PLAIN, state.plain)):
            tensors |= {f"{prefix}{batch}": hidden for batch, hidden in enumerate(batches)}
        record = {
            "setting": self.setting,
            "block": state.block,
            "errors": [asdict(item) for item in state.errors],
            "method": state.method,
        }
        if writer is not None:
            record["writer"] = writer.state()
            for name, tensor in writer.pending.items():
                tensors[PENDING + name] = tensor
        file = self.folder / f"after-{state.block}.safetensors"
        save_tensors(tensors, file)
        record["tensors"] = file.name
        # The record appears at once and names its tensors: a killed save leaves the one before it.
        write_json(self._record, record)
        for old in self.folder.glob("after-*.safetensors"):
            if old != file:
                old.unlink()
        self._saved = time.monotonic()

    def resume(self, writer: ShardWriter | None) -> CalibrationState | None:
        """Return the saved state and bring the writer to it; None if there is nothing to resume.

        Args:
            writer: of the output, new; None: nothing is written.
        """
        record = self._read()
        if record is None or not (self.folder / record["tensors"]).is_file():
            return None
        if writer is not None and not writer.can_resume(record["writer"]):
            return None
        from safetensors.torch import load_file  # loads torch

        tensors = load_file(self.folder / record["tensors"])
        pending = {}
        for name, tensor in tensors.items():
            if name.startswith(PENDING):
                pending[name.removeprefix(PENDING)] = tensor
        hidden, plain = _batches(tensors, HIDDEN), _batches(tensors, PLAIN)
        if writer is not None:
            writer.resume(record["writer"], pending)
        say(f"Resuming after block {record['block']}, where an earlier run was interrupted.")
        errors = [LayerError(**item) for item in record["errors"]]
        return CalibrationState(record["block"], hidden, errors, record["method"], plain)

    def _read(self) -> dict | None:
        """Return the saved record, or None where there is none that can be used here."""
        if not self._record.is_file():
            return None
        record = json.loads(self._record.read_text(encoding="utf-8"))
        return record if record["setting"] == self.setting else None


def _batches(tensors: dict[str, torch.Tensor], prefix: str) -> list[torch.Tensor]:
    """Return the saved batches of that name, in order."""
    batches: list[torch.Tensor] = []
    while f"{prefix}{len(batches)}" in tensors:
        batches.append(tensors[f"{prefix}{len(batches)}"])
    return batches
