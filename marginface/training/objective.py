"""The only place that turns config into a loss: terms → (scalar, metrics).

Each section of the config has its module, and each entry names a function of its table LOSSES, or
one of the user's own, "path/to/file.py:name":

    loss           class_losses     the loss over classes (name "" for none)
    regularizers   regularizers     functions of the prototypes, a mean over classes
    joint          joint_losses     beside the loss over classes, a mean over examples
    pairs          pair_losses      of pairs and triplets in the batch, a mean over anchors

A loss gets the fields of losses.table.Inputs that it asks for by name, and its numbers from the
config. total = loss + Σ weight · ramp · term.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from marginface import devices, sharding
from marginface.config import Config
from marginface.lookup import check_arguments, find, from_path, is_path, nearest
from marginface.losses import (
    class_losses,
    class_softmax,
    joint_losses,
    margins,
    pair_losses,
    regularizers,
)
from marginface.losses import similarity as similarities
from marginface.losses.table import Inputs, Loss, asked, call
from marginface.typing import Array, Float, Int

Hyper = dict[str, Any]
Metrics = dict[str, Array]

MODULES = {"regularizers": regularizers, "joint": joint_losses, "pairs": pair_losses}
RAMPS = ("constant", "linear", "inverse_anneal")
_RAMP = ("ramp", "begin", "end")
# Inputs that the loss over classes takes from keys of its own, and that terms may take as numbers.
_OF_CLASSES = {"margin", "scale", "similarity", "chunk_size"}


class Objective(NamedTuple):
    """What is minimised: what it trains and remembers, and the loss itself.

    init: (key, hyper) → (params, running). params: {"prototypes": rows, padded to divide over the
      mesh, "terms": what terms train}; running: what terms remember, e.g. moving averages.
    loss: (params, running, output, labels [b], hyper, step, key) → (scalar, (running, metrics)).
      output is the network's, {"embedding": [b, d], ...}. The metrics are "loss/<term>" before its
      weight, "loss/total", and with a loss over classes "train/top1" (by the similarity without
      margin) and "train/target_angle" (degrees), what tells of triplet collapse and of groups,
      and every single number that a term trains or remembers, "train/<term>_<name>".
    """

    init: Callable[[Array, Hyper], tuple[Any, Any]]
    loss: Callable[..., tuple[Array, tuple[Any, Metrics]]]


class _Term(NamedTuple):
    """An entry of the config.

    section, name: where it stands.
    label: what figures call it: its name, or section.name where two sections have that name.
    loss: what it computes.
    static: its arguments that are not traced.
    ramp: how its weight grows.
    """

    section: str
    name: str
    label: str
    loss: Loss
    static: dict[str, Any]
    ramp: str

    @property
    def key(self) -> str:
        """Under which its parameters and its state stand."""
        return f"{self.section}.{self.name}"

    def numbers(self, hyper: Hyper) -> Hyper:
        """Its numbers, traced and static."""
        traced = hyper["loss"] if self.section == "loss" else hyper[self.section][self.name]
        return {**traced, **self.static}


def hyper(config: Config) -> Hyper:
    """Every number that a sweep may vary, as float32: they reach the step as traced values."""
    loss = config.loss
    found = {section: {k: _numbers(kw) for k, kw in config[section].items()} for section in MODULES}
    return found | {
        "loss": _numbers(loss) | _numbers(loss.kw),
        "margin": {k: jnp.float32(v) for k, v in loss.get("margin_kw", {}).items()},
        "anneal": _numbers(loss.get("anneal", {})),
        "optimizer": _numbers(config.optimizer),
        "schedule": _numbers(config.schedule),
    }


def static(config: Config) -> dict[str, Any]:
    """The config without its seed and without the values that `hyper` holds, their keys kept: runs
    for which this is equal differ in numbers only, so one compiled step serves them all.
    """

    def words(section: Any) -> dict[str, Any]:
        return {
            k: words(v) if hasattr(v, "items") else None if isinstance(v, float) else v
            for k, v in section.items()
        }

    sections = ("loss", *MODULES, "optimizer", "schedule")
    found = {k: words(v) if k in sections else v for k, v in config.to_dict().items()}
    found["loss"]["sample_rate"] = config.loss.sample_rate  # it decides a shape
    found["loss"]["margin_kw"] = sorted(config.loss.get("margin_kw", {}))
    return found | {"seed": None}


def weights(prototypes: Any) -> Float[Array, "c *k d"]:
    """W, without the bias or the margins that some losses keep beside it."""
    return getattr(prototypes, "weight", prototypes)


def walk(config: Config, num_classes: int, mesh: Mesh | None) -> dict[str, Any]:
    """How the losses over classes walk: {"chunk_size", "precision"} on the devices of the mesh.

    Raises:
      ValueError: an unknown precision.
    """
    held, device = _held(num_classes, mesh)
    examples = config.batch_size // config.optimizer.accumulate
    if config.loss.sample_rate < 1:
        held = min(held, max(round(config.loss.sample_rate * held), examples))
    kind = similarities.KINDS.get(config.loss.similarity)
    several = config.loss.subcenters if kind and kind.several else 1
    wanted = config.loss.get("precision", "auto")  # which a config of an earlier version may lack
    return {
        "chunk_size": devices.chunk_size(
            config.loss.chunk_size, examples=examples * several, classes=held, device=device
        ),
        "precision": devices.precision(wanted, device, dim=config.model.embedding_dim),
    }


def chunk_size_between(config: Config, num_classes: int, mesh: Mesh | None) -> int | None:
    """Classes at a time where classes are compared with each other, unless a term has its own."""
    held, device = _held(num_classes, mesh)
    return devices.chunk_size_between(config.loss.chunk_size, classes=held, device=device)


def _held(num_classes: int, mesh: Mesh | None) -> tuple[int, jax.Device]:
    """How many classes a device holds, and one of this process's devices."""
    if mesh is None:
        return sharding.padded_rows(num_classes, 1), jax.local_devices()[0]
    return sharding.padded_rows(num_classes, mesh.size) // mesh.size, mesh.local_devices[0]


