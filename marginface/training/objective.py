"""The only place that turns config into a loss: terms → (scalar, metrics).

Each section of the config has its module, and each entry names a row of that module's table LOSSES,
or a loss of the user's own ("path/to/file.py:name"):

    loss           class_losses     the loss over classes (name "" for none)
    regularizers   regularizers     functions of the prototypes, a mean over classes
    joint          joint_losses     beside the loss over classes, a mean over examples
    pairs          pair_losses      of pairs and triplets in the batch, a mean over anchors

A loss gets the losses.table.Inputs that it asks for, and its numbers from the config.
total = loss + Σ weight · ramp · term.
"""

import collections
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from marginface import devices, lookup, sharding
from marginface.config import Config
from marginface.losses import (
    class_losses,
    class_softmax,
    joint_losses,
    margins,
    pair_losses,
    regularizers,
)
from marginface.losses.similarity import SIMILARITIES, Kind, norm
from marginface.losses.table import Inputs, Loss, call
from marginface.typing import Array, Float, Int

Hyper = dict[str, Any]
Metrics = dict[str, Array]

MODULES = {"regularizers": regularizers, "joint": joint_losses, "pairs": pair_losses}
RAMPS = ("constant", "linear", "inverse_anneal")
_OF_TERMS = ("name", "weight", "ramp", "begin", "end")  # keys that every term may have


class Objective(NamedTuple):
    """What is minimised: what it trains and remembers, and the loss itself.

    init: (key, hyper) → (params, running). params: {"prototypes": rows, padded to divide over the
      mesh, "terms": what terms train}; running: what terms remember, e.g. moving averages. Both
      are kept under "<section>.<term>".
    loss: (params, running, output, labels [b], hyper, step, key) → (scalar, (running, metrics)).
      output is the network's, {"embedding": [b, d], ...}. The metrics are "loss/<term>" before its
      weight, "loss/total", and with a loss over classes "train/top1" (by the similarity without
      margin) and "train/target_angle" (degrees), the figures that a loss adds, and every single
      number that a term trains or remembers, "train/<term>_<name>". Terms of two sections that
      share a name are called "<section>.<term>" there.
    """

    init: Callable[[Array, Hyper], tuple[Any, Any]]
    loss: Callable[..., tuple[Array, tuple[Any, Metrics]]]


