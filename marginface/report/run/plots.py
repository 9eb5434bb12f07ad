"""Pictures of a run: losses, learning, ROC, scores, the hardest pairs."""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from marginface.data import Pairs
from marginface.evaluators import curves, grouping, verification
from marginface.runs import folder as run_folder
from marginface.typing import Bool, Float, Int

Records = Sequence[Mapping[str, Any]]

# Okabe & Ito's palette: told apart by colour-blind readers and in grey print.
BLUE, VERMILION, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
GREY = "#666666"
GENUINE, IMPOSTOR = BLUE, VERMILION

_STYLE = matplotlib.rc_context(
    {
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#DDDDDD",
        "grid.linewidth": 0.6,
        "legend.framealpha": 0.9,
        "legend.edgecolor": "none",
        "legend.fontsize": 9,
        "figure.facecolor": "white",
        "figure.dpi": 150,
        "savefig.dpi": 150,
    }
)
_WIDTH = 8.0  # inches: 1,200 pixels


class Picture(NamedTuple):
    """A drawn file and one line that says how to read it."""

    path: pathlib.Path
    caption: str


def draw(
    workdir: pathlib.Path,
    records: Records,
    evaluators: Sequence[verification.Evaluator] = (),
    untrained: Mapping[str, np.ndarray] | None = None,
    separability: Float[np.ndarray, "c"] | None = None,
    groupings: Sequence[grouping.Evaluator] = (),
) -> list[Picture]:
    """Draws into <workdir>/plots whatever there is data for.

    Args:
        workdir: the run folder.
        records: the lines of metrics.jsonl.
        evaluators: those that have run; their last scores are drawn.
        untrained: scores before training by name of the pairs, drawn beside the ROC.
        separability: Sep_i of every class, if the classes have prototypes.
        groupings: those that have run, of a network with latent groups.
    """
    folder = workdir / run_folder.PLOTS
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    if _names(records, "loss/"):
        losses(records, folder / "loss.png")
        pictures.append(Picture(folder / "loss.png", "Each term of the loss, before its weight."))
    if _panels(records):
        learning(records, folder / "learning.png")
        pictures.append(Picture(folder / "learning.png", "How training and evaluation went."))
    for evaluator in evaluators:
        if evaluator.scores is None or evaluator.threshold is None:
            continue
        pairs, threshold = evaluator.pairs, evaluator.threshold
        shown = verification.tested(pairs.fold, pairs.protocol)
        scores, same = evaluator.scores[shown], pairs.same[shown]
        drawn = {"trained": curves.roc(scores, same)}
        if untrained and pairs.name in untrained:
            drawn["untrained"] = curves.roc(untrained[pairs.name][shown], same)
        path = folder / f"{pairs.name}_roc.png"
        roc(drawn, path, title=pairs.name)
        caption = "Genuine pairs accepted, for each rate of impostor pairs accepted by mistake."
        pictures.append(Picture(path, f"{pairs.name}: {caption}"))
        path = folder / f"{pairs.name}_scores.png"
        histogram(scores, same, threshold, path, title=pairs.name)
        caption = "Scores of both kinds of pairs; what overlaps is decided wrongly."
        pictures.append(Picture(path, f"{pairs.name}: {caption}"))
        path = folder / f"{pairs.name}_hardest.png"
        hardest(pairs, evaluator.scores, threshold, path)
        caption = "The impostor pairs most alike and the genuine pairs least alike."
        pictures.append(Picture(path, f"{pairs.name}: {caption}"))
    if separability is not None:
        separabilities({"all classes": separability}, folder / "separability.png")
        caption = (
            "How far each prototype lies from the nearest other one: a cosine, less is better."
        )
        pictures.append(Picture(folder / "separability.png", caption))
    for used in groupings:
        if used.chosen is not None:
            name = used.verified.pairs.name
            group_sheet(used.verified.pairs, used.chosen, folder / f"{name}_groups.png")
            caption = "Faces of each latent group, the same number from each."
            pictures.append(Picture(folder / f"{name}_groups.png", f"{name}: {caption}"))
    return pictures


