"""Pictures of what runs have left: metric along swept axes, heat maps, trade-offs, intervals.

    marginface figures runs/sweep --out figures --baseline arcface
    marginface figures experiments/results/losses.csv --out docs/figures --only forest pareto

RUNS are what `marginface results` takes: run folders, folders that hold some, or its CSVs.
Whatever there is data for is drawn; each line of output is a picture and how to read it, which also
stands at its foot. Only runs that are done count, the others are counted in the caption.

    forest     all settings, the best above, with 95 % intervals and the baseline's line; those
               that lack runs are hollow and stand below the others
    lines      the metric along each swept axis, a line for each value of a second one
    heat_maps  the metric over two swept axes, a panel for each value of a third one
    parallel   a curve for each setting through three swept axes or more
    pareto     the metric beside the mean Sep of the prototypes, with the Pareto front
    speed      the metric beside the training images per second

In a clone also `python -m launch.figures`.

Exit codes: 0 done; 2 a mistake in the options or the input, or there is nothing to draw.
"""

import math
import pathlib
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from marginface import command
from marginface.command import Parser
from marginface.evaluators.common import Picture
from marginface.report.run import meanings
from marginface.report.study import comparison, sweep_plots
from marginface.report.study.comparison import ALPHA
from marginface.report.study.rows import Row, figure, gather, seed, shares_time
from marginface.report.study.sweep_plots import MOST_LINES, WHO, Axis, Metric, Setting, Value
from marginface.runs import plan

SEP, SPEED = "prototypes/sep_mean", "time/examples_per_s"
_TALLEST = 60  # settings that one interval plot shows


class _Study(NamedTuple):
    """The runs as settings of a sweep.

    key: the figure that is the metric.
    settings: all, best first, incomplete ones and then those without a mean last.
    lines: label → its runs.
    keys: axis → the dotted key that it stands for.
    baseline: its label, or "".
    verdicts: label → "better" or "worse" than the baseline, "" where neither was shown, or
        "not tested"; empty without a baseline.
    """

    key: str
    metric: Metric
    settings: list[Setting]
    lines: Mapping[str, comparison.Line]
    keys: Mapping[str, str]
    baseline: str
    verdicts: Mapping[str, str]


class _Drawn(NamedTuple):
    """A picture that has no place yet."""

    name: str
    caption: str
    make: Callable[[str], Any]  # caption → Figure


def draw(
    rows: Sequence[Row],
    folder: pathlib.Path,
    *,
    metric: str = "/accuracy",
    baseline: str = "",
    only: Sequence[str] = (),
) -> tuple[list[Picture], list[str]]:
    """Draws into <folder> what there is data for.

    Args:
        rows: of `gather`.
        folder: made if it is not there.
        metric: a figure's name, or the end of exactly one.
        baseline: "EXPERIMENT[:VARIANT] [KEY=VALUE ...]", or "" for none.
        only: some of KINDS; all if empty.

    Returns:
        The pictures, and for each kind that could not be drawn why.

    Raises:
        ValueError: no such metric or baseline, or there is nothing to draw at all.
    """
    study = _study(rows, metric, baseline)
    pictures, reasons, names = [], [], Counter()
    for kind in dict.fromkeys(only or KINDS):
        try:
            for drawn in KINDS[kind](study):
                folder.mkdir(parents=True, exist_ok=True)
                names[drawn.name] += 1
                again = f"_{names[drawn.name]}" if names[drawn.name] > 1 else ""
                path = folder / f"{drawn.name}{again}.png"
                sweep_plots.save(drawn.make(drawn.caption), path)
                pictures.append(Picture(path, drawn.caption))
        except _NothingError as error:
            reasons.append(f"{kind}: {error}")
    if not pictures:
        raise ValueError(f"nothing to draw: {'; '.join(reasons)}")
    return pictures, reasons


# ---- rows to settings ---------------------------------------------------------------------------


class _NothingError(ValueError):
    """There is no data for a kind of picture."""


