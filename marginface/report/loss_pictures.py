"""Pictures of the losses: target logits, decision boundaries, ten identities on circle and sphere.

Nothing is drawn by hand. Curves and boundaries are measured on the objective that an experiment
trains, with one example between two classes; the embeddings are trained by it.
"""

import io
import math
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from marginface import build, sharding
from marginface import config as configs
from marginface.losses import regularizers
from marginface.losses.class_softmax import all_classes
from marginface.style import BLUE, GREEN, GREY, STYLE, VERMILION
from marginface.training import objective, step
from marginface.typing import Array

# Tol's muted palette and black: ten identities told apart by colour-blind readers.
IDENTITIES = (
    *("#332288", "#CC6677", "#DDCC77", "#117733", "#88CCEE"),
    *("#882255", "#44AA99", "#999933", "#AA4499", "#000000"),
)

# Which experiments stand in which picture. The first family is drawn with its norms, as they count.
FAMILIES = {
    "embeddings_with_norm": (
        *("softmax", "softmax_regular", "center", "ring"),
        *("l_softmax", "asoftmax", "asoftmax_regular", "sphereface_plus"),
    ),
    "embeddings_by_cosine": (
        *("normface", "label_smoothing", "adacos", "cosface"),
        *("arcface", "combined", "sphereface_r", "focal_arcface"),
    ),
    "embeddings_adaptive": (
        *("adam_softmax", "elasticface", "magface", "adaface"),
        *("curricularface", "mv_softmax", "circle", "sphereface2"),
    ),
    "embeddings_variants": (
        *("arcface_regular", "uniformface", "intra_inter", "subcenter_arcface"),
        *("arcface_partial_fc", "groupface", "uniface", "softmax_triplet"),
    ),
    "embeddings_pairs": ("contrastive", "triplet", "siamese"),
}
_NO_MARGIN: dict[str, Any] = {
    "label": "no margin",
    "color": GREY,
    "linewidth": 1.4,
    "linestyle": "--",
}
_BEHIND: dict[str, Any] = {"linewidth": 5, "alpha": 0.5}  # where another curve lies on it
_WIDTH, _DPI = 10.0, 100  # inches, and pixels in each
WITH_NORM = (*FAMILIES["embeddings_with_norm"], "magface")


class Faces(NamedTuple):
    """Photographs of ten people: images [n, h, w, 3] in [−1, 1], labels [n]."""

    images: np.ndarray
    labels: np.ndarray


class Embedded(NamedTuple):
    """What training made of them.

    points: embeddings [n, d].
    rows: prototypes [c, d], or where there is not one a class, the mean directions of the classes.
    sep: mean over classes of the largest cosine of a row to another one.
    intra: mean angle to the mean direction of the own class, degrees.
    """

    points: np.ndarray
    rows: np.ndarray
    sep: float
    intra: float


def config_of(name: str, variant: str) -> Any:
    """The config that experiments/<name>.py makes of a variant."""
    return configs.load(f"experiments/{name}.py:{variant}").unlock()


def render(*, samples: int = 40) -> Faces:
    """The first ten people of the embedded faces, as data=small draws them."""
    config = config_of("normface", "data=small")
    config.data.kw.update(identities=len(IDENTITIES), samples=samples)
    faces, _ = build.load_data(config)
    records = [faces.decode(faces.source[i]) for i in range(len(faces.source))]
    batch = {k: np.stack([record[k] for record in records]) for k in records[0]}
    return Faces(np.asarray(faces.to_images(batch)), batch["label"])


