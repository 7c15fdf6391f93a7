"""The loss curves of a training, as data and as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from slim.checkpoint import REPORT
from slim.plots import KEPT, REMOVED, new_figure, save_figure
from slim.training.fit import Outcome


def write_curves(outcome: Outcome, target: Path) -> None:
    """Write ``loss.json`` and ``loss.png`` with training and validation loss by step."""
    folder = target / REPORT
    folder.mkdir(exist_ok=True)
    validation = [{"step": step, "loss": loss} for step, loss in outcome.validation.items()]
    curves = {"train": outcome.train, "validation": validation, "best_step": outcome.best_step}
    (folder / "loss.json").write_text(json.dumps(curves, indent=2) + "\n", encoding="utf-8")
    _draw(curves, folder / "loss.png")


def _draw(curves: dict, path: Path) -> None:
    figure = new_figure(7.0, 4.0)
    axes = figure.subplots()
    for name, style, colour in (("train", "-", KEPT), ("validation", "o-", REMOVED)):
        steps, losses = ([point[key] for point in curves[name]] for key in ("step", "loss"))
        axes.plot(steps, losses, style, color=colour, label=name)
    axes.axvline(curves["best_step"], linestyle=":", color="grey", label="best, kept")
    axes.set(xlabel="step", ylabel="loss per token (nats)")
    axes.legend(fontsize="small", frameon=False)
    save_figure(figure, path)
