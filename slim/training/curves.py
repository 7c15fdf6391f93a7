"""The curves of a training, as data and as a picture: losses, learning rate, speed."""

from __future__ import annotations

import json
from pathlib import Path

from slim.checkpoints.checkpoint import REPORT
from slim.core.figures import KEPT, REMOVED, new_figure, save_figure
from slim.training.callbacks import Outcome


def write_curves(outcome: Outcome, target: Path) -> None:
    """Write ``loss.json`` and ``loss.png``: training and validation loss, learning rate and tokens
    per second by step.

    Args:
        outcome: What the training gave.
        target: Folder of the result; they go to its report.
    """
    folder = target / REPORT
    folder.mkdir(exist_ok=True)
    validation = [{"step": step, "loss": loss} for step, loss in outcome.validation.items()]
    curves = {"train": outcome.train, "validation": validation, "best_step": outcome.best_step}
    (folder / "loss.json").write_text(json.dumps(curves, indent=2) + "\n", encoding="utf-8")
    _draw(curves, folder / "loss.png")


def _draw(curves: dict, path: Path) -> None:
    figure = new_figure(7.0, 7.5)
    losses, rate, speed = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    losses.plot(*_points(curves["train"], "loss"), "-", color=KEPT, label="train")
    losses.plot(*_points(curves["validation"], "loss"), "o-", color=REMOVED, label="validation")
    losses.axvline(curves["best_step"], linestyle=":", color="grey", label="best, kept")
    losses.set(ylabel="loss per token (nats)")
    losses.legend(fontsize="small", frameon=False)
    rate.plot(*_points(curves["train"], "learning_rate"), color=KEPT)
    rate.set(ylabel="learning rate", ylim=(0, None))
    speed.plot(*_points(curves["train"], "tokens_per_second"), color=KEPT)
    speed.set(xlabel="step", ylabel="tokens per second", ylim=(0, None))
    save_figure(figure, path)


def _points(records: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Return the steps and the values of one curve."""
    steps = [record["step"] for record in records]
    return steps, [record[name] for record in records]