def _study(rows: Sequence[Row], metric: str, baseline: str) -> _Study:
    key = comparison.find_metric(rows, metric)
    lines = comparison.make_lines(rows, key)
    if not any(line.values for line in lines):
        raise ValueError(f"{len(rows)} runs, none of them done with {key!r}: run them first")
    base = comparison.find_line(lines, baseline) if baseline else None
    if base is not None and not base.values:
        raise ValueError(f"--baseline {baseline!r} has no mean: {base.why}")
    lines = lines if base is None else comparison.against(lines, base)
    names = _names(lines)
    labels = _labels(lines, names)
    settings = [_setting(line, labels[line.setting], names, key) for line in lines]
    return _Study(
        key=key,
        metric=_metric(key),
        settings=settings,
        lines={labels[line.setting]: line for line in lines},
        keys={name: key for key, name in names.items()},
        baseline="" if base is None else labels[base.setting],
        verdicts={labels[x.setting]: _verdict(x, key) for x in lines if x.difference is not None},
    )


def _metric(key: str) -> Metric:
    meaning = meanings.of(key)
    return Metric(meaning.title, meaning.form, meaning.less)


def _words(line: comparison.Line) -> dict[str, str]:
    """The overrides of a setting: dotted key → value as text."""
    return {k: v for k, _, v in (word.partition("=") for word in shlex.split(line.setting[2]))}


def _names(lines: Sequence[comparison.Line]) -> dict[str, str]:
    """Dotted key → its name in pictures: λ for a weight, else its shortest telling end."""
    keys = list(dict.fromkeys(key for line in lines for key in _words(line)))
    weights = [key for key in keys if key.endswith(".weight")]
    names = plan.short_keys(keys)
    for key in keys:
        if key in weights:
            names[key] = "λ" if len(weights) == 1 else f"λ of {key.split('.')[-2]}"
        elif key.endswith(".embedding_dim"):
            names[key] = "dim"
    unique = len({*names.values(), *WHO}) == len(names) + len(WHO)
    return names if unique else {key: key for key in keys}


def _labels(lines: Sequence[comparison.Line], names: Mapping[str, str]) -> dict[Any, str]:
    """Setting → what tells it from the others: experiment, variant, overrides."""
    variant, common = comparison.shared_words([line.setting for line in lines])
    found = {}
    alone = len({line.setting[0] for line in lines}) == 1
    for line in lines:
        own = {k: v for k, v in _words(line).items() if f"{k}={v}" not in common}
        words = [
            *([] if alone and own else [line.setting[0]]),
            *([line.setting[1]] if line.setting[1] not in ("", variant) else []),
            *(f"{names[k]}={v}" for k, v in own.items()),
        ]
        found[line.setting] = " ".join(words)
    return found


def _setting(line: comparison.Line, label: str, names: Mapping[str, str], key: str) -> Setting:
    factor = meanings.of(key).factor
    experiment, variant, _ = line.setting
    at: dict[str, Value] = {"experiment": experiment, "variant": variant}
    at |= {names[k]: _number(v) for k, v in _words(line).items()}
    return Setting(
        label=label,
        at=at,
        values={one: factor * value for one, value in line.values.items()},
        why=line.why,
        complete=line.complete,
        others={name: _others(line, name) for name in (SEP, SPEED)},
    )


def _others(line: comparison.Line, name: str) -> dict[int, float]:
    """Another figure of the runs that are counted."""
    rows = [row for row in line.rows if comparison.kind_of(row) == "done"]
    found = {seed(row): figure(row, name) for row in rows}
    return {one: v for one, v in found.items() if v is not None and one in line.values}


def _number(text: str) -> Value:
    try:
        value = float(text)
    except ValueError:
        return text
    return value if math.isfinite(value) else text


def _verdict(line: comparison.Line, key: str) -> str:
    """What could be told of a setting beside the baseline: a key of `sweep_plots.VERDICTS`."""
    if line.difference is None or line.p != line.p:
        return "not tested"
    if line.p > ALPHA:
        return ""
    return "better" if (line.difference.mean < 0) == meanings.of(key).less else "worse"


# ---- axes ---------------------------------------------------------------------------------------


def _groups(study: _Study) -> list[list[Setting]]:
    """Settings that have the same axes, and differ along one at least."""
    found: dict[frozenset[str], list[Setting]] = {}
    for setting in study.settings:
        found.setdefault(frozenset(setting.at), []).append(setting)
    groups = [group for group in found.values() if _swept(group)]
    if not groups:
        raise _NothingError("no override varies within an experiment")
    return groups


def _axes(group: Sequence[Setting]) -> list[Axis]:
    """What varies among settings of the same axes, numbers first."""
    axes = []
    for name in group[0].at:
        values = {setting.at[name] for setting in group}
        if len(values) > 1:
            order = sorted(values, key=lambda v: (isinstance(v, str), v))
            axes.append(Axis(name, tuple(order)))
    return sorted(axes, key=lambda axis: not axis.numeric)


