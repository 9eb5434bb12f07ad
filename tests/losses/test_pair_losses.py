"""Losses of pairs and triplets against loops over all of them, and pytorch-metric-learning."""

import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pair_oracles
import pytest
from jax import P

from marginface.losses import pair_losses

B, D, MARGIN = 16, 4, 0.5
LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4, 0, 5, 5, 1])  # one of them alone
LAYOUTS = ("at once", "five at a time", "sharded")  # 16 = 3·5 + 1; the first alone has all cases


def triplet_case(**options):
    normalized = options.get("normalized", True)

    def ours(x, y, learned, margin, axis_name):
        return pair_losses.triplet(x, y, margin=margin, axis_name=axis_name, **options)

    def textbook(x, weight, bias, margin, labels=LABELS):
        choice = {key: value for key, value in options.items() if key != "normalized"}
        x = pair_oracles.unit(x) if normalized else x
        return pair_oracles.triplet(x, labels, margin, **choice)

    return ours, textbook


def contrastive_case(normalized):
    def ours(x, y, learned, margin, axis_name):
        options = {"normalized": normalized, "axis_name": axis_name}
        return pair_losses.contrastive(x, y, margin=3 * margin, **options)

    def textbook(x, weight, bias, margin, labels=LABELS):
        x = pair_oracles.unit(x) if normalized else x
        return pair_oracles.contrastive(x, labels, 3 * margin)

    return ours, textbook


def siamese_case(features, frozen=False):
    def ours(x, y, learned, margin, axis_name):
        options = {"features": features, "frozen": frozen, "axis_name": axis_name}
        return pair_losses.siamese(x, y, learned=learned, **options)

    fixed = problem()[0]

    def textbook(x, weight, bias, margin, labels=LABELS):
        x = fixed if frozen else x
        return pair_oracles.siamese(x, labels, weight, bias, features)

    return ours, textbook


