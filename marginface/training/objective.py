"""The only place that turns config into a loss: terms → (scalar, metrics).

Each section of the config has its module, and each entry names a function in it:

    loss           class_losses     the loss over classes (name "" for none)
    regularizers   regularizers     functions of the prototypes, a mean over classes
    joint          joint_losses     beside the loss over classes, a mean over examples
    pairs          pair_losses      of pairs and triplets in the batch, a mean over anchors

A function gets what its signature asks for by name (`_Term.__call__` lists what there is) and its
numbers from the config. total = loss + Σ weight · ramp · term.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from marginface import devices, sharding
from marginface.config import Config
from marginface.lookup import check_arguments, find_function, nearest
from marginface.losses import (
    class_losses,
    class_softmax,
    groups,
    joint_losses,
    margins,
    pair_losses,
    regularizers,
)
from marginface.losses import similarity as similarities
from marginface.typing import Array, Float, Int

Hyper = dict[str, Any]
Metrics = dict[str, Array]

MODULES = {"regularizers": regularizers, "joint": joint_losses, "pairs": pair_losses}
RAMPS = ("constant", "linear", "inverse_anneal")
_RAMP = ("ramp", "begin", "end")
_SIMILARITIES = ("cosine", "linear", "subcenter_cosine")


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
    """An entry of the config: its function, where it stands, its numbers that are no numbers."""

    section: str
    name: str
    function: Callable
    static: dict[str, Any]
    ramp: str

    def companion(self, ending: str) -> Callable | None:
        """NAME_learned or NAME_start, where the function has one."""
        return getattr(inspect.getmodule(self.function), f"{self.name}_{ending}", None)

    def __call__(self, numbers: Mapping[str, Any], there_is: Mapping[str, Any]) -> Any:
        return _call(self.function, {**there_is, **numbers, **self.static})


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
    several = config.loss.subcenters if config.loss.similarity == "subcenter_cosine" else 1
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
    return bool(config.loss.name) and config.loss.similarity != "subcenter_cosine"


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
    loss, axis = config.loss, sharding.AXIS
    similarity = getattr(similarities, _known(loss.similarity, _SIMILARITIES, "loss.similarity"))
    shards = mesh.size if mesh else 1
    rows = sharding.padded_rows(num_classes, shards)
    fixed: dict[str, Any] = {
        "num_classes": num_classes,
        "rows": rows,
        "embedding_dim": embedding_dim,
    }
    fixed |= {"similarity": similarity, "axis_name": axis, **walk(config, num_classes, mesh)}
    fixed |= {"sample_rate": loss.sample_rate, "num_groups": config.model.kw.get("num_groups", 0)}
    class_loss = _class_loss(config) if loss.name else None
    margin_of = None
    if loss.name and (margin := loss.get("margin", "")):
        margin_of = find_function(margins, margin, "loss.margin", but_not=("detach", "anneal"))
        check_arguments(margin_of, loss.margin_kw, "loss.margin_kw")
    between = chunk_size_between(config, num_classes, mesh)
    terms = [
        _term(config, section, name, kw, between)
        for section in MODULES
        for name, kw in config[section].items()
    ]
    if not terms and class_loss is None:
        raise ValueError("nothing to minimise: give loss.name, or a term in pairs or joint")
    everything = [*([class_loss] if class_loss else []), *terms]

    def init(key: Array, hyper: Hyper) -> tuple[Any, Any]:
        key, key_rows, key_margins = jax.random.split(key, 3)
        learned, running = {}, {}
        for term in everything:
            key, part = jax.random.split(key)
            numbers = {**_numbers_of(hyper, term), **term.static, **fixed, "key": part}
            if function := term.companion("learned"):
                learned[term.name] = _call(function, numbers)
            if function := term.companion("start"):
                running[term.name] = _call(function, numbers)
        if class_loss is None:
            return {"prototypes": {}, "terms": learned}, running
        several = (loss.subcenters,) if loss.similarity == "subcenter_cosine" else ()
        # Short rows turn quickly at first; 0.01 is what arcface_torch starts with too.
        weight = 0.01 * jax.random.normal(key_rows, (rows, *several, embedding_dim))
        real = jnp.arange(rows) < num_classes
        weight = jnp.where(real.reshape(-1, *(1 for _ in weight.shape[1:])), weight, 0.0)
        prototypes: Any = weight
        if loss.similarity == "linear":
            prototypes = similarities.Linear(weight, jnp.zeros(rows))
        if class_loss.function is class_losses.adaptive_margin_softmax:
            margin = jax.random.uniform(key_margins, (rows,), minval=0.3, maxval=0.4)
            prototypes = class_losses.MarginRows(weight, jnp.where(real, margin, 0.0))
        return {"prototypes": prototypes, "terms": learned}, running

    # One function for each section: (term, its numbers, what there is) → value, state, metrics.

    def over_classes(term: _Term, numbers: Hyper, there_is: dict[str, Any]) -> tuple:
        if loss.sample_rate < 1:
            num = max(1, round(loss.sample_rate * rows / shards))
            key = jax.random.fold_in(there_is["key"], 1)
            sample = class_softmax.sample_classes(
                key, there_is["labels"], there_is["classes"], num, axis_name=axis
            )
            there_is = there_is | {"classes": sample}
        if loss.norm_as_scale:
            length = similarities.norm(there_is["embeddings"])
            numbers = numbers | {"scale": numbers["scale"] * length}
        result = term(numbers, there_is)
        metrics = {"train/top1": jnp.mean(result.target > result.hardest)}
        cos = result.target
        if loss.similarity == "linear" or loss.name == "large_margin_softmax":  # it is no cosine
            held = there_is["classes"]
            held = held._replace(rows=weights(held.rows))
            cos = class_softmax.target_similarity(
                there_is["embeddings"], there_is["labels"], held, axis_name=axis
            )
        angle = jnp.arccos(jnp.clip(cos, -1.0, 1.0))
        metrics["train/target_angle"] = jnp.mean(jnp.degrees(angle))
        return jnp.mean(result.loss), result.running, metrics

    def of_prototypes(term: _Term, numbers: Hyper, there_is: dict[str, Any]) -> tuple:
        held = there_is["classes"]
        per_class = term(numbers, there_is | {"classes": held._replace(rows=weights(held.rows))})
        return lax.psum(jnp.sum(per_class), axis) / num_classes, {}, {}

    def beside(term: _Term, numbers: Hyper, there_is: dict[str, Any]) -> tuple:
        result = term(numbers, there_is)
        losses, state = result if term.companion("start") else (result, {})
        metrics = {}
        if term.name == "grouping":
            logits = there_is["group_logits"]
            used = groups.usage(jnp.argmax(logits, axis=1), logits.shape[1])
            metrics = {"train/group_entropy": used.entropy, "train/group_largest": used.largest}
        return jnp.mean(losses), state, metrics

    def of_pairs(term: _Term, numbers: Hyper, there_is: dict[str, Any]) -> tuple:
        embeddings = there_is["embeddings"]
        value = lax.psum(jnp.sum(term(numbers, there_is)), axis) / embeddings.shape[0]
        metrics = {}
        if term.name == "triplet":
            collapsed, spread = pair_losses.collapse(embeddings, value, numbers["margin"])
            metrics = {"train/collapsed": collapsed, "train/spread": spread}
        return value, {}, metrics

    measure = {
        "loss": over_classes,
        "regularizers": of_prototypes,
        "joint": beside,
        "pairs": of_pairs,
    }

    def one_shard(
        params: Any, running: Any, output: Any, labels: Array, hyper: Hyper, step: Array, key: Array
    ) -> tuple[Any, Any]:
        there_is: dict[str, Any] = {**fixed, **output, "labels": labels}
        there_is["embeddings"] = output["embedding"]
        if class_loss is not None:
            there_is["classes"] = class_softmax.all_classes(
                params["prototypes"], num_classes, axis_name=axis
            )
        if margin_of is not None:
            there_is["margin"] = _margin(loss, margin_of, hyper, step)
        values, after, metrics = {}, dict(running), {}
        for i, term in enumerate(everything):
            own = {
                "key": jax.random.fold_in(key, i),
                "learned": params["terms"].get(term.name, {}),
                "running": running.get(term.name, {}),
            }
            with jax.named_scope(term.name):
                values[term.name], state, figures = measure[term.section](
                    term, _numbers_of(hyper, term), there_is | own
                )
            metrics |= figures
            if state:
                after[term.name] = state
            for name, leaf in {**own["learned"], **state}.items():
                if jnp.ndim(leaf) == 0:  # a scale that follows the angles, a learned threshold
                    metrics[f"train/{term.name}_{name}"] = leaf
        return values, (after, metrics)

    def objective(
        params: Any,
        running: Any,
        output: Mapping[str, Array],
        labels: Int[Array, "b"],
        hyper: Hyper,
        step: Int[Array, ""],
        key: Array,
    ) -> tuple[Array, tuple[Any, Metrics]]:
        state, walk = sharding.specs(running), one_shard
        if mesh is not None:
            walk = jax.shard_map(
                one_shard,
                mesh=mesh,
                in_specs=(sharding.specs(params), state, P(), P(), P(), P(), P()),
                out_specs=(P(), (state, P())),
            )
        values, (running, metrics) = walk(params, running, dict(output), labels, hyper, step, key)
        total = jnp.zeros(())
        for term in everything:
            weight = jnp.ones(())
            if term.section != "loss":
                numbers = hyper[term.section][term.name]
                factor = ramp(term.ramp, step / total_steps, step, numbers, hyper["anneal"])
                weight = numbers["weight"] * factor
            total += weight * values[term.name]
            metrics[f"loss/{term.name}"] = values[term.name]
        metrics["loss/total"] = total
        metrics = {name: jnp.float32(value) for name, value in metrics.items()}
        return total, lax.stop_gradient((running, metrics))

    return Objective(init, objective)


def _class_loss(config: Config) -> _Term:
    loss = config.loss
    function = find_function(class_losses, loss.name, "loss.name", but_not=("_start", "_learned"))
    takes = inspect.signature(function).parameters
    for key in ("scale", "margin"):
        if key in loss and key not in takes:
            raise ValueError(f"loss.{key} has no place in {loss.name}: leave it out of the config")
    for key, what in (("detach", "margin"), ("anneal", "margin"), ("norm_as_scale", "scale")):
        if loss.get(key) and what not in takes:
            raise ValueError(f"loss.{key}={loss[key]!r} has no place in {loss.name}")
    if loss.similarity != "cosine" and "similarity" not in takes:
        raise ValueError(f"loss.similarity={loss.similarity!r} has no place in {loss.name}")
    if loss.similarity == "linear" and loss.get("margin", "identity") != "identity":
        raise ValueError(
            f"loss.margin={loss.margin!r} changes a cosine, and loss.similarity='linear' is none: "
            "use loss.similarity='cosine', or loss.margin='identity'"
        )
    if not 0 < loss.sample_rate <= 1:
        raise ValueError(f"loss.sample_rate={loss.sample_rate}: give a part in (0, 1]")
    for key in ("scale", "margin"):
        if key in takes and takes[key].default is inspect.Parameter.empty and key not in loss:
            raise ValueError(f"loss.{key} is missing: {loss.name} needs it")
    given = {"margin", "scale", "similarity", "num_classes", "chunk_size", "precision"}
    given |= {"axis_name", "learned", "running", "key"}
    check_arguments(function, loss.kw, "loss.kw", given)
    return _Term("loss", loss.name, function, _rest(loss.kw), "constant")


def _term(config: Config, section: str, name: str, kw: Config, between: int | None) -> _Term:
    """`between` is chunk_size_between, for a term that has no chunk_size of its own."""
    key = f"{section}.{name}"
    endings = ("_start", "_learned", "_score", "_features", "_counts", "collapse")
    function = find_function(MODULES[section], name, section, but_not=endings)
    given = {"num_classes", "axis_name", "learned", "running", "key", "classes", "group_logits"}
    given |= {"precision"}
    own = {k: v for k, v in kw.items() if k not in ("weight", *_RAMP)}
    check_arguments(function, own, key, given)
    if "weight" not in kw:
        raise ValueError(f"{key}.weight is missing: every term needs one")
    for number in ("weight", "begin", "end"):
        if number in kw and not isinstance(kw[number], float):
            raise ValueError(f"{key}.{number}={kw[number]!r}: write it as a float, such as 1.0")
    if "classes" in inspect.signature(function).parameters and not one_row_a_class(config):
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
    return _Term(section, name, function, static, shape)


def _margin(loss: Config, margin_of: Callable, hyper: Hyper, step: Array) -> margins.Margin:
    margin = partial(margin_of, **hyper["margin"])
    if loss.detach:
        margin = margins.detach(margin)
    if hyper["anneal"]:
        margin = margins.anneal(margin, annealed_weight(step, hyper["anneal"]))
    return margin


def _call(function: Callable, arguments: Mapping[str, Any]) -> Any:
    takes = inspect.signature(function).parameters
    return function(**{k: v for k, v in arguments.items() if k in takes})


def _numbers(section: Any) -> dict[str, Any]:
    return {k: jnp.float32(v) for k, v in section.items() if isinstance(v, float)}


def _numbers_of(hyper: Hyper, term: _Term) -> Hyper:
    return hyper["loss"] if term.section == "loss" else hyper[term.section][term.name]


def _rest(section: Any) -> dict[str, Any]:
    return {k: v for k, v in section.items() if not isinstance(v, float)}


def _known(name: str, known: tuple[str, ...], key: str) -> str:
    if name not in known:
        raise ValueError(f"{key}={name!r} is unknown; {nearest(name, known)}")
    return name