def embed(name: str, dim: int, faces: Faces, *, steps: int = 300, seed: int = 0) -> Embedded:
    """Trains the smallest network by the loss of an experiment; embeds the images it has seen.

    All is as data=small has it, but for what a short run in few dimensions asks of every loss: five
    times the learning rate, or norms stay small; annealing done after half of the run; MagFace's
    bounds smaller as norms are, by √dim.
    """
    config = config_of(name, f"data=small,dim={dim}")
    config.model.kw.get("backbone_kw", config.model.kw).depth = 4
    config.optimizer.learning_rate *= 5
    if config.loss.get("anneal"):
        anneal = config.loss.anneal
        anneal.rate = 2 * (anneal.start / anneal.least - 1) / steps
    if name == "magface":
        for bounds in (config.loss.kw, config.joint.magnitude):
            bounds.update({k: bounds[k] * math.sqrt(dim / 128) for k in ("lower", "upper")})
    mesh, classes = sharding.make_mesh(1), len(IDENTITIES)
    losses = objective.make(
        config, num_classes=classes, embedding_dim=dim, mesh=mesh, total_steps=steps
    )
    functions = step.make(
        config,
        model=build.make_model(config),
        objective=losses,
        mesh=mesh,
        image_shape=faces.images.shape[1:],
        total_steps=steps,
    )
    hyper, number = objective.hyper(config), jnp.int32(seed)
    state = functions.init(number, hyper)
    batch = min(100, len(faces.labels))
    images, labels = jnp.asarray(faces.images), jnp.asarray(faces.labels)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.permutation(len(labels))[:batch]
        state, metrics = functions.train(state, images[chosen], labels[chosen], hyper, number)
    if not np.isfinite(float(metrics["loss/total"])):
        raise ValueError(f"{name} in {dim} dimensions: the loss is not finite")
    points = np.asarray(functions.embed(state, images)["embedding"])
    rows = means = _unit(np.eye(classes)[faces.labels].T @ _unit(points))
    if objective.one_row_a_class(config):
        rows = _unit(np.asarray(objective.weights(state["params"]["prototypes"]))[:classes])
    sep = jax.jit(regularizers.exclusive)(all_classes(jnp.asarray(rows), classes))
    own = np.sum(_unit(points) * means[faces.labels], axis=1)
    intra = np.degrees(np.arccos(np.clip(own, -1, 1)))
    return Embedded(points, rows, float(jnp.mean(sep)), float(np.mean(intra)))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


# One example between two classes.

Loss = Callable[..., Array]  # (θ to the own prototype, θ to the other, ‖x‖ = 1) → its loss
DEGREES = np.linspace(0.125, 179.875, 720)
_RADIANS = np.radians(DEGREES).astype(np.float32)


def probe(name: str, *, margin: float = 0.0, running: Any = None, **overrides: Any) -> Loss:
    """The loss over classes of an experiment, of one example between two classes.

    Published values, but for s = 1, so that losses compare; biases are 0, annealing is over.

    Args:
        name: of the experiment.
        margin: of every class, where the loss learns it (AdaM-Softmax).
        running: what the loss remembers; as it starts if not given.
        overrides: of config.loss or config.loss.kw, e.g. detach=True.
    """
    config = config_of(name, "data=folder,root=-")
    for section in objective.MODULES:
        config[section] = {}
    overrides = {"scale": 1.0} | overrides if "scale" in config.loss else overrides
    for key, value in overrides.items():
        (config.loss if key in config.loss else config.loss.kw)[key] = value
    made = objective.make(
        config, num_classes=2, embedding_dim=3, mesh=sharding.make_mesh(1), total_steps=1
    )
    hyper = objective.hyper(config)
    params, start = made.init(jax.random.key(0), hyper)
    params["terms"] = jax.tree.map(jnp.zeros_like, params["terms"])
    running = start if running is None else {f"loss.{config.loss.name}": running}

    def loss(own: Array, other: Array, length: Any = 1.0) -> Array:
        # x = (‖x‖, 0, 0): in three dimensions any two angles to it go together.
        first = jnp.stack([jnp.cos(own), jnp.sin(own), 0.0 * own])
        second = jnp.stack([jnp.cos(other), 0.0 * other, jnp.sin(other)])
        rows = params["prototypes"]
        weight = objective.weights(rows).at[:2].set(jnp.stack([first, second]))
        if hasattr(rows, "margin"):
            rows = rows._replace(margin=jnp.full_like(rows.margin, margin))
        rows = rows._replace(weight=weight) if hasattr(rows, "weight") else weight
        output = {"embedding": length * jnp.eye(1, 3)}
        now = {**params, "prototypes": rows}
        step, key = jnp.int32(10**9), jax.random.key(0)
        return made.loss(now, running, output, jnp.zeros(1, jnp.int32), hyper, step, key)[0]

    return loss


def target_logit(loss: Loss, *, opposite: float = -1.0, length: float = 1.0) -> Any:
    """z_y at each of DEGREES and its derivative in θ, as training has it.

    loss = softplus(z_j − z_y); the other class lies opposite, where z_j is known.
    """

    def logit(own: Array) -> Array:
        return opposite - _inverse_softplus(loss(own, jnp.float32(np.pi), length))

    return jax.jit(jax.vmap(jax.value_and_grad(logit)))(_RADIANS)


