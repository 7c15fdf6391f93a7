"""The folder of a sweep, where the processes that run its points meet: ``sweep.json``, and
``point.json`` per point."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from slim.core.errors import SlimError
from slim.core.io import write_json

HEADER = "sweep.json"
POINT = "point.json"
TRACEBACK = "error.txt"


@dataclass(frozen=True)
class SweepFolder:
    """Hydra's folder of a sweep, with one folder below it per point, named by its number."""

    path: Path

    def claim(self) -> None:
        """Clear what an earlier sweep left here. Raises ``SlimError`` if that one is still
        running."""
        if not (self.path / HEADER).is_file():
            return
        pid = self.header()["pid"]
        # a process that was killed left its number here, and does not count
        if pid != os.getpid() and Path(f"/proc/{pid}").exists():
            raise SlimError(
                f"Another sweep is running in {self.path}. "
                "Start this one again, or set hydra.sweep.dir=FOLDER."
            )
        for path in self.path.glob(f"*/{POINT}"):
            path.unlink()

    def header(self) -> dict:
        """Return what the points need to know of their sweep: ``run_id``, ``sweep``, ``swept``,
        ``pid`` ..."""
        return json.loads((self.path / HEADER).read_text(encoding="utf-8"))

    def write_header(self, header: dict) -> None:
        write_json(self.path / HEADER, header)

    def point(self, number: int) -> Path:
        """Return the folder of a point."""
        return self.path / str(number)

    def write_point(self, number: int, record: dict) -> None:
        """Record how a point ended.

        Args:
            number: of the point.
            record: ``status``, ``error``, ``run_id``, ``seconds``, ``final`` (of the last
                checkpoint).
        """
        write_json(self.point(number) / POINT, {"number": number, **record})

    def points(self) -> list[dict]:
        """Return the records of the points that have ended, by number."""
        records = []
        for path in self.path.glob(f"*/{POINT}"):
            records.append(json.loads(path.read_text(encoding="utf-8")))
        return sorted(records, key=lambda record: record["number"])
