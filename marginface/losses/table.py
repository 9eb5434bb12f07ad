"""What a loss may ask for, and what it needs beside: the rows of the tables LOSSES.

A loss is a pure function. Each module of losses ends with the table of those that a config may
name, and says there how what they train and remember starts:

    LOSSES = {"center": Loss(center, running=centers_at_origin), "intra": Loss(intra), ...}
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from marginface.losses.similarity import Precision
from marginface.typing import Array


class Inputs(NamedTuple):
    """What there is for a loss. A function gets the fields whose names its arguments have.

    Of the whole run, for functions that start something too:
      num_classes: C.
      rows: how many rows W has, C and padding; a multiple of the number of devices.
      embedding_dim: d.
      sample_rate: the part of the classes that a step's softmax sees.
      precision: of products with other classes, see similarity.product.
      axis_name: the mesh axis over which the classes are sharded; functions that start something
        are not inside jax.shard_map, and make whole arrays.
      num_groups: of a network with latent groups, see models.group_head.
      key: for chance; another for each loss, and in each step.

    Of a step, on this device:
      embeddings: x [b, d] of the whole batch.
      labels: y [b].
      classes: class_softmax.Classes, those held here. Outside of class_losses, W has one row for
        each class.
      learned: the loss's own parameters.
      running: its running state.
      outputs: those of the network that Loss.outputs names; each is asked for by its own name.
    """

    num_classes: int
    rows: int
    embedding_dim: int
    sample_rate: float
    precision: Precision
    axis_name: str | None
    num_groups: int | None = None
    key: Any = None
    embeddings: Any = None
    labels: Any = None
    classes: Any = None
    learned: Any = None
    running: Any = None
    outputs: Mapping[str, Array] = {}


class Loss(NamedTuple):
    """A loss that a config may name, and what it needs beside its numbers.

    The functions named here, as the loss itself, ask for fields of Inputs and for the numbers of
    the config by the names of their arguments.

    function: the loss.
    learned: makes the parameters of its own as they start, {name: array}; it gets them as
      `learned`. What has the classes as its leading axis, [rows, ...], is called "centers": it is
      sharded as W is.
    running: makes its running state as it starts, likewise; the loss gets it as `running` and
      returns the next beside its values.
    rows: (weight, ...) → the rows that are trained, of a loss over classes that trains more of
      each class than W; they have W as `weight`.
    outputs: those of the network, beside the embedding, that it asks for.
    figures: makes what a run shall show of the loss beside its value, {name: number}; it may ask
      for `value`, the mean of the batch.
    cosine: whether `target`, of a loss over classes, is a cosine.
    """

    function: Callable
    learned: Callable[..., dict[str, Array]] | None = None
    running: Callable[..., dict[str, Array]] | None = None
    rows: Callable | None = None
    outputs: tuple[str, ...] = ()
    figures: Callable[..., dict[str, Array]] | None = None
    cosine: bool = True


def call(function: Callable, inputs: Inputs, numbers: Mapping[str, Any], key: str) -> Any:
    """function(...) of what it asks for by the names of its arguments.

    Args:
      function: a loss, or one that its row of the table names.
      inputs: what there is.
      numbers: of the config.
      key: where the config names it.

    Raises:
      ValueError: it asks for what there is not.
    """
    given = {name: value for name, value in inputs._asdict().items() if value is not None}
    given = {**inputs.outputs, **numbers, **given}
    takes = inspect.signature(function).parameters
    for name, parameter in takes.items():
        named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if named and name not in given and parameter.default is parameter.empty:
            there_is = ", ".join(sorted(given))
            raise ValueError(f"{key} asks for {name}, which there is not here; there is {there_is}")
    return function(**{name: given[name] for name in takes if name in given})