def negative_logit(loss: Loss, own: float, *, opposite: float = -1.0) -> np.ndarray:
    """z_j at each of DEGREES, of an example at `own` degrees from its prototype."""
    angles = np.append(_RADIANS, np.float32(np.pi))
    values = jax.jit(jax.vmap(partial(loss, jnp.float32(np.radians(own)))))(angles)
    differences = _inverse_softplus(values)
    return np.asarray(differences[:-1] - differences[-1] + opposite)


def boundary(loss: Loss, degrees: np.ndarray) -> np.ndarray:
    """z_1 − z_2 of an example of class 1, for θ1 along the columns and θ2 along the rows."""
    angles = jnp.radians(jnp.asarray(degrees, jnp.float32))
    grid = jax.vmap(jax.vmap(loss, (0, None)), (None, 0))
    return np.asarray(-_inverse_softplus(jax.jit(grid)(angles, angles)))


def of_points(name: str, labels: tuple[int, ...], **overrides: Any) -> np.ndarray:
    """A loss of pairs or triplets of two or three points, by the angle of the first two.

    The third is 30° from the first, and as far from the second as the first is: NaN where no such
    three points are.
    """
    config = config_of(name, "data=small")
    config.pairs[name].update(overrides)
    made = objective.make(
        config, num_classes=2, embedding_dim=3, mesh=sharding.make_mesh(1), total_steps=1
    )
    params, running = made.init(jax.random.key(0), objective.hyper(config))
    third = len(labels) == 3
    half = np.radians(15.0) if third else 0.0
    x, y = np.cos(half), np.sin(half)

    def loss(angle: Array) -> Array:
        cosine = jnp.cos(angle) / x
        sine = jnp.sqrt(jnp.maximum(1 - cosine**2, 0.0))
        points = jnp.stack([jnp.array([x, y, 0]), jnp.stack([cosine, 0.0 * cosine, sine])])
        if third:
            points = jnp.concatenate([points, jnp.array([[x, -y, 0]])])
        output = {"embedding": points}
        rest = objective.hyper(config), jnp.int32(0), jax.random.key(0)
        value = made.loss(params, running, output, jnp.array(labels), *rest)[0]
        return jnp.where(jnp.abs(cosine) <= 1, value, jnp.nan)

    return np.asarray(jax.jit(jax.vmap(loss))(_RADIANS))


def _inverse_softplus(loss: Array) -> Array:
    return loss + jnp.log(-jnp.expm1(-loss))


# Pictures of curves.


@STYLE
def margins(path: pathlib.Path) -> None:
    """Losses whose target logit is one curve: the logit above, its derivative below."""
    panels = {
        "a factor on the angle": {
            "A-Softmax, m = 4": probe("asoftmax", anneal={}),
            "A-Softmax, λ = 5": probe("asoftmax"),
            "SphereFace (1.35)": probe("sphereface_r"),
        },
        "added to angle or cosine": {
            "CosFace": probe("cosface"),
            "ArcFace": probe("arcface"),
            "combined (CM1)": probe("combined"),
        },
        "ArcFace's two gradients": {
            "detached": probe("arcface", detach=True),
            "exact": probe("arcface"),
        },
    }
    none = target_logit(probe("normface"))
    figure = Figure(figsize=(_WIDTH, 5.8), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True)
    for column, (title, curves) in zip(grid.T, panels.items(), strict=True):
        for (label, loss), colour in zip(curves.items(), (BLUE, VERMILION, GREEN), strict=False):
            style = _BEHIND if label == "detached" else {}
            _two_curves(column, target_logit(loss), label, color=colour, **style)
        _two_curves(column, none, **_NO_MARGIN)
        column[0].set_title(title)
        column[0].legend(loc="lower left")
    for axes in grid[0, 1:]:
        axes.set_ylim(-2.6, 1.15)  # room for the legend
    _label(grid)
    _save(figure, path)


