"""Time of the README's first command with an empty and with a full cache, of help and of mistakes.

    python benchmarks/chain.py

Prints seconds beside their limits. Run it on an otherwise idle machine; the limits are for two
cores."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHAIN = ["model=tiny", "pruner=taylor", "tuner=lora", "quant=awq"]


def seconds(*arguments: str, repeats: int = 1) -> float:
    """Return the median wall time of ``compress.py`` with ``arguments``."""
    times = []
    for _ in range(repeats):
        started = time.monotonic()
        subprocess.run(
            [sys.executable, str(ROOT / "compress.py"), *arguments], capture_output=True, cwd=ROOT
        )
        times.append(time.monotonic() - started)
    return sorted(times)[len(times) // 2]


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"store={Path(folder) / 'runs'}"
        rows = [
            ("whole chain, empty cache", seconds(*CHAIN, store), 120),
            ("whole chain, everything cached", seconds(*CHAIN, store, repeats=3), 20),
            ("--help", seconds("--help", repeats=3), 1.5),
            ("quant.bits=5", seconds("quant.bits=5", repeats=3), 1.5),
            (
                "quant.group_size=256 (does not divide a layer)",
                seconds("quant.group_size=256", repeats=3),
                1.5,
            ),
            ("pruner=tailor (no such choice)", seconds("pruner=tailor", repeats=3), 1.5),
        ]
    for name, taken, limit in rows:
        print(
            f"{name:50} {taken:7.2f} s   limit {limit:6.1f} s   {'ok' if taken <= limit else 'TOO SLOW'}"
        )


if __name__ == "__main__":
    main()
