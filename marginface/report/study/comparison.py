"""Rows as a table: means over seeds with intervals, paired differences, and what papers print."""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from marginface.lookup import nearest
from marginface.report.run import meanings
from marginface.report.study import published, statistics, tables
from marginface.report.study.rows import Row, Setting, figure, seed, settings, shares_time
from marginface.report.study.tables import NOTHING, Cell, Table, number
from marginface.runs import plan

ALPHA = 0.05
_MOST_NAMED = 5  # settings in one line


class Line(NamedTuple):
    """A setting in the table.

    values: seed → figure of the runs that are counted.
    interval: of their mean.
    why: there is no mean, or "".
    complete: every run is counted, and there are several where other settings have several. The
        mean of only those seeds that did not fail, or of a single seed, may be luck.
    difference, p: to the baseline; p is Holm-adjusted, NaN where nothing could be tested.
    """

    setting: Setting
    rows: list[Row]
    values: dict[int, float]
    interval: statistics.Interval
    why: str
    complete: bool = False
    difference: statistics.Difference | None = None
    p: float = float("nan")


class _Column(NamedTuple):
    heading: str
    side: str
    cells: list[Cell]


def compare(rows: Sequence[Row], *, metric: str = "/accuracy", baseline: str = "") -> Table:
    """One row for each setting: mean ± 95 % half width over seeds, best first, incomplete last.

    Args:
        rows: of `gather` or `read_csv`.
        metric: a figure's name, or the end of exactly one.
        baseline: "EXPERIMENT[:VARIANT] [KEY=VALUE ...]"; then the paired difference to it on common
            seeds and its Holm-adjusted p value stand in two columns, and the best complete
            setting is bold if it is better than the baseline at the 5 % level.

    Raises:
        ValueError: no such metric or baseline, or more than one; names those there are.
    """
    key, labels = find_metric(rows, metric), _labels(rows)
    lines = make_lines(rows, key)
    base = find_line(lines, baseline) if baseline else None
    if base is not None:
        lines = against(lines, base)
    columns = _columns(lines, key, base, labels)
    notes = (_explained(lines, key, base, labels), _conditions(rows))
    return Table(
        header=tuple(column.heading for column in columns),
        rows=tuple(zip(*(column.cells for column in columns), strict=True)),
        align="".join(column.side for column in columns),
        notes=(*notes, *problems(rows, metric=metric)),
    )


def problems(rows: Sequence[Row], *, metric: str = "/accuracy") -> list[str]:
    """One line for each run that did not simply end well, and each setting without a mean.

    One more for all settings whose runs are of different commits. A setting of which nothing ran
    is left to the table, which says so.
    """
    labels, found = _labels(rows), []
    for line in make_lines(rows, find_metric(rows, metric)):
        label = _label(labels[line.setting])
        if line.why.startswith("not averaged"):
            found.append(f"{label}: {line.why}")
        if any(kind_of(row) != "not run" for row in line.rows):
            bad = (row for row in line.rows if row["status"] != "done")
            found += [f"{label}, seed {row['seed']}: {row['status']}" for row in bad]
    return found + _mixed(rows, labels)


def _mixed(rows: Sequence[Row], labels: Mapping[Setting, Sequence[str]]) -> list[str]:
    """A warning if means are of runs that different code has made."""
    names = [
        _label(labels[setting])
        for setting, group in settings(rows).items()
        if len({row["commit"] for row in group if kind_of(row) == "done"}) > 1
    ]
    if not names:
        return []
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return [
        f"Warning: different commits within {count_of(len(names), 'setting')}: "
        f"{', '.join(names[:_MOST_NAMED])}{more}"
    ]


def cited(rows: Sequence[Row]) -> Table | None:
    """What papers print for the experiments of these rows, each with its setting; None if nothing.

    A table of its own, so that no column holds numbers of ours and of others.
    """
    experiments = list(dict.fromkeys(str(row["experiment"]) for row in rows))
    found = published.of_experiments(published.load(), experiments)
    found.sort(key=lambda row: experiments.index(row.experiment))
    keys = [key for key in published.METRICS if any(key in row.metrics for row in found)]
    if not found:
        return None
    headings = (published.METRICS[key] for key in keys)
    return Table(
        header=("experiment", "as printed", *headings, "data", "network", "protocol", "cited from"),
        rows=tuple(_cited_cells(row, keys) for row in found),
        align="ll" + "r" * len(keys) + "llll",
        caption="Cited, not measured here: what papers print, in percent, each with its own data, "
        "network and protocol; not to be compared with ours, nor from row to row.",
        notes=tuple(f"{key}: {text}" for key, text in published.bibliography(found).items()),
    )


