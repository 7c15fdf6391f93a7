"""The report: what it compares, what the page tells plotly, what it keeps apart, and that nothing
of it misleads."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slim.report.markdown import markdown
from slim.report.page import page
from slim.report.pareto import front
from slim.report.points import points_of
from slim.report.published import facts
from slim.report.runs import Collection, Failure
from slim.report.sections import sections
from slim.report.table import record as result_record
from tests.support.reporting import chain, grid, quantized, record, source

PRESSURE = "<script>alert('x')</script>|`&"


class Reader(HTMLParser):
    """Collects script elements, the cells of every table by its id, and addresses that a browser
    would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.scripts, self.tables, self.addresses = [], {}, []
        self._table, self._inside, self._kind = None, None, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "script":
            self.scripts.append([attributes.get("id"), ""])
        if tag == "table":
            self._table = self.tables.setdefault(
                attributes.get("id", f"table{len(self.tables)}"), []
            )
        if tag == "tr":
            self._table.append([])
        if tag in ("td", "th"):
            self._table[-1].append("")
        self._inside = {"script": "script", "td": "cell", "th": "cell", "button": self._inside}.get(
            tag
        )

    def handle_endtag(self, tag):
        if tag in ("script", "td", "th"):
            self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1][1] += data
        elif self._inside == "cell":
            self._table[-1][-1] += data.strip()


def refuse(constant: str):
    raise AssertionError(f"{constant} is no JSON")


def read(collection: Collection) -> tuple[Reader, dict]:
    """The page as a browser reads it, and the pictures' data as plotly gets them."""
    reader = Reader(page(sections(collection)))
    data = next(text for name, text in reader.scripts if name == "pictures")
    return reader, json.loads(data, parse_constant=refuse)


@pytest.fixture(scope="module")
def swept() -> tuple[Reader, dict, str]:
    failures = [
        Failure(
            "p6",
            "quantizer.bits=2 quantizer.group_size=128",
            "FAILED",
            f"group too large {PRESSURE}",
        ),
        Failure("p7", "quantizer.bits=8", "FAILED", "the plan foresees 9 GB", skipped=True),
    ]
    collection = Collection("A sweep", grid(), failures, published=["4.2", "4.13", "9.9"])
    return *read(collection), markdown(sections(collection))


# The front


def dominates(one: tuple, other: tuple) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_front_is_what_nothing_dominates(points):
    slow = [
        index
        for index, point in enumerate(points)
        if not any(dominates(other, point) for other in points)
    ]
    found = front(points)
    assert sorted(found) == slow
    assert [points[index][0] for index in found] == sorted(points[index][0] for index in found)


@pytest.mark.parametrize(
    ("picture", "metric", "sign"),
    [("pareto-size", "bytes_on_disk", 1), ("pareto-speed", "decode_tokens_per_second", -1)],
)
def test_the_page_draws_the_front_of_the_recorded_figures(swept, picture, metric, sign):
    rows = {row.digest: row for one in grid() for row in one.rows if metric in row.metrics}
    scale = 1e-6 if metric == "bytes_on_disk" else 1
    figures = [
        (sign * row.metrics[metric] * scale, row.metrics["perplexity"]) for row in rows.values()
    ]
    best = {point for point in figures if not any(dominates(other, point) for other in figures)}
    option = next(option for option in swept[1][picture] if option["label"] == "perplexity")
    drawn = {
        trace["name"]: {(sign * x, y) for x, y in zip(trace["x"], trace["y"], strict=True)}
        for trace in option["data"]
    }
    close = lambda points: sorted((round(x, 6), round(y, 6)) for x, y in points)  # noqa: E731
    assert close(drawn["on the front"]) == close(best)
    assert close(drawn.get("not on the front", set())) == close(set(figures) - best)
    # up is better, also for a perplexity
    assert option["layout"]["yaxis"]["autorange"] == "reversed"


