"""What is known of every metric: its names, its unit, which way is better, what measures it.

Tables, the report, charts, search, differences and protocols read it here. To add a metric, write
one more ``Metric`` into ``METRICS`` (its place is its place in tables), or :func:`register` it from
a module of one's own, and return its value under its name from the part of the evaluation that
measures it (docs/extending/metric.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

HEADLINE, DETAIL, RECORD = "headline", "detail", "record"


@dataclass(frozen=True)
class Metric:
    """A number that says something about a checkpoint.

    Attributes:
        name: its key in ``results.json`` and in MLflow.
        title: what pages and Markdown call it, without the unit.
        short: what a terminal calls it; empty: the title.
        unit: of the number as it is shown; ``"%"`` for a share of one.
        scale: factor from the number as it is kept to the one that is shown.
        digits: digits after the point.
        better: ``"low"``, ``"high"``, or None where neither is.
        part: the part of the evaluation that measures it, whose protocol it depends on: a field of
            :class:`slim.evaluation.evaluation.Evaluation` or a name in its ``extra``,
            ``"generation"`` for what is said of all answers, ``"max_length"`` for what only
            ``eval.speed.max_length`` gives; None for what the checkpoint's own files say.
        level: ``"headline"``: shown everywhere; ``"detail"``: not in a terminal; ``"record"``:
            only in ``results.json`` and MLflow.
        change: how two checkpoints differ: by a ``"percent"`` of the first, by a ``"factor"``, or
            by the ``"difference"`` of the numbers as they are shown.
        per: for a perplexity, the list of records that counts what it is per, None: tokens, of
            which every window has the same number.
    """

    name: str
    title: str
    short: str = ""
    unit: str = ""
    scale: float = 1.0
    digits: int = 0
    better: Literal["low", "high"] | None = None
    part: str | None = None
    level: str = RECORD
    change: Literal["percent", "factor", "difference"] = "percent"
    per: str | None = None

    @property
    def heading(self) -> str:
        """The title with the unit, as a column's heading."""
        if self.unit in ("", "%"):  # the cells of a share say "%" by themselves
            return self.title
        return f"{self.title} ({self.unit})"

    @property
    def label(self) -> str:
        """The short name with the unit, as a terminal shows it."""
        name = self.short or self.title
        if not self.unit:
            return name
        return f"{name} ({self.unit})"

    @property
    def is_perplexity(self) -> bool:
        """Whether it is a perplexity: such numbers differ by factors."""
        return self.name.endswith("perplexity")

    @property
    def stderr(self) -> str:
        """Name under which its standard error is kept, where one is known."""
        return f"{self.name}_stderr"

    def format(self, value: float | None) -> str:
        """Show a value; NaN stays visible and a missing one is a dash."""
        if value is None:
            return "-"
        if math.isnan(value):
            return "NaN"
        return f"{value * self.scale:,.{self.digits}f}"

    def format_change(self, value: float | None, first: float | None) -> str:
        """Show how ``value`` differs from ``first``: ``+3.1%``, ``1.25x``, ``-2.0``.

        Returns:
            An empty text where one of them is missing, NaN or infinite.
        """
        if value is None or first is None or not math.isfinite(value) or not math.isfinite(first):
            return ""
        if self.change == "difference":
            return f"{self.scale * (value - first):+,.{self.digits}f}"
        if first == 0:
            return ""
        ratio = value / first
        if self.change == "factor":
            return f"{ratio:.2f}x"
        # a ruined model's perplexity grows a millionfold, which no per cent can say
        if ratio >= 1e6:
            return f"x{ratio:.0e}"
        if ratio >= 10:
            return f"x{ratio:,.0f}"
        return f"{100 * (ratio - 1):+.1f}%"


# what every multiple-choice task gives, under TASK/NAME
ACCURACY = Metric(
    "acc", "", "", "%", 100, 1, "high", part="tasks", level=HEADLINE, change="difference"
)
ACCURACY_NORM = replace(ACCURACY, name="acc_norm", level=RECORD)
TASK_PERPLEXITY = Metric(
    "word_perplexity", "", "", "", 1, 3, "low", part="tasks", level=HEADLINE, per="words"
)
MEAN_ACCURACY = replace(ACCURACY, name="tasks/acc", title="mean accuracy", level=RECORD)