# ---- lines ---------------------------------------------------------------------------------------


def make_lines(rows: Sequence[Row], key: str) -> list[Line]:
    """One for each setting, best first: the complete ones, other means, then those without."""
    lines = [_line(setting, group, key) for setting, group in settings(rows).items()]
    least = min(2, max((len(line.values) for line in lines), default=0))
    lines = [line._replace(complete=least <= len(line.values) == len(line.rows)) for line in lines]
    sign = 1 if meanings.of(key).less else -1

    def order(line: Line) -> tuple[bool, bool, float, Setting]:
        rank = sign * float(line.interval.mean) if line.values else 0.0
        return not line.values, not line.complete, rank, line.setting

    return sorted(lines, key=order)


def _line(setting: Setting, rows: list[Row], key: str) -> Line:
    counted = [(row, figure(row, key)) for row in rows if kind_of(row) == "done"]
    values = [(row, value) for row, value in counted if value is not None]
    why = _not_averaged([row for row, _ in values])
    if not values:
        why = ", ".join(sorted({kind_of(row) for row in rows} - {"done"})) or "no such figure"
    by_seed = {} if why else {seed(row): value for row, value in values}
    interval = statistics.mean_interval(np.array(list(by_seed.values()), np.float64))
    return Line(setting, rows, by_seed, interval, why)


def _not_averaged(rows: Sequence[Row]) -> str:
    """Why runs are not repetitions of one run with other seeds; "" if they are."""
    twice = [one for one, count in Counter(map(seed, rows)).items() if count > 1]
    if twice:
        return f"not averaged: seed {twice[0]} stands there twice; give one of the runs"
    hashes = sorted({str(row["setting_hash"]) for row in rows})
    if len(hashes) > 1:
        return f"not averaged: configs differ by more than the seed (setting {', '.join(hashes)})"
    return ""


def against(lines: Sequence[Line], base: Line) -> list[Line]:
    """Each line with its paired difference to the baseline and its adjusted p value.

    The family of tests is what could be tested at all: settings with two seeds in common.
    """
    differences = [
        statistics.paired_difference(*statistics.common_seeds(line.values, base.values))
        for line in lines
    ]
    tested = [d.n > 1 and line is not base for d, line in zip(differences, lines, strict=True)]
    p = np.full(len(lines), np.nan)
    p[tested] = statistics.holm(np.array([d.p for d in differences], np.float64)[tested])
    return [
        line if line is base else line._replace(difference=d, p=float(value))
        for line, d, value in zip(lines, differences, p, strict=True)
    ]


def tested(lines: Sequence[Line]) -> int:
    """How many settings are compared with the baseline: the family of the correction."""
    return sum(line.difference is not None and line.difference.n > 1 for line in lines)


def _is_best(line: Line, lines: Sequence[Line], key: str) -> bool:
    """Whether it is the best complete one and is shown to be better than the baseline."""
    if line is not lines[0] or not line.complete:
        return False
    if line.difference is None or not line.p <= ALPHA:
        return False
    return bool(line.difference.mean < 0) == meanings.of(key).less


# ---- columns -------------------------------------------------------------------------------------


def _columns(
    lines: Sequence[Line],
    key: str,
    base: Line | None,
    labels: Mapping[Setting, Sequence[str]],
) -> list[_Column]:
    columns = []
    for i, heading in enumerate(("experiment", "variant", "overrides")):
        texts = [labels[line.setting][i] for line in lines]
        if any(texts):
            columns.append(_Column(heading, "l", [Cell(text, code=True) for text in texts]))
    columns.append(_column("seeds", map(_counted, lines)))
    means = [Cell(_mean(line, key), bold=_is_best(line, lines, key)) for line in lines]
    columns.append(_Column(f"{meanings.of(key).title}, mean ± 95 %", "r", means))
    if base is not None:
        texts = [_difference(line, key, base) for line in lines]
        columns.append(_column(f"difference to {base.setting[0]}", texts))
        columns.append(_column("p (Holm)", (tables.p_value(line.p) for line in lines)))
    for other in _others(lines, key):
        columns.append(
            _column(meanings.of(other).title, (_plain_mean(line, other) for line in lines))
        )
    return columns


