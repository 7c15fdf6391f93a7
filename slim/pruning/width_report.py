"""What width pruning leaves for people: the scores and units kept as a table, and pictures of
them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from slim.core.figures import KEPT, REMOVED, new_figure, save_figure
from slim.models.spec import ModelSpec
from slim.pruning.width_sizes import width_of

if TYPE_CHECKING:
    from slim.pruning.width_method import KeptUnits
    from slim.pruning.width_scores import UnitScores


def write_report(
    folder: Path,
    criterion: str,
    before: ModelSpec,
    after: ModelSpec,
    kept: Mapping[int, KeptUnits],
    scores: Mapping[int, UnitScores],
    account: dict,
) -> None:
    """Write ``width_scores.json``, ``width_kept.png`` and ``head_scores.png``.

    Args:
        folder: is made where it is missing.
        criterion: name of the criterion.
        before: the model before pruning.
        after: the model after it.
        kept: block -> units that stay.
        scores: block -> scores of its units.
        account: sizes and multiply-accumulates before and after.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks = {}
    for block, units in sorted(kept.items()):
        blocks[str(block)] = {
            "groups_kept": units.groups,
            "channels_kept": units.channels,
            "group_scores": scores[block].groups.tolist(),
            "channel_scores": scores[block].channels.tolist(),
        }
    content = {"criterion": criterion, **account, "blocks": blocks}
    (folder / "width_scores.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    plot_kept(folder / "width_kept.png", before, after, criterion)
    plot_heads(folder / "head_scores.png", kept, scores, criterion)


def plot_kept(path: Path, before: ModelSpec, after: ModelSpec, title: str) -> None:
    """Draw query heads and MLP channels of every block, the removed ones on top in another colour.

    Args:
        path: of the picture.
        before: the model before pruning.
        after: the model after it.
        title: above the picture.
    """
    figure = new_figure(max(6.0, 2 + 0.24 * before.blocks), 4.6)
    upper, axes = figure.subplots(2, 1, sharex=True)
    _draw_counts(upper, before, after, "heads", "query heads")
    _draw_counts(axes, before, after, "channels", "MLP channels")
    axes.set(xlabel="block")
    axes.xaxis.get_major_locator().set_params(integer=True)
    share = after.parameters() / before.parameters()
    figure.suptitle(f"{title}: {share:.1%} of the parameters kept", fontsize="medium")
    axes.legend(
        fontsize="small", frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, -0.45)
    )
    save_figure(figure, path)


def _draw_counts(axes, before: ModelSpec, after: ModelSpec, name: str, label: str) -> None:
    """Draw how many units of every block stay, and on top how many go."""
    blocks = range(before.blocks)
    kept = [getattr(width_of(after, block), name) for block in blocks]
    removed = []
    for block in blocks:
        removed.append(getattr(width_of(before, block), name) - kept[block])
    axes.bar(blocks, kept, color=KEPT, label="kept")
    axes.bar(blocks, removed, bottom=kept, color=REMOVED, label="removed")
    axes.set(ylabel=label)


def plot_heads(
    path: Path, kept: Mapping[int, KeptUnits], scores: Mapping[int, UnitScores], title: str
) -> None:
    """Draw the share of every key/value group in its block's score as a map; removed groups are
    crossed out.

    Args:
        path: of the picture.
        kept: block -> units that stay.
        scores: block -> scores of its units.
        title: above the picture.
    """
    blocks = sorted(kept)
    widest = max(len(scores[block].groups) for block in blocks)
    grid = [[float("nan")] * len(blocks) for _ in range(widest)]
    figure = new_figure(max(5.0, 2 + 0.3 * len(blocks)), max(2.6, 1.2 + 0.25 * widest))
    axes = figure.subplots()
    for column, block in enumerate(blocks):
        shares = scores[block].groups.double()
        if shares.sum() > 0:
            shares = shares / shares.sum()
        for group, value in enumerate(shares.tolist()):
            grid[group][column] = value
            if group not in kept[block].groups:
                axes.plot(column, group, "x", color=REMOVED, markersize=9, markeredgewidth=2.5)
    image = axes.imshow(grid, origin="lower", aspect="auto", cmap="viridis")
    axes.set(
        xlabel="block",
        ylabel="key/value group",
        title=f"{title}: share of the block's score (× removed)",
    )
    axes.set_xticks(range(len(blocks)), blocks)
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes)
    save_figure(figure, path)