@STYLE
def adaptive_margins(path: pathlib.Path) -> None:
    """Losses whose margin differs from example to example: both ends of what it can be."""
    norms = {"mean": jnp.float32(40.0), "deviation": jnp.float32(10.0)}
    adaface = probe("adaface", rate=0.0, running=norms)
    panels = {
        "AdaM-Softmax": {f"m = {m}": (probe("adam_softmax", margin=m), 1.0) for m in (0.0, 1.0)},
        "ElasticFace": {
            f"m = {m}": (probe("elasticface", m=m, deviation=0.0), 1.0) for m in (0.475, 0.525)
        },
        "MagFace": {f"‖x‖ = {a:.0f}": (probe("magface"), a) for a in (10.0, 110.0)},
        "AdaFace": {
            "low quality, ẑ = −1": (adaface, 0.001),
            "high quality, ẑ = 1": (adaface, 80.0),
        },
    }
    none = target_logit(probe("normface"))
    figure = Figure(figsize=(_WIDTH, 5.2), layout="constrained")
    grid = figure.subplots(2, 4, sharex=True, sharey="row")
    for column, (title, ends) in zip(grid.T, panels.items(), strict=True):
        found = [target_logit(loss, length=length) for loss, length in ends.values()]
        for axes, low, high in zip(column, *found, strict=True):
            axes.fill_between(DEGREES, low, high, color=GREY, alpha=0.25, linewidth=0)
        for curves, label, colour in zip(found, ends, (VERMILION, BLUE), strict=True):
            _two_curves(column, curves, label, color=colour)
        _two_curves(column, none, **_NO_MARGIN)
        column[0].set_title(title)
        column[0].legend(loc="lower left")
    grid[0, 0].set_ylim(-3.2, 1.15)  # room for the legend
    _label(grid)
    _save(figure, path)


@STYLE
def negatives(path: pathlib.Path) -> None:
    """Losses that change the other classes too: target, derivative, and a negative's logit."""
    panels = {
        "CurricularFace": (probe("curricularface"), None, -1.0),
        "MV-Softmax": (probe("mv_softmax"), None, -1.0),
        "Circle": (probe("circle"), None, 0.0),
        # Summed, not a softmax: either half of the loss alone.
        "SphereFace2": (probe("sphereface2", balance=1.0), probe("sphereface2", balance=0.0), 0.0),
    }
    none = target_logit(probe("normface"))
    figure = Figure(figsize=(_WIDTH, 7.4), layout="constrained")
    grid = figure.subplots(3, 4, sharex=True, sharey="row")
    for column, (title, (loss, other, opposite)) in zip(grid.T, panels.items(), strict=True):
        _two_curves(column, target_logit(loss, opposite=opposite), "the loss", color=BLUE)
        _two_curves(column, none, **_NO_MARGIN)
        # An easy target and a hard one, where the negative asks for it.
        targets = ((30.0, GREEN), (75.0, VERMILION)) if opposite else ((75.0, BLUE),)
        for own, colour in targets:
            curve = _broken(negative_logit(other or loss, own, opposite=opposite))
            style = _BEHIND if colour == GREEN else {"linewidth": 1.8}
            column[2].plot(DEGREES, curve, color=colour, label=f"target at {own:.0f}°", **style)
        column[2].plot(DEGREES, none[0], **_NO_MARGIN)
        column[0].set_title(title)
    grid[0, 0].legend(loc="lower left")
    grid[2, 0].legend(loc="lower left")
    grid[2, 0].set_ylim(bottom=-2.2)  # room for the legend
    _label(grid)
    grid[2, 0].set_ylabel("a negative's logit")
    _save(figure, path)


@STYLE
def boundaries(path: pathlib.Path) -> None:
    """Where an example is of class 1 or 2 with its margin, over its angles to both prototypes."""
    panels = {
        "softmax, NormFace": probe("normface"),
        "A-Softmax, m = 4": probe("asoftmax", anneal={}),
        "A-Softmax, λ = 5": probe("asoftmax"),
        "SphereFace (1.35)": probe("sphereface_r"),
        "CosFace": probe("cosface"),
        "ArcFace": probe("arcface"),
        "combined (CM1)": probe("combined"),
        "Circle": probe("circle"),
    }
    figure = Figure(figsize=(_WIDTH, 5.6), layout="constrained")
    grid = figure.subplots(2, 4, sharex=True, sharey=True)
    degrees = np.linspace(0.0, 180.0, 181)
    for axes, (title, loss) in zip(grid.flat, panels.items(), strict=True):
        first = boundary(loss, degrees)
        for ahead, colour in ((first, BLUE), (first.T, VERMILION)):
            axes.contourf(degrees, degrees, ahead, [0, np.inf], colors=[colour], alpha=0.25)
            axes.contour(degrees, degrees, ahead, [0], colors=[colour], linewidths=1.8)
        margin = np.where((first < 0) & (first.T < 0), 1.0, np.nan)
        axes.pcolormesh(degrees, degrees, margin, cmap="Greys", vmin=0, vmax=4, rasterized=True)
        axes.text(8, 155, "1", color=BLUE, weight="bold", size=13)
        axes.text(160, 8, "2", color=VERMILION, weight="bold", size=13)
        axes.set_title(title)
        axes.set(aspect="equal", xticks=range(0, 181, 60), yticks=range(0, 181, 60))
    figure.supxlabel("θ1: angle to the prototype of class 1 (degrees)", size=10)
    figure.supylabel("θ2: angle to that of class 2 (degrees)", size=10)
    _save(figure, path)