def _column(heading: str, texts: Iterable[str]) -> _Column:
    return _Column(heading, "r", [Cell(text) for text in texts])


def _others(lines: Sequence[Line], key: str) -> list[str]:
    """Further figures that the table shows where a run has them."""
    names = (f"{key.rpartition('/')[0]}/auc", "prototypes/sep_mean", "time/wall_s")
    have = {name for line in lines for row in line.rows for name in row}
    return [name for name in names if name in have and name != key]


def _counted(line: Line) -> str:
    done, planned = len(line.values), len(line.rows)
    return str(done) if done == planned else f"{done} of {planned}"


def _mean(line: Line, key: str) -> str:
    if not line.values:
        return line.why.partition(":")[0]
    return _with_half(float(line.interval.mean), float(line.interval.half), key)


def _difference(line: Line, key: str, base: Line) -> str:
    if line.setting == base.setting:
        return "baseline"
    if line.difference is None or not line.difference.n:
        return NOTHING
    n, mean, half = line.difference.n, float(line.difference.mean), float(line.difference.half)
    text = _with_half(mean, half, key, signed=True)
    return f"{text} ({count_of(n, 'pair')})" if n < len(line.values) else text


def _with_half(mean: float, half: float, key: str, *, signed: bool = False) -> str:
    meaning = meanings.of(key)
    text = number(meaning.factor * mean, meaning.form, signed=signed)
    return text if np.isnan(half) else f"{text} ± {number(meaning.factor * half, meaning.form)}"


def _plain_mean(line: Line, key: str) -> str:
    found = [figure(row, key) for row in line.rows if seed(row) in line.values]
    values = [value for value in found if value is not None]
    meaning = meanings.of(key)
    return number(meaning.factor * float(np.mean(values)) if values else None, meaning.form)


# ---- notes ---------------------------------------------------------------------------------------


def _explained(
    lines: Sequence[Line],
    key: str,
    base: Line | None,
    labels: Mapping[Setting, Sequence[str]],
) -> str:
    """How to read the numbers."""
    unit = " in percent" if meanings.of(key).unit == "%" else ""
    what = "mean over seeds; no interval: none has two seeds with different figures"
    if any(line.interval.half == line.interval.half for line in lines):
        what = (
            "mean ± half width of the 95 % interval over seeds (Student t; none for one seed or "
            "equal figures)"
        )
    text = f"{key}{unit}: {what}; further columns are means."
    if any(line.values and not line.complete for line in lines):
        text += (
            " Below the complete settings stand those that lack runs, or have one seed where "
            "others have several."
        )
    shared = sum(shares_time(row) for line in lines for row in line.rows if kind_of(row) == "done")
    if shared and "time/wall_s" in (key, *_others(lines, key)):
        text += f" Wall time is without {count_of(shared)} that trained together in one program."
    return text if base is None else f"{text} {_compared(lines, _label(labels[base.setting]))}"


def _compared(lines: Sequence[Line], label: str) -> str:
    """How to read differences and tests, as far as there are any."""
    text = f"Differences to {label} are paired over common seeds"
    found = [line.difference for line in lines if line.difference is not None]
    if any(difference.half == difference.half for difference in found):
        text += ", each with its own 95 % interval"
    if not tested(lines):
        return f"{text}."
    return (
        f"{text}; p: paired t test, Holm-adjusted over {count_of(tested(lines), 'test')}. "
        "Bold: the best complete setting, where it is better than the baseline with p ≤ "
        f"{ALPHA:g}; it need not be better than the next one."
    )


def _conditions(rows: Sequence[Row]) -> str:
    """Where the numbers come from: what all share, commits, devices, versions, seeds."""
    done = [row for row in rows if kind_of(row) == "done"]
    variant, common = shared_words(list(settings(rows)))
    commits = [re.sub(r"^([0-9a-f]{7})[0-9a-f]{33}", r"\1", str(row["commit"])) for row in done]
    seeds = " ".join(map(str, sorted({seed(row) for row in done})))
    words = [
        *([f"variant {variant}"] if variant else []),
        *([f"all with {' '.join(common)}"] if common else []),
        tally("commit", "commits", commits),
        tally("device", "devices", [str(row["device"]) for row in done]),
        tally("versions", "versions", [str(row["versions"]) for row in done]),
        f"seeds {seeds or NOTHING}",
    ]
    return f"Conditions: {'; '.join(words)}."