@functools.cache
def problem():
    """x, the learned weight and bias, example weights."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6, D))[LABELS] + rng.normal(size=(B, D))
    arrays = x, -rng.uniform(0.5, 1.5, D), np.array(2.0), rng.uniform(0.5, 1.5, B)
    return tuple(a.astype(np.float32).astype(np.float64) for a in arrays)


CASES = {
    **{
        f"triplet, {triplets}, {positives} positives, {negatives} negatives": triplet_case(
            triplets=triplets, positives=positives, negatives=negatives
        )
        for triplets, positives, negatives in itertools.product(
            pair_losses.CATEGORIES, ("all", "hardest"), ("all", "hardest")
        )
    },
    "triplet, active": triplet_case(triplets="all", active=True),
    "triplet, not normalized": triplet_case(triplets="all", negatives="hardest", normalized=False),
    "contrastive": contrastive_case(False),
    "contrastive, normalized": contrastive_case(True),
    "siamese, difference": siamese_case("difference"),
    "siamese, chi_square": siamese_case("chi_square"),
    "siamese, frozen": siamese_case("difference", frozen=True),
}
ONLINE = "triplet, semi_hard, all positives, hardest negatives"
BATCH_HARD = "triplet, all, hardest positives, hardest negatives"
FEW = (ONLINE, BATCH_HARD, "triplet, active", "contrastive", "siamese, chi_square")


def run_cases(x, y, learned, margin, *, names, axis_name=None):
    """{name: losses [b]}."""
    return {name: CASES[name][0](x, y, learned, margin, axis_name) for name in names}


@functools.cache
def compiled(mesh, names, at_once):
    """(gradients of the weighted sum of each case wrt x and learned), losses."""

    def weighted(x, learned, y, weights, margin):
        run = partial(run_cases, names=names)
        if mesh is not None:
            run = jax.shard_map(
                partial(run, axis_name="data"),
                mesh=mesh,
                in_specs=P(),
                out_specs=P("data"),
            )
        losses = run(x, y, learned, margin)
        return {name: (loss * weights).sum() for name, loss in losses.items()}, losses

    fast = {"xla_backend_optimization_level": 0}  # to compile
    return jax.jit(jax.jacrev(weighted, (0, 1), has_aux=True), compiler_options=fast)


def run(layout, mesh, monkeypatch, x, labels=LABELS, *, weights=None, margin=MARGIN, few=False):
    at_once = 5 * B * B if layout == "five at a time" else pair_losses._AT_ONCE
    monkeypatch.setattr(pair_losses, "_AT_ONCE", at_once)
    _, weight, bias, example_weights = problem()
    names = FEW if few or layout != "at once" else tuple(CASES)
    return compiled(mesh if layout == "sharded" else None, names, at_once)(
        x if isinstance(x, jax.Array) else jnp.asarray(x, jnp.float32),
        {"weight": jnp.asarray(weight, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)},
        jnp.asarray(labels),
        jnp.asarray(example_weights if weights is None else weights, jnp.float32),
        jnp.float32(margin),
    )


@functools.cache
def wanted(name):
    """Losses and gradients of a case by its textbook form."""
    x, weight, bias, weights = problem()
    _, textbook = CASES[name]
    return textbook(x, weight, bias, MARGIN), oracles.gradient(
        lambda *args: (textbook(*args, MARGIN) * weights).sum(), x, weight, bias
    )


def close(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want)
    return np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_loss_in_every_layout_is_the_textbook_form(layout, mesh8, monkeypatch):
    grads, losses = run(layout, mesh8, monkeypatch, problem()[0])
    for name in losses:
        want, (to_x, to_weight, to_bias) = wanted(name)
        easy, learns, frozen = "easy" in name, "siamese" in name, "frozen" in name
        assert (np.abs(want).max() > 0) != easy, name
        assert close(losses[name], want), name
        got_x, learned = grads[name]
        assert close(got_x, to_x), name
        assert got_x.any() != (easy or frozen), name
        assert close(learned["weight"], to_weight), name
        assert close(learned["bias"], to_bias), name
        assert learned["weight"].any() == learns, name


BOUNDS = {  # of d_an − d_ap, in margins, where another choice begins
    ONLINE: (0, 1),
    "triplet, semi_hard, all positives, all negatives": (0, 1),
    "triplet, hard, all positives, all negatives": (0,),
    "triplet, easy, all positives, hardest negatives": (),  # whose loss is 0, chosen or not
    BATCH_HARD: (),
    "triplet, active": (1,),
    "triplet, not normalized": (),
    "contrastive": (),
    "contrastive, normalized": (),
    "siamese, difference": (),
    "siamese, chi_square": (),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", BOUNDS)
def test_a_thousand_random_cases_are_the_textbook_form(name):
    """Sizes stay, so that one program serves; all else is drawn, the hard spots among it."""
    rng, count, b, d = np.random.default_rng(len(name)), 1000, 6, 3
    scale = 10 ** rng.uniform(-4, 4, size=(count, 1, 1))
    x = rng.normal(size=(count, b, d)) * rng.choice([0.1, 1.0, 10.0], size=(count, b, 1)) * scale
    y = rng.integers(0, 3, size=(count, b))
    y[::10] = 0  # all labels equal
    y[1::10] = np.arange(b)  # all different
    x[2::10, 1] = x[2::10, 0]  # equal embeddings, of one person or of two
    x[3::10, 1] = -x[3::10, 0]
    x[4::10, 1] = 4 * x[4::10, 0]  # one direction
    x[5::10, 0] = 0
    x[6::10] = x[6::10, :1]  # collapsed
    margin = rng.uniform(0.01, 1.5, size=count)
    normalized = name not in ("contrastive", "triplet, not normalized")
    if not normalized:
        margin *= scale.ravel() ** (1 if name == "contrastive" else 2)
    weight, bias = rng.uniform(-3, 3, size=(count, d)), rng.uniform(-3, 3, size=count)
    single = [np.float32(a) for a in (x, weight, bias, margin)]
    x, weight, bias, margin = (a.astype(np.float64) for a in single)

    @jax.jit
    @jax.vmap
    def ours(x, weight, bias, margin, y):
        def total(x, learned):
            losses = CASES[name][0](x, y, learned, margin, None)
            return losses.sum(), losses

        return jax.grad(total, (0, 1), has_aux=True)(x, {"weight": weight, "bias": bias})

    results = ours(*single, y)
    for leaf in jax.tree.leaves(results):
        assert np.isfinite(leaf).all()
    losses = np.asarray(results[1], np.float64)
    compared = 0
    for i in range(count):
        if normalized and not np.linalg.norm(x[i], axis=1).all():
            continue  # a norm of 0 has no direction
        points = pair_oracles.unit(x[i]) if normalized else x[i]
        distances = np.array(pair_oracles.square_distances(points))
        # A difference of points is right to a few 2⁻²⁴ of their size, 1 if they are normalized and
        # that of the difference if they are not; and so is what is made of distances.
        sizes = np.maximum(distances.max(axis=1), 1.0) if normalized else distances.max(axis=1)
        if "triplet" in name:
            same = y[i][:, None] == y[i]
            gaps = distances[:, None] - distances[..., None]  # [anchor, positive, negative]
            gaps = gaps[(same & ~np.eye(b, dtype=bool))[..., None] & ~same[:, None]]
            if any((np.abs(gaps - k * margin[i]) < 1e-5 * sizes.max()).any() for k in BOUNDS[name]):
                continue  # so close to a tie that rounding chooses
        compared += 1
        wanted = CASES[name][1](x[i], weight[i], bias[i], margin[i], y[i])
        # b examples share the mean, so one may have b times its rounding.
        slack = 1e-5 * wanted + 1e-6 * b * (sizes + margin[i] ** (1 if "triplet" in name else 2))
        assert (np.abs(losses[i] - wanted) <= slack).all(), i
    assert compared > 0.6 * count


def test_the_mean_is_the_loss_of_the_paper(mesh8, monkeypatch):
    """Over unordered pairs, and over chosen triplets."""
    x, *_ = problem()
    _, losses = run("at once", mesh8, monkeypatch, x)
    pairs = [
        0.5 * d**2 if LABELS[i] == LABELS[j] else 0.5 * max(0.0, 3 * MARGIN - d) ** 2
        for i, j in itertools.combinations(range(B), 2)
        for d in [np.linalg.norm(x[i] - x[j])]
    ]
    np.testing.assert_allclose(losses["contrastive"].mean(), np.mean(pairs), rtol=1e-5)
    chosen, d = pair_oracles.mine(pair_oracles.unit(x), LABELS, MARGIN)
    triplets = [d[a][p] - d[a][n] + MARGIN for a, p, n in chosen]
    name = "triplet, semi_hard, all positives, all negatives"
    np.testing.assert_allclose(losses[name].mean(), np.mean(triplets), rtol=1e-5)


def test_bfloat16_embeddings_cost_their_own_rounding_alone(mesh8, monkeypatch):
    x = jnp.asarray(problem()[0], jnp.bfloat16)
    grads, losses = run("at once", mesh8, monkeypatch, x, few=True)
    wide_grads, wide = run("at once", mesh8, monkeypatch, x.astype(jnp.float32))
    for name in FEW:
        np.testing.assert_allclose(losses[name], wide[name], rtol=1e-6, atol=1e-7)
        assert losses[name].dtype == jnp.float32
        got, want = grads[name][0], wide_grads[name][0]
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(np.float32), want, rtol=2**-8, atol=1e-6)


DEGENERATE = {
    "all labels equal": (problem()[0], np.zeros(B, np.int32)),
    "all labels different": (problem()[0], np.arange(B)),
    "all embeddings equal": (np.tile(problem()[0][:1], (B, 1)), LABELS),
    "all embeddings equal, one label": (np.tile(problem()[0][:1], (B, 1)), np.zeros(B, np.int32)),
    "zero embeddings": (np.zeros((B, D)), LABELS),
    "one zero embedding": (problem()[0] * (np.arange(B) != 2)[:, None], LABELS),
    "huge and tiny embeddings": (problem()[0] * 10.0 ** np.linspace(-30, 6, B)[:, None], LABELS),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("layout", ["at once", "sharded"])
def test_degenerate_batches_are_finite(layout, name, mesh8, monkeypatch):
    x, labels = DEGENERATE[name]
    results = run(layout, mesh8, monkeypatch, x, labels)
    for leaf in jax.tree.leaves(results):
        assert np.isfinite(leaf).all()
    losses = results[1]
    if "labels" in name:  # no positive or no negative: no triplet
        assert not any(loss.any() for case, loss in losses.items() if "triplet" in case)
    elif name == "all embeddings equal":  # a tie is hard, and costs the margin
        assert losses[BATCH_HARD].mean() == MARGIN


def test_the_hardest_positive_has_an_earlier_word():
    x, y = jnp.asarray(problem()[0], jnp.float32), jnp.asarray(LABELS)
    now, before = (
        pair_losses.triplet(x, y, margin=0.5, triplets="all", positives=word)
        for word in ("hardest", "hard")
    )
    np.testing.assert_array_equal(now, before)
    assert (now != pair_losses.triplet(x, y, margin=0.5, triplets="all")).any()


def test_a_tie_is_hard_and_the_next_negative_semi_hard():
    x, y = jnp.array([[0.0], [1.0], [-1.0], [-1.1]]), jnp.array([0, 0, 1, 2])
    online = partial(pair_losses.triplet, margin=0.5, negatives="hardest", normalized=False)
    np.testing.assert_allclose(jax.jit(online)(x, y), [4 * (1 - 1.21 + 0.5), 0, 0, 0], rtol=1e-5)


def test_a_batch_of_one(mesh8, monkeypatch):
    one = {"x": np.ones((1, D)), "labels": [0], "weights": [1.0], "few": True}
    grads, losses = run("at once", mesh8, monkeypatch, **one)
    for leaf in jax.tree.leaves((grads, losses)):
        np.testing.assert_array_equal(leaf, 0)


def test_nan_is_not_mined_away(mesh8, monkeypatch):
    x = problem()[0].copy()
    x[1, 2] = np.nan
    _, losses = run("at once", mesh8, monkeypatch, x)
    for name, loss in losses.items():
        assert np.isnan(loss.mean()), name


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
def test_equals_pytorch_metric_learning(mesh8, monkeypatch):
    reason = "the `peers` extra is not installed"
    torch = pytest.importorskip("torch", reason=reason)
    miners = pytest.importorskip("pytorch_metric_learning.miners", reason=reason)
    peers = pytest.importorskip("pytorch_metric_learning.losses", reason=reason)
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.reducers import MeanReducer

    x, *_ = problem()
    grads, losses = run("at once", mesh8, monkeypatch, x, weights=np.full(B, 1 / B))
    squared, labels = LpDistance(power=2), torch.tensor(LABELS)
    peer = peers.TripletMarginLoss(margin=MARGIN, distance=squared, reducer=MeanReducer())
    for triplets in ("semi_hard", "hard", "easy", "all", "batch hard"):
        name, choice = f"triplet, {triplets}, all positives, all negatives", {"triplets": triplets}
        if triplets == "batch hard":
            name = BATCH_HARD
            choice = {"triplets": "all", "positives": "hardest", "negatives": "hardest"}
            miner = miners.BatchHardMiner(distance=squared)
        elif triplets == "all":  # theirs leaves the easy ones out
            miner = miners.TripletMarginMiner(np.inf, "all", distance=squared)
        else:
            kind = triplets.replace("_", "")
            miner = miners.TripletMarginMiner(MARGIN, kind, distance=squared)
        inputs = torch.tensor(x, requires_grad=True)
        found = miner(inputs, labels)
        chosen, _ = pair_oracles.mine(pair_oracles.unit(x), LABELS, MARGIN, **choice)
        assert set(zip(*(part.tolist() for part in found), strict=True)) == set(chosen)
        value = peer(inputs, labels, found)
        value.backward()
        np.testing.assert_allclose(losses[name].mean(), value.item(), rtol=1e-5)
        assert close(grads[name][0], inputs.grad), triplets


def test_a_batch_of_1800_needs_a_few_matrices_and_no_cube():
    """Compiled only, FaceNet's batch: in units of b² numbers; the triplets are b³."""
    b, d = 1800, 128
    shapes = jax.ShapeDtypeStruct((b, d), jnp.float32), jax.ShapeDtypeStruct((b,), jnp.int32)
    learned = pair_losses.siamese_start(d)

    def matrices(loss):
        step = jax.jit(jax.grad(lambda x, y: loss(x, y).mean()))
        temporary = step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
        return temporary / (4 * b * b)

    batch_all = partial(pair_losses.triplet, margin=0.2, triplets="all", active=True)
    assert matrices(batch_all) < 4
    assert matrices(partial(pair_losses.triplet, margin=0.2, negatives="hardest")) < 1
    assert matrices(partial(pair_losses.siamese, learned=learned, features="chi_square")) < 1