def one_row_a_class(config: Config) -> bool:
    """Whether there are prototypes, one for each class, so that Sep_i and Lr(W) have a meaning."""
    return bool(config.loss.name) and not similarities.KINDS[config.loss.similarity].several


def annealed_weight(step: Int[Array, ""], anneal: Hyper) -> Float[Array, ""]:
    """λ = max(least, start (1 + rate step)^-power), the weight of the plain cosine in A-Softmax.

    References:
      Liu et al., SphereFace, 2017, section 4.1 and the authors' training files.
    """
    decayed = anneal["start"] * (1.0 + anneal["rate"] * step) ** -anneal["power"]
    return jnp.maximum(anneal["least"], decayed)


def ramp(name: str, done: Float[Array, ""], step: Array, numbers: Hyper, anneal: Hyper) -> Array:
    """The factor on a term's weight: 1; or rising from 0 at `begin` to 1 at `end` of the run; or
    least/λ, which grows to 1 as A-Softmax's λ decays (RegularFace's code: 15·5/λ is weight 15).

    References:
      Zhao et al., RegularFace, 2019, the authors' training code.
    """
    match name:
        case "linear":
            begin, end = numbers.get("begin", 0.0), numbers.get("end", 1.0)
            return jnp.clip((done - begin) / jnp.maximum(end - begin, 1e-6), 0.0, 1.0)
        case "inverse_anneal":
            return anneal["least"] / annealed_weight(step, anneal)
        case _:
            return jnp.ones(())


def make(
    config: Config, *, num_classes: int, embedding_dim: int, mesh: Mesh | None, total_steps: int
) -> Objective:
    """loss + Σ weight · ramp · term, as config.loss, regularizers, joint and pairs say.

    Without a mesh the loss is for callers that are inside a jax.shard_map already, whose mesh has
    the axis sharding.AXIS with one device.

    Raises:
      ValueError: an unknown name, or arguments that a function does not take or lacks.
    """
    shards = mesh.size if mesh else 1
    walked = walk(config, num_classes, mesh)
    fixed = Inputs(
        num_classes=num_classes,
        rows=sharding.padded_rows(num_classes, shards),
        embedding_dim=embedding_dim,
        num_groups=config.model.kw.get("num_groups", 0) or None,
        sample_rate=config.loss.sample_rate,
        axis_name=sharding.AXIS,
        precision=walked["precision"],
    )
    terms = _terms(config, chunk_size_between(config, num_classes, mesh))
    one_shard = _on_one_shard(config, terms, fixed, walked["chunk_size"], shards)

    def loss(
        params: Any,
        running: Any,
        output: Mapping[str, Array],
        labels: Int[Array, "b"],
        hyper: Hyper,
        step: Int[Array, ""],
        key: Array,
    ) -> tuple[Array, tuple[Any, Metrics]]:
        state, everywhere = sharding.specs(running), one_shard
        if mesh is not None:
            everywhere = jax.shard_map(
                one_shard,
                mesh=mesh,
                in_specs=(sharding.specs(params), state, P(), P(), P(), P(), P()),
                out_specs=(P(), (state, P())),
            )
        values, (running, metrics) = everywhere(
            params, running, dict(output), labels, hyper, step, key
        )
        total = jnp.zeros(())
        for term in terms:
            weight = jnp.ones(())
            if term.section != "loss":
                numbers = term.numbers(hyper)
                factor = ramp(term.ramp, step / total_steps, step, numbers, hyper["anneal"])
                weight = numbers["weight"] * factor
            total += weight * values[term.key]
            metrics[f"loss/{term.label}"] = values[term.key]
        metrics["loss/total"] = total
        metrics = {name: jnp.float32(value) for name, value in metrics.items()}
        return total, lax.stop_gradient((running, metrics))

    return Objective(_start(config, terms, fixed), loss)


