"""Pictures of sweeps: settings, each with a few seeds, along their axes and beside each other.

What is drawn of a setting is its mean over seeds with Student's 95 % interval. Nothing here knows
of run folders; `launch.figures` makes settings of them.
"""

import io
import itertools
import math
import os
import pathlib
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.scale import scale_factory
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from marginface.report.study import statistics
from marginface.report.study.tables import number
from marginface.style import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE, VERMILION, WIDTH
from marginface.typing import Bool, Float

Value = float | str
WHO = ("experiment", "variant")  # axes whose values speak for themselves
_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, "#000000")
_MARKERS = "os^Dv*"
MOST_LINES = len(_COLOURS)  # that one panel holds
# On a setting beside the baseline → colour and how the legend calls it.
VERDICTS = {
    "": ("#444444", "no difference shown"),
    "better": (BLUE, "better"),
    "worse": (VERMILION, "worse"),
    "not tested": ("#AAAAAA", "not tested"),
}
_DARK_IS_BETTER = "YlGnBu"
_MOST_TICKS = 8  # that are the values themselves
_MOST_WRITTEN = 560  # characters of names beside points
_ROOM = 6.4  # inches that cells beside each other have


class Setting(NamedTuple):
    """What differs from others by more than the seed.

    label: what is written beside it; no two have the same.
    at: its value on each axis: {"m": 0.3, "experiment": "arcface"}.
    values: seed → metric in the unit that is shown; empty if there is no mean.
    why: there is no mean, or "".
    complete: its mean is of all runs that were planned.
    others: further figures by name: seed → value.
    """

    label: str
    at: Mapping[str, Value]
    values: Mapping[int, float]
    why: str = ""
    complete: bool = True
    others: Mapping[str, Mapping[int, float]] = {}


class Axis(NamedTuple):
    """What a sweep varies.

    name: the key of `Setting.at`, and how pictures call it.
    values: that settings have: numbers in their order, or words.
    """

    name: str
    values: tuple[Value, ...]

    @property
    def numeric(self) -> bool:
        """Whether a ruler can be made of it."""
        return not any(isinstance(value, str) for value in self.values)


class Metric(NamedTuple):
    """heading: with its unit; form: of its numbers, such as ".2f"; less: whether less is better."""

    heading: str
    form: str = ".4f"
    less: bool = False