class _Term(NamedTuple):
    """An entry of the config: what it computes, and with what.

    section: "loss", "regularizers", "joint" or "pairs".
    name: its key there; of the loss, that of its function.
    loss: its row of the table.
    label: what figures call it.
    static: its arguments that are no floats, and so not traced.
    ramp: how its weight changes, one of RAMPS.
    """

    section: str
    name: str
    loss: Loss
    label: str
    static: dict[str, Any]
    ramp: str = "constant"

    @property
    def key(self) -> str:
        """Where its parameters and its state are kept."""
        return f"{self.section}.{self.name}"

    def numbers(self, hyper: Hyper) -> Hyper:
        """What `hyper` holds of its entry."""
        return hyper["loss"] if self.section == "loss" else hyper[self.section][self.name]

    def call(self, function: Callable, inputs: Inputs, arguments: Mapping[str, Any]) -> Any:
        """One of the functions of its row, with what it asks for."""
        return call(function, inputs, arguments, self.key)


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
    several = config.loss.subcenters if _similarity(config).subcenters else 1
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
    return bool(config.loss.name) and not _similarity(config).subcenters


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
    walked = walk(config, num_classes, mesh)
    fixed = Inputs(
        num_classes=num_classes,
        rows=sharding.padded_rows(num_classes, mesh.size if mesh else 1),
        embedding_dim=embedding_dim,
        sample_rate=config.loss.sample_rate,
        precision=walked["precision"],
        axis_name=sharding.AXIS,
        num_groups=config.model.kw.get("num_groups"),
    )
    terms = _terms(config, walked["chunk_size"], chunk_size_between(config, num_classes, mesh))
    margin = _margin(config) if config.loss.name else None
    one_shard = partial(_one_shard, config.loss, terms, margin, fixed)

    def loss(
        params: Any,
        running: Any,
        output: Mapping[str, Array],
        labels: Int[Array, "b"],
        hyper: Hyper,
        step: Int[Array, ""],
        key: Array,
    ) -> tuple[Array, tuple[Any, Metrics]]:
        state, on_devices = sharding.specs(running), one_shard
        if mesh is not None:
            on_devices = jax.shard_map(
                one_shard,
                mesh=mesh,
                in_specs=(sharding.specs(params), state, P(), P(), P(), P(), P()),
                out_specs=(P(), (state, P())),
            )
        values, (running, metrics) = on_devices(
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

    return Objective(partial(_init, config, terms, fixed), loss)


def _init(
    config: Config, terms: list[_Term], fixed: Inputs, key: Array, hyper: Hyper
) -> tuple[Any, Any]:
    """Objective.init."""
    key, key_weight, key_rows = jax.random.split(key, 3)
    learned, running = {}, {}
    for term in terms:
        key, part = jax.random.split(key)
        inputs, arguments = fixed._replace(key=part), {**term.numbers(hyper), **term.static}
        if term.loss.learned is not None:
            learned[term.key] = term.call(term.loss.learned, inputs, arguments)
        if term.loss.running is not None:
            running[term.key] = term.call(term.loss.running, inputs, arguments)
    if not config.loss.name:
        return {"prototypes": {}, "terms": learned}, running
    several = (config.loss.subcenters,) if _similarity(config).subcenters else ()
    # Short rows turn quickly at first; 0.01 is what arcface_torch starts with too.
    weight = 0.01 * jax.random.normal(key_weight, (fixed.rows, *several, fixed.embedding_dim))
    real = jnp.arange(fixed.rows) < fixed.num_classes
    prototypes: Any = jnp.where(real.reshape(-1, *(1 for _ in weight.shape[1:])), weight, 0.0)
    if (rows := terms[0].loss.rows) is not None:
        inputs = fixed._replace(key=key_rows)
        prototypes = terms[0].call(rows, inputs, {"weight": prototypes})
    return {"prototypes": prototypes, "terms": learned}, running


def _one_shard(
    loss: Config,
    terms: list[_Term],
    margin: Callable[[Hyper, Array], margins.Margin] | None,
    fixed: Inputs,
    params: Any,
    running: Any,
    output: Mapping[str, Array],
    labels: Array,
    hyper: Hyper,
    step: Array,
    key: Array,
) -> tuple[dict[str, Array], tuple[Any, Metrics]]:
    """One device's part: each term's value by its key, and the next running state, metrics."""
    shared = fixed._replace(embeddings=output["embedding"], labels=labels)
    if loss.name:
        classes = class_softmax.all_classes(
            params["prototypes"], fixed.num_classes, axis_name=fixed.axis_name
        )
        shared = shared._replace(classes=classes)
    values, after, metrics = {}, dict(running), {}
    for i, term in enumerate(terms):
        inputs = shared._replace(
            key=jax.random.fold_in(key, i),
            learned=params["terms"].get(term.key),
            running=running.get(term.key),
            outputs={name: output[name] for name in term.loss.outputs if name in output},
        )
        arguments = {**term.numbers(hyper), **term.static}
        if term.section == "loss" and margin is not None:
            arguments["margin"] = margin(hyper, step)
        if term.section == "loss" and loss.get("norm_as_scale"):
            arguments["scale"] = arguments["scale"] * norm(output["embedding"])
        with jax.named_scope(term.label):
            value, state, figures = _MEASURE[term.section](term, inputs, arguments)
            if term.loss.figures is not None:
                asked = {**arguments, "value": value}
                figures = {**figures, **term.call(term.loss.figures, inputs, asked)}
        if bool(state) != (term.loss.running is not None):
            what = "a state, and nothing says how it starts" if state else "no next state"
            raise ValueError(f"{term.key} gives {what}: `running` of its Loss must agree with it")
        values[term.key] = value
        if state:
            after[term.key] = state
        for name, figure in figures.items():
            taken = f"train/{name}" in metrics
            metrics[f"train/{term.label}_{name}" if taken else f"train/{name}"] = figure
        for name, leaf in {**(inputs.learned or {}), **state}.items():
            if jnp.ndim(leaf) == 0:  # a scale that follows the angles, a learned threshold
                metrics[f"train/{term.label}_{name}"] = leaf
    return values, (after, metrics)


# How each section measures a term: (term, inputs, arguments) → its mean, next state, figures.


def _over_classes(term: _Term, inputs: Inputs, arguments: Mapping[str, Any]) -> tuple:
    classes, axis = inputs.classes, inputs.axis_name
    if inputs.sample_rate < 1:
        num = max(1, round(inputs.sample_rate * inputs.rows / lax.axis_size(axis)))
        key = jax.random.fold_in(inputs.key, 1)
        classes = class_softmax.sample_classes(key, inputs.labels, classes, num, axis_name=axis)
    result = term.call(term.loss.function, inputs._replace(classes=classes), arguments)
    if not isinstance(result, class_losses.ClassLoss):
        raise ValueError(f"{term.key} gives {type(result).__name__}: a ClassLoss is needed")
    figures = {"top1": jnp.mean(result.target > result.hardest)}
    cos = result.target
    if not term.loss.cosine:
        cos = class_softmax.target_similarity(
            inputs.embeddings, inputs.labels, _of_weights(classes), axis_name=axis
        )
    angle = jnp.arccos(jnp.clip(cos, -1.0, 1.0))
    figures["target_angle"] = jnp.mean(jnp.degrees(angle))
    return jnp.mean(result.loss), result.running, figures


def _of_prototypes(term: _Term, inputs: Inputs, arguments: Mapping[str, Any]) -> tuple:
    inputs = inputs._replace(classes=_of_weights(inputs.classes))
    per_class, state = _values(term, inputs, arguments)
    return lax.psum(jnp.sum(per_class), inputs.axis_name) / inputs.num_classes, state, {}


def _beside(term: _Term, inputs: Inputs, arguments: Mapping[str, Any]) -> tuple:
    losses, state = _values(term, inputs, arguments)
    return jnp.mean(losses), state, {}


def _of_pairs(term: _Term, inputs: Inputs, arguments: Mapping[str, Any]) -> tuple:
    losses, state = _values(term, inputs, arguments)
    return lax.psum(jnp.sum(losses), inputs.axis_name) / len(inputs.labels), state, {}


def _values(term: _Term, inputs: Inputs, arguments: Mapping[str, Any]) -> tuple[Array, Any]:
    """What a term gives, one number each, and its next state."""
    result = term.call(term.loss.function, inputs, arguments)
    values, state = result if isinstance(result, tuple) else (result, {})
    if jnp.ndim(values) != 1:
        shape = list(jnp.shape(values))
        raise ValueError(
            f"{term.key} gives values of shape {shape}: one for each example is needed"
        )
    return values, state


def _of_weights(classes: class_softmax.Classes) -> class_softmax.Classes:
    return classes._replace(rows=weights(classes.rows))


_MEASURE = {
    "loss": _over_classes,
    "regularizers": _of_prototypes,
    "joint": _beside,
    "pairs": _of_pairs,
}

# From the config to terms: every mistake is named here.


def _terms(config: Config, chunk_size: int | None, between: int | None) -> list[_Term]:
    """The loss over classes, if there is one, and all others.

    Args:
      config: of the run.
      chunk_size: of the loss over classes.
      between: chunk_size_between, for a term that has no chunk_size of its own.
    """
    terms = [_class_loss(config, chunk_size)] if config.loss.name else []
    for section in MODULES:
        terms += [_term(config, section, k, kw, between) for k, kw in config[section].items()]
    if not terms:
        raise ValueError("nothing to minimise: give loss.name, or a term in pairs or joint")
    names = collections.Counter(["total", *(term.name for term in terms)])
    return [t._replace(label=t.key) if names[t.name] > 1 else t for t in terms]


def _class_loss(config: Config, chunk_size: int | None) -> _Term:
    loss, similarity = config.loss, _similarity(config)
    found = _find(class_losses.LOSSES, loss.name, "loss.name")
    name, takes = loss.name.rpartition(":")[2], inspect.signature(found.function).parameters
    for key in ("scale", "margin"):
        if key in loss and key not in takes:
            raise ValueError(f"loss.{key} has no place in {name}: leave it out of the config")
    for key, what in (("detach", "margin"), ("anneal", "margin"), ("norm_as_scale", "scale")):
        if loss.get(key) and what not in takes:
            raise ValueError(f"loss.{key}={loss[key]!r} has no place in {name}")
    if loss.similarity != "cosine" and "similarity" not in takes:
        raise ValueError(f"loss.similarity={loss.similarity!r} has no place in {name}")
    if not similarity.cosine and loss.get("margin", "identity") != "identity":
        raise ValueError(
            f"loss.margin={loss.margin!r} changes a cosine, and loss.similarity="
            f"{loss.similarity!r} is none: use loss.similarity='cosine', or loss.margin='identity'"
        )
    if not 0 < loss.sample_rate <= 1:
        raise ValueError(f"loss.sample_rate={loss.sample_rate}: give a part in (0, 1]")
    for key in ("scale", "margin"):
        if key in takes and takes[key].default is inspect.Parameter.empty and key not in loss:
            raise ValueError(f"loss.{key} is missing: {name} needs it")
    given = {"margin", "scale", "similarity", "chunk_size", *Inputs._fields, *found.outputs}
    lookup.check_arguments(found.function, loss.kw, "loss.kw", given, by_name=True)
    found = found._replace(
        rows=found.rows or similarity.rows, cosine=found.cosine and similarity.cosine
    )
    static = _rest(loss.kw) | {"similarity": similarity.function, "chunk_size": chunk_size}
    return _Term("loss", name, found, name, static)


def _term(config: Config, section: str, name: str, kw: Config, between: int | None) -> _Term:
    key, named = f"{section}.{name}", kw.get("name", name)
    found = _find(MODULES[section].LOSSES, named, f"{key}.name" if "name" in kw else section)
    own = {k: v for k, v in kw.items() if k not in _OF_TERMS}
    given = {*Inputs._fields, *found.outputs}
    lookup.check_arguments(found.function, own, key, given, by_name=True)
    if "weight" not in kw:
        raise ValueError(f"{key}.weight is missing: every term needs one")
    for number in ("weight", "begin", "end"):
        if number in kw and not isinstance(kw[number], float):
            raise ValueError(f"{key}.{number}={kw[number]!r}: write it as a float, such as 1.0")
    if "classes" in inspect.signature(found.function).parameters and not one_row_a_class(config):
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
    return _Term(section, name, found, name, static, shape)


def _find(table: Mapping[str, Any], name: str, key: str) -> Loss:
    """A row of the table, or of the user's own code: there a function alone is a row, too."""
    if not lookup.is_path(name):
        return lookup.find(table, name, key)
    found = lookup.from_path(name, key, table="LOSSES")
    row = found if isinstance(found, Loss) else Loss(found)
    if not callable(row.function):
        raise ValueError(f"{key}={name!r} is no function")
    for what in ("learned", "running"):
        asked = what in inspect.signature(row.function).parameters
        if asked and getattr(row, what) is None:
            raise ValueError(
                f"{key}={name!r} asks for {what}, and nothing says how that starts: write "
                f"LOSSES = {{...: Loss(..., {what}=...)}} beside it"
            )
    return row


def _margin(config: Config) -> Callable[[Hyper, Array], margins.Margin] | None:
    """(hyper, step) → ψ as it is in that step, of a loss that has a margin."""
    loss = config.loss
    if not (name := loss.get("margin")):
        return None
    key, own = "loss.margin", lookup.is_path(name)
    margin_of = (
        lookup.from_path(name, key, "MARGINS") if own else lookup.find(margins.MARGINS, name, key)
    )
    if not callable(margin_of):
        raise ValueError(f"{key}={name!r} is no function")
    lookup.check_arguments(margin_of, loss.margin_kw, "loss.margin_kw")

    def margin(hyper: Hyper, step: Array) -> margins.Margin:
        psi: Any = partial(margin_of, **hyper["margin"])
        if loss.detach:
            psi = margins.detach(psi)
        if hyper["anneal"]:
            psi = margins.anneal(psi, annealed_weight(step, hyper["anneal"]))
        return psi

    return margin


def _similarity(config: Config) -> Kind:
    return lookup.find(SIMILARITIES, config.loss.similarity, "loss.similarity")


def _numbers(section: Any) -> dict[str, Any]:
    return {k: jnp.float32(v) for k, v in section.items() if isinstance(v, float)}


def _rest(section: Any) -> dict[str, Any]:
    return {k: v for k, v in section.items() if not isinstance(v, float)}


def _known(name: str, known: Iterable[str], key: str) -> str:
    if name not in known:
        raise ValueError(f"{key}={name!r} is unknown; {lookup.nearest(name, known)}")
    return name
