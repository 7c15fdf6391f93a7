"""What a sweep costs over its parts, and what a second process brings.

    # nine quantisations behind prune + LoRA, about five minutes
    python benchmarks/sweep.py
    # two joblib processes against one, one thread each
    python benchmarks/sweep.py --parallel --repeats 10

``--extra tuner.steps=5 eval.speed=null`` adds settings to every command, for a quick look.

The first compares the command with 1.1 x (prune + LoRA) + 9 x (the bare quantise and evaluate):
what calling the stages directly takes, in a process that has imported everything. The second begins
each time from a store that holds the shared stages, and counts stages made twice and messages of
the database. Prints medians, and JSON with ``--json FILE``. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
SHARED = ["model=tiny", "pruner=taylor", "tuner=lora"]
BITS, GROUPS = (2, 3, 4), (32, 64, 128)
POINTS = ["quant=gptq", "quant.bits=2,3,4", "quant.group_size=32,64,128"]
COUNT = len(BITS) * len(GROUPS)


extra: list[str] = []  # settings that every command gets


def command(*arguments: str, threads: int | None = None) -> tuple[float, str]:
    """Return the wall time of ``compress.py`` with ``arguments``, seconds, and what it said."""
    places = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:  # of Hydra's multirun
        script = [sys.executable, str(ROOT / "compress.py"), *arguments, *extra]
        done = subprocess.run(script, cwd=folder, env=places, capture_output=True, text=True)
    taken = time.monotonic() - started
    if done.returncode:
        raise SystemExit(
            f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    return taken, done.stdout + done.stderr


def bare(store: Path) -> list[float]:
    """Return the seconds of quantising and evaluating each point behind the last result in
    ``store``, called directly."""
    from slim.chain.build import build_pipeline
    from slim.chain.compose import compose
    from slim.chain.pipeline import Pipeline
    from slim.checkpoints.source import Source
    from slim.checkpoints.store import Store

    chain = build_pipeline(compose("compress", [*SHARED, "quant=none", f"store={store}", *extra]))
    healed = Source(str(chain.plan()[-1].folder))
    times = []
    with tempfile.TemporaryDirectory() as folder:
        # imports, and the evaluation of the source
        Pipeline(healed, [], chain.evaluation, Store(folder), chain.device).run()
        for bits in BITS:
            for group in GROUPS:
                options = [
                    "pruner=none",
                    "quant=gptq",
                    f"quant.bits={bits}",
                    f"quant.group_size={group}",
                    f"store={folder}",
                ]
                own = [
                    setting for setting in extra if not setting.startswith(("tuner.", "pruner."))
                ]
                point = build_pipeline(compose("compress", [*options, *own]))
                point.model = healed
                started = time.monotonic()
                point.run()
                times.append(time.monotonic() - started)
    return times


def bare_elsewhere(store: Path) -> list[float]:
    """Return :func:`bare` of a process of its own, which has its own imports and caches."""
    script = [sys.executable, __file__, "--bare", str(store), "--extra", *extra]
    done = subprocess.run(script, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.strip().splitlines()[-1])


def cost(repeats: int) -> dict:
    """Measure the sweep and its parts, each from an empty store."""
    rows = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            first, second = Path(folder) / "parts", Path(folder) / "sweep"
            shared, _ = command(*SHARED, "quant=none", f"store={first}")
            points = sum(bare_elsewhere(first))
            total, _ = command("-m", *SHARED, *POINTS, f"store={second}")
            rows.append({"shared": shared, "bare": points, "sweep": total})
    found = {name: median(row[name] for row in rows) for name in rows[0]}
    found["limit"] = 1.1 * found["shared"] + found["bare"]
    found["overhead_per_point"] = (found["sweep"] - found["shared"] - found["bare"]) / COUNT
    return {**found, "repeats": repeats, "rows": rows}


def parallel(repeats: int) -> dict:
    """Measure nine points with one and with two joblib processes of one thread, from a store with
    the shared stages."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        command(*SHARED, "quant=none", f"store={base}", threads=1)
        for _ in range(repeats):
            row: dict = {}
            for jobs in (1, 2):
                store = Path(folder) / f"jobs{jobs}"
                shutil.copytree(base, store)
                launcher = ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}"]
                row[f"jobs{jobs}"], said = command(
                    "-m", *SHARED, *POINTS, *launcher, f"store={store}", threads=1
                )
                row[f"twice{jobs}"], row[f"database{jobs}"] = (
                    made_twice(store),
                    said.lower().count("database"),
                )
                shutil.rmtree(store)
            row["ratio"] = row["jobs2"] / row["jobs1"]
            rows.append(row)
            print(row, flush=True)
    found = {name: median(row[name] for row in rows) for name in ("jobs1", "jobs2", "ratio")}
    faults = {
        name: sum(row[f"{name}{jobs}"] for row in rows for jobs in (1, 2))
        for name in ("twice", "database")
    }
    return {**found, **faults, "repeats": repeats, "rows": rows}


def made_twice(store: Path) -> int:
    """Count the stages that more than one run of the store says to have made."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("slim").experiment_id
    stages = client.search_runs(
        [experiment], "tags.`slim.kind` = 'stage' and tags.cached = 'false'"
    )
    return sum(count - 1 for count in Counter(stage.data.tags["hash"] for stage in stages).values())


def report(name: str, value: float, limit: float) -> None:
    print(f"{name:58} {value:8.2f}   limit {limit:8.2f}   {'ok' if value <= limit else 'TOO MUCH'}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(spec=__doc__.splitlines()[0])
    parser.add_argument("--parallel", action="store_true", help="two joblib processes against one")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--extra", nargs="*", default=[], help="settings that every command gets")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    extra.extend(options.extra)
    if options.bare:
        print(json.dumps(bare(options.bare)))
        return
    if options.parallel:
        found = parallel(options.repeats)
        report("two processes / one process", found["ratio"], 0.7)
        report("stages made twice", found["twice"], 0)
        report("messages of the database", found["database"], 0)
    else:
        found = cost(options.repeats)
        report("sweep of nine points (s)", found["sweep"], found["limit"])
        report("own overhead per point (s)", found["overhead_per_point"], 3.0)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