def tally(one: str, many: str, texts: Sequence[str]) -> str:
    """ "commit a", or "different commits: a (3 runs), b (1 run)"."""
    counts = Counter(text or "unknown" for text in texts)
    if len(counts) < 2:
        return f"{one} {next(iter(counts), NOTHING)}"
    found = (f"{text} ({count_of(count)})" for text, count in sorted(counts.items()))
    return f"different {many}: {', '.join(found)}"


def count_of(count: int, word: str = "run") -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def shared_words(found: Sequence[Setting]) -> tuple[str, list[str]]:
    """The variant ("" if they differ) and the overrides that all settings have."""
    variants = {variant for _, variant, _ in found}
    words = [shlex.split(overrides) for _, _, overrides in found]
    common = [word for word in words[0] if all(word in other for other in words)] if words else []
    return variants.pop() if len(variants) == 1 else "", common


def _labels(rows: Iterable[Row]) -> dict[Setting, tuple[str, str, str]]:
    """Setting → experiment, and variant and overrides in short but for what all share."""
    found = list(settings(rows))
    variant, common = shared_words(found)
    words = {s: [w.partition("=") for w in shlex.split(s[2]) if w not in common] for s in found}
    short = plan.short_keys(list({key: None for split in words.values() for key, _, _ in split}))
    overrides = {s: " ".join(f"{short[k]}={v}" for k, _, v in words[s]) for s in found}
    return {s: (s[0], s[1] if s[1] != variant else "", overrides[s]) for s in found}


def _label(parts: Sequence[str]) -> str:
    experiment, variant, overrides = parts
    return f"{experiment}{':' * bool(variant)}{variant} {overrides}".strip()


# ---- cited rows ----------------------------------------------------------------------------------


def _cited_cells(row: published.Cited, keys: Iterable[str]) -> tuple[Cell, ...]:
    numbers = (Cell(row.printed.get(key, NOTHING)) for key in keys)
    source = ", ".join(filter(None, (row.key, row.source, row.table)))
    texts = (row.data, row.backbone, row.protocol, f"{source} ({row.note})" if row.note else source)
    return Cell(row.experiment, code=True), Cell(row.method), *numbers, *map(Cell, texts)


# ---- names ---------------------------------------------------------------------------------------


def find_metric(rows: Iterable[Row], end: str) -> str:
    """The one figure with this name or this ending."""
    names = sorted({name for row in rows for name in row if "/" in name})
    fitting = [name for name in names if name == end] or [
        name for name in names if name.endswith(end) and not name.startswith("untrained/")
    ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(f"--metric {end!r} fits {', '.join(fitting)}: name one of them")
    if names:
        raise ValueError(f"--metric {end!r}: no run has such a figure; {nearest(end, names)}")
    return end.strip("/")  # nothing has run yet


def find_line(lines: Sequence[Line], text: str) -> Line:
    """The one line that "EXPERIMENT[:VARIANT] [KEY=VALUE ...]" fits, or fits exactly."""
    name, *wanted = shlex.split(text) or [""]
    experiment, _, variant = name.partition(":")
    fitting = [
        line
        for line in lines
        if line.setting[0] == experiment and variant in ("", line.setting[1])
        if all(_has(line, word) for word in wanted)
    ]
    exact = [line for line in fitting if len(shlex.split(line.setting[2])) == len(wanted)]
    if len(exact) == 1 or len(fitting) == 1:
        return (exact if len(exact) == 1 else fitting)[0]
    if fitting:
        known = " and ".join(repr(_label(line.setting)) for line in fitting[:2])
        raise ValueError(f"--baseline {text!r} fits {len(fitting)} settings, such as {known}")
    labels = (name for line in lines for name in (line.setting[0], _label(line.setting)))
    hint = nearest(text, set(labels))
    raise ValueError(f"--baseline {text!r} is not among the runs; {hint}")


def _has(line: Line, word: str) -> bool:
    """Whether a setting has the override KEY=VALUE; the end of a dotted key is enough."""
    return any(o == word or o.endswith(f".{word}") for o in shlex.split(line.setting[2]))


def kind_of(row: Row) -> str:
    return str(row["status"]).partition(":")[0]