# In the order of tables. Metrics of tasks come after the perplexities: see metrics_of.
METRICS = [
    Metric("parameters", "parameters", "", "M", 1e-6, 2, level=HEADLINE),
    Metric("bytes_on_disk", "disk", "size on disk", "MB", 1e-6, 2, "low", level=HEADLINE),
    Metric("macs_per_token", "multiplications per token", "", "M", 1e-6, 2, "low"),
    Metric("perplexity", "perplexity", "", "", 1, 3, "low", "perplexity", HEADLINE),
    Metric("kl", "KL", "", "", 1, 4, "low", "kl", HEADLINE),
    Metric("kl_p99", "KL, 99 % of tokens", "", "", 1, 3, "low", "kl", DETAIL),
    Metric("kl_max", "KL, largest", "", "", 1, 3, "low", "kl", DETAIL),
    Metric(
        "same_top", "same top token", "same top", "%", 100, 1, "high", "kl", HEADLINE, "difference"
    ),
    Metric(
        "word_perplexity", "word perplexity", "", "", 1, 3, "low", "documents", HEADLINE,
        per="words",
    ),
    Metric(
        "byte_perplexity", "byte perplexity", "", "", 1, 4, "low", "documents", DETAIL, per="bytes"
    ),
    Metric("bits_per_byte", "bits per byte", "", "", 1, 4, "low", "documents"),
    MEAN_ACCURACY,
    Metric(
        "accuracy", "accuracy", "", "%", 100, 1, "high", "classification", HEADLINE, "difference"
    ),
    Metric(
        "macro_f1", "macro F1", "", "%", 100, 1, "high", "classification", HEADLINE, "difference"
    ),
    Metric(
        "calibration_error", "calibration error", "", "%", 100, 1, "low", "classification",
        HEADLINE, "difference",
    ),
    Metric("class_nll", "loss of classes", "", "", 1, 4, "low", "classification", DETAIL),
    Metric("spearman", "Spearman", "", "", 1, 3, "high", "retrieval", HEADLINE, "difference"),
    Metric(
        "recall_at_1", "recall@1", "", "%", 100, 1, "high", "retrieval", HEADLINE, "difference"
    ),
    Metric(
        "recall_at_k", "recall@k", "", "%", 100, 1, "high", "retrieval", HEADLINE, "difference"
    ),
    Metric("ndcg", "nDCG@k", "", "", 1, 3, "high", "retrieval", HEADLINE, "difference"),
    Metric(
        "similarity/mean", "similarity", "similarity of answers", "", 1, 3, "high", "answers",
        HEADLINE, "difference",
    ),
    Metric(
        "similarity/median", "median similarity", "", "", 1, 3, "high", "answers", RECORD,
        "difference",
    ),
    Metric(
        "repeated_4grams", "repeated 4-grams", "", "%", 100, 1, "low", "generation", RECORD,
        "difference",
    ),
    Metric(
        "repeating_answers", "repeating answers", "", "%", 100, 1, "low", "generation", RECORD,
        "difference",
    ),
    Metric(
        "prefill_tokens_per_second", "prefill", "reading", "tok/s", 1, 0, "high", "speed", HEADLINE,
        "factor",
    ),
    Metric(
        "decode_tokens_per_second", "decode", "writing", "tok/s", 1, 0, "high", "speed", HEADLINE,
        "factor",
    ),
    Metric(
        "whole_length_tokens_per_second", "whole length", "", "tok/s", 1, 0, "high", "max_length",
        RECORD, "factor",
    ),
    Metric(
        "texts_per_second", "texts", "encoding", "texts/s", 1, 0, "high", "encoding", HEADLINE,
        "factor",
    ),
    Metric("text_latency", "one text", "", "ms", 1000, 2, "low", "encoding", HEADLINE),
    Metric("time_to_first_token", "time to first token", "", "s", 1, 3, "low", "speed"),
    Metric(
        "energy_joules_per_token", "energy", "energy", "J/tok", 1, 3, "low", "energy", HEADLINE
    ),
    Metric(
        "energy_joules_per_token_estimate", "energy", "energy", "J/tok, estimate", 1, 3, "low",
        "energy", HEADLINE,
    ),
    Metric("weights_bytes", "weights", "", "MB", 1e-6, 2, "low", "speed", DETAIL),
    Metric("resident_bytes", "resident", "", "MB", 1e-6, 1, "low", "speed", DETAIL),
    Metric("peak_bytes", "peak", "peak memory", "MB", 1e-6, 1, "low", "speed", HEADLINE),
    Metric("prefill_peak_bytes", "prefill peak", "", "MB", 1e-6, 1, "low", "speed"),
    Metric("decode_peak_bytes", "decode peak", "", "MB", 1e-6, 1, "low", "speed"),
    Metric("cache_bytes_per_token", "cache per token", "", "MB", 1e-6, 3, "low", "speed"),
]  # fmt: skip
BY_NAME = {metric.name: metric for metric in METRICS}
# where tables show what tasks measured
AFTER_TASKS = METRICS.index(MEAN_ACCURACY)
# ends of the names of what says how sure a number is
SPREADS = ("_stderr", "_iqr")
# what a task of lm-eval may measure that is better low
LOSSES = ("perplexity", "bits_per_byte", "brier_score")


