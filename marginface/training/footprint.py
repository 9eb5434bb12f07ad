"""What a train step needs of a device's memory, told from its shapes before it is compiled.

State and gradients are exact. Activations are a walk over the traced step: an array takes memory
from the operation that makes it to the last one that reads it. What XLA fuses takes none: the
result of an elementwise operation counts only where a product, convolution or loop reads it, else
what it was made of is kept in its place. XLA does not fuse and order all that well, and libraries
want scratch memory: _SPARE stands for it. On CPU the sum is within a factor of two of what XLA says
once it has compiled (test_footprint.py), but for model.kw.remat, which that backend undoes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from marginface import devices, sharding
from marginface.training.step import Step

_SPARE = 1.5
_LOOPS = ("scan", "while", "cond")
_CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "shard_map")
_CALLS += ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
# What reads and writes memory; the rest is fused into its readers.
_WHOLE = ("conv_general_dilated", "dot_general", "ragged_dot_general", "sort", "top_k")
_WHOLE += ("gather", "scatter", "scatter-add", "reduce_window_max", "select_and_scatter_add")
_WHOLE += ("pallas_call", "custom_call", "ffi_call")
_SMALLER = ("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "argmax", "argmin", "psum")
_SAME = ("transpose", "reshape", "squeeze", "expand_dims", "copy", "sharding_constraint")
_SAME += ("stop_gradient", "pvary", "broadcast_in_dim")


class Footprint(NamedTuple):
    """Bytes on each device."""

    parameters: float
    optimizer: float
    gradients: float
    activations: float

    @property
    def total(self) -> float:
        return sum(self)


class _Value:
    """An array of the traced step."""

    __slots__ = ("begin", "bytes", "end", "kept", "roots")

    def __init__(self, size: float) -> None:
        self.bytes, self.kept, self.begin, self.end = size, False, -1, -1
        self.roots: frozenset[_Value] = frozenset()

    def sources(self) -> frozenset["_Value"]:
        """Itself, or the kept arrays that it is made of."""
        return frozenset((self,)) if self.kept else self.roots


class _Operation(NamedTuple):
    equation: Any
    reads: list[_Value]
    writes: list[_Value]


def of_step(
    steps: Step,
    *,
    mesh: Mesh,
    batch_size: int,
    accumulate: int = 1,
    image_shape: tuple[int, int, int],
    hyper: Any,
    seed: Any,
) -> Footprint:
    """Of `steps.train`, whose trace its first call then uses.

    Args:
        steps: of step.make.
        mesh: the devices.
        batch_size: of the whole batch.
        accumulate: optimizer.accumulate, the parts it is taken in.
        image_shape: [h, w, 3].
        hyper, seed: as the step gets them.
    """
    by_batch = NamedSharding(mesh, P(sharding.AXIS))
    images = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32, sharding=by_batch)
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=by_batch)
    train: Any = steps.train
    traced = train.trace(steps.like, images, labels, hyper, seed)
    like = steps.like
    parameters, gradients = _bytes(like) - _bytes(like["opt"]), _bytes(like["params"])
    rows = [x.shape[0] for x in jax.tree.leaves(like["params"]["prototypes"]) if x.ndim]
    split = {batch_size, batch_size // accumulate, *rows}

    def local(aval: Any) -> float:
        """What leads with the batch or with the classes is split over the mesh."""
        size = _size(aval)
        return size / mesh.size if aval.ndim and aval.shape[0] in split else size

    jaxpr = traced.jaxpr.jaxpr
    count = len(jax.tree.leaves(like))
    held = [_Value(0.0) for _ in jaxpr.invars[:count]]  # the state, counted by itself
    others = [_Value(local(v.aval)) for v in jaxpr.invars[count:]]
    working = _peak(jaxpr, [*held, *others], local)
    activations = _SPARE * max(0.0, working - gradients)
    return Footprint(parameters, _bytes(like["opt"]), gradients, activations)


def describe(need: Footprint, *, mesh: Mesh, walk: dict[str, Any] | None) -> list[str]:
    """Two lines: the devices and how classes are walked on them; the memory a step needs.

    A third warns where that is more than there is.

    Args:
        need: of the step.
        mesh: the devices.
        walk: objective.walk, None without a loss over classes.
    """
    device = mesh.local_devices[0]
    shared = jax.local_device_count() if device.platform == "cpu" else 1
    memory = devices.memory(device) / shared
    line = f"device: {mesh.size} × {device.device_kind}, {_text(memory)} of memory each"
    if walk is not None:
        size = walk["chunk_size"]
        line += f"; loss.precision={walk['precision']}, loss.chunk_size={size or 0}"
        line += "" if size else " (all classes at once)"
    lines = [
        line,
        f"needed: about {_text(need.total)} each: parameters {_text(need.parameters)}, optimizer "
        f"{_text(need.optimizer)}, gradients {_text(need.gradients)}, activations "
        f"{_text(need.activations)} (estimated)",
    ]
    if need.total > memory:
        lines.append(
            "warning: that is more than there is. What helps: a smaller batch_size, or "
            "optimizer.accumulate; model.kw.remat=True; a smaller loss.chunk_size; more devices"
        )
    return lines


def _peak(jaxpr: Any, inputs: Sequence[_Value], size: Callable[[Any], float]) -> float:
    """The most bytes that are live at a time, inputs and outputs among them."""
    operations: list[_Operation] = []
    outputs = list(_flatten(jaxpr, inputs, size, operations))
    for value in inputs:
        value.kept = True
    for name, reads, writes in ((o.equation.primitive.name, *o[1:]) for o in reversed(operations)):
        if name in _SAME:  # no array of its own: what is wanted of it is wanted of its source
            if writes[0].kept:
                writes[0].kept, reads[0].kept = False, True
        elif name in _WHOLE or name in _LOOPS:
            for value in (*reads, *writes):
                value.kept = True
        elif name in _SMALLER:
            for value in writes:
                value.kept = True
    inner = [0.0] * len(operations)
    for at, (equation, reads, writes) in enumerate(operations):
        sources = frozenset().union(*(value.sources() for value in reads))
        inner[at] = _inner_peak(equation, size)
        if any(value.kept for value in writes):
            for source in sources:
                source.end = at
        for value in writes:
            value.begin = value.end = at
            value.roots = sources
    for value in outputs:
        for source in value.sources():
            source.end = len(operations)
    changes = [0.0] * (len(operations) + 2)
    everything = {id(v): v for o in operations for v in (*o.reads, *o.writes)}
    for value in everything.values():
        if value.kept:
            changes[max(value.begin, 0)] += value.bytes
            changes[value.end + 1] -= value.bytes
    live = most = 0.0
    for at, change in enumerate(changes[:-1]):
        live += change
        most = max(most, live + (inner[at] if at < len(inner) else 0.0))
    return most


def _flatten(
    jaxpr: Any,
    inputs: Sequence[_Value],
    size: Callable[[Any], float],
    operations: list[_Operation],
) -> Iterator[_Value]:
    """Appends the operations, those of called functions too; yields the outputs."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= {v: _Value(0.0) for v in jaxpr.constvars}

    def read(variable: Any) -> _Value:
        return _Value(0.0) if isinstance(variable, core.Literal) else known[variable]

    for equation in jaxpr.eqns:
        reads = [read(v) for v in equation.invars]
        if equation.primitive.name in _CALLS:
            called = equation.params.get("jaxpr") or equation.params["call_jaxpr"]
            # Below shard_map shapes are those of one device.
            inside = _size if equation.primitive.name == "shard_map" else size
            writes = list(_flatten(_open(called), reads, inside, operations))
        else:
            writes = [_Value(size(v.aval)) for v in equation.outvars]
            operations.append(_Operation(equation, reads, writes))
        known |= dict(zip(equation.outvars, writes, strict=True))
    yield from map(read, jaxpr.outvars)


def _inner_peak(equation: Any, size: Callable[[Any], float]) -> float:
    """What a loop or branch needs beside what it reads and writes."""
    name, params = equation.primitive.name, equation.params
    if name not in _LOOPS:
        return 0.0
    bodies = params.get("branches") or [params.get("jaxpr") or params["body_jaxpr"]]
    return max(
        _peak(_open(body), [_Value(0.0) for _ in _open(body).invars], size) for body in bodies
    )


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _size(aval: Any) -> float:
    return float(math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 8))


def _bytes(tree: Any) -> float:
    """Of arrays with shardings, on one device."""
    return float(
        sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )
    )


def _text(size: float) -> str:
    power = 1 if size < 1e6 else 2 if size < 1e9 else 3
    return f"{size / 1024**power:.3g} {('KiB', 'MiB', 'GiB')[power - 1]}"
