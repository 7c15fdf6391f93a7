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
    from slim.pruning.width_scores import UnitScores
    from slim.pruning.width_visitor import Kept


def write_report(
    folder: Path, criterion: str, before: ModelSpec, after: ModelSpec, kept: Mapping[int, Kept],
    scores: Mapping[int, UnitScores], account: dict,
) -> None:  # fmt: skip
    """Write ``width_scores.json``, ``width_kept.png`` and ``head_scores.png`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks = {
        str(block): {
            "groups_kept": found.groups,
            "channels_kept": found.channels,
            "group_scores": scores[block].groups.tolist(),
            "channel_scores": scores[block].channels.tolist(),
        }
        for block, found in sorted(kept.items())
    }
    content = {"criterion": criterion, **account, "blocks": blocks}
    (folder / "width_scores.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    plot_kept(folder / "width_kept.png", before, after, criterion)
    plot_heads(folder / "head_scores.png", kept, scores, criterion)


def plot_kept(path: Path, before: ModelSpec, after: ModelSpec, title: str) -> None:
    """Draw query heads and MLP channels of every block, what went on top in another colour."""
    figure = new_figure(max(6.0, 2 + 0.24 * before.blocks), 4.6)
    blocks = range(before.blocks)
    for axes, name, label in zip(
        figure.subplots(2, 1, sharex=True),
        ("heads", "channels"),
        ("query heads", "MLP channels"),
        strict=True,
    ):
        left = [getattr(width_of(after, block), name) for block in blocks]
        gone = [
            getattr(width_of(before, block), name) - count
            for block, count in zip(blocks, left, strict=True)
        ]
        axes.bar(blocks, left, color=KEPT, label="kept")
        axes.bar(blocks, gone, bottom=left, color=REMOVED, label="removed")
        axes.set(ylabel=label)
    axes.set(xlabel="block")
    axes.xaxis.get_major_locator().set_params(integer=True)
    share = after.parameters() / before.parameters()
    figure.suptitle(f"{title}: {share:.1%} of the parameters kept", fontsize="medium")
    axes.legend(
        fontsize="small", frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, -0.45)
    )
    save_figure(figure, path)


def plot_heads(
    path: Path, kept: Mapping[int, Kept], scores: Mapping[int, UnitScores], title: str
) -> None:
    """Draw the share of every key/value group in its block's score as a map; removed groups are
    crossed out."""
    blocks = sorted(kept)
    widest = max(len(scores[block].groups) for block in blocks)
    grid = [[float("nan")] * len(blocks) for _ in range(widest)]
    figure = new_figure(max(5.0, 2 + 0.3 * len(blocks)), max(2.6, 1.2 + 0.25 * widest))
    axes = figure.subplots()
    for column, block in enumerate(blocks):
        values = scores[block].groups.double()
        share = (values / values.sum()).tolist() if values.sum() > 0 else values.tolist()
        for group, value in enumerate(share):
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