@_STYLE
def losses(records: Records, path: pathlib.Path) -> None:
    """One panel for each "loss/<term>", all over the same steps."""
    names = sorted(_names(records, "loss/"), key=lambda n: n != "loss/total")
    height = 3.4 if len(names) == 1 else 0.7 + 2.1 * len(names)
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name, colour in zip(panels, names, _cycle(len(names)), strict=True):
        steps, values = _series(records, name)
        _line(axes, steps, values, colour, smooth=True)
        axes.set_title(name.removeprefix("loss/").replace("_", " "))
        axes.set_ylabel("loss")
    _step_axis(panels[-1], records)
    _save(figure, path)


@_STYLE
def learning(records: Records, path: pathlib.Path) -> None:
    """Training accuracy, angle, learning rate, verification accuracy, prototypes, speed by step."""
    panels = _panels(records)
    rows = math.ceil(len(panels) / 2)
    columns = min(2, len(panels))
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(_WIDTH, 0.3 + 2.6 * rows), layout=layout)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in grid[len(panels) :]:
        unused.remove()
    for axes, (title, unit, names) in zip(grid, panels, strict=False):
        for name, colour in zip(names, _cycle(len(names)), strict=True):
            steps, values = _series(records, name)
            factor = 100 if unit == "%" else 1
            smooth = name.startswith(("train/", "time/")) and name != "train/learning_rate"
            label = name.rsplit("/", 1)[0] if len(names) > 1 else None
            _line(axes, steps, factor * values, colour, smooth=smooth, label=label)
            spread = _spread(records, name)
            if len(spread) == len(values):
                axes.errorbar(
                    steps,
                    factor * values,
                    yerr=factor * spread,
                    fmt="none",
                    ecolor=colour,
                    elinewidth=1,
                    capsize=2,
                    alpha=0.6,
                )
        axes.set_title(title)
        axes.set_ylabel(unit)
        values = np.concatenate([_series(records, name)[1] for name in names])
        if title == "learning rate" and values.min() > 0 and values.max() / values.min() > 8:
            axes.set_yscale("log")
        if len(names) > 1:
            axes.legend()
        if unit == "%":
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, (low + high) / 2 - 1), max(high, (low + high) / 2 + 1))
        _step_axis(axes, records)
    _save(figure, path)


@_STYLE
def roc(found: Mapping[str, curves.Roc], path: pathlib.Path, *, title: str) -> None:
    """TAR over FAR on a logarithmic axis, from one accepted impostor pair on.

    Args:
        found: by the name that the legend shows; the first is the main one.
        path: a .png.
        title: above the axes.
    """
    figure = Figure(figsize=(_WIDTH, 5.2), layout="constrained")
    axes = figure.subplots()
    lowest = min(curve.far[curve.far > 0].min() for curve in found.values())
    for (name, curve), colour in zip(found.items(), (BLUE, GREY, GREEN, ORANGE), strict=False):
        label = f"{name}: AUC {curves.auc(curve):.4f}, EER {curves.eer(curve):.2%}"
        width = 2.0 if colour == BLUE else 1.4
        axes.step(
            curve.far, 100 * curve.tar, where="post", color=colour, linewidth=width, label=label
        )
        for far in map(float, curves.FARS):
            if colour == BLUE and far >= lowest:
                tar = curves.tar_at_far(curve, far)
                axes.plot(far, 100 * tar, "o", color=colour, markersize=5, clip_on=False, zorder=5)
                # Right below the point there is room: the curve only rises.
                axes.annotate(
                    f"{tar:.2%}",
                    (far, 100 * tar),
                    (5, -5),
                    textcoords="offset points",
                    va="top",
                    color=colour,
                    fontsize=9,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.8},
                )
    chance = np.geomspace(lowest, 1, 200)
    axes.plot(chance, 100 * chance, ":", color=GREY, linewidth=1, label="chance")
    axes.set_xscale("log")
    axes.set_xlim(min(lowest, 0.5), 1)
    axes.set_ylim(0, 104)
    axes.set_xlabel("FAR: impostor pairs accepted")
    axes.set_ylabel("TAR: genuine pairs accepted (%)")
    percent = FuncFormatter(lambda x, _: f"{100 * x:g}%")
    axes.xaxis.set_major_formatter(percent)
    few = FuncFormatter(lambda x, _: f"{100 * x:g}%" if round(100 * x) in (20, 50) else "")
    axes.xaxis.set_minor_formatter(NullFormatter() if lowest <= 0.1 else few)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_title(f"{title}: ROC")
    axes.legend(loc="lower right")
    _save(figure, path)


