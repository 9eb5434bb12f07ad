"""What a loss may ask for, and what it needs beside: the records that the tables LOSSES hold.

    LOSSES = table(Loss(center, running=centers_at_origin), Loss(intra), ...)

A loss is a function of arrays and numbers. Arguments named as a field of `Inputs` get that field;
all others are numbers and choices of the config.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Inputs(NamedTuple):
    """All that a loss may ask for; None is what there is not.

    Attributes:
        embeddings: x [b, d].
        labels: y [b].
        classes: class_softmax.Classes held here; without the loss over classes there are none.
        group_logits: [b, K], of a network with latent groups.
        learned: the loss's own parameters, as its `learned` starts them.
        running: the loss's own state, as its `running` starts it.
        key: for random draws.
        num_classes: C.
        rows: of the prototype array on all devices, padding among them.
        embedding_dim: d.
        num_groups: K.
        sample_rate: the part of the classes in each step (Partial FC).
        axis_name: the mesh axis over which classes and anchors are spread.
        precision: of products with the other classes, see similarity.product.
        chunk_size: classes visited at a time.
        similarity, margin, scale: of the loss over classes, as the config names them.
    """

    embeddings: Any = None
    labels: Any = None
    classes: Any = None
    group_logits: Any = None
    learned: Any = None
    running: Any = None
    key: Any = None
    num_classes: Any = None
    rows: Any = None
    embedding_dim: Any = None
    num_groups: Any = None
    sample_rate: Any = None
    axis_name: Any = None
    precision: Any = None
    chunk_size: Any = None
    similarity: Any = None
    margin: Any = None
    scale: Any = None


class Loss(NamedTuple):
    """A loss, and what it needs beside its numbers.

    The other functions ask for fields of `Inputs` and for the loss's numbers by name, as the loss
    itself does.

    Attributes:
        function: the loss. One with `running` returns its next state too: a ClassLoss with it, or
            (values, state).
        learned: → its own parameters at the start, a dict of arrays.
        running: → its own state before the first batch, a dict of arrays.
        rows: (W [rows, d], key, num_classes) → prototypes that hold more than W.
        figures: → {name: number} to watch, from the inputs and `value`, the loss's mean.
        cosine: whether ClassLoss.target is a cosine where the similarity is one.
    """

    function: Callable
    learned: Callable | None = None
    running: Callable | None = None
    rows: Callable | None = None
    figures: Callable | None = None
    cosine: bool = True


def table(*losses: Loss) -> dict[str, Loss]:
    """The losses by the names of their functions."""
    return {getattr(loss.function, "__name__", ""): loss for loss in losses}


def asked(function: Callable) -> set[str]:
    """The fields of Inputs that a function asks for."""
    return inspect.signature(function).parameters.keys() & set(Inputs._fields)


def call(function: Callable, inputs: Inputs, numbers: Mapping[str, Any]) -> Any:
    """function(what it asks for): its numbers, and of the inputs those that there are.

    Raises:
        ValueError: it cannot do without an input that there is not.
    """
    there_is = {**numbers, **{k: v for k, v in inputs._asdict().items() if v is not None}}
    there_is.setdefault("chunk_size", None)  # all at once
    parameters = inspect.signature(function).parameters
    for name in asked(function) - there_is.keys():
        if parameters[name].default is inspect.Parameter.empty:
            called = getattr(function, "__name__", "the loss")
            raise ValueError(f"{called} needs {name}, which neither network nor loss give")
    return function(**{name: there_is[name] for name in parameters if name in there_is})