def _swept(group: Sequence[Setting]) -> list[Axis]:
    """The axes that vary within one experiment: those that a sweep has chosen."""
    parts = _by_experiment(group)
    names = {axis.name for part in parts for axis in _axes(part)}
    return [axis for axis in _axes(group) if axis.name in names]


def _by_experiment(group: Sequence[Setting]) -> list[list[Setting]]:
    found: dict[tuple[Value, ...], list[Setting]] = {}
    for setting in group:
        found.setdefault(tuple(setting.at[name] for name in WHO), []).append(setting)
    return list(found.values())


def _suffix(group: Sequence[Setting], groups: Sequence[Any]) -> str:
    """Tells the files of a group from those of others by its experiments."""
    if len(groups) == 1:
        return ""
    names = sorted({str(setting.at["experiment"]) for setting in group})
    return f"_{'+'.join(names if len(names) < 3 else [names[0], f'{len(names) - 1}_more'])}"


# ---- kinds of pictures --------------------------------------------------------------------------


def _forest(study: _Study) -> Iterator[_Drawn]:
    held = [s for s in study.settings if s.values]
    shown = held[:_TALLEST]
    base = next((s for s in held if s.label == study.baseline), None)
    if base is not None and base not in shown:
        shown[-1] = base
    what = "Mean of each setting with its 95 % interval; small strokes are seeds."
    if len(shown) < len(held):
        what += f" The best {len(shown)} of {len(held)} settings."
    if not all(s.complete for s in shown):
        what += " Hollow, below the others: runs are missing, or one seed where others have more."
    if base is not None:
        what += f" Dashed: {base.label}"
        if tested := comparison.tested(list(study.lines.values())):
            what += (
                "; colours: paired t test against it over common seeds, "
                f"p ≤ {ALPHA:g} after Holm over {comparison.count_of(tested, 'test')}"
            )
        what += "."
    yield _Drawn(
        "forest",
        _caption(study, study.settings, what, shown=shown),
        lambda caption: sweep_plots.forest(
            shown, study.metric, baseline=base, verdicts=study.verdicts, caption=caption
        ),
    )


def _lines(study: _Study) -> Iterator[_Drawn]:
    groups = _groups(study)
    for group in groups:
        for x in (axis for axis in _swept(group) if axis.numeric):
            yield _along(study, group, x, _suffix(group, groups))
    if not any(axis.numeric for group in groups for axis in _swept(group)):
        raise _NothingError("no number varies within an experiment")


def _along(study: _Study, group: Sequence[Setting], x: Axis, suffix: str) -> _Drawn:
    """The metric along one axis: lines of a grid, or points where other axes vary freely."""
    axes = _axes(group)
    others = [axis for axis in axes if axis.name != x.name]
    roles = _roles(others) if _joined(group, x) else None
    joined = roles is not None
    if roles is None:
        few = (a for a in others if a.name in WHO and len(a.values) <= MOST_LINES)
        roles = {"by": next(few, None)}
        what = "each point a setting, its bar the 95 % interval; other axes vary as well"
    else:
        what = f"means with bands of 95 % over seeds (Student t), {_seeds_of(group)}"
        what += "; bands are of each mean, not of differences"
    return _Drawn(
        f"lines_{_slug(x.name)}{suffix}",
        _caption(study, group, f"Along {x.name}: {what}.", axes),
        lambda caption: sweep_plots.lines(
            group, study.metric, x, joined=joined, caption=caption, **roles
        ),
    )


def _joined(group: Sequence[Setting], x: Axis) -> bool:
    """Whether most settings have another one that differs from it by x only."""
    rest = [tuple(v for k, v in s.at.items() if k != x.name) for s in group]
    counts = Counter(rest)
    return sum(counts[r] > 1 for r in rest) > len(rest) / 2


def _roles(others: Sequence[Axis]) -> dict[str, Axis | None] | None:
    """Which axis makes lines, and which make panels; None if they are too many."""
    by = next((axis for axis in others if len(axis.values) <= MOST_LINES), None)
    panels = sorted((a for a in others if a is not by), key=lambda a: len(a.values))
    if len(panels) > 2 or (len(panels) == 2 and len(panels[0].values) > 4):
        return None
    return {"by": by} | dict(zip(("columns", "rows"), panels, strict=False))


