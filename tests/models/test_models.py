"""Networks: parameter counts, the fast convolutions, precision, rematerialisation, errors."""

import functools
import importlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding

from marginface.models import iresnet, layers, sphereface

KEY = jax.random.key(0)
IMAGES = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (8, 32, 48, 3)), jnp.float32)


def _count(model, size=112):
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, KEY, images)["params"]))


def _iresnet_count(blocks, size, dim):
    """3×3 convolutions without bias, 2 numbers per normalised channel, 1 per PReLU channel."""
    total, inputs = 27 * 64 + 2 * 64 + 64, 64
    for outputs, repeats in zip((64, 128, 256, 512), blocks, strict=True):
        for i in range(repeats):
            total += 9 * inputs * outputs + 9 * outputs**2 + 2 * inputs + 4 * outputs + outputs
            total += inputs * outputs + 2 * outputs if i == 0 else 0
            inputs = outputs
    return total + 2 * 512 + 512 * (size // 16) ** 2 * dim + dim + dim


@pytest.mark.parametrize(
    ("depth", "blocks", "published"),
    [
        (18, (2, 2, 2, 2), 24_025_088),
        (34, (3, 4, 6, 3), 34_138_816),
        (50, (3, 4, 14, 3), 43_590_336),
        (100, (3, 13, 30, 3), 65_155_648),
    ],
)
def test_iresnet_parameters(depth, blocks, published):
    assert _count(iresnet.Model(depth=depth)) == _iresnet_count(blocks, 112, 512) == published


def test_iresnet_parameters_at_another_size():
    model = iresnet.Model(depth=18, embedding_dim=128)
    assert _count(model, 64) == _iresnet_count((2, 2, 2, 2), 64, 128)


@pytest.mark.parametrize("depth", [4, 10, 20, 36, 64])
def test_sphereface_parameters_and_depth(depth):
    params = jax.eval_shape(sphereface.Model(depth=depth).init, KEY, jnp.zeros((1, 112, 112, 3)))
    params = params["params"]
    kernels = [x for x in jax.tree.leaves(params) if x.ndim == 4]
    assert len(kernels) == depth  # the embedding layer is not counted in a network's name
    pairs = {4: (0, 0, 0, 0), 10: (0, 1, 2, 0), 20: (1, 2, 4, 1), 36: (2, 4, 8, 2)}
    pairs[64] = (3, 8, 16, 3)
    total, inputs = 25_088 * 512 + 512, 3
    for channels, count in zip((64, 128, 256, 512), pairs[depth], strict=True):
        total += 9 * inputs * channels + 2 * channels + count * 2 * (9 * channels**2 + channels)
        inputs = channels
    assert sum(x.size for x in jax.tree.leaves(params)) == total


@pytest.mark.parametrize("shape", [(2, 8, 12, 3, 4), (1, 2, 2, 5, 1)])
def test_stride2_equals_plain_convolution(shape):
    n, h, w, i, o = shape
    x = jax.random.normal(KEY, (n, h, w, i))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, i, o))

    def plain(x, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (2, 2), [(1, 1)] * 2, dimension_numbers=dims)

    want, want_vjp = jax.vjp(plain, x, kernel)
    got, got_vjp = jax.vjp(layers.conv3x3_stride2, x, kernel)
    g = jax.random.normal(jax.random.key(2), want.shape)
    assert got.shape == (n, h // 2, w // 2, o)
    for a, b in zip((got, *got_vjp(g)), (want, *want_vjp(g)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise_equals_plain_convolution(stride):
    conv = layers.Conv(5, size=1, stride=stride)
    x = jax.random.normal(KEY, (2, 4, 6, 3))
    kernel = conv.init(KEY, x)["params"]["kernel"]

    def plain(x, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), "VALID", dimension_numbers=dims
        )

    def ours(x, kernel):
        return conv.apply({"params": {"kernel": kernel}}, x)

    want, want_vjp = jax.vjp(plain, x, kernel)
    got, got_vjp = jax.vjp(ours, x, kernel)
    for a, b in zip((got, *got_vjp(got)), (want, *want_vjp(want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_prelu():
    x = jnp.array([[-2.0, 3.0]])
    got = layers.PReLU().apply({"params": {"slope": jnp.array([0.5, 0.5])}}, x)
    np.testing.assert_array_equal(got, [[-1.0, 3.0]])


def test_start_has_the_published_spread():
    model = iresnet.Model(depth=18, embedding_dim=8, width=0.5)

    @jax.jit  # only what is returned is compiled
    def start(key):
        params = model.init(key, IMAGES)["params"]
        return params["stage3_block1"]["conv2"]["kernel"], params["embedding"]["kernel"]

    conv, dense = start(KEY)
    np.testing.assert_allclose(np.std(conv), 0.1, rtol=0.02)
    np.testing.assert_allclose(np.abs(dense).max(), dense.shape[0] ** -0.5, rtol=0.01)
    shape = (3, 3, 4, 8)
    drawn_flat = layers.normal(0.1)(KEY, shape)
    np.testing.assert_allclose(drawn_flat, 0.1 * jax.random.normal(KEY, shape), rtol=1e-6)
    np.testing.assert_allclose(
        np.std(layers.he_normal(KEY, (3, 3, 50, 50))), 450**-0.5 * 2**0.5, rtol=0.02
    )


def test_plain_network_starts_alive():
    """Through 36 layers without normalisation the signal neither explodes nor dies."""
    model = sphereface.Model(depth=36, embedding_dim=24, width=0.125)
    embeddings, _ = model.init_with_output(KEY, IMAGES)
    assert 0.02 < float(embeddings.std()) < 20


SMALL = {
    "iresnet": iresnet.Model(depth=18, embedding_dim=24, width=0.125),
    "sphereface": sphereface.Model(depth=10, embedding_dim=24, width=0.125),
    "sphereface_batch": sphereface.Model(depth=10, embedding_dim=24, width=0.125, norm="batch"),
}


def _variables(model, images=IMAGES):
    """Random parameters from numpy: drawing them with JAX compiles slowly."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, KEY, images)

    def fill(path, like):
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, like.shape), jnp.float32)
        if path[-1].key == "slope":
            return jnp.full(like.shape, 0.25)
        fan_in = math.prod(like.shape[:-1])
        return jnp.asarray(rng.normal(0, (2 / fan_in) ** 0.5, like.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@functools.partial(jax.jit, static_argnums=0)
def _train_step(model, variables, images, key):
    """Embeddings, new statistics, and the gradient of a fixed function of the embeddings."""

    def loss(params):
        embeddings, update = model.apply(
            {**variables, "params": params},
            images,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        weight = jnp.arange(1.0, 1 + embeddings.size).reshape(embeddings.shape)
        return jnp.mean(jnp.sin(weight) * embeddings), (embeddings, update)

    gradient, (embeddings, update) = jax.grad(loss, has_aux=True)(variables["params"])
    return embeddings, update, gradient


def _close(a, b, rtol):
    """Within rtol of the largest number anywhere in b: rounding alone fills an exact zero."""
    a, b = jax.device_get((a, b))
    largest = max(np.abs(y).max() for y in jax.tree.leaves(b))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * largest)


@pytest.mark.parametrize("name", SMALL)
def test_shapes_and_gradients(name):
    embeddings, update, gradient = _train_step(SMALL[name], _variables(SMALL[name]), IMAGES, KEY)
    assert embeddings.shape == (8, 24)
    assert embeddings.dtype == jnp.float32
    assert bool(update.get("batch_stats")) == (name != "sphereface")
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(g).all(), path
        assert np.any(g), path


@pytest.mark.parametrize("name", ["iresnet", "sphereface_batch"])
def test_remat_has_the_same_parameters(name):
    model = SMALL[name]
    shapes = [jax.eval_shape(m.init, KEY, IMAGES) for m in (model, model.clone(remat=True))]
    assert shapes[0] == shapes[1]
    jaxpr = jax.make_jaxpr(model.clone(remat=True).apply)(_variables(model), IMAGES)
    assert "remat" in str(jaxpr) or "checkpoint" in str(jaxpr)


def test_remat_has_the_same_gradients():
    model = SMALL["sphereface_batch"]
    variables = _variables(model)
    want = _train_step(model, variables, IMAGES, KEY)
    _close(_train_step(model.clone(remat=True), variables, IMAGES, KEY), want, 1e-5)


def test_batch_statistics_are_global(mesh8):
    """A batch sharded over eight devices gives the numbers of one device."""
    model = SMALL["sphereface_batch"]
    variables = _variables(model)
    images = jax.device_put(IMAGES, NamedSharding(mesh8, jax.P("data")))
    replicated = jax.device_put(variables, NamedSharding(mesh8, jax.P()))
    got = _train_step(model, replicated, images, KEY)
    _close(got, _train_step(model, variables, IMAGES, KEY), 1e-5)


def test_bfloat16():
    """Embeddings, statistics and gradients are float32 and near those of float32 compute."""
    model = SMALL["sphereface_batch"]
    variables = _variables(model)
    got = _train_step(model.clone(dtype="bfloat16"), variables, IMAGES, KEY)
    want = _train_step(model, variables, IMAGES, KEY)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    assert not np.array_equal(got[0], want[0])  # it did compute in bfloat16
    lengths = jnp.linalg.norm(got[0], axis=1) * jnp.linalg.norm(want[0], axis=1)
    assert ((got[0] * want[0]).sum(1) / lengths).min() > 0.98
    _close(got[1], want[1], 0.02)


def test_bfloat16_reaches_the_convolutions():
    model = SMALL["iresnet"].clone(dtype="bfloat16")
    jaxpr = str(jax.make_jaxpr(model.apply)(_variables(model), IMAGES))
    assert re.findall(r"(\w+)\[[\d,]+\] = conv_general_dilated", jaxpr) == ["bf16"] * 17


def test_dropout_is_random_in_training_only():
    model = SMALL["sphereface"].clone(dropout=0.5)
    variables = _variables(model)
    one, two = (_train_step(model, variables, IMAGES, jax.random.key(i))[0] for i in (1, 2))
    assert not np.allclose(one, two)
    evaluate = jax.jit(lambda model, images: model.apply(variables, images), static_argnums=0)
    np.testing.assert_array_equal(evaluate(model, IMAGES), evaluate(SMALL["sphereface"], IMAGES))


@pytest.mark.parametrize("name", ["iresnet", "sphereface"])
def test_unknown_depth(name):
    module = importlib.import_module(f"marginface.models.{name}")
    with pytest.raises(ValueError, match=r"no depth 17: choose from .*, \d+"):
        module.Model(depth=17)


def test_unknown_norm():
    with pytest.raises(ValueError, match="norm 'layer': choose from none, batch"):
        sphereface.Model(depth=4, norm="layer")


@pytest.mark.parametrize("name", ["iresnet", "sphereface"])
def test_size_not_divisible_by_16(name):
    with pytest.raises(ValueError, match="divisible by 16"):
        jax.eval_shape(SMALL[name].init, KEY, jnp.zeros((1, 112, 100, 3)))


def test_iresnet_equals_pytorch():
    """Same weights, same images: an independent statement of the network gives our numbers."""
    torch = pytest.importorskip("torch")
    from benchmarks.torch_iresnet import IResNet

    model = iresnet.Model(depth=18, embedding_dim=16)
    images = IMAGES[:3, :, :32]
    variables = jax.device_get(_variables(model, images))
    net = IResNet(18, size=32, embedding_dim=16)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert trained == sum(x.size for x in jax.tree.leaves(variables["params"]))

    state = {}
    for path, value in jax.tree_util.tree_leaves_with_path(
        (variables["params"], variables["batch_stats"])
    ):
        *module, leaf = (key.key for key in path[1:])
        module = ".".join(module).removesuffix(".norm")
        if leaf == "kernel" and value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)
        elif leaf == "kernel":  # rows are (h, w, c) here and (c, h, w) there
            value = value.reshape(2, 2, 512, 16).transpose(3, 2, 0, 1).reshape(16, -1)
        names = {"bias": "bias", "mean": "running_mean", "var": "running_var"}
        state[f"{module}.{names.get(leaf, 'weight')}"] = torch.tensor(value)
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("tracked" in key or key == "embedding_norm.weight" for key in missing)

    @functools.partial(jax.jit, static_argnums=2)
    def ours(variables, images, train):
        return model.apply(variables, images, train=train, mutable=["batch_stats"])[0]

    for train in (False, True):
        with torch.no_grad():
            theirs = net.train(train)(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
        _close(ours(variables, images, train), theirs, 1e-3)