def test_collapse_is_told_from_slow_progress():
    rng = np.random.default_rng(0)
    labels, margin = jnp.arange(64) // 4, 0.2
    point, noise = rng.normal(size=(1, 32)), rng.normal(size=(64, 32))

    @jax.jit
    def report(x, extra):
        loss = pair_losses.triplet(x, labels, margin=margin, triplets="all").mean()
        return loss, *pair_losses.collapse(x, loss + extra, margin).values()

    loss, collapsed, spread = report(5 * point + 1e-3 * noise, 0.0)
    np.testing.assert_allclose(loss, margin, rtol=1e-3)
    assert collapsed
    assert spread < 1e-5
    assert not report(5 * point + 1e-3 * noise, 0.01)[1]  # some other loss
    loss, collapsed, spread = report(noise, 0.0)
    assert not report(noise, margin - loss)[1]  # as large as the margin, but spread out
    unit = pair_oracles.unit(noise)
    np.testing.assert_allclose(spread, unit.var(axis=0).sum(), rtol=1e-5)
    np.testing.assert_allclose(spread, np.mean(pair_oracles.square_distances(unit)) / 2, rtol=1e-5)


@pytest.mark.parametrize("features", ["difference", "chi_square"])
def test_the_siamese_start_already_verifies(features):
    rng = np.random.default_rng(0)
    for d in (32, 512):
        people = rng.normal(size=(2, 200, d))
        a, *others = (20 * (people[i] + 0.6 * rng.normal(size=(200, d))) for i in (0, 0, 1))
        learned = pair_losses.siamese_start(d)
        score = partial(pair_losses.siamese_score, features=features)
        same, different = (score(learned, jnp.asarray(a), jnp.asarray(b)) for b in others)
        np.testing.assert_array_equal(same, score(learned, jnp.asarray(others[0]), jnp.asarray(a)))
        assert (same > 0).mean() > 0.9
        assert (different < 0).mean() > (0.9 if d == 512 else 0.75)