def _seeds_of(group: Sequence[Setting]) -> str:
    """Whether all points are means over the same seeds."""
    seeds = {frozenset(s.values) for s in group if s.values}
    return (
        "every point over the same seeds" if len(seeds) == 1 else "hollow where seeds are missing"
    )


def _heat_maps(study: _Study) -> Iterator[_Drawn]:
    parts = [part for group in _groups(study) for part in _grids(group)]
    crossed = [(part, _axes(part)) for part in parts if any(s.values for s in part)]
    crossed = [(part, axes) for part, axes in crossed if len(axes) > 1]
    found = [(part, axes) for part, axes in crossed if _is_grid(part, axes)]
    if not crossed:
        raise _NothingError("one override varies, not two")
    if not found:
        raise _NothingError("what was run fills no grid of at most four axes")
    for part, axes in found:
        x, y, *panels = sorted(axes, key=lambda a: (not a.numeric, -len(a.values)))
        y = y if y.numeric else y._replace(values=y.values[::-1])  # words are read downwards
        roles = dict(zip(("columns", "rows"), reversed(panels), strict=False))
        who = "" if "experiment" in (a.name for a in axes) else f"{part[0].at['experiment']}, "
        yield _Drawn(
            f"heat_maps{_suffix(part, found)}",
            _caption(study, part, f"In each cell: {who}mean ± half of its 95 % interval.", axes),
            lambda caption, part=part, x=x, y=y, roles=roles: sweep_plots.heat_maps(
                part, study.metric, x, y, caption=caption, **roles
            ),
        )


def _grids(group: list[Setting]) -> list[list[Setting]]:
    """A grid for each experiment; one of all where a single override varies."""
    return [group] if len(_swept(group)) == 1 else _by_experiment(group)


def _is_grid(part: Sequence[Setting], axes: Sequence[Axis]) -> bool:
    """Whether settings fill a third of the cells or more, in cells that can be read."""
    sizes = [len(axis.values) for axis in axes]
    few = all(len(axis.values) <= (12 if axis.numeric else 40) for axis in axes)
    return len(axes) <= 4 and few and 3 * len(part) >= math.prod(sizes)


def _parallel(study: _Study) -> Iterator[_Drawn]:
    groups = [
        group
        for group in _groups(study)
        if len(_axes(group)) > 2 and sum(bool(s.values) for s in group) > 1
    ]
    if not groups:
        raise _NothingError("fewer than three axes vary")
    for group in groups:
        axes = _axes(group)
        what = "A curve for each setting, its colour the mean: dark is better; the best is thick"
        what += "." if all(s.complete for s in group) else ", of those that lack no runs."
        yield _Drawn(
            f"parallel{_suffix(group, groups)}",
            _caption(study, group, what, axes),
            lambda caption, group=group, axes=axes: sweep_plots.parallel(
                group, study.metric, axes, caption=caption
            ),
        )


def _pareto(study: _Study) -> Iterator[_Drawn]:
    return _beside(study, "pareto", SEP)


def _speed(study: _Study) -> Iterator[_Drawn]:
    return _beside(study, "speed", SPEED)


def _beside(study: _Study, name: str, other: str) -> Iterator[_Drawn]:
    shown = [s for s in study.settings if s.values and s.others[other]]
    if not shown or study.key == other:
        raise _NothingError(f"no run has {other}" if not shown else f"{other} is the metric")
    what = f"{study.key} and {other}: means with 95 % intervals, named where there is room; "
    what += "blue: the means that none beats in both; means only are compared."
    absent = [study.lines[s.label] for s in study.settings if s.values and not s.others[other]]
    together = sum(other == SPEED and any(map(shares_time, line.rows)) for line in absent)
    if together:  # the program's speed is none of its runs'
        what += f" {comparison.count_of(together, 'setting')} left out: trained together."
    if without := len(absent) - together:
        what += f" {comparison.count_of(without, 'setting')} without {other}."
    yield _Drawn(
        name,
        _caption(study, study.settings, what, shown=shown),
        lambda caption: sweep_plots.tradeoff(
            shown, study.metric, other, _metric(other), caption=caption
        ),
    )


KINDS: dict[str, Callable[[_Study], Iterator[_Drawn]]] = {
    "forest": _forest,
    "lines": _lines,
    "heat_maps": _heat_maps,
    "parallel": _parallel,
    "pareto": _pareto,
    "speed": _speed,
}


# ---- captions -----------------------------------------------------------------------------------


