"""One table, three ways to write it: Markdown, LaTeX with booktabs, HTML.

A table knows nothing of runs or papers; whoever fills it decides what is bold. Whatever stands in
its cells is shown as it is: no text can end a cell, open a tag or call a command.
"""

import html as _html
import re
from collections.abc import Callable
from typing import NamedTuple

NOTHING = "–"  # shown where there is no number


class Cell(NamedTuple):
    """A text; `code`: as typed on a command line."""

    text: str
    bold: bool = False
    code: bool = False


class Table(NamedTuple):
    """Rows under a header, and what a reader must know to judge them.

    header: a heading for each column.
    rows: of as many cells.
    align: "l" or "r" for each column.
    caption: one line above the table, or "".
    notes: lines below it.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    align: str
    caption: str = ""
    notes: tuple[str, ...] = ()


def render(table: Table, form: str) -> str:
    """The table as text, with a last newline.

    Args:
        table: what to show.
        form: a key of FORMATS.

    Raises:
        ValueError: a row or `align` does not fit the header, or there is no such format.
    """
    if form not in FORMATS:
        raise ValueError(f"format {form!r} is unknown; known: {', '.join(FORMATS)}")
    columns = len(table.header)
    if len(table.align) != columns or set(table.align) - set("lr"):
        raise ValueError(f"align {table.align!r} does not give l or r to {columns} columns")
    if wrong := [row for row in table.rows if len(row) != columns]:
        raise ValueError(f"a row has {len(wrong[0])} cells, the header {columns}: {wrong[0]}")
    return FORMATS[form](table)


def number(value: float | None, form: str, *, signed: bool = False) -> str:
    """A number in `form`, such as ".2f", with a true minus sign; NOTHING for None and NaN."""
    if value is None or value != value:
        return NOTHING
    return format(value, f"+{form}" if signed else form).replace("-", "−")


def p_value(value: float | None) -> str:
    """Three decimals; below them "<0.001", never 0."""
    return "<0.001" if value is not None and value < 0.001 else number(value, ".3f")


def markdown(table: Table) -> str:
    """A GitHub table; notes as a list."""

    def line(cells: tuple[str, ...]) -> str:
        return f"| {' | '.join(cells)} |"

    rule = ("---" if a == "l" else "---:" for a in table.align)
    lines = [
        *([_markdown(table.caption), ""] if table.caption else []),
        line(tuple(map(_markdown, table.header))),
        f"|{'|'.join(rule)}|",
        *(line(tuple(map(_markdown_cell, row))) for row in table.rows),
        *(["", *(f"- {_markdown(note)}" for note in table.notes)] if table.notes else []),
    ]
    return "\n".join(lines) + "\n"


def latex(table: Table) -> str:
    """A floating table for \\usepackage{booktabs}."""

    def line(cells: list[str]) -> str:
        return f"{' & '.join(cells)} \\\\"

    lines = [
        r"\begin{table}",
        r"\centering",
        *([rf"\caption{{{_latex(table.caption)}}}"] if table.caption else []),
        rf"\begin{{tabular}}{{{table.align}}}",
        r"\toprule",
        line([_latex(heading) for heading in table.header]),
        r"\midrule",
        *(line([_latex_cell(cell) for cell in row]) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par\raggedright\footnotesize {_latex(note)}" for note in table.notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def html(table: Table) -> str:
    """A fragment that needs no style sheet and no script."""

    def cells(row: tuple[str, ...], tag: str) -> str:
        sides = ("left" if a == "l" else "right" for a in table.align)
        return "".join(
            f'<{tag} style="text-align:{side};padding:0.2em 0.8em">{text}</{tag}>'
            for text, side in zip(row, sides, strict=True)
        )

    items = [f"<li>{_html_text(note)}</li>" for note in table.notes]
    lines = [
        "<section>",
        '<table style="border-collapse:collapse">',
        *([f"<caption>{_html_text(table.caption)}</caption>"] if table.caption else []),
        f"<thead><tr>{cells(tuple(map(_html_text, table.header)), 'th')}</tr></thead>",
        "<tbody>",
        *(f"<tr>{cells(tuple(map(_html_cell, row)), 'td')}</tr>" for row in table.rows),
        "</tbody>",
        "</table>",
        *(["<ul>", *items, "</ul>"] if items else []),
        "</section>",
    ]
    return "\n".join(lines) + "\n"


FORMATS: dict[str, Callable[[Table], str]] = {"markdown": markdown, "latex": latex, "html": html}

_LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "{}$&#%_"},
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "×": r"$\times$",
    "≤": r"$\leq$",
    "°": r"$^\circ$",
    "θ": r"$\theta$",
    "λ": r"$\lambda$",
    "–": "--",
}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _markdown(text: str) -> str:
    """Plain text; "<" is written so that a page's own comments cannot be imitated."""
    text = re.sub(r"([\\`*~\[\]|]|(?<!\w)_|_(?!\w))", r"\\\1", _one_line(text))
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _markdown_cell(cell: Cell) -> str:
    plain = not cell.code or re.search(r"[`<|]|^$", cell.text)
    text = _markdown(cell.text) if plain else f"`{_one_line(cell.text)}`"
    return f"**{text}**" if cell.bold else text


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in _one_line(text))


def _latex_cell(cell: Cell) -> str:
    text = rf"\texttt{{{_latex(cell.text)}}}" if cell.code else _latex(cell.text)
    return rf"\textbf{{{text}}}" if cell.bold else text


def _html_text(text: str) -> str:
    return _html.escape(_one_line(text))


def _html_cell(cell: Cell) -> str:
    text = f"<code>{_html_text(cell.text)}</code>" if cell.code else _html_text(cell.text)
    return f"<strong>{text}</strong>" if cell.bold else text
