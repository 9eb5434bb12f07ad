"""Numbers that papers print, to be cited beside ours: published.toml, read and checked."""

import pathlib
import tomllib
from collections.abc import Collection, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

PATH = pathlib.Path(__file__).with_name("published.toml")

# Metrics, in the order of a table's columns: key → heading. All are in percent.
METRICS = {
    "lfw": "LFW",
    "cfp_fp": "CFP-FP",
    "agedb": "AgeDB",
    "calfw": "CALFW",
    "cplfw": "CPLFW",
    "ytf": "YTF",
    "megaface_rank1": "MegaFace rank 1",
    "megaface_tar": "MegaFace TAR@FAR=1e-6",
    "ijbb_1e4": "IJB-B TAR@FAR=1e-4",
    "ijbc_1e4": "IJB-C TAR@FAR=1e-4",
    "ijbc_1e5": "IJB-C TAR@FAR=1e-5",
    "mr_all": "MFR-All",
    "val": "VAL@FAR=1e-3",
}
_PAPER = {"title": str, "authors": str, "year": int, "venue": str}
_QUOTED = "quoted by "
_SETTING = ("data", "backbone", "protocol")
_WORDS = {str: "a text", dict: "a table of keys", list: "a list"}
_OF_A_ROW = ("experiment", "of", "note", *_SETTING)


class Cited(NamedTuple):
    """One row of a paper's table, with the setting it was measured in.

    key: of the bibliography, e.g. "deng2019arcface": the method's paper.
    title, authors, year, venue: of that paper.
    table: where the numbers are printed.
    data, backbone, protocol: the setting.
    experiment: the name of the file in experiments/ that holds this method, or "".
    method: as printed.
    metrics: of METRICS → percent.
    printed: the same as text, with as many digits as printed.
    source: "" for the paper's own numbers, else "quoted by KEY".
    note: what a reader must know, or "".
    """

    key: str
    title: str
    authors: str
    year: int
    venue: str
    table: str
    data: str
    backbone: str
    protocol: str
    experiment: str
    method: str
    metrics: dict[str, float]
    printed: dict[str, str]
    source: str
    note: str


def load(path: pathlib.Path = PATH) -> list[Cited]:
    """All cited rows, in the order of the file.

    Args:
        path: a file such as published.toml, which says what it holds.

    Raises:
        ValueError: not TOML, a key that is missing, unknown or of another type, or a number that
            is no percentage; names the file, the table and the key.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
    except ValueError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    try:
        papers = _checked(content, {"papers": dict, "tables": list}, "the file")["papers"]
        for key, paper in papers.items():
            _checked(paper, _PAPER, f"papers.{key}")
        return [row for table in content["tables"] for row in _rows(table, papers)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def bibliography(cited: Collection[Cited], path: pathlib.Path = PATH) -> dict[str, str]:
    """Key → "Authors: Title. Venue, year." of the papers of these rows, and of those that quote."""
    papers = tomllib.loads(path.read_text(encoding="utf-8"))["papers"]
    keys = {key for row in cited for key in (row.key, row.source.removeprefix(_QUOTED)) if key}
    return {
        key: "{authors}: {title}. {venue}, {year}.".format(**papers[key]) for key in sorted(keys)
    }


def of_experiments(cited: Collection[Cited], experiments: Collection[str]) -> list[Cited]:
    """The rows whose method is one of these experiments."""
    return [row for row in cited if row.experiment in experiments]


def _rows(table: Any, papers: Mapping[str, Any]) -> list[Cited]:
    """The rows of one table, each with what the table says for all."""
    needed = {"paper": str, "table": str, "rows": list}
    table = _checked(table, needed, "a table", optional=_SETTING)
    where = f"{table['paper']}, {table['table']}"
    return [_row(row, table, papers, where) for row in table["rows"]]


def _row(row: Any, table: Mapping[str, Any], papers: Mapping[str, Any], where: str) -> Cited:
    row = _checked(row, {"method": str}, f"{where}, a row", optional=_OF_A_ROW, metrics=True)
    where = f"{where}, {row['method']}"
    setting = {key: row.get(key, table.get(key, "")) for key in _SETTING}
    if not all(setting.values()):
        raise ValueError(f"{where}: say data, backbone and protocol in the row or the table")
    printed = {key: str(row[key]) for key in METRICS if key in row}
    if not printed:
        raise ValueError(f"{where} has no metric; known: {', '.join(METRICS)}")
    if wrong := [key for key in printed if not 1 < row[key] <= 100]:
        raise ValueError(f"{where}: {wrong[0]}={printed[wrong[0]]} is no percentage")
    key = row.get("of", table["paper"])
    for name in (key, table["paper"]):
        if name not in papers:
            raise ValueError(f"{where}: no [papers.{name}]; known: {', '.join(papers)}")
    return Cited(
        key=key,
        **{name: papers[key][name] for name in _PAPER},
        table=table["table"],
        **setting,
        experiment=row.get("experiment", ""),
        method=row["method"],
        metrics={key: float(text) for key, text in printed.items()},
        printed=printed,
        source=f"{_QUOTED}{table['paper']}" if key != table["paper"] else "",
        note=row.get("note", ""),
    )


def _checked(
    content: Any,
    needed: Mapping[str, type],
    where: str,
    *,
    optional: Collection[str] = (),
    metrics: bool = False,
) -> dict[str, Any]:
    """`content` once it holds what is needed, texts under `optional`, numbers under METRICS."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} is {type(content).__name__}, not {_WORDS[dict]}")
    kinds: dict[str, Any] = {**dict.fromkeys(optional, str), **needed}
    if metrics:
        kinds |= dict.fromkeys(METRICS, (int, Decimal))
    if missing := sorted(needed.keys() - content.keys()):
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    for key, value in content.items():
        if key not in kinds:
            raise ValueError(f"{where}: unknown key {key!r}; known: {', '.join(kinds)}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool) or value == "":
            raise ValueError(
                f"{where}: {key}={value!r} is not {_WORDS.get(kinds[key], 'a number')}"
            )
    return content
