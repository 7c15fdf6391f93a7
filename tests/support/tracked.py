"""Tracking stores for tests: the tables, which take a second to make, are made once and copied."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path


@cache
def _template() -> Path:
    from slim.tracking.connection import connect

    folder = Path(tempfile.mkdtemp(prefix="slim-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    connect(f"sqlite:///{folder / 'mlflow.db'}")
    return folder


def fresh_store(root: Path) -> Path:
    """Put an empty tracking database into the store ``root`` and return ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    for path in _template().glob("mlflow.db*"):
        if not path.name.endswith(".lock"):
            shutil.copyfile(path, root / path.name)
    return root


def client(root: Path):
    """Return MLflow's client over the database of the store ``root``."""
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{root / 'mlflow.db'}")


def tracked(root: Path, experiment: str = "slim") -> list:
    """Return the runs of an experiment in the order in which they began."""
    store = client(root)
    return store.search_runs(
        [store.get_experiment_by_name(experiment).experiment_id], order_by=["start_time"]
    )
