"""The registry of metrics: what tables, report, search and differences read."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import cache

import pytest
from omegaconf import OmegaConf

from slim.chain.compose import CONF
from slim.evaluation.evaluation import Evaluation
from slim.evaluation.metrics import BY_NAME, DETAIL, HEADLINE, METRICS, metric_of, metrics_of

# parts that are no field of an evaluation: said of all answers, given by one setting of speed, the
# speed of encoders
DERIVED = {"generation", "max_length", "encoding"}


def test_every_metric_has_a_name_of_its_own():
    assert len(BY_NAME) == len(METRICS)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_names_a_part_of_the_evaluation(metric):
    parts = {field.name for field in fields(Evaluation)} | DERIVED | set(extra_parts())
    assert metric.part is None or metric.part in parts


@cache
def extra_parts() -> list[str]:
    """Return the names below ``extra`` of the choices of the group ``eval``."""
    names: list[str] = []
    for path in (CONF / "eval").glob("*.yaml"):
        names += OmegaConf.load(path).get("extra") or []
    return names


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_label_for_a_terminal_is_short(metric):
    assert metric.level != HEADLINE or len(metric.label) <= 24


def test_a_task_has_metrics_of_its_own():
    metric = metric_of("tiny_facts/acc")
    assert (metric.name, metric.heading, metric.better) == ("tiny_facts/acc", "tiny_facts", "high")


def test_a_case_of_a_timing_is_shown_as_the_timing():
    timed = metric_of("decode_tokens_per_second/p512_b4")
    assert (timed.unit, timed.better, timed.part) == ("tok/s", "high", "speed")


@pytest.mark.parametrize(
    ("name", "better"),
    [("one/brier_score", "low"), ("one/f1", "high"), ("steps_per_second", "high"), ("x", "low")],
)
def test_an_unknown_metric_is_better_low_unless_a_task_gives_it(name, better):
    assert metric_of(name).better == better


def test_metrics_of_tasks_come_after_perplexities_and_before_speed():
    names = ["decode_tokens_per_second", "one/acc", "perplexity", "one/acc_norm", "two/acc"]
    shown = [metric.name for metric in metrics_of(names) if metric.name in names]
    assert shown == ["perplexity", "one/acc", "two/acc", "decode_tokens_per_second"]


def test_a_terminal_shows_fewer_metrics_than_a_page():
    assert set(metrics_of([], HEADLINE)) < set(metrics_of([], DETAIL))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("perplexity", 2.28349, "2.283"),
        ("perplexity", math.nan, "NaN"),
        ("bytes_on_disk", None, "-"),
        ("bytes_on_disk", 3_940_000, "3.94"),
        ("one/acc", 0.975, "97.5"),
        ("decode_tokens_per_second", 14705.4, "14,705"),
    ],
)
def test_a_value_is_shown_in_its_unit(name, value, text):
    assert metric_of(name).format(value) == text


@pytest.mark.parametrize(
    ("name", "value", "first", "text"),
    [
        ("perplexity", 3.0, 2.0, "+50.0%"),
        ("perplexity", 40.0, 2.0, "x20"),
        ("perplexity", 2e20, 2.0, "x1e+20"),
        ("perplexity", math.inf, 2.0, ""),
        ("perplexity", 3.0, None, ""),
        ("one/acc", 0.9, 0.975, "-7.5"),
        ("decode_tokens_per_second", 150.0, 100.0, "1.50x"),
        ("bytes_on_disk", 0.36, 1.0, "-64.0%"),
        ("bytes_on_disk", 1.0, 0.0, ""),
    ],
)
def test_a_change_is_shown_the_way_its_metric_changes(name, value, first, text):
    assert metric_of(name).format_change(value, first) == text
