"""Networks: parameter counts, the fast convolutions, precision, rematerialisation, errors."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding

from marginface.models import iresnet, layers, sphereface

KEY = jax.random.key(0)


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


SMALL = {
    "iresnet": iresnet.Model(depth=18, embedding_dim=24, width=0.125),
    "sphereface": sphereface.Model(depth=20, embedding_dim=24, width=0.125),
    "sphereface_batch": sphereface.Model(depth=10, embedding_dim=24, width=0.125, norm="batch"),
}
IMAGES = np.random.default_rng(0).uniform(-1, 1, (8, 32, 48, 3)).astype(np.float32)


@functools.cache
def _variables(name):
    return jax.jit(SMALL[name].init)(KEY, IMAGES)


@functools.partial(jax.jit, static_argnums=0)
def _train_step(model, variables, images, key):
    """Embeddings, new statistics and the gradient of a fixed quadratic of the embeddings."""
    rest = {k: v for k, v in variables.items() if k != "params"}

    def loss(params):
        embeddings, update = model.apply(
            {"params": params, **rest},
            images,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        weight = jnp.arange(embeddings.shape[1], dtype=jnp.float32)
        return jnp.mean((embeddings * weight).sum(1) ** 2), (embeddings, update)

    (_, (embeddings, update)), gradient = jax.value_and_grad(loss, has_aux=True)(
        variables["params"]
    )
    return embeddings, update, gradient


def _close(a, b, rtol):
    """Each leaf of a equals b's within rtol of the largest number in it."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * float(np.abs(y).max()) + 1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_shapes_gradients_and_reproducible_start(name):
    model, variables = SMALL[name], _variables(name)
    embeddings, update, gradient = _train_step(model, variables, IMAGES, KEY)
    assert embeddings.shape == (8, 24)
    assert embeddings.dtype == jnp.float32
    assert (
        all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(gradient["stage1"]))
        if name != "iresnet"
        else np.any(gradient["conv"]["kernel"])
    )
    assert bool(update.get("batch_stats")) == (name != "sphereface")
    again = jax.jit(model.init)(KEY, IMAGES)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), variables, again)))


def test_start_keeps_the_signal():
    """The plain 64-layer network neither explodes nor dies at the start."""
    model = sphereface.Model(depth=64, embedding_dim=24, width=0.125)
    embeddings = jax.jit(lambda key: model.apply(model.init(key, IMAGES), IMAGES))(KEY)
    assert 0.02 < float(embeddings.std()) < 20


@pytest.mark.parametrize("name", ["iresnet", "sphereface"])
def test_remat_changes_nothing(name):
    model = SMALL[name].clone(remat=True)
    plain = _train_step(SMALL[name], _variables(name), IMAGES, KEY)
    _close(_train_step(model, _variables(name), IMAGES, KEY), plain, 1e-4)


def test_batch_statistics_are_global(mesh8):
    """A batch sharded over eight devices gives the numbers of one device."""
    model, variables = SMALL["iresnet"], _variables("iresnet")
    images = jax.device_put(IMAGES, NamedSharding(mesh8, jax.P("data")))
    variables8 = jax.device_put(variables, NamedSharding(mesh8, jax.P()))
    got = _train_step(model, variables8, images, KEY)
    want = _train_step(model, variables, IMAGES, KEY)
    _close(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, want), 1e-4)


@pytest.mark.parametrize("name", ["iresnet", "sphereface_batch"])
def test_bfloat16(name):
    """Embeddings and statistics are float32 and near those of float32 compute."""
    model = SMALL[name].clone(dtype="bfloat16")
    variables = _variables(name)
    embeddings, update, gradient = _train_step(model, variables, IMAGES, KEY)
    want, want_update, _ = _train_step(SMALL[name], variables, IMAGES, KEY)
    assert {x.dtype for x in jax.tree.leaves((embeddings, update, gradient))} == {
        jnp.dtype("float32")
    }
    assert not np.array_equal(embeddings, want)  # it did compute in bfloat16
    cosine = (embeddings * want).sum(1) / jnp.linalg.norm(embeddings, axis=1)
    assert (cosine / jnp.linalg.norm(want, axis=1)).min() > 0.98
    np.testing.assert_allclose(
        update["batch_stats"]["embedding_norm"]["norm"]["mean"],
        want_update["batch_stats"]["embedding_norm"]["norm"]["mean"],
        atol=0.02,
    )


def test_dropout_is_random_in_training_only():
    model, variables = SMALL["sphereface"].clone(dropout=0.5), _variables("sphereface")
    one, _, _ = _train_step(model, variables, IMAGES, jax.random.key(1))
    two, _, _ = _train_step(model, variables, IMAGES, jax.random.key(2))
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
    variables = jax.device_get(jax.jit(model.init)(KEY, images))
    net = IResNet(18, size=32, embedding_dim=16)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert trained == sum(x.size for x in jax.tree.leaves(variables["params"]))

    state = {}
    for path, value in jax.tree_util.tree_leaves_with_path(variables["params"]):
        *module, leaf = (key.key for key in path)
        module = ".".join(module).removesuffix(".norm")
        if leaf == "kernel" and value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)
        elif leaf == "kernel":  # rows are (h, w, c) here and (c, h, w) there
            value = value.reshape(2, 2, 512, 16).transpose(3, 2, 0, 1).reshape(16, -1)
        names = {"kernel": "weight", "scale": "weight", "slope": "weight", "bias": "bias"}
        state[f"{module}.{names[leaf]}"] = torch.tensor(value)
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("running" in k or "tracked" in k or k == "embedding_norm.weight" for k in missing)

    ours = jax.jit(
        lambda v, x, t: model.apply(v, x, train=t, mutable=["batch_stats"])[0], static_argnums=2
    )
    for train in (True, False):
        fresh = {k: v.clone() for k, v in net.state_dict().items()}
        with torch.no_grad():
            theirs = net.train(train)(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
        net.load_state_dict(fresh)
        _close(np.asarray(ours(variables, images, train)), theirs, 1e-3)
