"""Optimizers and schedules against loops in float64, and against PyTorch's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from marginface.training import optim

HYPER = {"clip_norm": 0.0, "weight_decay": 0.05, "momentum": 0.9, "b1": 0.8, "b2": 0.95}
RATE, STEPS = 0.1, 6
SHAPES = {"kernel": (3, 4), "bias": (4,), "scale": (4,)}


def parameters():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def gradients(step):
    rng = np.random.default_rng(1 + step)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def clipped(grads, limit):
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    return {k: g * min(1.0, limit / norm) if limit else g for k, g in grads.items()}


def decayed(name, hyper):
    """The kernel alone: biases and scales of norms are spared."""
    return hyper["weight_decay"] if name == "kernel" else 0.0


def textbook_sgd(hyper):
    """PyTorch's: buffer = momentum · buffer + gradient + decay · parameter."""
    params = parameters()
    buffers = {k: np.zeros_like(p) for k, p in params.items()}
    for step in range(STEPS):
        for k, g in clipped(gradients(step), hyper["clip_norm"]).items():
            g = g + decayed(k, hyper) * params[k]
            buffers[k] = hyper["momentum"] * buffers[k] + g
            params[k] = params[k] - RATE * buffers[k]
    return params


def textbook_adam(hyper, trust):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2); with trust, LAMB (You et al. 2020)."""
    params = parameters()
    first = {k: np.zeros_like(p) for k, p in params.items()}
    second = {k: np.zeros_like(p) for k, p in params.items()}
    b1, b2 = hyper["b1"], hyper["b2"]
    for step in range(STEPS):
        for k, g in clipped(gradients(step), hyper["clip_norm"]).items():
            first[k] = b1 * first[k] + (1 - b1) * g
            second[k] = b2 * second[k] + (1 - b2) * g**2
            unbiased = first[k] / (1 - b1 ** (step + 1))
            spread = second[k] / (1 - b2 ** (step + 1))
            update = unbiased / (np.sqrt(spread) + 1e-8) + decayed(k, hyper) * params[k]
            if trust:
                update = update * np.linalg.norm(params[k]) / np.linalg.norm(update)
            params[k] = params[k] - RATE * update
    return params


def ours(name, hyper):
    """The same updates by optim.direction, every hyper-parameter traced."""

    @jax.jit
    def update(params, state, grads, hyper):
        updates, state = optim.direction(name, hyper).update(grads, state, params)
        return optax.apply_updates(params, jax.tree.map(lambda u: -RATE * u, updates)), state

    params = jax.tree.map(jnp.float32, parameters())
    state = optim.direction(name, dict.fromkeys(hyper, 0.0)).init(params)
    traced = {k: jnp.float32(v) for k, v in hyper.items()}
    for step in range(STEPS):
        params, state = update(params, state, jax.tree.map(jnp.float32, gradients(step)), traced)
    return params


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_an_optimizer_is_the_textbook_form(name, clip_norm):
    hyper = HYPER | {"clip_norm": clip_norm}
    expected = textbook_sgd(hyper) if name == "sgd" else textbook_adam(hyper, name == "lamb")
    assert_same(ours(name, hyper), expected)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_optimizer_is_pytorchs(name):
    torch = pytest.importorskip("torch", reason="pip install marginface[peers]")
    hyper = HYPER | {"clip_norm": 1.0}
    params = {k: torch.tensor(p, requires_grad=True) for k, p in parameters().items()}
    groups = [{"params": [p], "weight_decay": decayed(k, hyper)} for k, p in params.items()]
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, RATE, momentum=hyper["momentum"])
    else:
        optimizer = torch.optim.AdamW(groups, RATE, betas=(hyper["b1"], hyper["b2"]))
    for step in range(STEPS):
        for k, g in gradients(step).items():
            params[k].grad = torch.tensor(g)
        torch.nn.utils.clip_grad_norm_(params.values(), hyper["clip_norm"])
        optimizer.step()
    assert_same(ours(name, hyper), {k: p.detach().numpy() for k, p in params.items()})


def factors(total, **schedule):
    return [
        float(optim.learning_rate_factor(jnp.int32(t), total, **schedule)) for t in range(total)
    ]


def test_warm_up_rises_linearly_and_ends_at_the_peak():
    found = factors(20, name="constant", warmup=0.25)
    np.testing.assert_allclose(found, [0.2, 0.4, 0.6, 0.8, 1.0] + [1.0] * 15, rtol=1e-6)
    assert factors(3, name="constant", warmup=0.0) == [1.0] * 3


def test_step_multiplies_at_each_boundary():
    found = factors(10, name="step", warmup=0.0, boundaries=(0.5, 0.8), factor=0.2)
    np.testing.assert_allclose(found, [1.0] * 5 + [0.2] * 3 + [0.04] * 2, rtol=1e-6)


def test_cosine_and_polynomial_fall_to_zero_after_the_warm_up():
    u = np.clip((np.arange(20) / 20 - 0.2) / 0.8, 0, 1)
    rise = np.minimum(1, np.arange(1, 21) / 4)
    found = factors(20, name="cosine", warmup=0.2)
    np.testing.assert_allclose(found, rise * (1 + np.cos(np.pi * u)) / 2, rtol=1e-5)
    found = factors(20, name="polynomial", warmup=0.2, power=2.0)
    np.testing.assert_allclose(found, rise * (1 - u) ** 2, rtol=1e-5)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"optimizer.name='sgdd' is unknown; did you mean 'sgd'"):
        optim.direction("sgdd", HYPER)
    with pytest.raises(ValueError, match=r"schedule.name='cosin' is unknown; known: constant"):
        optim.learning_rate_factor(jnp.int32(0), 1, name="cosin", warmup=0.0)


def test_an_optimizer_of_ones_own(tmp_path):
    """Named by its path, with numbers of its own: here RMSProp beside Optax's."""
    path = tmp_path / "mine.py"
    path.write_text(
        "import optax\n"
        "def rmsprop(hyper, decay):\n"
        "    return decay, optax.scale_by_rms(decay=hyper['memory'])\n"
    )
    hyper = HYPER | {"clip_norm": 0.0, "weight_decay": 0.0, "memory": 0.9}
    optimizer = optax.rmsprop(RATE, decay=0.9)
    params = jax.tree.map(jnp.float32, parameters())
    state = optimizer.init(params)
    for step in range(STEPS):
        grads = jax.tree.map(jnp.float32, gradients(step))
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(params, updates)
    assert_same(ours(f"{path}:rmsprop", hyper), params)
