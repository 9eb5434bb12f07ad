"""One table in Markdown, LaTeX and HTML: numbers as they are, no text that breaks out."""

import html.parser
import re

import pytest

from marginface.report.study import tables
from marginface.report.study.tables import Cell, Table

HOSTILE = [
    "a|b",
    "<!-- end losses -->",
    "<script>alert(1)</script>",
    "[x](javascript:y)",
    r"\input{/etc/passwd} & \\ %",
    "$x_1^2$ ~ #{}",
    "two\nlines",
    "`tick`",
    "*star* _under_ a_b",
    '"quoted" & <b>',
]


def table(*rows, **kw):
    return Table(
        header=("experiment", "accuracy"),
        rows=tuple(rows) or ((Cell("arcface", code=True), Cell("92.30 ± 0.41", bold=True)),),
        align="lr",
        **kw,
    )


def test_markdown():
    found = tables.render(table(caption="All.", notes=("One.", "Two.")), "markdown")
    assert found.splitlines() == [
        "All.",
        "",
        "| experiment | accuracy |",
        "|---|---:|",
        "| `arcface` | **92.30 ± 0.41** |",
        "",
        "- One.",
        "- Two.",
    ]


def test_latex():
    found = tables.render(table(caption="All 5 %.", notes=("a_b ≤ 1",)), "latex")
    assert found.splitlines() == [
        r"\begin{table}",
        r"\centering",
        r"\caption{All 5 \%.}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"experiment & accuracy \\",
        r"\midrule",
        r"\texttt{arcface} & \textbf{92.30 $\pm$ 0.41} \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\par\raggedright\footnotesize a\_b $\leq$ 1",
        r"\end{table}",
    ]


class Reader(html.parser.HTMLParser):
    """The texts of cells, the tags there are, and whether each is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.cells = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        assert {name for name, _ in attrs} <= {"style"}
        self.tags.append(tag)
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data

    def handle_comment(self, data):
        raise AssertionError(data)


def test_html():
    found = Reader(tables.render(table(caption="All.", notes=("One.",)), "html"))
    assert found.cells == ["experiment", "accuracy", "arcface", "92.30 ± 0.41"]
    assert not found.open
    assert {"caption", "code", "strong", "li"} <= set(found.tags)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("code", [False, True])
def test_no_text_breaks_out(text, code):
    shown = table((Cell(text, code=code), Cell(text, bold=True)), caption=text, notes=(text,))
    plain = " ".join(text.split())
    found = Reader(tables.render(shown, "html"))
    assert found.cells[2:] == [plain, plain]
    assert "script" not in found.tags
    page = tables.render(shown, "markdown")
    row = page.splitlines()[4]
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert len(page.splitlines()) == 7
    assert "<" not in page
    latex = tables.render(shown, "latex")
    row = next(line for line in latex.splitlines() if "textbf" in line)
    assert row.endswith(r" \\")
    bare = re.sub(r"\\textbackslash\{\}|\\[&%#_${}]", "", row.removesuffix(r"\\"))
    assert bare.count("&") == 1
    assert "%" not in bare
    assert "#" not in bare
    assert "input{" not in bare
    assert bare.count("{") == bare.count("}")


def test_underscores_within_words_stay():
    assert "version a_b, \\_c\\_" in tables.render(table(notes=("version a_b, _c_",)), "markdown")


def test_numbers():
    assert tables.number(92.304, ".2f") == "92.30"
    assert tables.number(-0.4, ".2f", signed=True) == "−0.40"
    assert tables.number(0.4, ".2f", signed=True) == "+0.40"
    assert tables.number(None, ".2f") == tables.number(float("nan"), ".2f") == tables.NOTHING
    found = [tables.p_value(p) for p in (0.0, 0.0004, 0.0123, 1.0, float("nan"), None)]
    assert found == ["<0.001", "<0.001", "0.012", "1.000", "–", "–"]


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="a row has 1 cells, the header 2"):
        tables.render(table((Cell("a"),)), "markdown")
    with pytest.raises(ValueError, match="format 'word' is unknown; known: markdown, latex, html"):
        tables.render(table(), "word")
    with pytest.raises(ValueError, match="align 'l' does not give"):
        tables.render(table()._replace(align="l"), "html")
