import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import P

from marginface.losses import margins, similarity
from marginface.losses.class_losses import margin_softmax as margin_softmax_loss
from marginface.losses.class_softmax import PAD, Classes, all_classes, negatives, target_similarity


def margin_softmax(*args, reweight=None, **kw):
    """One loss per example; with the hook, NormFace over reweighted negatives."""
    if reweight is None:
        return margin_softmax_loss(*args, **kw).loss
    target = target_similarity(*args, axis_name=kw["axis_name"])
    others = negatives(*args, reweight=reweight, target=target, **kw)
    return jax.nn.softplus(others.logsumexp - kw["scale"] * target)


C, PADDED, D, DEVICES = 29, 32, 6, 8  # four rows a device; the last holds one class and three pads
LABELS = np.array([0, 3, 4, 7, 28, 28, 13, 20])  # the edges of shards, a repeated one, the last
B = len(LABELS)

MARGINS = {  # ours, textbook, scale
    "normface": (margins.identity, oracles.identity, 20.0),
    **{
        f"asoftmax({m})": (
            partial(margins.multiplicative_angular, m=m),
            partial(oracles.multiplicative_angular, m=m),
            "norm",
        )
        for m in (1, 2, 3, 4, 1.35)
    },
    "asoftmax annealed": (
        margins.anneal(partial(margins.multiplicative_angular, m=4), 5.0),
        lambda theta: (5 * np.cos(theta) + oracles.multiplicative_angular(theta, 4)) / 6,
        "norm",
    ),
    "cosface": (
        partial(margins.additive_cosine, m=0.35),
        partial(oracles.additive_cosine, m=0.35),
        20.0,
    ),
    "arcface": (
        partial(margins.additive_angular, m=0.5),
        partial(oracles.additive_angular, m=0.5),
        20.0,
    ),
    "arcface, m per example": (
        partial(margins.additive_angular, m=jnp.linspace(0.3, 0.6, B)),
        partial(oracles.additive_angular, m=np.linspace(0.3, 0.6, B)),
        20.0,
    ),
    "combined": (
        partial(margins.combined, m1=0.9, m2=0.4, m3=0.15),
        partial(oracles.combined, m1=0.9, m2=0.4, m3=0.15),
        20.0,
    ),
}
DETACHED = {
    "arcface detached": ("arcface", 20.0),
    "asoftmax(1.35) detached": ("asoftmax(1.35)", "norm"),
}
MARGINS |= {
    name: (margins.detach(MARGINS[plain][0]), MARGINS[plain][1], scale)
    for name, (plain, scale) in DETACHED.items()
}
NAMES = list(MARGINS)
LAYOUTS = {  # name: (rows padded, chunk_size, sharded)
    "dense": (False, None, False),
    "padded": (True, None, False),
    "chunked": (False, 7, False),  # 29 = 4·7 + 1
    "sharded": (True, None, True),
    "sharded, chunked": (True, 3, True),  # 4 = 3 + 1
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@functools.cache
def problem():
    """x, W, bias, example weights; one target beyond π − m, one close to its prototype."""
    rng = np.random.default_rng(0)
    x, w, bias = rng.normal(size=(B, D)), rng.normal(size=(C, D)), rng.normal(size=C)
    x[1] = -w[LABELS[1]] + 0.1 * rng.normal(size=D)
    x[2] = 2 * w[LABELS[2]] + 0.2 * rng.normal(size=D)
    arrays = x, w, bias, rng.uniform(0.5, 1.5, size=B)
    return tuple(a.astype(np.float32).astype(np.float64) for a in arrays)


def single(a):
    return jnp.asarray(a, jnp.float32)


def pad(rows):
    """Rows up to PADDED; the padding is not zero, it must be ignored."""
    return jax.tree.map(
        lambda a: jnp.concatenate([a, jnp.ones((PADDED - C, *a.shape[1:]), a.dtype)]), rows
    )


def spread(loss, mesh):
    """loss(x, y, rows, axis_name, *hyper) with the rows sharded and everything else replicated."""

    def sharded(x, y, rows, *hyper):
        return jax.shard_map(
            lambda x, y, rows, *hyper: loss(x, y, rows, "data", *hyper),
            mesh=mesh,
            in_specs=(P(), P(), P("data"), *(P() for _ in hyper)),
            out_specs=P(),
        )(x, y, rows, *hyper)

    return sharded


@functools.cache
def compiled(layout, mesh, kind):
    """(loss [b], gradients of the weighted sum wrt x and rows), one program for all margins."""
    _, chunk_size, sharded = LAYOUTS[layout]

    def loss(x, y, rows, axis_name, *hyper):
        kw = {"similarity": similarity.linear, "scale": 1.0}
        if kind == "cosine":
            index, scale, by_norm = hyper
            kw = {
                "margin": lambda c: jax.lax.switch(index, [m for m, *_ in MARGINS.values()], c),
                "scale": jnp.where(by_norm, similarity.norm(x), scale),
            }
        if kind == "reweight":
            kw = {"reweight": reweight, "scale": 20.0}
        classes = all_classes(rows, C, axis_name=axis_name)
        return margin_softmax(x, y, classes, chunk_size=chunk_size, axis_name=axis_name, **kw)

    run = (
        spread(loss, mesh) if sharded else lambda x, y, rows, *hyper: loss(x, y, rows, None, *hyper)
    )

    def total(x, rows, y, weights, *hyper):
        losses = run(x, y, rows, *hyper)
        return (losses * weights).sum(), losses

    return jax.jit(jax.grad(total, (0, 1), has_aux=True))


def check(layout, mesh, kind, rows, oracle, hyper=()):
    """Loss and gradients against the textbook form; the gradient of padding is exactly zero."""
    x, _, _, weights = problem()
    padded = LAYOUTS[layout][0]
    ours = jax.tree.map(single, rows)
    grads, losses = compiled(layout, mesh, kind)(
        single(x), pad(ours) if padded else ours, jnp.asarray(LABELS), single(weights), *hyper
    )
    leaves = jax.tree.leaves(rows)
    wanted = oracles.gradient(lambda x, *rows: (oracle(x, *rows) * weights).sum(), x, *leaves)
    assert oracles.relative_error(losses, oracle(x, *leaves)) < 1e-5
    for got, want in zip(jax.tree.leaves(grads), wanted, strict=True):
        assert oracles.relative_error(got[: len(want)], want) < 1e-5
    for got in jax.tree.leaves(grads[1]):
        np.testing.assert_array_equal(got[C:], 0)


@layouts
@pytest.mark.parametrize("name", MARGINS)
def test_every_margin_in_every_layout_is_the_textbook_form(name, layout, mesh8):
    x, w, *_ = problem()
    _, psi, scale = MARGINS[name]
    if name in DETACHED:
        theta = np.arccos(oracles.cosines(x, w)[np.arange(B), LABELS])
        gap = psi(theta) - np.cos(theta)

        def psi(theta):  # the gap does not move with θ
            return np.cos(theta) + gap

    by_norm = scale == "norm"
    check(
        layout,
        mesh8,
        "cosine",
        w,
        lambda x, w: oracles.margin_softmax(x, w, LABELS, psi, scale),
        (NAMES.index(name), single(1.0 if by_norm else scale), jnp.asarray(by_norm)),
    )


@layouts
def test_softmax_with_bias_in_every_layout_is_the_textbook_form(layout, mesh8):
    _, w, bias, _ = problem()
    check(
        layout,
        mesh8,
        "linear",
        similarity.Linear(w, bias),
        lambda x, w, bias: oracles.cross_entropy(x @ w.T + bias, LABELS),
    )


def reweight(cos, target):
    """MV-Softmax's form: negatives closer than the target count more."""
    hard = cos > target[:, None]
    return jnp.where(hard, 1.2 * cos + 0.2, cos)


@layouts
def test_reweighted_negatives_in_every_layout_are_the_textbook_form(layout, mesh8):
    _, w, *_ = problem()

    def oracle(x, w):
        cos = oracles.cosines(x, w)
        hard = cos > cos[np.arange(B), LABELS][:, None]
        return oracles.cross_entropy(20 * np.where(hard, 1.2 * cos + 0.2, cos), LABELS)

    check(layout, mesh8, "reweight", w, oracle)


@pytest.mark.parametrize("name", ["ArcFace", "CosFace", "SphereFace", "NormFace"])
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
def test_equals_pytorch_metric_learning(name):
    torch = pytest.importorskip("torch", reason="the `peers` extra is not installed")
    peers = pytest.importorskip(
        "pytorch_metric_learning.losses", reason="the `peers` extra is not installed"
    )
    x, w, *_ = problem()
    peer, options, ours = {
        "ArcFace": (
            peers.ArcFaceLoss,
            {"margin": math.degrees(0.5), "scale": 20},
            {"margin": partial(margins.additive_angular, m=0.5), "scale": 20.0},
        ),
        "CosFace": (
            peers.CosFaceLoss,
            {"margin": 0.35, "scale": 20},
            {"margin": partial(margins.additive_cosine, m=0.35), "scale": 20.0},
        ),
        "SphereFace": (
            peers.SphereFaceLoss,
            {"margin": 4, "scale": 1},
            {"margin": partial(margins.multiplicative_angular, m=4)},
        ),
        "NormFace": (peers.NormalizedSoftmaxLoss, {"temperature": 1 / 20}, {"scale": 20.0}),
    }[name]
    rows = np.arange(B) != 1  # beyond π − m that code falls back to c − m·sin m, ours is clipped
    peer = peer(C, D, **options).double()
    peer.W.data = torch.tensor(w.T)
    inputs = torch.tensor(x[rows], requires_grad=True)
    value = peer(inputs, torch.tensor(LABELS[rows]))
    value.backward()

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1))
    def mean(x, w):
        kw = {"scale": similarity.norm(x), **ours}
        return margin_softmax(x, jnp.asarray(LABELS[rows]), all_classes(w, C), **kw).mean()

    loss, (gx, gw) = mean(single(x[rows]), single(w))
    assert oracles.relative_error(loss, value.item()) < 1e-5
    assert oracles.relative_error(gx, inputs.grad) < 1e-5
    assert oracles.relative_error(gw, peer.W.grad.T) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "chunk_size"), [("float32", None), ("float32", 4), ("bfloat16", 4)]
)
def test_finite_where_cosines_end_norms_vanish_and_scales_explode(dtype, chunk_size):
    w = np.random.default_rng(1).normal(size=(9, 5))
    w[3], w[4] = w[2], 0
    x = np.stack([w[0], -w[1], 3 * w[2], w[4], w[5], np.zeros(5), 1e4 * w[7], 1e-30 * w[8]])
    x, w = jnp.asarray(x, dtype), jnp.asarray(w, dtype)
    y = jnp.array([0, 1, 2, 4, 4, 6, 7, 8])
    families = [
        MARGINS[name][0] for name in ("asoftmax(4)", "cosface", "arcface", "arcface detached")
    ]

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1))
    def mean(x, w, index, scale):
        scale = jnp.where(scale > 0, scale, similarity.norm(x))
        kw = {"margin": lambda c: jax.lax.switch(index, families, c), "scale": scale}
        return margin_softmax(x, y, all_classes(w, len(w)), chunk_size=chunk_size, **kw).mean()

    for index in range(len(families)):
        for scale in (-1.0, 64.0, 1e6):
            loss, (gx, gw) = mean(x, w, index, single(scale))
            assert np.isfinite(loss), (index, scale)
            assert np.isfinite(gx.astype(np.float32)).all(), (index, scale)
            assert np.isfinite(gw.astype(np.float32)).all(), (index, scale)
            assert gx.dtype == gw.dtype == dtype


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_one_example_and_one_class(chunk_size):
    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1))
    def arcface(x, w):
        margin = partial(margins.additive_angular, m=0.5)
        kw = {"margin": margin, "scale": 2.0, "chunk_size": chunk_size}
        return margin_softmax(x, jnp.array([0]), all_classes(w, len(w)), **kw)[0]

    x, w = jnp.array([[3.0, 4.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
    loss, _ = arcface(x, w)
    psi = np.cos(np.arccos(0.6) + 0.5)
    np.testing.assert_allclose(loss, np.log1p(np.exp(2 * 0.8 - 2 * psi)), rtol=1e-6)
    loss, grads = arcface(x, w[:1])
    assert loss == 0  # nobody to confuse it with
    for grad in grads:
        np.testing.assert_array_equal(grad, 0)


def test_a_small_loss_keeps_its_digits():
    w = jnp.eye(3)
    normface = jax.jit(lambda x: margin_softmax(x, jnp.array([0]), all_classes(w, 3), scale=60.0))
    np.testing.assert_allclose(normface(w[:1]), 2 * np.exp(-60.0), rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_the_largest_negative_leaves_out_the_target_and_the_padding(chunk_size):
    @jax.jit
    def both(x, y, rows):
        classes = all_classes(rows, C)
        others = negatives(x, y, classes, chunk_size=chunk_size)
        return others.hardest, target_similarity(x, y, classes)

    x, w, *_ = problem()
    rows = pad(single(w)).at[C:].set(single(x[0]))  # padding that would win
    largest, target = both(single(x), jnp.asarray(LABELS), rows)
    cos = oracles.cosines(x, w)
    np.testing.assert_allclose(target, cos[np.arange(B), LABELS], atol=1e-6)
    cos[np.arange(B), LABELS] = -np.inf
    np.testing.assert_allclose(largest, cos.max(axis=1), atol=1e-6)


def test_classes_may_be_any_sorted_part():
    x, w, *_ = problem()
    held = np.array([0, 3, 4, 7, 13, 20, 28])
    ids = jnp.asarray(np.append(held, [PAD, PAD]))
    rows = single(np.concatenate([w[held], np.ones((2, D))]))
    normface = jax.jit(partial(margin_softmax, scale=20.0))
    got = normface(single(x), jnp.asarray(LABELS), Classes(rows, ids))
    labels = np.searchsorted(held, LABELS)
    wanted = oracles.margin_softmax(x, w[held], labels, oracles.identity, 20.0)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_a_label_that_nobody_holds_gives_nan():
    x, w, *_ = problem()
    labels = jnp.asarray(LABELS).at[2].set(C).at[4].set(int(PAD))
    losses = jax.jit(margin_softmax)(single(x), labels, all_classes(pad(single(w)), C))
    np.testing.assert_array_equal(np.isnan(losses), [0, 0, 1, 0, 1, 0, 0, 0])


def test_margin_and_scale_change_without_recompiling():
    x, w, *_ = problem()
    traces = []

    @jax.jit
    def mean(x, w, m, s, lam):
        traces.append(1)
        margin = margins.anneal(partial(margins.additive_angular, m=m), lam)
        return margin_softmax(
            x, jnp.asarray(LABELS), all_classes(w, C), margin=margin, scale=s, chunk_size=8
        ).mean()

    values = {
        float(mean(single(x), single(w), m, s, 1.0)) for m in (0.1, 0.5) for s in (16.0, 64.0)
    }
    assert len(values) == 4
    assert len(traces) == 1


def test_a_chunk_size_that_is_not_positive_is_refused():
    x, w, *_ = problem()
    with pytest.raises(ValueError, match="chunk_size is 0; give a positive number or None"):
        negatives(single(x), jnp.asarray(LABELS), all_classes(single(w), C), chunk_size=0)


def test_chunks_take_at_most_five_percent_of_the_dense_memory():
    """Compiled only: b = 512, C = 100,000, d = 512, and the chunks that auto takes on a CPU."""

    def mean(x, w, y, chunk_size):
        margin = partial(margins.additive_angular, m=0.5)
        classes = all_classes(w, len(w))
        return margin_softmax(x, y, classes, margin=margin, chunk_size=chunk_size).mean()

    def temporary(chunk_size):
        shapes = [
            jax.ShapeDtypeStruct((512, 512), jnp.float32),
            jax.ShapeDtypeStruct((100_000, 512), jnp.float32),
            jax.ShapeDtypeStruct((512,), jnp.int32),
        ]
        step = jax.jit(jax.grad(partial(mean, chunk_size=chunk_size), (0, 1)))
        return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary(768) <= 0.05 * temporary(None)
