"""One update of the network and the prototypes: state, images, labels → state, metrics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from marginface import models, sharding
from marginface.config import Config
from marginface.lookup import nearest
from marginface.training import optim
from marginface.training.objective import Hyper, Metrics, Objective
from marginface.training.objective import hyper as hyper_of
from marginface.typing import Array, Int

State = dict[str, Any]


class Step(NamedTuple):
    """The three functions of a run, and the shape of its state.

    init: (seed, hyper) → state {"params": {"network", "prototypes", "terms"}, "stats", "running",
      "opt", "step"}; "terms" and "running" are what the objective's terms train and remember.
    train: (state, images [b, h, w, 3], labels [b], hyper, seed) → (state, metrics). The old
      state's memory is reused. Where a loss or gradient is not finite the state stays as it was.
    embed: (state, images [b, h, w, 3]) → {"embedding": [b, d], ...}, all that the network gives by
      name, each the mean over image and mirror image.
    like: shapes and shardings of the state: what a checkpoint restores into.
    """

    init: Callable[[Array, Hyper], State]
    train: Callable[[State, Array, Array, Hyper, Array], tuple[State, Metrics]]
    embed: Callable[[State, Array], dict[str, Array]]
    like: State


def make(
    config: Config,
    *,
    model: nn.Module,
    objective: Objective,
    mesh: Mesh,
    image_shape: tuple[int, int, int],
    total_steps: int,
) -> Step:
    """The jitted functions. Every device runs the network on its part of the batch.

    Arguments and errors are those of `functions`.
    """
    plain = functions(
        config,
        model=model,
        objective=objective,
        mesh=mesh,
        image_shape=image_shape,
        total_steps=total_steps,
    )
    replicated = NamedSharding(mesh, P())
    by_batch = NamedSharding(mesh, P(sharding.AXIS))
    placed = sharding.state_shardings(mesh, plain.like)
    like = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), plain.like, placed
    )
    return Step(
        like=like,
        init=jax.jit(plain.init, out_shardings=placed),
        train=jax.jit(
            plain.train,
            in_shardings=(placed, by_batch, by_batch, replicated, replicated),
            out_shardings=(placed, replicated),
            donate_argnums=0,
        ),
        embed=jax.jit(plain.embed, in_shardings=(placed, by_batch), out_shardings=replicated),
    )


def functions(
    config: Config,
    *,
    model: nn.Module,
    objective: Objective,
    mesh: Mesh | None,
    image_shape: tuple[int, int, int],
    total_steps: int,
) -> Step:
    """The same functions, not jitted: to be transformed further (many runs in one program).

    Without a mesh they are for use inside a jax.shard_map, see objective.make.

    Batch statistics are those of the whole batch on any number of devices. With
    config.optimizer.accumulate = k, the gradient is the mean over k parts of the batch, which
    never stand in memory together; running state passes from part to part.

    Raises:
      ValueError: unknown optimizer or schedule, or accumulation together with losses over pairs.
    """
    optimizer, schedule = config.optimizer, config.schedule
    if optimizer.accumulate > 1 and config.pairs:
        raise ValueError(
            f"optimizer.accumulate={optimizer.accumulate} would part the images of a person, and "
            f"pairs.{next(iter(config.pairs))} needs them in one batch: use optimizer.accumulate=1"
        )
    if schedule.name not in optim.SCHEDULES:
        hint = nearest(schedule.name, optim.SCHEDULES)
        raise ValueError(f"schedule.name={schedule.name!r} is unknown; {hint}")
    init = _init(model, objective, optimizer, image_shape)
    gradients = _in_parts(_gradients(model, objective), optimizer.accumulate, mesh)
    return Step(
        init=init,
        train=_train(gradients, optimizer, schedule, total_steps),
        embed=_embed(model),
        like=jax.eval_shape(init, jnp.zeros((), jnp.int32), hyper_of(config)),
    )


def _init(
    model: nn.Module, objective: Objective, optimizer: Config, image_shape: tuple[int, int, int]
) -> Callable[[Array, Hyper], State]:
    """Step.init."""

    @jax.jit  # traced once, for shapes and for values
    def init(seed: Int[Array, ""], hyper: Hyper) -> State:
        network_key, prototypes_key = jax.random.split(jax.random.key(seed))
        variables = model.init(network_key, jnp.zeros((2, *image_shape)), train=False)
        own, running = objective.init(prototypes_key, hyper)
        params = {"network": variables["params"], **own}
        # The structure of the optimizer's state does not depend on the values here.
        zeros = dict.fromkeys(optimizer, 0.0)
        return {
            "params": params,
            "stats": variables.get("batch_stats", {}),
            "running": running,
            "opt": optim.direction(optimizer.name, zeros).init(params),
            "step": jnp.zeros((), jnp.int32),
        }

    return init


# (params, memory, images, labels, hyper, step, key) → (gradients, memory, metrics); the memory is
# (batch statistics, running state), as one batch leaves it to the next.
_Gradients = Callable[..., tuple[Any, Any, Metrics]]


def _gradients(model: nn.Module, objective: Objective) -> _Gradients:
    """Those of a batch as a whole."""

    def loss(
        params: Any,
        memory: tuple[Any, Any],
        images: Array,
        labels: Array,
        hyper: Hyper,
        step: Array,
        key: Array,
    ) -> tuple[Array, tuple[Any, Metrics]]:
        stats, running = memory
        network_key, objective_key = jax.random.split(key)
        output, updated = model.apply(
            {"params": params["network"], "batch_stats": stats},
            images,
            train=True,
            rngs={"dropout": network_key},
            mutable=["batch_stats"],
        )
        own = {k: v for k, v in params.items() if k != "network"}
        total, (running, metrics) = objective.loss(
            own, running, models.outputs(output), labels, hyper, step, objective_key
        )
        return total, ((updated.get("batch_stats", {}), running), metrics)

    def gradients(*arguments: Any) -> tuple[Any, Any, Metrics]:
        grads, (memory, metrics) = jax.grad(loss, has_aux=True)(*arguments)
        return grads, memory, metrics

    return gradients


def _in_parts(gradients: _Gradients, parts: int, mesh: Mesh | None) -> _Gradients:
    """The mean over so many parts of the batch, one after the other."""
    if parts == 1:
        return gradients

    def split(x: Array) -> Array:  # every part takes from every device: nothing moves
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def mean(
        params: Any,
        memory: tuple[Any, Any],
        images: Array,
        labels: Array,
        hyper: Hyper,
        step: Array,
        key: Array,
    ) -> tuple[Any, Any, Metrics]:
        def one_part(carry: tuple, part: tuple) -> tuple:
            sums, memory = carry
            images, labels, key = part
            if mesh is not None:
                by_batch = NamedSharding(mesh, P(sharding.AXIS))
                images = jax.lax.with_sharding_constraint(images, by_batch)
            grads, memory, metrics = gradients(params, memory, images, labels, hyper, step, key)
            return (jax.tree.map(jnp.add, sums, grads), memory), metrics

        start = (jax.tree.map(jnp.zeros_like, params), memory)
        keys = jax.random.split(key, parts)
        (sums, memory), metrics = jax.lax.scan(
            one_part, start, (split(images), split(labels), keys)
        )
        grads = jax.tree.map(lambda x: x / parts, sums)
        return grads, memory, jax.tree.map(lambda x: jnp.mean(x, axis=0), metrics)

    return mean


def _train(
    gradients: _Gradients, optimizer: Config, schedule: Config, total_steps: int
) -> Callable[..., tuple[State, Metrics]]:
    """Step.train."""

    def train(
        state: State, images: Array, labels: Array, hyper: Hyper, seed: Int[Array, ""]
    ) -> tuple[State, Metrics]:
        params, step = state["params"], state["step"]
        key = jax.random.fold_in(jax.random.key(seed), step)
        memory = state["stats"], state["running"]
        grads, (stats, running), metrics = gradients(
            params, memory, images, labels, hyper, step, key
        )
        factor = optim.learning_rate_factor(
            step,
            total_steps,
            name=schedule.name,
            boundaries=tuple(schedule.boundaries),
            **hyper["schedule"],
        )
        rate = hyper["optimizer"]["learning_rate"] * factor
        metrics["train/learning_rate"] = rate
        metrics["train/gradient_norm"] = optax.tree.norm(grads)
        finite = jnp.stack([jnp.all(jnp.isfinite(m)) for m in metrics.values()]).all()

        def if_finite(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        direction: Any = optim.direction(optimizer.name, hyper["optimizer"])
        updates, opt = direction.update(grads, state["opt"], params)
        updates, opt = _shared(updates, opt, if_finite(opt, state["opt"]))
        own_rate = rate * hyper["optimizer"]["prototypes_factor"]
        rates = {"network": rate, "prototypes": own_rate, "terms": own_rate}
        updates = {k: jax.tree.map(lambda u, r=rates[k]: -r * u, updates[k]) for k in rates}
        new = {"params": optax.apply_updates(params, updates), "stats": stats, "running": running}
        old = {name: state[name] for name in new}
        step = jnp.where(finite, step + 1, step)
        return if_finite(new, old) | {"opt": opt, "step": step}, metrics

    return train


def _embed(model: nn.Module) -> Callable[[State, Array], dict[str, Array]]:
    """Step.embed."""

    def embed(state: State, images: Array) -> dict[str, Array]:
        variables = {"params": state["params"]["network"], "batch_stats": state["stats"]}

        @jax.jit  # traced once, for both
        def outputs(variables: Any, images: Array) -> dict[str, Array]:
            return models.outputs(model.apply(variables, images, train=False))

        as_is, mirrored = outputs(variables, images), outputs(variables, images[:, :, ::-1])
        return {name: 0.5 * (as_is[name] + mirrored[name]) for name in as_is}

    return embed


def _shared(updates: Any, opt: Any, kept: Any) -> tuple[Any, Any]:
    """The updates, with the arrays that the optimizer's new state `opt` holds too out of `kept`.

    SGD's are its momentum. Read from what is stored, they need neither the old momentum nor the
    gradient, whose memory XLA then gives to the new: two arrays of the prototypes' size less.
    """
    stored = dict(zip(map(id, jax.tree.leaves(opt)), jax.tree.leaves(kept), strict=True))
    return jax.tree.map(lambda leaf: stored.get(id(leaf), leaf), updates), kept
