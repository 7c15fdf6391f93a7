"""Pictures of pruning scores. Drawn on matplotlib's Agg canvas: no display, no global state."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from slim.core.text import counted

KEPT, REMOVED = "#4878a8", "#d1603d"
LOG_FROM = 30  # ratio of largest to smallest score from which a logarithmic axis shows more


def new_figure(width: float, height: float):
    """Return a figure of ``width`` by ``height`` inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path: Path) -> None:
    """Write a figure as PNG.

    Args:
        figure: of :func:`new_figure`.
        path: the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)  # without pyplot, which looks for a display
    figure.savefig(path, format="png", dpi=120)


def bar_scores(
    path: Path,
    scores: Sequence[float],
    removed: Collection[int],
    protected: Collection[int],
    score: str = "score",
    title: str = "",
    reference: float | None = None,
) -> None:
    """Draw one bar per block: removed ones in another colour, protected ones hatched.

    Args:
        path: the picture.
        scores: one per block.
        removed: numbers of the blocks that are removed.
        protected: numbers of those that had to stay.
        score: label of the axis.
        title: above the picture.
        reference: value of the whole model, as a dashed line; None for no line.
    """
    figure = new_figure(max(5.0, 1.5 + 0.24 * len(scores)), 3.6)
    axes = figure.subplots()
    colours = [KEPT] * len(scores)
    for block in removed:
        colours[block] = REMOVED
    bars = axes.bar(range(len(scores)), scores, color=colours, edgecolor="white")
    for block in protected:
        bars[block].set_hatch("///")
    # on a linear axis one large score would flatten all others
    if min(scores) > 0 and max(scores) > LOG_FROM * min(scores):
        axes.set_yscale("log")
    handles = legend_of_blocks(REMOVED in colours, bool(protected))
    if reference is not None:
        handles.append(
            axes.axhline(reference, color="black", linestyle="--", linewidth=1, label="whole model")
        )
    axes.set(xlabel="block", ylabel=score, title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(
        handles=handles,
        fontsize="small",
        frameon=False,
        ncols=len(handles),
        loc="lower left",
        bbox_to_anchor=(0, 1.08),
    )
    save_figure(figure, path)


def legend_of_blocks(removed: bool, protected: bool) -> list:
    """Return the legend's patches.

    Args:
        removed: whether there are removed blocks.
        protected: whether there are blocks that had to stay.
    """
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=KEPT, label="kept")]
    if removed:
        patches.append(Patch(facecolor=REMOVED, label="removed"))
    if protected:
        patches.append(Patch(facecolor=KEPT, edgecolor="white", hatch="///", label="protected"))
    return patches


def run_distances(
    path: Path,
    curve: Sequence[float],
    by_length: Sequence[Sequence[float]],
    candidates: Collection[int],
    removed: Sequence[int],
) -> None:
    """Draw angular distances: per start of a run of the wanted length, and for all runs as a heat
    map.

    Args:
        path: the picture.
        curve: distance per start.
        by_length: row n - 1 holds the distances of runs of n blocks, per start.
        candidates: starts that were allowed.
        removed: the chosen run.
    """
    figure = new_figure(11.0, 4.2)
    left, right = figure.subplots(1, 2)
    draw_run_curve(left, curve, candidates, removed)
    image = draw_heat_map(right, by_length, removed)
    figure.colorbar(image, ax=right, label="angular distance / π")
    save_figure(figure, path)


def draw_run_curve(
    axes, curve: Sequence[float], candidates: Collection[int], removed: Sequence[int]
) -> None:
    """Draw the distance over the start of the run; starts that were not allowed are hollow.

    Args:
        axes: of matplotlib.
        curve: distance per start.
        candidates: starts that were allowed.
        removed: the chosen run.
    """
    allowed = []
    barred = []
    for start in range(len(curve)):
        if start in candidates:
            allowed.append(start)
        else:
            barred.append(start)
    axes.plot(range(len(curve)), curve, color=KEPT, linewidth=1)
    axes.plot(allowed, [curve[start] for start in allowed], "o", color=KEPT, label="possible run")
    if barred:
        axes.plot(
            barred,
            [curve[start] for start in barred],
            "o",
            color=KEPT,
            markerfacecolor="white",
            label="protected",
        )
    axes.plot(
        removed[0],
        curve[removed[0]],
        "o",
        color=REMOVED,
        markersize=9,
        label="removed: " + " to ".join(dict.fromkeys((str(removed[0]), str(removed[-1])))),
    )
    axes.set(
        xlabel="first block of the run",
        ylabel="angular distance / π",
        title=f"{counted(len(removed), 'block')} in a run",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small", frameon=False)


def draw_heat_map(axes, by_length: Sequence[Sequence[float]], removed: Sequence[int]):
    """Draw distances over (start, run length) and return the image; the chosen run is marked.

    Args:
        axes: of matplotlib.
        by_length: row n - 1 holds the distances of runs of n blocks, per start.
        removed: the chosen run.
    """
    depth = len(by_length)
    grid = []
    for row in by_length:  # the longer the run, the fewer starts it has: NaN stays white
        grid.append(list(row) + [float("nan")] * (depth - len(row)))
    image = axes.imshow(
        grid,
        origin="lower",
        aspect="auto",
        cmap="viridis",
        extent=(-0.5, depth - 0.5, 0.5, depth + 0.5),
    )
    axes.plot(removed[0], len(removed), "s", color=REMOVED, markersize=9)
    axes.set(xlabel="first block of the run", ylabel="blocks in the run", title="all runs")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return image