def register(metric: Metric) -> Metric:
    """Make a metric known; it comes last in tables.

    Args:
        metric: one whose name no other has, unless it is the same (a module imported twice).

    Returns:
        ``metric``.

    Raises:
        ValueError: when another metric has its name.
    """
    known = BY_NAME.setdefault(metric.name, metric)
    if known != metric:
        raise ValueError(f"there is a metric '{metric.name}' already: {known}")
    if metric not in METRICS:
        METRICS.append(metric)
    return metric


def metric_of(name: str) -> Metric:
    """Return what is known of the metric ``name``.

    Args:
        name: of a registered metric; of one that a task gives (``TASK/acc``); with the case of a
            timing after it (``decode_tokens_per_second/p128_b4``); or any other.

    Returns:
        The registered metric, or one made up for the name: what a task measures is better high,
        unless it is a loss.
    """
    if name in BY_NAME:
        return BY_NAME[name]
    first, _, last = name.rpartition("/")
    if last == "acc":
        return replace(ACCURACY, name=name, title=first)
    if last == "acc_norm":
        return replace(ACCURACY_NORM, name=name, title=f"{first} acc_norm")
    if last == "word_perplexity" and first:
        return replace(TASK_PERPLEXITY, name=name, title=f"{first} word perplexity")
    timed, _, case = name.partition("/")
    if timed in BY_NAME and case:
        timing = BY_NAME[timed]
        return replace(timing, name=name, title=f"{timing.title} {case}", level=RECORD)
    if first:
        is_loss = any(word in last for word in LOSSES)
        is_loss = is_loss and not name.endswith("_per_second")
        return Metric(name, name, digits=4, better="low" if is_loss else "high", part="tasks")
    # without a task nothing is known of it but its name
    better = "high" if name.endswith("_per_second") else "low"
    return Metric(name, name, digits=4, better=better)


def metrics_of(names: list[str], level: str = DETAIL) -> list[Metric]:
    """Return the metrics that a table shows, in its order.

    Args:
        names: of the metrics that there are values of.
        level: ``"headline"`` for those of a terminal, ``"detail"`` for those of a page.

    Returns:
        Registered metrics, those of tasks in the order of ``names`` among them.
    """
    # timings of further cases also have names that are not registered
    of_tasks: dict[Metric, None] = {}
    for name in names:
        metric = metric_of(name)
        if name not in BY_NAME and metric.part == "tasks":
            of_tasks[metric] = None  # a dictionary keeps their order
    levels = [HEADLINE]
    if level != HEADLINE:
        levels.append(DETAIL)
    ordered = METRICS[:AFTER_TASKS] + list(of_tasks) + METRICS[AFTER_TASKS:]
    return [metric for metric in ordered if metric.level in levels]


def measured_by(part: str) -> list[Metric]:
    """Return the registered metrics that a part of the evaluation gives."""
    return [metric for metric in METRICS if metric.part == part]
