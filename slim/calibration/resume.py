"""Going on with a walk that was interrupted: what is saved between two blocks, and how it is taken
up.

Saved are the hidden states, the errors so far, the visitor's state, and how far the output files
have been written (the files themselves stay where they are). A save takes the time of writing the
hidden states, so it is made only when the last one is some seconds ago: a short walk never pays for
it, and a killed one loses little more than a block."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from slim.core.console import say
from slim.core.hardware import versions
from slim.core.io import save_tensors, write_json

if TYPE_CHECKING:
    from slim.calibration.sequential import SequentialCalibration

SAVE_SECONDS = 20.0  # between two saves, at least


class CalibrationProgress:
    """The saved progress of one walk in ``folder``. device: as results may differ between
    devices."""

    def __init__(self, folder: Path, device: str = "cpu"):
        self.folder = folder
        self.setting = {"versions": versions(), "device": device}
        self._saved = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def _record(self) -> Path:
        return self.folder / "walk.json"

    def save(self, walk: SequentialCalibration, block: int) -> None:
        """Save the state after ``block``, if the last save is long enough ago."""
        if time.monotonic() - self._saved < SAVE_SECONDS:
            return
        tensors, record = (
            {},
            {
                "setting": self.setting,
                "block": block,
                "errors": [asdict(item) for item in walk.errors],
            },
        )
        if walk.captured is not None:
            tensors.update(
                {f"hidden.{batch}": hidden for batch, hidden in enumerate(walk.captured.hidden)}
            )
        if walk.writer is not None:
            record["writer"] = walk.writer.state()
            tensors.update(
                {f"pending.{name}": tensor for name, tensor in walk.writer.pending.items()}
            )
        file = self.folder / f"after-{block}.walk"
        save_tensors(tensors, file)
        record.update(method=walk.method.state(), tensors=file.name)
        write_json(self._record, record)
        for old in self.folder.glob("after-*.walk"):
            if old != file:
                old.unlink()
        self._saved = time.monotonic()

    def resume(self, walk: SequentialCalibration) -> int:
        """Bring ``walk`` to where it was interrupted; return the block to go on with, 0 if there is
        nothing saved."""
        from slim.calibration.errors import LayerError

        record = self._read()
        if record is None:
            return 0
        from safetensors.torch import load_file

        tensors = load_file(self.folder / record["tensors"])
        if walk.captured is not None:
            walk.captured.hidden = [
                tensors[f"hidden.{batch}"] for batch in range(len(walk.captured.hidden))
            ]
        if walk.writer is not None:
            pending = {
                name[8:]: tensor for name, tensor in tensors.items() if name.startswith("pending.")
            }
            walk.writer.resume(record["writer"], pending)
        walk.method.resume(record["method"])
        walk.errors = [LayerError(**item) for item in record["errors"]]
        say(f"Resuming after block {record['block']}, where an earlier run was interrupted.")
        return record["block"] + 1

    def _read(self) -> dict | None:
        """Return the saved record, or None where there is none that can be used here."""
        if not self._record.is_file():
            return None
        record = json.loads(self._record.read_text(encoding="utf-8"))
        return record if record["setting"] == self.setting else None