def test_accuracy_is_better_upwards_and_errors_are_drawn(swept):
    option = next(option for option in swept[1]["pareto-size"] if option["label"] == "one")
    assert "autorange" not in option["layout"]["yaxis"]
    front_trace = next(trace for trace in option["data"] if trace["name"] == "on the front")
    assert front_trace["error_y"]["array"] == [pytest.approx(2.0)] * len(front_trace["x"])
    assert max(front_trace["y"]) == pytest.approx(90.0)


def test_the_headline_is_the_front_with_the_loss_against_the_source(swept):
    rows = swept[0].tables["best-table"][1:]
    sizes = [float(row[1]) for row in rows]
    perplexities = [float(row[3]) for row in rows]
    assert sizes == sorted(sizes) and perplexities == sorted(perplexities, reverse=True)
    assert rows[-1][2] == "base" and rows[-1][4] == "-" and rows[-1][5] == "100 %"
    first = next(row for row in rows if "bits 4, group_size 128" in row[2])
    assert first[4] == f"{100 * ((5 + 0.5 + 0.128) / 5 - 1):+.1f} %"
    assert first[5] == f"{100 * 4.05 / 8:.0f} %"


# The tables


def test_every_checkpoint_is_listed_once_with_its_chain(swept):
    header, *rows = swept[0].tables["models-table"]
    names = [row[0] for row in rows]
    assert (
        names[0] == "base"
        and names[1] == "base → taylor blocks 1"
        and len(names) == len(set(names)) == 7
    )
    assert "base → taylor blocks 1 → gptq bits 3, group_size 128" in names
    assert [row[1] for row in rows].count("step on the way") == 1
    assert rows[0][header.index("one")] == "90.0 ± 2.0" and rows[1][header.index("one")] == "-"


def test_failures_are_listed_and_drawn_nowhere(swept):
    rows = swept[0].tables["failures-table"][1:]
    assert [row[1] for row in rows] == ["failed", "ruled out by the plan"] and PRESSURE in rows[0][
        2
    ]
    drawn = [len(trace["x"]) for trace in swept[1]["pareto-size"][0]["data"]]
    assert sum(drawn) == 7


def test_markdown_has_the_same_tables(swept):
    reader, _, text = swept
    for row in reader.tables["models-table"][1:]:
        assert "| " + " | ".join(row) + " |" in text
    assert "<script" not in text and "(published, other hardware)" in text


# The other pictures


def test_the_heat_map_holds_the_grid_and_leaves_the_missing_cell_empty(swept):
    option = swept[1]["heat"][0]
    (trace,) = option["data"]
    assert trace["x"] == ["2", "3", "4"] and trace["y"] == ["64", "128"]
    expected = [[5 + 8 / bits**2 + group / 1000 for bits in (2, 3, 4)] for group in (64, 128)]
    assert trace["z"][0] == pytest.approx(expected[0])
    assert (
        trace["z"][1][0] is None
        and trace["text"][1][0] == ""
        and trace["z"][1][1:] == pytest.approx(expected[1][1:])
    )
    assert "1 of 6 cells are empty" in option["sentence"] and trace["reversescale"] is True


def test_runs_that_differ_in_more_than_two_settings_share_no_heat_map():
    chains = [
        chain(
            source(),
            quantized(
                number, {"bits": bits, "group_size": group, "format": form}, perplexity=5.0 + number
            ),
        )
        for number, (bits, group, form) in enumerate(
            [(b, g, f) for b in (2, 3) for g in (64, 128) for f in ("awq", "gptq")], 1
        )
    ]
    _, pictures = read(Collection("t", chains))
    assert len(pictures["heat"]) == 2
    shown = [
        sorted(z for line in option["data"][0]["z"] for z in line) for option in pictures["heat"]
    ]
    assert sorted(shown) == [[6.0, 8.0, 10.0, 12.0], [7.0, 9.0, 11.0, 13.0]]