@_STYLE
def histogram(
    scores: Float[np.ndarray, "n"],
    same: Bool[np.ndarray, "n"],
    threshold: float,
    path: pathlib.Path,
    *,
    title: str,
) -> None:
    """How the scores of genuine and of impostor pairs lie about the threshold."""
    figure = Figure(figsize=(_WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    bins = int(np.clip(np.sqrt(len(scores)), 10, 60))
    edges = np.histogram_bin_edges(scores, bins=bins)
    far, tar = curves.rates(scores, same, threshold)
    kinds = [
        (IMPOSTOR, ~same, f"impostor pairs, {far:.2%} accepted"),
        (GENUINE, same, f"genuine pairs, {1 - tar:.2%} refused"),
    ]
    for colour, kind, label in kinds:
        counts, _ = np.histogram(scores[kind], edges)
        shares = 100 * counts / kind.sum()
        axes.stairs(shares, edges, fill=True, color=colour, alpha=0.35)
        axes.stairs(
            shares, edges, color=colour, linewidth=1.5, zorder=3, label=f"{kind.sum():,} {label}"
        )
    axes.axvline(threshold, color="black", linewidth=1.3, linestyle="--")
    axes.annotate(
        f" threshold {threshold:.3f}",
        (threshold, 1),
        xycoords=("data", "axes fraction"),
        va="top",
        fontsize=9,
    )
    axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
    axes.set_xlabel("score: cosine of the two embeddings")
    axes.set_ylabel("share of the pairs of a kind")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}%"))
    axes.set_title(f"{title}: scores", pad=26)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    _save(figure, path)


@_STYLE
def separabilities(runs: Mapping[str, Float[np.ndarray, "c"]], path: pathlib.Path) -> None:
    """Sep_i = max_{j≠i} cos(W_i, W_j) of one run or of several beside each other."""
    figure = Figure(figsize=(_WIDTH, 4.0), layout="constrained")
    axes = figure.subplots()
    bins = int(np.clip(np.sqrt(max(map(len, runs.values()))), 10, 60))
    edges = np.histogram_bin_edges(np.concatenate(list(runs.values())), bins=bins)
    for colour, (label, values) in zip(_cycle(len(runs)), runs.items(), strict=True):
        shares = 100 * np.histogram(values, edges)[0] / len(values)
        axes.stairs(shares, edges, fill=True, color=colour, alpha=0.25)
        text = f"{label}: mean {values.mean():.3f}, variance {values.var():.5f}"
        axes.stairs(shares, edges, color=colour, linewidth=1.5, zorder=3, label=text)
        axes.axvline(values.mean(), color=colour, linewidth=1.3, linestyle="--")
    axes.set_xlabel("Sep: cosine of a prototype to the nearest other one")
    axes.set_ylabel("share of the classes")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}%"))
    axes.set_title("Separability of the prototypes", pad=18 + 14 * len(runs))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    _save(figure, path)


@_STYLE
def hardest(
    pairs: Pairs,
    scores: Float[np.ndarray, "n"],
    threshold: float,
    path: pathlib.Path,
    *,
    count: int = 8,
) -> None:
    """A contact sheet: impostor pairs that score highest, genuine pairs that score lowest.

    Args:
        pairs: with the images.
        scores: [n], one for each pair.
        threshold: pairs with this score or more are accepted.
        path: a .png.
        count: pairs of each kind.
    """
    impostor, genuine = hardest_pairs(pairs, scores, count=count)
    sections = [
        ("impostor pairs most alike", IMPOSTOR, impostor),
        ("genuine pairs least alike", GENUINE, genuine),
    ]
    columns = 4
    rows = [math.ceil(len(chosen) / columns) for _, _, chosen in sections]
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.03)
    figure = Figure(figsize=(_WIDTH, 0.7 + 1.25 * sum(rows)), layout=layout)
    parts = figure.subfigures(2, 1, height_ratios=rows, squeeze=False)[:, 0]
    for part, (title, colour, chosen), height in zip(parts, sections, rows, strict=True):
        strips = _side_by_side(pairs, chosen)
        part.suptitle(
            f"{pairs.name}: {title}", x=0.01, ha="left", weight="bold", size=11, color=colour
        )
        grid = part.subplots(height, columns, squeeze=False).ravel()
        for axes in grid[len(chosen) :]:
            axes.set_axis_off()
        for axes, strip, pair in zip(grid, strips, chosen, strict=False):
            axes.imshow(strip)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color=colour, linewidth=2.5)
            accepted = scores[pair] >= threshold
            verdict = "accepted" if accepted else "refused"
            wrong = accepted != pairs.same[pair]
            axes.set_title(
                f"{scores[pair]:.3f} {verdict} {'✗' if wrong else '✓'}",
                loc="center",
                size=9,
                weight="normal",
            )
    _save(figure, path)