@STYLE
def shapes(path: pathlib.Path) -> None:
    """Losses that are not told by one logit: the loss itself, at a scale where it can be seen."""
    layout = ConstrainedLayoutEngine(h_pad=0.1)
    figure = Figure(figsize=(_WIDTH, 5.8), layout=layout)
    grid = figure.subplots(2, 2)
    ninety = jnp.float32(np.pi / 2)

    def of_class(loss: Loss) -> np.ndarray:
        return np.asarray(jax.jit(jax.vmap(lambda own: loss(own, ninety)))(_RADIANS))

    panels = {
        "label smoothing": {
            "NormFace": of_class(probe("normface", scale=8.0)),
            "ε = 0.1": of_class(probe("label_smoothing", scale=8.0)),
        },
        "focal ArcFace": {
            "ArcFace": of_class(probe("arcface", scale=8.0)),
            "γ = 2": of_class(probe("focal_arcface", scale=8.0)),
        },
        "contrastive": {
            "same person": of_points("contrastive", (0, 0)),
            "different people": of_points("contrastive", (0, 1)),
        },
        "triplet, positive at 30°": {
            "all": of_points("triplet", (0, 1, 0), triplets="all"),
            "semi-hard": of_points("triplet", (0, 1, 0)),
        },
    }
    for axes, (title, curves) in zip(grid.flat, panels.items(), strict=True):
        for (label, curve), colour in zip(curves.items(), (BLUE, VERMILION), strict=True):
            axes.plot(DEGREES, _broken(curve), color=colour, linewidth=1.8, label=label)
        axes.set_title(title)
        axes.legend()
        axes.set(xlim=(0, 180), xticks=range(0, 181, 60))
    for axes in grid[:, 0]:
        axes.set_ylabel("loss")
    for axes in grid[0]:
        axes.set_xlabel("θ to the own prototype, another at 90° (degrees)")
    grid[1, 0].set_xlabel("angle between the two (degrees)")
    grid[1, 1].set_xlabel("angle of anchor and negative (degrees)")
    _save(figure, path)


def _two_curves(column: np.ndarray, curves: Any, label: str, **style: Any) -> None:
    """A logit and its derivative."""
    for axes, values in zip(column, curves, strict=False):
        axes.plot(DEGREES, values, **{"linewidth": 1.8, "label": label} | style)


def _label(grid: np.ndarray) -> None:
    for axes in grid.flat:
        axes.set(xlim=(0, 180), xticks=range(0, 181, 60))
    for axes in grid[-1]:
        axes.set_xlabel("θ (degrees)")
    grid[0, 0].set_ylabel("target logit at s = 1")
    grid[1, 0].set_ylabel("its derivative in θ")


def _broken(curve: np.ndarray) -> np.ndarray:
    """With a gap where it jumps, not a steep line."""
    rise = np.diff(curve)
    jumps = np.minimum(abs(rise - np.roll(rise, 1)), abs(rise - np.roll(rise, -1))) > 0.05
    return np.where(np.append(False, jumps), np.nan, curve)


# Pictures of embeddings.


@STYLE
def embeddings(
    path: pathlib.Path, names: Sequence[str], faces: Faces, *, steps: int = 300, seed: int = 0
) -> None:
    """Ten people as each loss arranges them: in two dimensions, and below it in three."""
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(2.5 * columns, 0.8 + 5.0 * rows), layout="constrained")
    people, panels = figure.subfigures(2, 1, height_ratios=(0.8, 5.0 * rows), squeeze=False)[:, 0]
    for label, (axes, colour) in enumerate(
        zip(people.subplots(1, len(IDENTITIES)), IDENTITIES, strict=True)
    ):
        axes.imshow((faces.images[faces.labels == label][0] + 1) / 2)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=colour, linewidth=3)
    for i, name in enumerate(names):
        row, column = divmod(i, columns)
        for dim in (2, 3):
            place = (2 * rows, columns, (2 * row + dim - 2) * columns + column + 1)
            axes = panels.add_subplot(*place, projection="3d" if dim == 3 else None)
            found = embed(name, dim, faces, steps=steps, seed=seed)
            (_on_sphere if dim == 3 else _on_circle)(axes, found, faces.labels, name in WITH_NORM)
            title = f"Sep {found.sep:.2f}, intra {found.intra:.1f}°"
            axes.set_title(title, loc="center", size=9, weight="normal", pad=2)
            if dim == 2:
                axes.text(0.5, 1.12, name, transform=axes.transAxes, ha="center", weight="bold")
    _save(figure, path)