def _start(config: Config, terms: list[_Term], fixed: Inputs) -> Callable:
    """Objective.init: prototypes, what terms train, what terms remember."""

    def prototypes(key_rows: Array, key_margins: Array) -> Any:
        kind = similarities.KINDS[config.loss.similarity]
        several = (config.loss.subcenters,) if kind.several else ()
        # Short rows turn quickly at first; 0.01 is what arcface_torch starts with too.
        shape = (fixed.rows, *several, fixed.embedding_dim)
        weight = 0.01 * jax.random.normal(key_rows, shape)
        real = (jnp.arange(fixed.rows) < fixed.num_classes).reshape(-1, *(1,) * (len(shape) - 1))
        weight = jnp.where(real, weight, 0.0)
        if kind.rows is not None:
            return kind.rows(weight)
        if (rows := terms[0].loss.rows) is not None:
            return rows(weight, key=key_margins, num_classes=fixed.num_classes)
        return weight

    def init(key: Array, hyper: Hyper) -> tuple[Any, Any]:
        key, key_rows, key_margins = jax.random.split(key, 3)
        learned, running = {}, {}
        for term in terms:
            key, part = jax.random.split(key)
            inputs, numbers = fixed._replace(key=part), term.numbers(hyper)
            if term.loss.learned is not None:
                learned[term.key] = call(term.loss.learned, inputs, numbers)
            if term.loss.running is not None:
                running[term.key] = call(term.loss.running, inputs, numbers)
        rows = prototypes(key_rows, key_margins) if config.loss.name else {}
        return {"prototypes": rows, "terms": learned}, running

    return init


def _on_one_shard(
    config: Config, terms: list[_Term], fixed: Inputs, chunk_size: int | None, shards: int
) -> Callable:
    """(params, running, output, labels, hyper, step, key) → the terms' values, state, metrics."""
    loss, num_classes = config.loss, fixed.num_classes
    sample = max(1, round(loss.sample_rate * fixed.rows / shards)) if loss.sample_rate < 1 else 0
    kind = similarities.KINDS[loss.similarity]
    margin_of = _margin_of(loss) if loss.name else None
    measure = {
        "loss": partial(
            _over_classes,
            sample=sample,
            bounded=kind.bounded,
            norm_as_scale=bool(loss.get("norm_as_scale")),
        ),
        "regularizers": _of_prototypes,
        "joint": _beside,
        "pairs": _of_pairs,
    }

    def one_shard(
        params: Any, running: Any, output: Any, labels: Array, hyper: Hyper, step: Array, key: Array
    ) -> tuple[Any, Any]:
        given = fixed._replace(
            embeddings=output["embedding"], labels=labels, group_logits=output.get("group_logits")
        )
        if loss.name:
            classes = class_softmax.all_classes(
                params["prototypes"], num_classes, axis_name=sharding.AXIS
            )
            given = given._replace(classes=classes)
        values, after, metrics = {}, dict(running), {}
        for i, term in enumerate(terms):
            inputs = given._replace(
                key=jax.random.fold_in(key, i),
                learned=params["terms"].get(term.key),
                running=running.get(term.key),
            )
            if term.section == "loss":
                inputs = inputs._replace(similarity=kind.function, chunk_size=chunk_size)
                if margin_of is not None:
                    inputs = inputs._replace(margin=_margin(loss, margin_of, hyper, step))
            with jax.named_scope(term.label):
                value, state, figures = measure[term.section](term, term.numbers(hyper), inputs)
            values[term.key] = value
            if state:
                after[term.key] = state
            metrics |= {f"train/{name}": number for name, number in figures.items()}
            for name, leaf in {**(inputs.learned or {}), **(state or {})}.items():
                if jnp.ndim(leaf) == 0:  # a scale that follows the angles, a learned threshold
                    metrics[f"train/{term.label}_{name}"] = leaf
        return values, (after, metrics)

    return one_shard