def _caption(
    study: _Study,
    planned: Sequence[Setting],
    what: str,
    axes: Sequence[Axis] = (),
    *,
    shown: Sequence[Setting] = (),
) -> str:
    """One line: what it is, the metric, n, seeds, conditions, and the runs that are missing.

    Args:
        study: of the settings.
        planned: what would be shown if all had run.
        what: how to read the picture.
        axes: whose keys are told.
        shown: what is shown; all of the planned that have a mean if empty.
    """
    shown = shown or [s for s in planned if s.values]
    lines = [study.lines[setting.label] for setting in planned]
    done = [r for s in shown for r in study.lines[s.label].rows if seed(r) in s.values]
    variant, common = comparison.shared_words([line.setting for line in lines])
    words = [
        f"{study.key} over {_counted(shown)}",
        *([f"variant {variant}"] if variant else []),
        *([f"all with {' '.join(common)}"] if common else []),
        *(
            f"{a.name}: {study.keys[a.name]}"
            for a in axes
            if study.keys.get(a.name, a.name) != a.name
        ),
        comparison.tally("device", "devices", [str(row["device"]) for row in done]),
        comparison.tally("commit", "commits", [_commit(row) for row in done]),
        *_missing(lines),
    ]
    return f"{what} {'; '.join(words)}."


def _commit(row: Row) -> str:
    return re.sub(r"^([0-9a-f]{7})[0-9a-f]{33}", r"\1", str(row["commit"]))


def _counted(shown: Sequence[Setting]) -> str:
    """How many settings, seeds, and how many seeds each."""
    counts = sorted({len(setting.values) for setting in shown})
    seeds = " ".join(map(str, sorted({one for setting in shown for one in setting.values})))
    text = f"{comparison.count_of(len(shown), 'setting')}, seeds {seeds}, n = {counts[0]}"
    text += f" to {counts[-1]}" if len(counts) > 1 else " each"
    if counts[-1] == 1:
        return f"{text}, so no intervals"
    equal = any(len(s.values) > 1 and math.isnan(sweep_plots.interval(s.values)[1]) for s in shown)
    return f"{text}, no interval where all seeds gave one figure" if equal else text


def _missing(lines: Sequence[comparison.Line]) -> list[str]:
    """The runs that are not complete, and the settings that must not be averaged."""
    done = [sum(comparison.kind_of(row) == "done" for row in line.rows) for line in lines]
    mixed = [line.why.startswith("not averaged") for line in lines]
    absent = sum(len(line.rows) for line in lines) - sum(done)
    without = sum(n - len(x.values) for n, x, m in zip(done, lines, mixed, strict=True) if not m)
    texts = {
        f"{comparison.count_of(absent)} not complete": absent,
        f"{comparison.count_of(without)} without the figure": without,
        f"{comparison.count_of(sum(mixed), 'setting')} not averaged": sum(mixed),
    }
    return [text for text, count in texts.items() if count]


def _slug(text: str) -> str:
    """A text as a file can be called."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text.replace("λ", "lambda")).strip("_")


# ---- the command --------------------------------------------------------------------------------


def run(argv: Sequence[str]) -> None:
    """Draws what `argv` (without the program's name) asks for.

    Raises:
        ValueError: an option, a path or a file that does not fit, or nothing to draw.
    """
    usage = "marginface figures RUNS ... --out FOLDER [options]"
    parser = Parser("marginface figures", __doc__, usage=usage)
    add = parser.add_argument
    add("runs", type=pathlib.Path, nargs="+", metavar="RUNS", help="folders or CSVs")
    add("--out", type=pathlib.Path, required=True, metavar="FOLDER", help="for the pictures")
    add("--metric", default="/accuracy", metavar="END", help="end of a figure's name (%(default)s)")
    add("--baseline", default="", metavar="SETTING", help='"arcface" or "arcface:data=small m=0.3"')
    add("--only", nargs="+", default=(), choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    options = parser.parse_args(argv)
    rows = gather(options.runs)
    pictures, reasons = draw(
        rows, options.out, metric=options.metric, baseline=options.baseline, only=options.only
    )
    for picture in pictures:
        print(f"{picture.path}: {picture.caption}", flush=True)
    for reason in [
        *(reasons if options.only else []),
        *comparison.problems(rows, metric=options.metric),
    ]:
        print(reason, file=sys.stderr)


def main() -> None:
    """The command."""
    command.main(run, "marginface")


if __name__ == "__main__":
    main()