def _on_circle(axes: Axes, found: Embedded, labels: np.ndarray, with_norm: bool) -> None:
    """The plane; without norms, each person's points one further out than the other, to be seen."""
    points = found.points
    if not with_norm:
        rank = np.array([np.sum(labels[:i] == label) for i, label in enumerate(labels)])
        points = _unit(points) * (1 + 0.25 * rank / rank.max())[:, None]
    reach = 1.08 * np.abs(points).max()
    radius = np.mean(np.linalg.norm(points, axis=1)) if with_norm else 1.0
    turn = np.linspace(0, 2 * np.pi, 200)
    axes.plot(radius * np.cos(turn), radius * np.sin(turn), color=GREY, linewidth=0.8)
    for row, colour in zip(found.rows * radius, IDENTITIES, strict=True):
        axes.plot([0, row[0]], [0, row[1]], color=colour, linewidth=1.8)
    axes.scatter(*points.T, c=_colours(labels), s=4, linewidths=0)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axes.set_axis_off()


def _on_sphere(axes: Any, found: Embedded, labels: np.ndarray, with_norm: bool) -> None:
    """Space, with a wire sphere of the mean norm; what is behind the sphere's middle is pale."""
    norms = np.linalg.norm(found.points, axis=1, keepdims=True)
    points = found.points / (norms.mean() if with_norm else norms)
    around, up = np.mgrid[0 : 2 * np.pi : 25j, 0 : np.pi : 13j]
    wires = np.cos(around) * np.sin(up), np.sin(around) * np.sin(up), np.cos(up)
    axes.plot_wireframe(*wires, color=GREY, linewidth=0.4, alpha=0.4)
    elevation, azimuth = np.radians((axes.elev, axes.azim))
    towards_us = np.array(
        [
            np.cos(elevation) * np.cos(azimuth),
            np.cos(elevation) * np.sin(azimuth),
            np.sin(elevation),
        ]
    )
    for row, colour in zip(found.rows, IDENTITIES, strict=True):
        front = row @ towards_us > 0
        axes.plot(*zip(np.zeros(3), row, strict=True), color=colour, alpha=1.0 if front else 0.35)
    alpha = np.where(points @ towards_us > 0, 0.9, 0.25)[:, None]
    colours = np.concatenate([_colours(labels), alpha], axis=1)
    axes.scatter(*points.T, c=colours, s=5, linewidths=0, depthshade=False)
    reach = max(1.0, np.abs(points).max())
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), zlim=(-reach, reach))
    axes.set_box_aspect((1, 1, 1), zoom=1.45)
    axes.set_axis_off()


def _colours(labels: np.ndarray) -> np.ndarray:
    return np.array([to_rgb(IDENTITIES[label]) for label in labels])


def _save(figure: Figure, path: pathlib.Path) -> None:
    """Writes the whole picture or none, in 256 colours: a third of the size."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    temporary = path.with_name(f".{path.name}.part")
    Image.open(drawn).convert("RGB").quantize(256).save(temporary, "png", optimize=True)
    os.replace(temporary, path)


# All of them.

CURVES = {f.__name__: f for f in (margins, adaptive_margins, negatives, shapes, boundaries)}
NAMES = (*CURVES, *FAMILIES)


def draw(
    folder: pathlib.Path, *, only: Collection[str] = NAMES, seed: int = 0
) -> Iterator[pathlib.Path]:
    """Draws <folder>/<name>.png for each name of `only`, one after the other.

    Args:
        folder: made if it is not there.
        only: some of NAMES.
        seed: of the networks' start and of the batches; the ten people stay the same.

    Yields:
        The picture, once it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    faces = None
    for name in NAMES:
        path = folder / f"{name}.png"
        if name not in only:
            continue
        if name in CURVES:
            CURVES[name](path)
        else:
            faces = faces or render()
            embeddings(path, FAMILIES[name], faces, seed=seed)
        yield path
