"""Embedded faces: pictures are a function of three numbers, data sets are exact arithmetic."""

import collections
import functools
import pickle

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from marginface.data.faces import renderer as face_renderer
from marginface.data.faces import traits as face_traits
from marginface.data.readers import synthetic

SIZE, BATCH = 24, 24  # one shape for all tests: each costs a compilation


def photographs(identities, samples, difficulty=1.0, seed=0):
    """Every sample of every identity, at most BATCH pictures."""
    who = np.repeat(np.asarray(identities, np.uint32), len(samples))
    which = np.tile(np.asarray(samples, np.uint32), len(identities))
    batch = np.zeros((2, BATCH), np.uint32)
    batch[:, : len(who)] = who, which
    images = synthetic.render(seed, *batch, size=SIZE, difficulty=difficulty)
    return np.asarray(images)[: len(who)].reshape(len(identities), len(samples), SIZE, SIZE, 3)


@pytest.fixture(scope="module")
def small():
    return synthetic.load(
        identities=30, samples=4, image_size=SIZE, test_identities=40, test_samples=4, pairs=200
    )


def within(images):
    """Mean distance between pictures of one identity."""
    return np.abs(images - images.mean(1, keepdims=True)).mean()


def test_pictures_are_deterministic_finite_and_in_range():
    a, b = (photographs(range(6), range(4)) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert np.isfinite(a).all()
    assert a.min() >= -1
    assert a.max() <= 1
    assert a.std() > 0.2


def test_every_argument_changes_the_picture():
    base = photographs([5], [3])
    for other in (
        photographs([6], [3]),
        photographs([5], [4]),
        photographs([5], [3], seed=1),
        photographs([5], [3], difficulty=2.0),
    ):
        assert np.abs(base - other).mean() > 0.02


def test_a_picture_does_not_depend_on_its_neighbours():
    alone, among = photographs([7], [2])[0, 0], photographs(range(2, 8), range(3))[5, 2]
    np.testing.assert_allclose(alone, among, atol=1e-5)


def test_the_largest_identities_are_drawn():
    images = photographs([0, 10_000_000, 2**31, 2**32 - 1], [0, 2**32 - 1])
    for a in range(4):
        for b in range(a):
            assert np.abs(images[a] - images[b]).mean() > 0.05


def test_identities_differ_more_than_samples_of_easy_photographs():
    images = photographs(range(6), range(4), difficulty=0.0)
    middle = images[:, :, 4:-4, 6:-6].mean((0, 1))  # the face, not the backdrop
    faces = images[:, :, 4:-4, 6:-6] - middle
    assert faces.mean(1).std(0).mean() > 1.5 * faces.std(1).mean()


def test_difficulty_varies_the_samples_of_an_identity():
    spread = [within(photographs(range(6), range(4), difficulty=d)) for d in (0.0, 1.0, 2.0)]
    assert spread[0] < 0.7 * spread[1]
    assert spread[1] < spread[2]


def test_traits_come_from_the_identity_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(face_traits, "draw_traits", lambda key: seen.append(key) or key)
    monkeypatch.setattr(face_traits, "draw_shot", lambda key, difficulty: key)
    monkeypatch.setattr(
        face_renderer,
        "draw",
        lambda traits, shot, noise, size: (
            jax.random.uniform(traits, (3, size, size)) + 0 * jax.random.uniform(shot, ())
        ),
    )
    draw = jax.jit(functools.partial(synthetic._draw_all, 0, size=8, difficulty=1.0))
    images = np.asarray(draw(np.array([4, 4, 5], np.uint32), np.array([0, 1, 0], np.uint32)))
    np.testing.assert_array_equal(images[0], images[1])
    assert np.abs(images[0] - images[2]).mean() > 0.1
    assert len(seen) == 1


def test_compiled_and_sharded_over_devices_draws_the_same(small, mesh8):
    faces, _ = small
    records = [faces.decode(faces.source[i]) for i in range(BATCH)]
    batch = {key: np.stack([r[key] for r in records]) for key in records[0]}
    plain = synthetic.render(0, batch["identity"], batch["sample"], size=SIZE)
    batch = jax.device_put(batch, NamedSharding(mesh8, P("data")))
    sharded = jax.jit(faces.to_images)(batch)
    assert sharded.shape == (BATCH, SIZE, SIZE, 3)
    np.testing.assert_allclose(plain, sharded, atol=2e-3)


def test_records(small):
    faces, tests = small
    assert len(faces.source) == 30 * 4
    assert faces.num_classes == 30
    record = faces.source[34]
    assert record == {"identity": 4, "sample": 1, "label": 4}
    assert [v.dtype for v in record.values()] == [np.uint32, np.uint32, np.int32]
    changed = faces.augment(record, np.random.default_rng(0))
    assert changed == faces.decode(record) == {**record, "unreadable": 0}
    for source in (faces.source, tests["synthetic"].source):
        copy = pickle.loads(pickle.dumps(source))
        assert len(copy) == len(source)
        assert copy[17] == source[17]
        with pytest.raises(IndexError, match="index"):
            source[len(source)]


def test_ten_million_identities_store_nothing():
    faces, _ = synthetic.load(
        identities=10_000_000, samples=100, image_size=SIZE, label_noise=0.1, long_tail=0.1
    )
    assert len(pickle.dumps(faces.source)) < 10_000
    seen = [faces.source[i] for i in range(0, len(faces.source), len(faces.source) // 1000)]
    assert max(int(r["identity"]) for r in seen) > 9_000_000
    assert all(0 <= r["label"] < 10_000_000 for r in seen)


@pytest.mark.parametrize(("samples", "long_tail"), [(12, 1.0), (20, 0.5), (5, 2.3), (4, 1e-9)])
def test_long_tail_counts_are_exact(samples, long_tail):
    faces, _ = synthetic.load(identities=50, samples=samples, long_tail=long_tail)
    records = [faces.source[i] for i in range(len(faces.source))]
    counts = collections.Counter(int(r["identity"]) for r in records)
    k = np.arange(1, 51)
    expected = np.maximum(1, np.floor(samples * k**-long_tail + 1e-7))
    if long_tail == 1e-9:
        expected[1:] = samples - 1  # just below `samples`
    np.testing.assert_array_equal([counts[i] for i in range(50)], expected)
    assert len({(int(r["identity"]), int(r["sample"])) for r in records}) == len(records)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.333, 1.0])
def test_label_noise_is_exact(noise):
    faces, _ = synthetic.load(identities=20, samples=10, label_noise=noise)
    records = [faces.source[i] for i in range(200)]
    wrong = [r for r in records if int(r["label"]) != int(r["identity"])]
    assert len(wrong) == round(noise * 200)
    assert all(0 <= r["label"] < 20 for r in records)
    assert [faces.source[i] for i in range(200)] == records
    if noise >= 0.1:  # spread over identities and over wrong labels
        assert len({int(r["identity"]) for r in wrong}) > 8
        assert len({(int(r["label"]) - int(r["identity"])) % 20 for r in wrong}) > 8


def test_pairs_are_balanced_new_and_disjoint(small):
    faces, tests = small
    pairs = tests["synthetic"]
    assert pairs.protocol == "folds"
    records = [pairs.source[i] for i in range(len(pairs.source))]
    identity = np.array([r["identity"] for r in records])
    trained = {int(faces.source[i]["identity"]) for i in range(len(faces.source))}
    assert not trained & set(identity.tolist())
    a, b = identity[pairs.first], identity[pairs.second]
    np.testing.assert_array_equal(a == b, pairs.same)
    assert (pairs.first != pairs.second).all()
    assert len({tuple(sorted(p)) for p in zip(pairs.first, pairs.second, strict=True)}) == 200
    people = [set(a[pairs.fold == f]) | set(b[pairs.fold == f]) for f in range(10)]
    assert sum(len(p) for p in people) == len(set().union(*people))
    for fold in range(10):
        assert pairs.same[pairs.fold == fold].tolist().count(True) == 10
        assert (pairs.fold == fold).sum() == 20


def test_fingerprint_follows_the_settings(small):
    def fingerprint(**kw):
        return synthetic.load(identities=30, samples=4, **kw)[0].fingerprint

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint(seed=1), fingerprint(label_noise=0.1)}) == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("identities", 1),
        ("samples", 0),
        ("image_size", 50),
        ("image_size", 0),
        ("difficulty", -0.5),
        ("difficulty", float("nan")),
        ("seed", -1),
        ("long_tail", -1.0),
        ("label_noise", 1.5),
        ("folds", 0),
        ("test_identities", 19),
        ("test_samples", 1),
        ("pairs", 30),
        ("pairs", 10**9),
    ],
)
def test_bad_arguments_name_key_and_value(key, value):
    with pytest.raises(ValueError, match=f"^{key}={value}") as error:
        synthetic.load(**{key: value})
    assert "\n" not in str(error.value)


def test_render_refuses_a_size_without_blocks():
    with pytest.raises(ValueError, match="image_size=20"):
        synthetic.render(0, np.zeros(1, np.uint32), np.zeros(1, np.uint32), size=20)
