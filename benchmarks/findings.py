"""The tables and the picture of docs/findings.md, from the runs of ``experiment=smollm2/...``.

    python benchmarks/findings.py --store runs --picture docs/images/findings.png

Prints Markdown. Only the tracking store is read, so it can be run again at any time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from slim.report.find import connect, find
from slim.report.points import Point, points_of
from slim.report.runs import Row, collect

CHAINS = {
    (): "source",
    ("Taylor",): "6 of 30 blocks removed",
    ("Taylor", "Lora"): "removed, LoRA",
    ("Taylor", "Distill"): "removed, KD",
}
QUANTIZED = {
    None: "-",
    ("AWQ", 4): "AWQ 4",
    ("GPTQ", 4): "GPTQ 4",
    ("GPTQ", 3): "GPTQ 3",
    ("GPTQ", 2): "GPTQ 2",
}
COLUMNS = {
    "MB": ("bytes_on_disk", 1e-6, 1),
    "perplexity": ("perplexity", 1, 2),
    "KL": ("kl", 1, 3),
    "same top token (%)": ("same_top", 100, 1),
    "ARC (%)": ("arc_challenge/acc", 100, 1),
    "reading (tok/s)": ("prefill_tokens_per_second", 1, 0),
    "writing (tok/s)": ("decode_tokens_per_second", 1, 1),
}


def method(row: Row) -> str:
    """Return the method of a step; distillation is told from tuning by the stage's kind."""
    return "Distill" if row.kind == "distill" else row.method


def steps(point: Point) -> list[Row]:
    """Return the steps after the source that change it."""
    return [row for row in point.chain if row.method and row.kind not in ("import", "source")]


def is_fitted(row: Row) -> bool:
    """Whether what is left was fitted anew: only then is the ridge of that part of the result."""
    return row.kind == "prune" and "damping" in row.settings


def place(point: Point) -> tuple | None:
    """Return (chain, quantizer) of a point in the main table; None where it belongs elsewhere."""
    rows = steps(point)
    quantizer = None
    if rows and rows[-1].kind == "quantize":
        last = rows.pop()
        quantizer = (last.method, last.settings.get("bits"))
    if any(is_fitted(row) for row in rows):
        return None
    chain = tuple(method(row) for row in rows)
    if chain not in CHAINS or quantizer not in QUANTIZED:
        return None
    return chain, quantizer


def cells(metrics: dict[str, float]) -> list[str]:
    """Return the figures of a row as text, a dash where one was not measured."""
    texts = []
    for name, scale, digits in COLUMNS.values():
        value = metrics.get(name)
        texts.append("-" if value is None else f"{value * scale:.{digits}f}")
    return texts


def main_table(points: list[Point]) -> list[str]:
    """Return the lines of the table of chains and quantizers."""
    found = {place(point): point for point in points}
    lines = [
        f"| chain | quantised | {' | '.join(COLUMNS)} |",
        f"| --- | --- |{' ---: |' * len(COLUMNS)}",
    ]
    for chain, name in CHAINS.items():
        for quantizer, title in QUANTIZED.items():
            point = found.get((chain, quantizer))
            if point is not None:
                lines.append(f"| {name} | {title} | {' | '.join(cells(point.row.metrics))} |")
    return lines


def other_rows(points: list[Point]) -> list[str]:
    """Return a line for every point that the main table leaves out."""
    lines = []
    for point in points:
        if place(point) is None:
            name = point.name.removeprefix("smollm2 → ")
            if any(is_fitted(row) for row in steps(point)):
                name += ", fitted"
            size = point.row.metrics.get("parameters", 0) / 1e6
            lines.append(f"| {name} | {size:.2f} | {' | '.join(cells(point.row.metrics))} |")
    return lines


def picture(points: list[Point], path: Path) -> None:
    """Draw KL and perplexity against bytes, a line per chain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, metric, title in (
        (axes[0], "kl", "KL to the source (nats per token)"),
        (axes[1], "perplexity", "perplexity, WikiText-2"),
    ):
        for chain, name in CHAINS.items():
            line = []
            for point in points:
                where = place(point)
                # AWQ stands next to GPTQ at 4 bits and would bend the line
                if where is None or where[0] != chain or where[1] == ("AWQ", 4):
                    continue
                metrics = point.row.metrics
                line.append((metrics["bytes_on_disk"] * 1e-6, metrics[metric]))
            line.sort()
            axis.plot(*zip(*line, strict=True), marker="o", label=name)
        axis.set_xlabel("weights on disk (MB)")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the tables and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="runs", help="as in store=FOLDER")
    parser.add_argument("--picture", type=Path, help="where to draw it; without: not drawn")
    options = parser.parse_args()
    client = connect("smollm2", options.store, None)
    run_ids, _ = find(client, "smollm2")
    points = points_of(collect(client, run_ids).chains)
    print("\n".join(main_table(points)), end="\n\n")
    print("\n".join(other_rows(points)))
    if options.picture:
        picture(points, options.picture)


if __name__ == "__main__":
    main()