# One function for each section: (term, its numbers, inputs) → its mean, its next state, figures.


def _over_classes(
    term: _Term, numbers: Hyper, inputs: Inputs, *, sample: int, bounded: bool, norm_as_scale: bool
) -> tuple[Array, Any, Metrics]:
    held, axis = inputs.classes, inputs.axis_name
    if sample:
        key = jax.random.fold_in(inputs.key, 1)
        held = class_softmax.sample_classes(key, inputs.labels, held, sample, axis_name=axis)
    inputs = inputs._replace(classes=held, scale=numbers.get("scale"))
    if norm_as_scale:
        inputs = inputs._replace(scale=inputs.scale * similarities.norm(inputs.embeddings))
    result = call(term.loss.function, inputs, numbers)
    figures = {"top1": jnp.mean(result.target > result.hardest)}
    cos = result.target
    if not (bounded and term.loss.cosine):
        held = held._replace(rows=weights(held.rows))
        cos = class_softmax.target_similarity(
            inputs.embeddings, inputs.labels, held, axis_name=axis
        )
    angle = jnp.arccos(jnp.clip(cos, -1.0, 1.0))
    figures["target_angle"] = jnp.mean(jnp.degrees(angle))
    value = jnp.mean(result.loss)
    return value, result.running, figures | _figures(term, numbers, inputs, value)


def _of_prototypes(term: _Term, numbers: Hyper, inputs: Inputs) -> tuple[Array, Any, Metrics]:
    held = inputs.classes
    directions = inputs._replace(classes=held._replace(rows=weights(held.rows)))
    per_class, state = _with_state(term, call(term.loss.function, directions, numbers))
    value = lax.psum(jnp.sum(per_class), inputs.axis_name) / inputs.num_classes
    return value, state, _figures(term, numbers, inputs, value)


def _beside(term: _Term, numbers: Hyper, inputs: Inputs) -> tuple[Array, Any, Metrics]:
    losses, state = _with_state(term, call(term.loss.function, inputs, numbers))
    value = jnp.mean(losses)
    return value, state, _figures(term, numbers, inputs, value)


def _of_pairs(term: _Term, numbers: Hyper, inputs: Inputs) -> tuple[Array, Any, Metrics]:
    losses, state = _with_state(term, call(term.loss.function, inputs, numbers))
    value = lax.psum(jnp.sum(losses), inputs.axis_name) / inputs.embeddings.shape[0]
    return value, state, _figures(term, numbers, inputs, value)


def _with_state(term: _Term, result: Any) -> tuple[Array, Any]:
    return result if term.loss.running is not None else (result, None)


def _figures(term: _Term, numbers: Hyper, inputs: Inputs, value: Array) -> Metrics:
    if term.loss.figures is None:
        return {}
    return call(term.loss.figures, inputs, {**numbers, "value": value})


# From the config to terms: every mistake ends in one line that names its key.


def _terms(config: Config, between: int | None) -> list[_Term]:
    """The loss over classes first, then the others; `between` is chunk_size_between."""
    _known(config.loss.similarity, similarities.KINDS, "loss.similarity")
    terms = [_class_loss(config)] if config.loss.name else []
    for section in MODULES:
        for name, kw in config[section].items():
            terms.append(_term(config, section, name, kw, between))
    if not terms:
        raise ValueError("nothing to minimise: give loss.name, or a term in pairs or joint")
    names = [term.name for term in terms]
    return [t._replace(label=t.key) if names.count(t.name) > 1 else t for t in terms]


def _find(table: Mapping[str, Loss], name: str, key: str) -> Loss:
    """A row of a table, or the user's own: a function, or a Loss that says what it needs."""
    found = from_path(name, key, "LOSSES") if is_path(name) else find(table, name, key)
    if isinstance(found, Loss):
        return found
    if not callable(found):
        raise ValueError(f"{key}={name!r} is neither a function nor a Loss")
    return Loss(found)