def interval(values: Mapping[int, float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval; NaN where there is none."""
    found = statistics.mean_interval(np.array(list(values.values()), np.float64))
    return float(found.mean), float(found.half)


@STYLE
def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes the whole picture or none, in 256 colours: a third of the size."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    temporary = path.with_name(f".{path.name}.part")
    Image.open(drawn).convert("RGB").quantize(256).save(temporary, "png", optimize=True)
    os.replace(temporary, path)


# ---- along axes ---------------------------------------------------------------------------------


@STYLE
def lines(
    settings: Sequence[Setting],
    metric: Metric,
    x: Axis,
    *,
    by: Axis | None = None,
    columns: Axis | None = None,
    rows: Axis | None = None,
    joined: bool = True,
    caption: str = "",
) -> Figure:
    """The metric along an axis with a band of 95 %.

    Args:
        settings: where one has no mean, its line has a gap.
        metric: what stands upwards.
        x: numbers.
        by: a line for each of its values.
        columns: a panel for each of its values.
        rows: a row of panels for each of its values.
        joined: by lines; False where no two settings differ by x only.
        caption: below the panels.
    """
    figure, panels = _panels(columns, rows, height=2.5, most=4 if rows else 3)
    seeds = max(len(s.values) for s in settings)
    for panel in panels:
        held = [s for s in settings if _lies(s, panel.part)]
        for i, value in enumerate(by.values if by else ("",)):
            own = [s for s in held if by is None or s.at[by.name] == value]
            label = _equals(by, value) if by else None
            if joined:
                _band(panel.axes, own, x, i, label, seeds)
            else:
                _points(panel.axes, own, x, i, label)
        if not any(s.values for s in held):
            _blank(panel.axes, "not run")
        _ruler(panel.axes, x, width=panel.width - 0.9)
        panel.axes.set_ylabel(metric.heading if panel.left else "")
        panel.axes.set_xlabel(x.name if panel.bottom else "")
    if by is not None:
        _legend(figure, panels[0].axes)
    _foot(figure, caption)
    return figure


def _band(
    axes: Axes, own: Sequence[Setting], x: Axis, i: int, label: str | None, seeds: int
) -> None:
    """One line: means, hollow where there are fewer seeds, and around them the band.

    Where nothing was measured there is a gap.
    """
    own = sorted(own, key=lambda s: float(s.at[x.name]))
    points = [(float(s.at[x.name]), *interval(s.values)) for s in own]
    at, mean, half = np.array(points, float).reshape(-1, 3).T
    colour, marker = _COLOURS[i % MOST_LINES], _MARKERS[i % MOST_LINES]
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "zorder": 3}
    axes.plot(at, mean, label=label, linewidth=1.8, **style)
    lacking = [0 < len(s.values) < seeds for s in own]
    axes.plot(at[lacking], mean[lacking], linestyle="", markerfacecolor="white", **style)
    axes.fill_between(at, mean - half, mean + half, color=colour, alpha=0.13, linewidth=0)
    for edge in (mean - half, mean + half):  # what lies on what can be told by its edges
        axes.plot(at, edge, color=colour, alpha=0.5, linewidth=0.7)
    alone = _alone(half)
    bars: dict[str, Any] = {"fmt": "none", "ecolor": colour, "elinewidth": 1, "capsize": 2}
    axes.errorbar(at[alone], mean[alone], half[alone], **bars)


def _alone(values: Float[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Which numbers have none beside them: no band can be drawn there."""
    there = np.pad(np.isfinite(values), 1)
    return there[1:-1] & ~there[:-2] & ~there[2:]


def _points(axes: Axes, own: Sequence[Setting], x: Axis, i: int, label: str | None) -> None:
    """Settings that no line joins, each with its interval."""
    own = [s for s in own if s.values]
    at = [float(s.at[x.name]) for s in own]
    mean, half = np.array([interval(s.values) for s in own], float).reshape(-1, 2).T
    colour, marker = _COLOURS[i % MOST_LINES], _MARKERS[i % MOST_LINES]
    axes.errorbar(at, mean, half, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.4)
    axes.plot(at, mean, marker, color=colour, markersize=4.5, label=label, zorder=3)


def scale_of(values: Iterable[Value]) -> tuple[str, dict[str, Any]]:
    """How numbers are best laid out: linear, log over a decade or more, symlog if 0 is there."""
    numbers = np.unique([float(value) for value in values])
    positive = numbers[numbers > 0]
    if numbers[0] < 0 or len(positive) < 2 or positive[-1] / positive[0] < 10:
        return "linear", {}
    if numbers[0] > 0:
        return "log", {}
    step = float(np.median(np.diff(np.log10(positive))))
    return "symlog", {"linthresh": float(positive[0]), "linscale": min(max(step, 0.3), 1.0)}


def _ruler(axes: Axes, x: Axis, *, width: float) -> None:
    """The scale, and a tick at each value that there is room for."""
    kind, how = scale_of(x.values)
    axes.set_xscale(kind, **how)
    at = _placed(x.values, x.values)
    span = at[-1] - at[0] or 1.0
    low, high = at[0] - 0.06 * span, at[-1] + 0.06 * span
    axes.set_xlim(*axes.xaxis.get_transform().inverted().transform([low, high]))
    axes.xaxis.set_minor_locator(NullLocator())
    free, ticks = -math.inf, []
    some = ticks_of(x.values)
    for value, place in zip(some, (_placed(x.values, some) - at[0]) / span * width, strict=True):
        half = (len(_text(value)) + 1.5) * 0.04  # inches
        if place - half >= free:
            ticks.append(value)
            free = place + half
    axes.set_xticks(ticks, [_text(value) for value in ticks])


def ticks_of(values: Sequence[Value]) -> Sequence[Value]:
    """The values themselves, or of many numbers some round ones between them."""
    if len(values) <= _MOST_TICKS or any(isinstance(value, str) for value in values):
        return values
    numbers = np.array(values, float)
    if scale_of(values)[0] == "linear":
        found = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(numbers.min(), numbers.max())
    else:
        ends = np.log10([numbers[numbers > 0].min(), numbers.max()])
        decades = 10.0 ** np.arange(np.floor(ends[0]), np.ceil(ends[1]) + 1)
        steps = (1.0,) if np.ptp(ends) > 2 else (1.0, 2.0, 5.0)
        found = np.append(np.outer(decades, steps), 0.0)
    return [float(f"{v:.6g}") for v in np.unique(found) if numbers.min() <= v <= numbers.max()]


def _placed(values: Sequence[Value], some: Sequence[Value]) -> Float[np.ndarray, "n"]:
    """Where some values lie along the scale of all, evenly spaced if these are words."""
    if any(isinstance(value, str) for value in values):
        return np.array([list(values).index(value) for value in some], float)
    kind, how = scale_of(values)
    transform = scale_factory(kind, Figure().subplots().xaxis, **how).get_transform()
    return np.asarray(transform.transform(np.array(some, float)))


# ---- cells --------------------------------------------------------------------------------------


@STYLE
def heat_maps(
    settings: Sequence[Setting],
    metric: Metric,
    x: Axis,
    y: Axis,
    *,
    columns: Axis | None = None,
    rows: Axis | None = None,
    caption: str = "",
) -> Figure:
    """Mean ± half width in each cell of two axes; a panel for each value of further axes.

    Args:
        settings: of which no two lie in one cell of one panel.
        metric: what colours the cells.
        x: rightwards.
        y: upwards.
        columns: a panel for each of its values.
        rows: a row of panels for each of its values.
        caption: below the panels.
    """
    cell = 0.085 * max(len(line) for s in settings for line in _cell(s, metric)[0].split("\n"))
    beside = max(1, int(_ROOM / cell) // len(x.values))
    height = 0.45 * len(y.values) + 0.7
    figure, panels = _panels(columns, rows, height=height, most=beside)
    across = len(x.values) * sum(panel.bottom for panel in panels)
    figure.set_figwidth(min(WIDTH, max(4.5, 1.6 + 0.9 * across)))
    means = [interval(s.values)[0] for s in settings if s.values]
    colours = matplotlib.colormaps[_DARK_IS_BETTER + "_r" * metric.less]
    norm = Normalize(min(means), max(means))
    for axes, part, left, bottom, _ in panels:
        held = {(s.at[x.name], s.at[y.name]): s for s in settings if _lies(s, part)}
        grid = np.full((len(y.values), len(x.values)), np.nan)
        for row, column in np.ndindex(grid.shape):
            own = held.get((x.values[column], y.values[row]))
            if own is not None and own.values:
                grid[row, column] = interval(own.values)[0]
            ink = _ink(colours(norm(grid[row, column])))
            text, size = _cell(own, metric)
            axes.text(column, row, text, ha="center", va="center", color=ink, size=size)
        axes.imshow(np.ma.masked_invalid(grid), colours, norm, aspect="auto", origin="lower")
        axes.set_facecolor("#EEEEEE")
        axes.grid(False)
        axes.set_xticks(range(len(x.values)), map(_text, x.values))
        axes.set_yticks(range(len(y.values)), map(_text, y.values))
        axes.set_xlabel(x.name if bottom else "")
        axes.set_ylabel(y.name if left else "")
    shades = ScalarMappable(norm, colours)
    bar = figure.colorbar(shades, ax=[panel.axes for panel in panels], aspect=30, pad=0.01)
    bar.set_label(metric.heading)
    bar.outline.set_visible(False)
    _foot(figure, caption)
    return figure


def _cell(own: Setting | None, metric: Metric) -> tuple[str, int]:
    """What stands in a cell, and its size."""
    if own is None:
        return "not run", 7
    if not own.values:
        return textwrap.fill(own.why.partition(":")[0], 12), 7
    return _mean(own, metric, between="\n± "), 8


def _ink(colour: Sequence[float]) -> str:
    """Black or white, whichever can be read on a colour; grey on none."""
    red, green, blue, alpha = colour
    if not alpha:
        return GREY
    return "black" if 0.30 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"


# ---- many axes ----------------------------------------------------------------------------------


@STYLE
def parallel(
    settings: Sequence[Setting], metric: Metric, axes_of: Sequence[Axis], *, caption: str = ""
) -> Figure:
    """A curve for each setting through its values on upright axes, the last of them the metric.

    Curves that share a value are set apart there, the better ones above. The best complete setting
    is thick.

    Args:
        settings: those with a mean are drawn.
        metric: colours the curves, dark is better.
        axes_of: from left to right.
        caption: below.
    """
    sign = -1 if metric.less else 1
    drawn = sorted((s for s in settings if s.values), key=lambda s: sign * interval(s.values)[0])
    means = np.array([interval(s.values)[0] for s in drawn])
    ruler = MaxNLocator(6, steps=[1, 2, 5, 10])
    ticks = [t for t in ruler.tick_values(means.min(), means.max()) if _within(t, means)]
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.subplots()
    heights = [_node_heights(drawn, axis) for axis in axes_of]
    heights.append(_unit(means, means.min(), means.max()))
    colours = matplotlib.colormaps[_DARK_IS_BETTER]
    best = max((i for i, s in enumerate(drawn) if s.complete), default=-1)
    steps = np.linspace(0, 1, 25)
    ease = steps * steps * (3 - 2 * steps)
    for i, values in enumerate(np.transpose(heights)):
        x = np.concatenate([k + steps for k in range(len(axes_of))])
        y = np.concatenate([a + (b - a) * ease for a, b in itertools.pairwise(values)])
        colour = colours(0.3 + 0.7 * i / max(1, len(drawn) - 1))
        axes.plot(x, y, color=colour, linewidth=2.6 if i == best else 1.3, zorder=2)
    for k, axis in enumerate(axes_of):
        some = ticks_of(axis.values)
        _upright(axes, k, axis.name, _unit_places(axis.values, some), map(_text, some), -1)
    at = _unit(np.array(ticks), means.min(), means.max())
    _upright(axes, len(axes_of), metric.heading, at, map(_text, ticks), 1)
    axes.set(xlim=(-0.25, len(axes_of) + 0.25), ylim=(-0.06, 1.06))
    axes.set_axis_off()
    _foot(figure, caption)
    return figure


def _node_heights(drawn: Sequence[Setting], axis: Axis) -> Float[np.ndarray, "n"]:
    """Where each setting crosses an axis: those with one value side by side in their order."""
    places = _unit_places(axis.values, axis.values)
    room = min(0.15, 0.5 * float(np.diff(np.sort(places)).min(initial=1.0)))
    found = np.zeros(len(drawn))
    for value, place in zip(axis.values, places, strict=True):
        members = [i for i, s in enumerate(drawn) if s.at[axis.name] == value]
        reach = min(room, 0.012 * len(members)) if len(members) > 1 else 0.0
        found[members] = place + np.linspace(-reach / 2, reach / 2, len(members))
    return found


def _unit_places(values: Sequence[Value], some: Sequence[Value]) -> Float[np.ndarray, "n"]:
    """Places of some values along the scale of all, which goes from 0.08 to 0.92."""
    at = _placed(values, values)
    return 0.08 + 0.84 * _unit(_placed(values, some), at.min(), at.max())


def _unit(values: np.ndarray, low: float, high: float) -> Float[np.ndarray, "n"]:
    return (values - low) / (high - low) if high > low else np.full(len(values), 0.5)


def _within(value: float, values: np.ndarray) -> bool:
    return bool(values.min() <= value <= values.max())


def _upright(
    axes: Axes, k: int, title: str, at: Iterable[float], texts: Iterable[str], side: int
) -> None:
    """An upright axis with its texts on the left (side −1) or right (1)."""
    axes.plot([k, k], [0, 1], color="black", linewidth=1.2, zorder=3)
    axes.text(k, 1.06, title, ha="center", va="bottom", weight="bold")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.8}
    where = "left" if side > 0 else "right"
    for place, text in zip(at, texts, strict=True):
        axes.plot([k, k + 0.02 * side], [place, place], color="black", linewidth=1.2, zorder=3)
        axes.text(k + 0.035 * side, place, text, ha=where, va="center", size=9, bbox=box, zorder=4)


# ---- beside another figure ----------------------------------------------------------------------


@STYLE
def tradeoff(
    settings: Sequence[Setting],
    metric: Metric,
    other: str,
    beside: Metric,
    *,
    caption: str = "",
) -> Figure:
    """The metric over another figure, with intervals of both, and the Pareto front.

    All settings are named if there is room for that, else those of the front.

    Args:
        settings: those that have both are drawn.
        metric: upwards.
        other: a name in `Setting.others`.
        beside: how that figure is called, and whether less of it is better.
        caption: below.
    """
    drawn = [s for s in settings if s.values and s.others.get(other)]
    y, tall = np.array([interval(s.values) for s in drawn]).T
    x, wide = np.array([interval(s.others[other]) for s in drawn]).T
    best = pareto_front(x, y, less=(beside.less, metric.less))
    figure = Figure(figsize=(WIDTH, 5.8), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(x, y, tall, wide, fmt="none", ecolor=GREY, elinewidth=0.8, alpha=0.45, zorder=1)
    axes.plot(x[~best], y[~best], "o", color=GREY, markersize=5, zorder=3)
    axes.plot(x[best], y[best], "o", color=BLUE, markersize=7, zorder=4, label="Pareto front")
    order = np.flatnonzero(best)[np.argsort(x[best])]
    where = "post" if beside.less else "pre"
    axes.step(x[order], y[order], where=where, color=BLUE, linewidth=1.2, zorder=2)
    _plain_log(axes, x)
    axes.set_xlabel(_better(beside))
    axes.set_ylabel(_better(metric))
    _legend(figure, axes)
    _foot(figure, caption)
    room = sum(len(s.label) for s in drawn) <= _MOST_WRITTEN
    texts = {int(i): drawn[i].label for i in np.argsort(~best, kind="stable") if best[i] or room}
    front = _stair(x[order], y[order], first_across=beside.less)
    wide, tall = np.nan_to_num(wide), np.nan_to_num(tall)
    avoided = [_arms(x, y, wide, 0 * y), _arms(x, y, 0 * x, tall), front, front]
    _name_points(figure, axes, np.stack([x, y], axis=1), np.concatenate(avoided), texts, best)
    return figure


def pareto_front(
    x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"], *, less: tuple[bool, bool]
) -> Bool[np.ndarray, "n"]:
    """Which points no other one beats: as good in both figures and better in one.

    Args:
        x: one figure of each point.
        y: another one.
        less: whether less is better, of x and of y.
    """
    x, y = (-v if down else v for v, down in zip((x, y), less, strict=True))
    no_worse = (x[:, None] <= x) & (y[:, None] <= y)
    better = (x[:, None] < x) | (y[:, None] < y)
    return np.array(~(no_worse & better).any(axis=1), bool)


def _plain_log(axes: Axes, x: np.ndarray) -> None:
    """A log axis where values span a decade, with few ticks that read as plain numbers."""
    if x.min() > 0 and scale_of(x)[0] == "log":
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    elif x.min() > 0:  # an interval may reach below 0, the figure cannot
        axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))


def _better(metric: Metric) -> str:
    return f"{metric.heading}, {'less' if metric.less else 'more'} is better"


def _stair(x: np.ndarray, y: np.ndarray, *, first_across: bool) -> np.ndarray:
    """The boxes [2 (n − 1), 4] of a stair's lines through points from left to right."""
    corners = np.stack((x[1:], y[:-1]) if first_across else (x[:-1], y[1:]), axis=1)
    points = np.stack([x, y], axis=1)
    low, high = np.minimum, np.maximum
    ends = (points[:-1], points[1:])
    return np.concatenate([np.hstack([low(corners, e), high(corners, e)]) for e in ends])


def _arms(x: np.ndarray, y: np.ndarray, wide: np.ndarray, tall: np.ndarray) -> np.ndarray:
    """Boxes [n, 4] about points: left, bottom, right, top."""
    return np.stack([x - wide, y - tall, x + wide, y + tall], axis=1)


def _name_points(
    figure: Figure,
    axes: Axes,
    points: Float[np.ndarray, "n 2"],
    arms: Float[np.ndarray, "a 4"],
    texts: Mapping[int, str],
    bold: Bool[np.ndarray, "n"],
) -> None:
    """Writes each text at the nearest place where it covers no other text, point or leader.

    A text that finds no place is left out.

    Args:
        figure: laid out but for the texts.
        axes: of the points.
        points: in data coordinates.
        arms: boxes that texts avoid where they can, in data coordinates.
        texts: by the point's number; the first are placed first.
        bold: points whose texts stand out.
    """
    canvas = FigureCanvasAgg(figure)  # one that can measure texts
    figure.draw_without_rendering()
    renderer = canvas.get_renderer()
    at = axes.transData.transform(points)
    corners = axes.transData.transform(arms.reshape(-1, 2)).reshape(-1, 4)
    taken = _arms(*at.T, *np.full((2, len(at)), 9.0))
    for i, text in texts.items():
        style: dict[str, Any] = {"size": 8, "color": BLUE if bold[i] else "#333333"}
        written = axes.annotate(text, points[i], (0, 0), textcoords="offset pixels", **style)
        written.set_in_layout(False)
        size = np.array(written.get_window_extent(renderer).size) + 4
        found = _free_place(at[i], size, taken, corners, axes.bbox.extents, len(at))
        if found is None:
            written.remove()
            continue
        middle, box = found
        written.set(position=middle - at[i], ha="center", va="center")
        edge = np.clip(at[i], box[:2], box[2:])
        if np.linalg.norm(edge - at[i]) > 14:
            ends = axes.transData.inverted().transform([at[i], edge])
            (leader,) = axes.plot(*ends.T, color=GREY, linewidth=0.6, zorder=2, scalex=False)
            leader.set_in_layout(False)
            steps = np.linspace(0, 1, 12)[1:, None]
            beads = at[i] + steps * (edge - at[i])
            taken = np.concatenate([taken, _arms(*beads.T, *np.full((2, len(beads)), 2.0))])
        taken = np.concatenate([taken, box[None]])


def _free_place(
    point: np.ndarray, size: np.ndarray, taken: np.ndarray, soft: np.ndarray, frame: Any, n: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Middle and box of a text of this size: near its point, on nothing taken, in the frame.

    An interval that it would cover counts as much as 30 pixels of distance, a text or point (the
    first n that are taken) that its leader would cross as 100. None where all is taken.
    """
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    gap = np.array([12.0, 18, 26, 36, 50, 68, 90, 120, 160])[:, None]
    away = np.stack([np.cos(angle) * (gap + size[0] / 2), np.sin(angle) * (gap + size[1] / 2)], -1)
    middles = point + away.reshape(-1, 2)
    boxes = np.concatenate([middles - size / 2, middles + size / 2], axis=1)
    outside = (boxes[:, :2] < frame[:2]).any(1) | (boxes[:, 2:] > frame[2:]).any(1)
    free = ~outside & (_overlaps(boxes, taken) == 0)
    if not free.any():
        return None
    cost = np.where(free, np.repeat(gap[:, 0], len(angle)), np.inf) + 30 * _overlaps(boxes, soft)
    edges = np.clip(point, boxes[:, :2], boxes[:, 2:])
    others = np.concatenate([taken[:n][(np.abs(taken[:n, :2] - point + 9) > 1).any(1)], taken[n:]])
    for share in np.linspace(0.1, 1, 10):
        bead = point + share * (edges - point)
        cost += 100 * _overlaps(np.concatenate([bead, bead], axis=1), others)
    least = int(np.argmin(cost))
    return middles[least], boxes[least]


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How many of the others each box meets."""
    apart = (boxes[:, None, :2] >= others[:, 2:]) | (boxes[:, None, 2:] <= others[:, :2])
    return (~apart.any(axis=2)).sum(axis=1)


# ---- all settings -------------------------------------------------------------------------------


@STYLE
def forest(
    settings: Sequence[Setting],
    metric: Metric,
    *,
    baseline: Setting | None = None,
    verdicts: Mapping[str, str] | None = None,
    caption: str = "",
) -> Figure:
    """Each setting's mean with its interval, downwards as given; each seed a small stroke.

    The mean of an incomplete setting is hollow.

    Args:
        settings: those with a mean are drawn.
        metric: rightwards.
        baseline: its mean is a line through all.
        verdicts: label → a key of VERDICTS, of each setting but the baseline.
        caption: below.
    """
    drawn = [s for s in settings if s.values]
    plain, given = "#444444", {}  # of what is compared with nothing; label → verdict
    if baseline is not None:
        plain, others = "black", (s.label for s in drawn if s.label != baseline.label)
        given = {label: (verdicts or {}).get(label, "not tested") for label in others}
    places = np.arange(len(drawn), 0, -1)
    figure = Figure(figsize=(WIDTH, 1.3 + 0.21 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    for setting, place in zip(drawn, places, strict=True):
        mean, half = interval(setting.values)
        colour = VERDICTS[given[setting.label]][0] if setting.label in given else plain
        inside = colour if setting.complete else "white"
        seeds = list(setting.values.values())
        axes.errorbar(mean, place, xerr=half, color=colour, elinewidth=1.6, capsize=2.5)
        axes.plot(seeds, [place] * len(seeds), "|", color=colour, markersize=5, alpha=0.6)
        axes.plot(mean, place, "o", color=colour, markerfacecolor=inside, markersize=6, zorder=3)
    if baseline is not None:
        axes.axvline(interval(baseline.values)[0], color="black", linewidth=1, linestyle="--")
        axes.plot([], [], "--", color="black", linewidth=1, label=f"baseline: {baseline.label}")
        for verdict, (colour, text) in VERDICTS.items():
            if verdict in given.values():
                axes.plot([], [], "o", color=colour, label=text)
        _legend(figure, axes)
    axes.grid(False, axis="y")
    axes.set_ylim(0.3, len(drawn) + 0.7)
    axes.set_yticks(places, [s.label for s in drawn], size=9)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(_better(metric))
    right = axes.twinx()
    right.set_ylim(*axes.get_ylim())
    right.set_yticks(places, [_mean(s, metric) for s in drawn], size=9)
    right.tick_params(axis="y", length=0)
    right.grid(False)
    right.spines["left"].set_visible(False)
    _foot(figure, caption)
    return figure


# ---- parts of pictures --------------------------------------------------------------------------


class _Panel(NamedTuple):
    """part: what its settings have in common; left, bottom: where labels stand; width: inches."""

    axes: Axes
    part: Mapping[str, Value]
    left: bool
    bottom: bool
    width: float


def _panels(
    columns: Axis | None, rows: Axis | None, *, height: float, most: int
) -> tuple[Figure, list[_Panel]]:
    """A panel for each value or pair of values; at most so many beside each other."""
    axes_of = [axis for axis in (rows, columns) if axis is not None]
    parts = [dict(zip((a.name for a in axes_of), at, strict=True)) for at in _product(axes_of)]
    in_row = len(columns.values) if rows and columns else len(parts)
    high = len(parts) // in_row if in_row <= most else math.ceil(len(parts) / most)
    wide = math.ceil(len(parts) / high)
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06)
    figure = Figure(figsize=(WIDTH, 1.2 + height * high), layout=layout)
    grid = figure.subplots(high, wide, squeeze=False, sharex=True, sharey=True).ravel()
    for unused in grid[len(parts) :]:
        unused.remove()
    panels = []
    for i, (axes, part) in enumerate(zip(grid, parts, strict=False)):
        bottom = i + wide >= len(parts)
        axes.tick_params(labelbottom=bottom)
        axes.set_title(", ".join(_equals(a, part[a.name]) for a in axes_of), size=10)
        panels.append(_Panel(axes, part, i % wide == 0, bottom, WIDTH / wide))
    return figure, panels


def _product(axes_of: Sequence[Axis]) -> list[tuple[Value, ...]]:
    return list(itertools.product(*(axis.values for axis in axes_of)))


def _lies(setting: Setting, part: Mapping[str, Value]) -> bool:
    return all(setting.at[name] == value for name, value in part.items())


def _blank(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=GREY)


def _foot(figure: Figure, text: str) -> None:
    lines = textwrap.fill(text, int(17.5 * figure.get_figwidth()))
    figure.supxlabel(lines, x=0.01, ha="left", size=7.5, color=GREY)


def _legend(figure: Figure, axes: Axes) -> None:
    """Above the panels, where it covers nothing, in as many columns as there is room for."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, 110 // (max(map(len, labels)) + 7))
    columns = len(labels) if sum(map(len, labels)) + 7 * len(labels) < 110 else columns
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def _text(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:g}".replace("-", "−")


def _equals(axis: Axis, value: Value) -> str:
    return _text(value) if axis.name in WHO else f"{axis.name} = {_text(value)}"


def _mean(setting: Setting, metric: Metric, *, between: str = " ± ") -> str:
    mean, half = interval(setting.values)
    text = number(mean, metric.form)
    return text if math.isnan(half) else f"{text}{between}{number(half, metric.form)}"
