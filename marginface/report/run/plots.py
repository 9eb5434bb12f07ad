"""Pictures of how a run went: each term of the loss, and learning curves."""

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from marginface.evaluators.common import Picture
from marginface.report.run import meanings
from marginface.runs import folder as run_folder
from marginface.style import STYLE, WIDTH, cycle, save

Records = Sequence[Mapping[str, Any]]


def draw(workdir: pathlib.Path, records: Records, evaluators: Iterable[Any] = ()) -> list[Picture]:
    """Draws into <workdir>/plots whatever there is data for.

    Args:
        workdir: the run folder.
        records: the lines of metrics.jsonl.
        evaluators: those that have run; each draws its own, if it has any.
    """
    folder = workdir / run_folder.PLOTS
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    if _names(records, "loss/"):
        losses(records, folder / "loss.png")
        pictures.append(Picture(folder / "loss.png", "Each term of the loss, before its weight."))
    if _panels(records):
        learning(records, folder / "learning.png")
        caption = "How training and evaluation went"
        if any(len(_spread(records, name)) for _, names in _panels(records) for name in names):
            caption += "; bars: ± the standard error, of mean Sep the standard deviation"
        pictures.append(Picture(folder / "learning.png", f"{caption}."))
    for evaluator in evaluators:
        if hasattr(evaluator, "pictures"):
            pictures += evaluator.pictures(folder)
    return pictures


@STYLE
def losses(records: Records, path: pathlib.Path) -> None:
    """One panel for each "loss/<term>", all over the same steps."""
    names = sorted(_names(records, "loss/"), key=lambda n: n != "loss/total")
    height = 3.4 if len(names) == 1 else 0.7 + 2.1 * len(names)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name, colour in zip(panels, names, cycle(len(names)), strict=True):
        steps, values = _series(records, name)
        _line(axes, steps, values, colour, smooth=True)
        axes.set_title(name.removeprefix("loss/").replace("_", " "))
        axes.set_ylabel("loss")
    _step_axis(panels[-1], records)
    save(figure, path)


@STYLE
def learning(records: Records, path: pathlib.Path) -> None:
    """A panel for each kind of figure that has a curve, all over the steps."""
    panels = _panels(records)
    rows = math.ceil(len(panels) / 2)
    columns = min(2, len(panels))
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(WIDTH, 0.3 + 2.6 * rows), layout=layout)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in grid[len(panels) :]:
        unused.remove()
    for axes, (meaning, names) in zip(grid, panels, strict=False):
        for name, colour in zip(names, cycle(len(names)), strict=True):
            steps, values = _series(records, name)
            smooth = name.startswith(("train/", "time/")) and name != "train/learning_rate"
            label = name.rsplit("/", 1)[0] if len(names) > 1 else None
            _line(axes, steps, meaning.factor * values, colour, smooth=smooth, label=label)
            spread = _spread(records, name)
            if len(spread) == len(values):
                axes.errorbar(
                    steps,
                    meaning.factor * values,
                    yerr=meaning.factor * spread,
                    fmt="none",
                    ecolor=colour,
                    elinewidth=1,
                    capsize=2,
                    alpha=0.6,
                )
        axes.set_title(meaning.heading)
        axes.set_ylabel(meaning.unit)
        values = np.concatenate([_series(records, name)[1] for name in names])
        if meaning.unit == "step size" and values.min() > 0 and values.max() / values.min() > 8:
            axes.set_yscale("log")
        if len(names) > 1:
            axes.legend()
        if meaning.unit == "%":
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, (low + high) / 2 - 1), max(high, (low + high) / 2 + 1))
        _step_axis(axes, records)
    save(figure, path)


def _names(records: Records, prefix: str = "", suffix: str = "") -> list[str]:
    """Figures with at least one finite value, in order of appearance."""
    names = dict.fromkeys(k for record in records for k in record)
    matching = [n for n in names if n.startswith(prefix) and n.endswith(suffix) and n != "step"]
    return [n for n in matching if len(_series(records, n)[0])]


def _series(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one figure."""
    points = [
        (record["step"], record[name])
        for record in records
        if isinstance(record.get(name), int | float) and math.isfinite(record[name])
    ]
    steps, values = np.array(points, float).reshape(-1, 2).T
    return steps, values


def _spread(records: Records, name: str) -> np.ndarray:
    """Standard error of an accuracy, standard deviation of the separability; else empty."""
    if name.endswith("/sep_mean"):
        return np.sqrt(_series(records, name.replace("sep_mean", "sep_var"))[1])
    return _series(records, f"{name}_stderr")[1]


def _panels(records: Records) -> list[tuple[meanings.Meaning, list[str]]]:
    """What each learning curve shows, and the figures in it that have data."""
    found = ((meanings.of(last), last) for last in meanings.TABLE)
    panels = [(m, _names(records, suffix=f"/{last}")) for m, last in found if m.curve]
    return [panel for panel in panels if panel[1]]


def _line(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    colour: str,
    *,
    smooth: bool,
    label: str | None = None,
) -> None:
    """A line; with markers if short, with a running mean over it if long and noisy."""
    width = len(values) // 25
    if smooth and width > 1:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
        window = np.full(width, 1 / width)
        steps = np.convolve(steps, window, "valid")
        values = np.convolve(values, window, "valid")
    marker = "o" if len(values) <= 25 else None
    axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker, markersize=4, label=label)


def _step_axis(axes: Axes, records: Records) -> None:
    steps = [record["step"] for record in records]
    margin = max(1, 0.03 * (max(steps) - min(steps)))
    axes.set_xlim(min(steps) - margin, max(steps) + margin)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
