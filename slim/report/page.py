"""The report as one HTML page that needs nothing else: plotly, styles and data are inside, and it
asks no network."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

from slim.report.published import MARK
from slim.report.sections import Sections

ASSETS = Path(__file__).parent.parent / "assets" / "report"


def page(report: Sections) -> str:
    """Return the page. All that comes from runs is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # everything is escaped unless the template says "safe"; a missing name is an error
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    options = {}
    for picture in report.pictures:
        options[picture["id"]] = picture["options"]
    return environment.get_template("report.html").render(
        report=report,
        sections=sections(report),
        mark=MARK,
        style=(ASSETS / "report.css").read_text(encoding="utf-8"),
        script=(ASSETS / "report.js").read_text(encoding="utf-8"),
        # several megabytes that a page without pictures is better off without
        plotly=plotly_script() if report.pictures else "",
        pictures=embedded(options),
    )


def sections(report: Sections) -> list[tuple[str, str]]:
    """Return (anchor, heading) of the sections the page has."""
    possible = [
        ("best", "The best model for your memory", report.best),
        ("models", "All models", report.models),
    ]
    for picture in report.pictures:
        possible.append((picture["id"], picture["title"], picture))
    possible += [
        ("classes", "Classes", report.classes),
        ("answers", "Answers side by side", report.answers),
        ("published", "Published figures", report.published),
        ("failures", "Runs without results", report.failures),
        ("settings", "Settings", report.settings),
    ]
    listed = []
    for anchor, heading, content in possible:
        if content:
            listed.append((anchor, heading))
    return listed


@cache
def plotly_script() -> str:
    """Return plotly's script, for use inside ``<script>``."""
    from plotly.offline import get_plotlyjs

    # the first "</script" ends the element, even within a string of the script
    return get_plotlyjs().replace("</script", "<\\/script")


def embedded(value: Any) -> str:
    """Return JSON that is safe inside ``<script>``: no ``<``, and null for what JSON has no number
    for."""
    text = json.dumps(finite(value), allow_nan=False)
    # these characters occur only inside JSON's strings, where an escape means the same
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def finite(value: Any) -> Any:
    """Replace NaN and infinity by None, at any depth."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
