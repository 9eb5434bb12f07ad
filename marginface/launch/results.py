"""What runs have left, in one CSV and one table: means over seeds, intervals, fair comparisons.

    marginface results runs/sweep --name losses --baseline softmax --update README.md
    marginface results experiments/results/losses.csv --format latex --cited

RUNS are run folders, folders that hold some (sweeps, too), or CSVs that this command wrote. --name
or --out writes the CSV, one row a run. The table has one row for each experiment, variant and set
of overrides; below it stand commits, devices and versions, and by name each run that did not end
well. In a page it stands between <!-- NAME --> and <!-- end NAME -->. In a
clone also `python -m launch.results`.

Exit codes: 0 done; 2 a mistake in the options or the input.
"""

import argparse
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence

from marginface import command
from marginface import config as configs
from marginface.command import Parser
from marginface.launch import typed
from marginface.report.study import tables
from marginface.report.study.comparison import cited, compare, problems
from marginface.report.study.rows import Row, gather, is_table, merge, read_csv, settings, to_csv
from marginface.runs.files import write_atomically

__all__ = ["Row", "gather", "read_csv", "settings", "stale", "update"]

ROOT = configs.CLONE or pathlib.Path()
RESULTS = ROOT / "experiments" / "results"


# ---- pages ---------------------------------------------------------------------------------------


def update(page: pathlib.Path, name: str, text: str) -> None:
    """Puts a text between the marks <!-- NAME --> and <!-- end NAME --> of a page.

    Raises:
        ValueError: the page lacks them.
    """
    head, _, tail = _split(page, name)
    write_atomically(page, f"{head}{text}{tail}")


def stale(page: pathlib.Path, results: pathlib.Path = RESULTS) -> list[str]:
    """The names of a page's tables that are not what `results`/NAME.csv gives.

    Raises:
        ValueError: a table that ends nowhere, or a damaged CSV.
    """
    text, found = page.read_text(encoding="utf-8"), []
    for path in sorted(results.glob("*.csv")):
        if f"<!-- {path.stem} -->" not in text or not is_table(path):
            continue
        old = _split(page, path.stem)[1]
        made_by = re.match(r"\n<!-- (?:python -m launch\.|marginface )results (.+) -->\n", old)
        if not made_by:
            found.append(path.stem)
            continue
        options = _parse(shlex.split(made_by[1]))
        if _for_page(options, options.runs[0], read_csv(path)) != old:
            found.append(path.stem)
    return found


def _split(page: pathlib.Path, name: str) -> tuple[str, str, str]:
    """What stands before, between and after the two marks, which stay outside."""
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    head, first, rest = page.read_text(encoding="utf-8").partition(begin)
    text, last, tail = rest.partition(end)
    if not first or not last:
        raise ValueError(f"{page} lacks {begin} or {end} after it: put both where the table goes")
    return head + first, text, last + tail


def _for_page(options: argparse.Namespace, path: pathlib.Path, rows: Sequence[Row]) -> str:
    """What stands between the marks: the command that makes it anew of the CSV, and the tables."""
    words = [_shown(path)]
    words += ["--metric", options.metric] if options.metric != "/accuracy" else []
    words += ["--baseline", options.baseline] if options.baseline else []
    words += ["--format", options.format] if options.format != "markdown" else []
    words += ["--cited"] * options.cited + ["--update", _shown(options.update)]
    return f"\n<!-- {typed('results')} {shlex.join(words)} -->\n{_tables(options, rows)}"


def _shown(path: pathlib.Path) -> str:
    """The path from the clone's root, or the working directory, where it lies in it."""
    inside = path.resolve().is_relative_to(ROOT.resolve())
    return path.resolve().relative_to(ROOT.resolve()).as_posix() if inside else path.as_posix()


# ---- the command ---------------------------------------------------------------------------------


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("marginface results", __doc__, usage="marginface results RUNS ... [options]")
    add = parser.add_argument
    add("runs", type=pathlib.Path, nargs="+", metavar="RUNS", help="folders or CSVs")
    add("--name", help="of the table: its CSV is experiments/results/NAME.csv")
    add("--out", type=pathlib.Path, metavar="CSV", help="where the CSV goes instead")
    add("--append", action="store_true", help="keep the CSV's rows of other runs")
    add("--metric", default="/accuracy", metavar="END", help="end of a figure's name (%(default)s)")
    add("--baseline", default="", metavar="SETTING", help='"arcface" or "arcface:data=small m=0.3"')
    add("--format", default="markdown", choices=tables.FORMATS)
    add("--cited", action="store_true", help="a second table: what papers print")
    add("--update", type=pathlib.Path, metavar="PAGE", help="put it between the marks of this page")
    options = parser.parse_args(argv)
    if options.name and not re.fullmatch(r"[\w.-]+", options.name):
        raise ValueError(f"--name {options.name!r}: use letters, digits, '.', '-' and '_'")
    return options


def _csv_of(options: argparse.Namespace) -> pathlib.Path | None:
    """The CSV that is written, or read and not written; None if there is none."""
    if options.out or options.name:
        return options.out or RESULTS / f"{options.name}.csv"
    only = options.runs[0] if len(options.runs) == 1 else None
    return only if only is not None and only.suffix == ".csv" else None


def _tables(options: argparse.Namespace, rows: Sequence[Row]) -> str:
    """Our table, and behind it the cited one."""
    ours = compare(rows, metric=options.metric, baseline=options.baseline)
    found = [ours, cited(rows) if options.cited else None]
    return "\n".join(tables.render(t, options.format) for t in found if t is not None)


def run(argv: Sequence[str]) -> None:
    """Does what `argv` (without the program's name) asks for.

    Raises:
        ValueError: an option, a path or a file that does not fit; one line that says which.
    """
    options = _parse(argv)
    path = _csv_of(options)
    if path is None and (options.update or options.append):
        raise ValueError("--update and --append need a CSV: give --name NAME or --out FILE.csv")
    rows = gather(options.runs)
    if options.append and path is not None and path.exists():
        rows = merge(read_csv(path), rows)
    if path is not None and (options.name or options.out):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, to_csv(rows))
        print(f"rows: {path}", file=sys.stderr)
    print(_tables(options, rows), end="", flush=True)
    if options.update and path is not None:
        update(options.update, options.name or path.stem, _for_page(options, path, rows))
        print(f"table: {options.update}", file=sys.stderr)
    if options.cited and cited(rows) is None:
        print("cited: published.toml has nothing on these experiments", file=sys.stderr)
    for problem in problems(rows, metric=options.metric):
        print(problem, file=sys.stderr)


def main() -> None:
    """The command."""
    command.main(run, "marginface")


if __name__ == "__main__":
    main()