def test_chi_square_is_the_published_form_and_safe():
    f = np.array([[0.6, 0.8, 0.0], [0.0, 0.6, 0.8], [0.6, -0.8, 0.0]])
    got = pair_losses.pair_features(jnp.asarray(f[[0, 0]]), jnp.asarray(f[[1, 2]]), "chi_square")
    np.testing.assert_allclose(got, [[0.6, 0.04 / 1.4, 0.8], [0.0, 1.6, 0.0]], rtol=1e-5)

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def total(a, b):
        return pair_losses.pair_features(a, b, "chi_square").sum()

    tiny = jnp.array([[1.0, 1e-15, 0.0]])
    for grad in jax.tree.leaves((total(tiny, -tiny), total(tiny, tiny), total(tiny, 0 * tiny))):
        assert np.isfinite(grad).all()
    for grad in total(tiny, tiny):
        np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, y: pair_losses.triplet(x, y, margin=0.2, triplets="semihard"),
            "triplets='semihard' is unknown; use one of all, easy, semi_hard, hard",
        ),
        (
            lambda x, y: pair_losses.triplet(x, y, margin=0.2, positives="nearest"),
            "positives='nearest' is unknown; use one of all, hardest",
        ),
        (
            lambda x, y: pair_losses.triplet(x, y, margin=0.2, negatives="hard"),
            "negatives='hard' is unknown; use one of all, hardest",
        ),
        (
            lambda x, y: pair_losses.pair_features(x, x, "product"),
            "features='product' is unknown; use one of difference, chi_square",
        ),
    ],
)
def test_unknown_choices_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((4, D)), jnp.zeros(4, jnp.int32))


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(mesh8):
    loss = partial(pair_losses.contrastive, margin=1.0, axis_name="data")
    sharded = jax.shard_map(loss, mesh=mesh8, in_specs=P(), out_specs=P("data"))
    with pytest.raises(ValueError, match="a batch of 12 does not divide over 8 devices"):
        jax.eval_shape(sharded, jnp.ones((12, D)), jnp.zeros(12, jnp.int32))