def _class_loss(config: Config) -> _Term:
    loss = config.loss
    found = _find(class_losses.LOSSES, loss.name, "loss.name")
    name = loss.name.rpartition(":")[2]
    takes = inspect.signature(found.function).parameters
    for key in ("scale", "margin"):
        if key in loss and key not in takes:
            raise ValueError(f"loss.{key} has no place in {name}: leave it out of the config")
    for key, what in (("detach", "margin"), ("anneal", "margin"), ("norm_as_scale", "scale")):
        if loss.get(key) and what not in takes:
            raise ValueError(f"loss.{key}={loss[key]!r} has no place in {name}")
    if loss.similarity != "cosine" and "similarity" not in takes:
        raise ValueError(f"loss.similarity={loss.similarity!r} has no place in {name}")
    if loss.similarity == "linear" and loss.get("margin", "identity") != "identity":
        raise ValueError(
            f"loss.margin={loss.margin!r} changes a cosine, and loss.similarity='linear' is none: "
            "use loss.similarity='cosine', or loss.margin='identity'"
        )
    if not 0 < loss.sample_rate <= 1:
        raise ValueError(f"loss.sample_rate={loss.sample_rate}: give a part in (0, 1]")
    for key in ("scale", "margin"):
        if key in takes and takes[key].default is inspect.Parameter.empty and key not in loss:
            raise ValueError(f"loss.{key} is missing: {name} needs it")
    check_arguments(found.function, loss.kw, "loss.kw", asked(found.function))
    return _Term("loss", name, name, found, _rest(loss.kw), "constant")


def _term(config: Config, section: str, name: str, kw: Config, between: int | None) -> _Term:
    key = f"{section}.{name}"
    named = f"{key}.name" if "name" in kw else section
    found = _find(MODULES[section].LOSSES, kw.get("name", name), named)
    takes = asked(found.function)
    own = {k: v for k, v in kw.items() if k not in ("name", "weight", *_RAMP)}
    check_arguments(found.function, own, key, takes - _OF_CLASSES)
    if "weight" not in kw:
        raise ValueError(f"{key}.weight is missing: every term needs one")
    for number in ("weight", "begin", "end"):
        if number in kw and not isinstance(kw[number], float):
            raise ValueError(f"{key}.{number}={kw[number]!r}: write it as a float, such as 1.0")
    if "classes" in takes and not one_row_a_class(config):
        raise ValueError(
            f"{key} needs one prototype for each class; loss.name={config.loss.name!r} with "
            f"loss.similarity={config.loss.similarity!r} has none or several"
        )
    shape = _known(kw.get("ramp", "constant"), RAMPS, f"{key}.ramp")
    if shape == "inverse_anneal" and not config.loss.get("anneal"):
        raise ValueError(f"{key}.ramp='inverse_anneal' follows loss.anneal, which is not given")
    static = _rest(own)
    if static.get("chunk_size", "auto") in ("auto", 0):  # 0, as none: as the loss over classes
        static["chunk_size"] = between
    return _Term(section, name, name, found, static, shape)


def _margin_of(loss: Config) -> Callable | None:
    """ψ with its parameters open, if the loss has a margin of the config."""
    if not (name := loss.get("margin", "")):
        return None
    key = "loss.margin"
    margin_of = from_path(name, key) if is_path(name) else find(margins.MARGINS, name, key)
    if not callable(margin_of):
        raise ValueError(f"loss.margin={name!r} is no function")
    check_arguments(margin_of, loss.margin_kw, "loss.margin_kw")
    return margin_of


def _margin(loss: Config, margin_of: Callable, hyper: Hyper, step: Array) -> margins.Margin:
    margin = partial(margin_of, **hyper["margin"])
    if loss.detach:
        margin = margins.detach(margin)
    if hyper["anneal"]:
        margin = margins.anneal(margin, annealed_weight(step, hyper["anneal"]))
    return margin


def _numbers(section: Any) -> dict[str, Any]:
    return {k: jnp.float32(v) for k, v in section.items() if isinstance(v, float)}


def _rest(section: Any) -> dict[str, Any]:
    return {k: v for k, v in section.items() if not isinstance(v, float)}


def _known(name: str, known: Iterable[str], key: str) -> str:
    if name not in known:
        raise ValueError(f"{key}={name!r} is unknown; {nearest(name, known)}")
    return name