@_STYLE
def group_sheet(
    pairs: Pairs,
    chosen: Int[np.ndarray, "m"],
    path: pathlib.Path,
    *,
    columns: int = 10,
    most: int = 16,
) -> None:
    """A contact sheet with a row of faces for each latent group, the most used groups first.

    Args:
        pairs: with the images.
        chosen: the group of each image of pairs.source.
        path: a .png.
        columns: faces of each group, spread evenly over those that it has.
        most: groups that are shown.
    """
    ids, counts = np.unique(chosen, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    figure = Figure(figsize=(_WIDTH, 0.5 + 0.78 * len(order)), layout="constrained")
    figure.suptitle(f"{pairs.name}: latent groups", x=0.01, ha="left", weight="bold", size=11)
    grid = figure.subplots(len(order), columns, squeeze=False)
    for row, i in zip(grid, order, strict=True):
        members = np.flatnonzero(chosen == ids[i])
        shown = members[np.linspace(0, len(members) - 1, min(columns, len(members))).astype(int)]
        for axes, image in zip(row, _images(pairs, shown), strict=False):
            axes.imshow(image)
        for axes in row:
            axes.set_axis_off()
        share = f"{ids[i] + 1}: {counts[i] / len(chosen):.0%} "
        row[0].text(-0.1, 0.5, share, transform=row[0].transAxes, ha="right", va="center", size=9)
    _save(figure, path)


def hardest_pairs(
    pairs: Pairs, scores: Float[np.ndarray, "n"], *, count: int
) -> tuple[Int[np.ndarray, "i"], Int[np.ndarray, "g"]]:
    """Numbers of the impostor pairs that score highest and the genuine pairs that score lowest."""
    shown = np.flatnonzero(verification.tested(pairs.fold, pairs.protocol))
    rising = shown[np.argsort(scores[shown], kind="stable")]
    same = pairs.same[rising]
    return rising[~same][::-1][:count], rising[same][:count]


def _side_by_side(pairs: Pairs, chosen: np.ndarray) -> np.ndarray:
    """Both images of each pair in one strip [n, h, 2w + gap, 3], in [0, 1]."""
    images = _images(pairs, np.stack([pairs.first[chosen], pairs.second[chosen]], axis=1).ravel())
    gap = np.ones((len(chosen), images.shape[1], max(1, images.shape[2] // 24), 3))
    return np.concatenate([images[0::2], gap, images[1::2]], axis=2)


def _images(pairs: Pairs, order: np.ndarray) -> np.ndarray:
    """Images of pairs.source [n, h, w, 3], in [0, 1]."""
    decoded = [pairs.decode(pairs.source[int(i)]) for i in order]
    batch = {k: np.stack([record[k] for record in decoded]) for k in decoded[0]}
    return np.clip((np.asarray(jax.jit(pairs.to_images)(batch)) + 1) / 2, 0, 1)


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
    if name == "prototypes/sep_mean":
        return np.sqrt(_series(records, "prototypes/sep_var")[1])
    return _series(records, f"{name}_stderr")[1]


def _panels(records: Records) -> list[tuple[str, str, list[str]]]:
    """(title, unit, figures) of each learning curve that has data."""
    panels = [
        ("verification accuracy", "%", _names(records, suffix="/accuracy")),
        ("training top-1", "%", _names(records, "train/top1")),
        ("mean angle to the own class", "degrees", _names(records, "train/target_angle")),
        ("learning rate", "step size", _names(records, "train/learning_rate")),
        ("nearest other class: mean ± sd", "cosine", _names(records, "prototypes/sep_mean")),
        ("speed", "examples / s", _names(records, "time/examples_per_s")),
    ]
    return [panel for panel in panels if panel[2]]


def _cycle(count: int) -> list[str]:
    palette = (BLUE, VERMILION, GREEN, PURPLE, ORANGE)
    return [palette[i % len(palette)] for i in range(count)]


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


def _save(figure: Figure, path: pathlib.Path) -> None:
    """Writes the whole picture or none."""
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
