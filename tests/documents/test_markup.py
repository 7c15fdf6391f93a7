"""Files without pages: Markdown, HTML, plain text."""

from __future__ import annotations

import pytest

from slim.documents import markup
from slim.documents.layout import page_text
from slim.documents.pages import CODE, HEADING, TABLE, TEXT, Unreadable

MARKDOWN = """\
# Über Maße

Ein Absatz
in zwei Zeilen.

| a | b |
|---|---|
| 1 | 2 |
```python
x = 1

y = 2
```
Ende.
"""
HTML = """\
<html><head><title>T</title><style>p {}</style></head><body>
<nav><a href="/">Start</a></nav><header>Universität</header>
<main><h1>Größen</h1><p>Die <b>Länge</b> ist eine <a href="/x">Größe</a>.</p>
<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>
<pre><code>for x in y:
    print(x)
</code></pre><ul><li>erstens</li><li>zweitens</li></ul></main>
<footer>Impressum</footer><script>var a = 1;</script></body></html>
"""


def read(tmp_path, text: str, ending: str) -> list[str]:
    path = tmp_path / f"a{ending}"
    path.write_text(text, encoding="utf-8")
    readers = {".md": markup.read_markdown, ".html": markup.read_html, ".txt": markup.read_plain}
    return [page_text(page.lines) for page in readers[ending](path)]


def test_markdown_comes_back(tmp_path):
    expected = MARKDOWN.replace("|\n```", "|\n\n```").replace("```\nEnde", "```\n\nEnde").strip()
    assert read(tmp_path, MARKDOWN, ".md") == [expected]


def test_the_parts_of_markdown_have_their_kinds():
    kinds = [line.kind for line in markup.markdown_lines(MARKDOWN)]
    assert kinds == [HEADING, TEXT, TABLE, CODE, TEXT]


def test_a_fence_that_is_never_closed_loses_nothing():
    [line] = markup.markdown_lines("```\nx = 1\n")
    assert (line.kind, line.text) == (CODE, "```\nx = 1")


def test_html_is_its_text_without_navigation_and_script(tmp_path):
    assert read(tmp_path, HTML, ".html") == [
        "# Größen\n\nDie **Länge** ist eine Größe.\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n"
        "```\nfor x in y:\n    print(x)\n```\n\n- erstens\n- zweitens"
    ]


def test_html_in_its_own_encoding(tmp_path):
    content = '<html><head><meta charset="iso-8859-1"></head><body><p>Größe</p></body></html>'
    (tmp_path / "a.html").write_bytes(content.encode("latin-1"))
    [page] = markup.read_html(tmp_path / "a.html")
    assert page_text(page.lines) == "Größe"


def test_form_feeds_divide_plain_text_into_pages(tmp_path):
    assert read(tmp_path, "eins\nzwei\n\ndrei\fvier", ".txt") == ["eins\nzwei\n\ndrei", "vier"]


def test_text_in_an_unknown_encoding_says_so(tmp_path):
    (tmp_path / "a.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(Unreadable, match="line 1: byte 0xf6 is not UTF-8"):
        markup.read_plain(tmp_path / "a.txt")
