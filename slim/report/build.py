"""From runs to a report: ``build_report`` is all that the end of a sweep and ``python -m
slim.report`` need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Report:
    """One self-contained HTML page, and the same tables as Markdown."""

    html: str
    markdown: str


def build_report(client: MlflowClient, run_ids: list[str], title: str | None = None) -> Report:
    """Report on runs.

    Args:
        client: of the store or server that holds them; nothing else is read.
        run_ids: of runs and sweeps; a sweep's run stands for its points.
        title: of the page; None: what was typed.
    """
    from slim.report.markdown import markdown
    from slim.report.page import page
    from slim.report.runs import collect
    from slim.report.sections import sections

    report = sections(collect(client, run_ids, title))
    return Report(page(report), markdown(report))