def test_steps_and_losses_show_what_was_recorded():
    curves = [
        ["train_loss", 1.5, 1],
        ["validation_loss", 1.2, 0],
        ["validation_loss", 0.9, 10],
        ["learning_rate", 0.1, 1],
    ]
    tuned = record(
        "tune lora",
        "b" * 16,
        "tune",
        {"r": 8},
        size=7e6,
        perplexity=5.2,
        tasks={"one": 0.85},
        curves=curves,
    )
    _, pictures = read(Collection("t", [chain(source(), tuned)]))
    (option,) = pictures["losses"]
    assert {trace["name"]: (trace["x"], trace["y"]) for trace in option["data"]} == {
        "training": ([1], [1.5]), "validation": ([0, 10], [1.2, 0.9])
    }  # fmt: skip
    assert "1.200 before" in option["sentence"] and "0.900, at step 10" in option["sentence"]
    lines = {trace["name"]: trace["y"] for trace in pictures["steps"][0]["data"]}
    assert lines == {"perplexity": [5.0, 5.2], "one": [pytest.approx(90), pytest.approx(85)]}


def test_bars_hold_every_final_model_and_its_errors(swept):
    traces = swept[1]["tasks"][0]["data"]
    assert len(traces) == 6  # the source and five results; no step on the way
    last = next(trace for trace in traces if trace["name"].endswith("bits 2, group_size 64"))
    assert dict(zip(last["x"], last["y"], strict=True)) == {
        "one": pytest.approx(70),
        "two": pytest.approx(30),
    }
    assert last["error_y"]["array"] == [pytest.approx(2), pytest.approx(2)]


def test_plotly_accepts_every_picture(swept):
    from plotly import graph_objects

    for options in swept[1].values():
        for option in options:
            # raises for what plotly does not know
            graph_objects.Figure(option["data"], option["layout"])


# What must not mislead


def test_unequal_protocols_are_kept_apart_and_said():
    chains = [
        chain(source(window=256), quantized(1, {"bits": 3}, perplexity=6.0, window=256)),
        chain(source(window=64), quantized(2, {"bits": 2}, perplexity=40.0, window=64), run_id="s"),
    ]
    reader, pictures = read(Collection("t", chains))
    labels = [
        option["label"]
        for option in pictures["pareto-size"]
        if option["label"].startswith("perplexity")
    ]
    assert sorted(labels) == ["perplexity, window 256", "perplexity, window 64"]
    for option in pictures["pareto-size"][:2]:
        drawn = [y for trace in option["data"] for y in trace["y"]]
        assert not (6.0 in drawn and 40.0 in drawn)
    header, *rows = reader.tables["models-table"]
    columns = [index for index, heading in enumerate(header) if heading.startswith("perplexity")]
    assert len(columns) == 2 and all(
        sum(row[index] != "-" for index in columns) == 1 for row in rows
    )
    assert "not all measured by the same protocol" in sections(Collection("t", chains)).notes[0]


def test_nan_stays_visible_and_is_drawn_nowhere():
    chains = [
        chain(source(), quantized(1, {"bits": 2}, perplexity=math.nan)),
        chain(source(), quantized(2, {"bits": 3}, perplexity=6.0)),
    ]
    reader, pictures = read(Collection("t", chains))  # read() refuses NaN in the JSON
    header, *rows = reader.tables["models-table"]
    broken = next(row for row in rows if "bits 2" in row[0])
    assert broken[header.index("perplexity")] == "NaN"
    option = pictures["pareto-size"][0]
    assert sorted(y for trace in option["data"] for y in trace["y"]) == [5.0, 6.0]
    assert "1 without both figures" in option["sentence"]
    assert all("bits 2" not in row[2] for row in reader.tables["best-table"])


def test_published_figures_are_marked_and_in_no_picture_or_table_of_ours(swept):
    reader, pictures, _ = swept
    text = page(sections(Collection("t", grid(), published=["4.2"])))
    published = [row for row in facts()["rows"] if row["table"] == "4.2"]
    assert published and "published, other hardware" in text
    rows = next(
        table for name, table in reader.tables.items() if any("awq4 g128" in row for row in table)
    )
    assert [row[:2] for row in rows[1:]] == [[row["model"], row["method"]] for row in published]
    assert rows[1][2] == f"{100 * published[0]['metrics']['winogrande/acc']:.1f}"
    assert "Mistral" not in json.dumps(pictures)
    assert not any("Mistral" in cell for row in reader.tables["models-table"] for cell in row)
    # what is known to be wrong with its reference rows
    assert "adapters had not been applied" in text


