"""Pictures of what evaluators found: ROC, scores, hardest pairs, separability, latent groups."""

import math
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from marginface.data import Pairs
from marginface.evaluators import curves
from marginface.style import BLUE, GREY, STYLE, VERMILION, WIDTH, cycle, save
from marginface.typing import Bool, Float, Int

GENUINE, IMPOSTOR = BLUE, VERMILION


@STYLE
def roc(curve: curves.Roc, path: pathlib.Path, *, title: str) -> None:
    """TAR over FAR on a logarithmic axis, from one accepted impostor pair on.

    Args:
        curve: of the pairs that are reported on.
        path: a .png.
        title: above the axes.
    """
    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    axes = figure.subplots()
    lowest = curve.far[curve.far > 0].min()
    label = f"trained: AUC {curves.auc(curve):.4f}, EER {curves.eer(curve):.2%}"
    axes.step(curve.far, 100 * curve.tar, where="post", color=BLUE, linewidth=2.0, label=label)
    for far in (far for far in map(float, curves.FARS) if far >= lowest):
        tar = curves.tar_at_far(curve, far)
        axes.plot(far, 100 * tar, "o", color=BLUE, markersize=5, clip_on=False, zorder=5)
        # Right below the point there is room: the curve only rises.
        axes.annotate(
            f"{tar:.2%}",
            (far, 100 * tar),
            (5, -5),
            textcoords="offset points",
            va="top",
            color=BLUE,
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
    save(figure, path)


@STYLE
def histogram(
    scores: Float[np.ndarray, "n"],
    same: Bool[np.ndarray, "n"],
    threshold: float,
    path: pathlib.Path,
    *,
    title: str,
) -> None:
    """How the scores of genuine and of impostor pairs lie about the threshold."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
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
    save(figure, path)


@STYLE
def separabilities(runs: Mapping[str, Float[np.ndarray, "c"]], path: pathlib.Path) -> None:
    """Sep_i = max_{j≠i} cos(W_i, W_j) of one run or of several beside each other."""
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    axes = figure.subplots()
    bins = int(np.clip(np.sqrt(max(map(len, runs.values()))), 10, 60))
    edges = np.histogram_bin_edges(np.concatenate(list(runs.values())), bins=bins)
    for colour, (label, values) in zip(cycle(len(runs)), runs.items(), strict=True):
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
    save(figure, path)


@STYLE
def hardest(
    pairs: Pairs,
    scores: Float[np.ndarray, "n"],
    threshold: float,
    impostor: Int[np.ndarray, "i"],
    genuine: Int[np.ndarray, "g"],
    path: pathlib.Path,
    *,
    title: str,
) -> None:
    """A contact sheet: impostor pairs that score highest, genuine pairs that score lowest.

    Args:
        pairs: with the images.
        scores: [n], one for each pair.
        threshold: pairs with this score or more are accepted.
        impostor, genuine: numbers of the pairs that are shown.
        path: a .png.
        title: above each half, before what it shows.
    """
    sections = [
        ("impostor pairs most alike", IMPOSTOR, impostor),
        ("genuine pairs least alike", GENUINE, genuine),
    ]
    columns = 4
    rows = [math.ceil(len(chosen) / columns) for _, _, chosen in sections]
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.03)
    figure = Figure(figsize=(WIDTH, 0.7 + 1.25 * sum(rows)), layout=layout)
    parts = figure.subfigures(2, 1, height_ratios=rows, squeeze=False)[:, 0]
    for part, (half, colour, chosen), height in zip(parts, sections, rows, strict=True):
        strips = _side_by_side(pairs, chosen)
        part.suptitle(f"{title}: {half}", x=0.01, ha="left", weight="bold", size=11, color=colour)
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
    save(figure, path)


@STYLE
def group_sheet(
    pairs: Pairs,
    chosen: Int[np.ndarray, "m"],
    path: pathlib.Path,
    *,
    title: str,
    columns: int = 10,
    most: int = 16,
) -> None:
    """A contact sheet with a row of faces for each latent group, the most used groups first.

    Args:
        pairs: with the images.
        chosen: the group of each image of pairs.source.
        path: a .png.
        title: above the sheet.
        columns: faces of each group, spread evenly over those that it has.
        most: groups that are shown.
    """
    ids, counts = np.unique(chosen, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    figure = Figure(figsize=(WIDTH, 0.5 + 0.78 * len(order)), layout="constrained")
    figure.suptitle(f"{title}: latent groups", x=0.01, ha="left", weight="bold", size=11)
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
    save(figure, path)


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