def test_unknown_published_tables_are_said():
    assert any("9.9" in note for note in sections(Collection("t", grid(), published=["9.9"])).notes)


def test_what_comes_from_runs_is_text_and_no_code():
    base = source() | {
        "checkpoint": PRESSURE,
        "samples": [{"prompt": PRESSURE, "answer": PRESSURE}],
    }
    last = quantized(
        1,
        {"bits": 3, "path": PRESSURE},
        perplexity=6.0,
        samples=[{"prompt": PRESSURE, "answer": PRESSURE}],
    )
    curves = record(
        f"tune {PRESSURE}",
        "c" * 16,
        "tune",
        {"r": PRESSURE},
        perplexity=5.0,
        curves=[["train_loss", 1.0, 1]],
    )
    collection = Collection(PRESSURE, [chain(base, curves, last, typed=PRESSURE)], notes=[PRESSURE])
    reader, pictures = read(collection)
    assert [name for name, _ in reader.scripts] == ["pictures", None, None]
    assert PRESSURE in reader.tables["models-table"][1][0]
    texts = [text for trace in pictures["pareto-size"][0]["data"] for text in trace["hovertext"]]
    assert texts and not any("<script" in text for text in texts)  # plotly reads these as HTML
    assert "<script" not in markdown(sections(collection))


def test_the_page_asks_for_nothing_outside_itself(swept):
    assert all(address.startswith(("#", "data:")) for address in swept[0].addresses)


def test_a_report_over_nothing_says_so():
    reader, pictures = read(
        Collection("Nothing", failures=[Failure("a", "b=1", "KILLED", "interrupted")])
    )
    assert pictures == {} and reader.tables["failures-table"][1] == ["b=1", "killed", "interrupted"]
    assert "models-table" not in reader.tables


# results.json


def test_a_record_holds_the_stage_and_the_errors_of_perplexities():
    nll, words = [1.0, 1.4, 0.7, 1.3], [10, 20, 15, 5]
    manifest = {
        "hash": "h1",
        "kind": "prune",
        "method": "Taylor",
        "settings": {"blocks": 1},
        "curves": [["x", 1.0, 0]],
    }
    mean = sum(nll) / 4
    quality = {
        "metrics": {"perplexity": math.exp(mean)}, "protocol": {}, "samples": [{"prompt": "p", "answer": "a"}],
        "records": {"perplexity": {"nll": nll}, "documents": {"nll": nll, "words": words, "bytes": words}},
    }  # fmt: skip
    result = SimpleNamespace(
        label="prune taylor", digest="h1", cached=True, seconds=2.0, metadata={}, quality=quality, speed={},
        metrics=quality["metrics"], checkpoint=SimpleNamespace(folder="f", manifest=manifest),
    )  # fmt: skip
    found = result_record(result)
    assert (found["kind"], found["method"], found["settings"], found["curves"]) == (
        "prune",
        "Taylor",
        {"blocks": 1},
        [["x", 1.0, 0]],
    )
    deviation = math.sqrt(sum((value - mean) ** 2 for value in nll) / 3)
    assert found["metrics"]["perplexity_stderr"] == pytest.approx(math.exp(mean) * deviation / 2)
    assert (
        "word_perplexity_stderr" not in found["metrics"] and found["samples"] == quality["samples"]
    )
    result.digest = "another"  # the same folder as the source of a chain
    assert result_record(result)["kind"] == "source" and result_record(result)["curves"] == []


def test_an_imported_model_is_a_source_under_its_own_name():
    imported = record("smollm2", "b" * 16, "import", {"file": "model.gguf"}, perplexity=5.0)
    points = points_of([chain(imported, quantized(1, {"bits": 3}, perplexity=6.0))])
    assert [point.role for point in points] == ["source", "final"]
    assert points[1].name == "smollm2 → gptq bits 3"
