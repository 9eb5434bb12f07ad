import csv
import dataclasses
import io
import zipfile

import numpy as np
import pytest

from marginface.data import Pairs
from marginface.evaluators import common, curves, verification


def made_up(n=300, *, steps=None, seed=0):
    """Overlapping genuine and impostor scores; `steps` rounds them so that many are equal."""
    rng = np.random.default_rng(seed)
    same = rng.random(n) < 0.4
    scores = np.where(same, rng.normal(0.5, 0.2, n), rng.normal(0.2, 0.2, n))
    return (scores if steps is None else np.round(scores * steps) / steps), same


CASES = [made_up(), made_up(steps=10), made_up(40, steps=3, seed=1), made_up(seed=2, steps=50)]
cases = pytest.mark.parametrize(("scores", "same"), CASES, ids=["distinct", "ties", "few", "some"])


# Slow forms, straight from the definitions.


def all_thresholds(scores):
    distinct = np.unique(scores)
    return [-10.0, *(distinct[1:] + distinct[:-1]) / 2, 10.0]


@cases
def test_auc_is_mann_whitney(scores, same):
    wins = [(g > i) + (g == i) / 2 for g in scores[same] for i in scores[~same]]
    assert curves.auc(curves.roc(scores, same)) == pytest.approx(np.mean(wins))


@cases
def test_auc_is_scikit_learns(scores, same):
    metrics = pytest.importorskip("sklearn.metrics")
    curve = curves.roc(scores, same)
    assert curves.auc(curve) == pytest.approx(metrics.roc_auc_score(same, scores))
    far, tar, thresholds = metrics.roc_curve(same, scores, drop_intermediate=False)
    np.testing.assert_allclose(np.stack(curve), np.stack([far, tar, thresholds]), atol=1e-12)


@cases
def test_best_threshold_is_found_by_no_search_to_be_beaten(scores, same):
    best = max(np.mean((scores > t) == same) for t in all_thresholds(scores))
    chosen = curves.best_threshold(scores, same)
    assert curves.accuracy(scores, same, chosen) == best
    assert not np.isin(chosen, scores)


@cases
@pytest.mark.parametrize("far", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_tar_at_far_is_the_best_allowed_threshold(scores, same, far):
    allowed = [t for t in all_thresholds(scores) if np.mean(scores[~same] > t) <= far]
    best = max(np.mean(scores[same] > t) for t in allowed)
    assert curves.tar_at_far(curves.roc(scores, same), far) == best


@cases
def test_eer_lies_between_the_rates_around_it(scores, same):
    rates = [curves.rates(scores, same, t) for t in all_thresholds(scores)]
    low = max(min(far, 1 - tar) for far, tar in rates)
    high = min(max(far, 1 - tar) for far, tar in rates)
    assert low - 1e-12 <= curves.eer(curves.roc(scores, same)) <= high + 1e-12


def test_eer_of_two_gaussians():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(1, 1, 20_000), rng.normal(-1, 1, 20_000)])
    found = curves.eer(curves.roc(scores, np.arange(40_000) < 20_000))
    assert found == pytest.approx(0.158655, abs=0.005)  # Φ(−1)


def test_by_hand():
    scores = np.array([0.9, 0.8, 0.8, 0.6, 0.4, 0.1])
    same = np.array([True, True, False, True, False, False])
    curve = curves.roc(scores, same)
    np.testing.assert_allclose(curve.far, [0, 0, 1 / 3, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(curve.tar, [0, 1 / 3, 2 / 3, 1, 1, 1])
    assert curves.auc(curve) == pytest.approx(8 / 9 - 1 / 18)
    assert curves.eer(curve) == pytest.approx(1 / 3)
    assert curves.best_threshold(scores, same) == pytest.approx(0.5)
    assert curves.accuracy(scores, same, 0.5) == pytest.approx(5 / 6)
    assert curves.rates(scores, same, 0.8) == pytest.approx((1 / 3, 2 / 3))  # >= accepts


def test_perfect_and_inverted_scores():
    same = np.array([True] * 3 + [False] * 3)
    perfect = np.array([0.9, 0.8, 0.7, 0.3, 0.2, 0.1])
    curve = curves.roc(perfect, same)
    assert (curves.auc(curve), curves.eer(curve)) == (1.0, 0.0)
    assert curves.tar_at_far(curve, 0.0) == 1.0
    curve = curves.roc(-perfect, same)
    assert (curves.auc(curve), curves.eer(curve)) == (0.0, 1.0)
    # Nothing beats accepting or refusing everything; that threshold is finite.
    chosen = curves.best_threshold(-perfect, same)
    assert np.isfinite(chosen)
    assert curves.accuracy(-perfect, same, chosen) == 0.5


def test_equal_scores_tell_nothing():
    same = np.arange(10) < 4
    curve = curves.roc(np.full(10, 0.5), same)
    assert (curves.auc(curve), curves.eer(curve)) == (0.5, 0.5)
    assert curves.tar_at_far(curve, 0.1) == 0.0
    chosen = curves.best_threshold(np.full(10, 0.5), same)
    assert curves.accuracy(np.full(10, 0.5), same, chosen) == 0.6


def test_neighbouring_float32_scores_are_parted():
    low = np.float32(0.7)
    scores = np.array([np.nextafter(low, np.float32(1)), low], np.float32)
    same = np.array([True, False])
    chosen = curves.best_threshold(scores, same)
    assert curves.accuracy(scores, same, chosen) == 1.0
    wide = np.array([np.nextafter(0.7, 1), 0.7])
    assert curves.accuracy(wide, same, curves.best_threshold(wide, same)) == 1.0


@pytest.mark.parametrize("function", [curves.roc, curves.best_threshold])
def test_degenerate_input(function):
    scores = np.array([0.1, 0.2])
    with pytest.raises(ValueError, match=r"^all 2 pairs are genuine .* needs impostor pairs$"):
        function(scores, np.array([True, True]))
    with pytest.raises(ValueError, match=r"^all 2 pairs are impostor .* needs genuine pairs$"):
        function(scores, np.array([False, False]))
    with pytest.raises(common.NotFiniteError, match=r"^1 of 2 scores are not finite$"):
        function(np.array([0.1, np.nan]), np.array([True, False]))


# Protocols.


def test_folds_never_see_their_own_threshold():
    # Fold 2 lies 10 higher: the others' threshold accepts all of it.
    fold = np.repeat(np.arange(3), 4)
    same = np.tile([True, True, False, False], 3)
    scores = np.where(same, 0.8, 0.2) + np.where(fold == 2, 10.0, 0.0)
    found = verification.fold_accuracies(scores, same, fold, "folds")
    assert found.accuracies[2] == 0.5
    assert found.thresholds[2] == pytest.approx(0.5)
    assert found.mean == pytest.approx(found.accuracies.mean())
    assert found.stderr == pytest.approx(found.accuracies.std(ddof=1) / np.sqrt(3))


@pytest.mark.parametrize("seed", range(3))
def test_folds_are_the_loop_over_folds(seed):
    scores, same = made_up(seed=seed, steps=20)
    fold = np.arange(len(scores)) % 5
    for k, found in enumerate(verification.fold_accuracies(scores, same, fold, "folds").accuracies):
        rest, here = fold != k, fold == k
        threshold = curves.best_threshold(scores[rest], same[rest])
        assert found == np.mean((scores[here] >= threshold) == same[here])


def test_development_protocol():
    fold = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    same = np.array([True, True, False, False] * 2)
    scores = np.array([0.9, 0.8, 0.2, 0.1, 0.9, 0.4, 0.3, 0.2])
    found = verification.fold_accuracies(scores, same, fold, "dev")
    assert found.thresholds == pytest.approx([0.5])
    assert found.accuracies == pytest.approx([0.75])
    assert found.stderr == pytest.approx(np.sqrt(0.75 * 0.25 / 4))
    assert verification.tested(fold, "dev").tolist() == [False] * 4 + [True] * 4


def test_protocols_refused():
    scores, same = np.array([0.1, 0.9]), np.array([False, True])
    with pytest.raises(ValueError, match="unknown protocol 'view2': known are 'dev' and 'folds'"):
        verification.fold_accuracies(scores, same, np.array([0, 1]), "view2")
    with pytest.raises(ValueError, match="needs two folds"):
        verification.fold_accuracies(scores, same, np.array([1, 1]), "folds")
    with pytest.raises(ValueError, match=r"folds 0 and 1, the pairs have \[1, 2\]"):
        verification.fold_accuracies(scores, same, np.array([1, 2]), "dev")


# From images to figures.


class Source:
    """Records that know how often they were read."""

    def __init__(self, vectors):
        self.vectors = vectors
        self.reads = [0] * len(vectors)

    def __len__(self):
        return len(self.vectors)

    def __getitem__(self, i):
        self.reads[i] += 1
        return {"vector": self.vectors[i], "label": np.int32(i)}


def decode(record):
    return {"image": record["vector"] * 2, "label": record["label"]}


@pytest.mark.parametrize("batch_size", [1, 4, 10, 16])
def test_every_image_is_embedded_once_in_order(batch_size):
    source = Source(np.random.default_rng(0).normal(size=(10, 3)))
    seen = []

    def embed(state, batch):
        assert batch["image"].shape == (batch_size, 3)
        seen.extend(batch["label"].tolist())
        return {"embedding": batch["image"] + state, "label": batch["label"][:, None]}

    found = common.embed_all(embed, 5.0, source, decode, batch_size)
    np.testing.assert_array_equal(found["embedding"], source.vectors * 2 + 5.0)
    np.testing.assert_array_equal(found["label"][:, 0], range(10))
    assert source.reads == [1] * 10
    assert seen[:10] == list(range(10))


def test_a_batch_is_handed_over_before_the_last_is_read():
    happened = []

    class Lazy:
        def __init__(self, labels):
            self.labels = labels
            happened.append(f"start {labels[0]}")

        def __array__(self, *_, **__):
            happened.append(f"read {self.labels[0]}")
            return np.zeros((4, 2))

    source = Source(np.zeros((12, 3)))
    common.embed_all(lambda _, batch: {"embedding": Lazy(batch["label"])}, None, source, decode, 4)
    assert happened == ["start 0", "start 4", "read 0", "start 8", "read 4", "read 8"]


def test_embeddings_refused():
    source = Source(np.zeros((10, 3)))

    def embed(state, batch):
        broken = np.where(batch["label"][:, None] == 6, np.nan, batch["image"])
        return {"embedding": batch["image"], state: broken}

    for name in ("embedding", "group_logits"):
        message = rf"^the {name} of image 6 of 10 is not finite"
        with pytest.raises(common.NotFiniteError, match=message):
            common.embed_all(embed, name, source, decode, 4)
    with pytest.raises(ValueError, match="no images to embed"):
        common.embed_all(embed, "embedding", Source(np.zeros((0, 3))), decode, 4)


def test_an_unreadable_image_stops_the_evaluation():
    def broken(record):
        raise OSError(f"image {record['label']} cannot be read")

    with pytest.raises(OSError, match="image 0 cannot be read"):
        common.embed_all(lambda s, b: b["image"], None, Source(np.zeros((3, 2))), broken, 2)


def people(protocol, *, noise, seed=0):
    """30 people of 4 images each: every genuine pair and as many impostor pairs, in 5 folds."""
    rng = np.random.default_rng(seed)
    vectors = np.repeat(rng.normal(size=(30, 16)), 4, axis=0) + noise * rng.normal(size=(120, 16))
    first, second = np.triu_indices(120, k=1)
    same = first // 4 == second // 4
    kept = np.concatenate([np.flatnonzero(same), rng.permutation(np.flatnonzero(~same))[:200]])
    return Pairs(
        source=Source(vectors),
        decode=decode,
        to_images=lambda batch: batch["image"],
        first=first[kept].astype(np.int64),
        second=second[kept].astype(np.int64),
        same=same[kept],
        fold=np.arange(len(kept)) % (2 if protocol == "dev" else 5),
        protocol=protocol,
        name="people",
    )


def embed(state, batch):
    return {"embedding": batch["image"] * state}


@pytest.mark.parametrize("protocol", ["dev", "folds"])
def test_evaluator(protocol):
    pairs = people(protocol, noise=0.8)
    embedded = common.Embedded(embed, pairs, 32)
    evaluator = verification.Evaluator(common.Subject("people", pairs, embedded))
    found = dict(evaluator.run(3.0))
    x = pairs.source.vectors / np.linalg.norm(pairs.source.vectors, axis=1, keepdims=True)
    cosine = (x[pairs.first] * x[pairs.second]).sum(axis=1)
    np.testing.assert_allclose(evaluator.scores, cosine, atol=1e-12)
    expected = verification.fold_accuracies(cosine, pairs.same, pairs.fold, protocol)
    assert found["people/accuracy"] == pytest.approx(expected.mean)
    assert found["people/accuracy_stderr"] == pytest.approx(expected.stderr)
    assert (
        found["people/threshold"]
        == evaluator.threshold
        == pytest.approx(expected.thresholds.mean())
    )
    shown = pairs.fold == 1 if protocol == "dev" else pairs.fold >= 0
    curve = curves.roc(cosine[shown], pairs.same[shown])
    assert found["people/auc"] == pytest.approx(curves.auc(curve))
    assert found["people/eer"] == pytest.approx(curves.eer(curve))
    assert found["people/tar@far=1e-1"] == curves.tar_at_far(curve, 0.1)
    # 200 impostor pairs (100 of them tested in "dev") cannot show a rate of one in a thousand.
    assert "people/tar@far=1e-2" in found
    assert "people/tar@far=1e-3" not in found
    assert 0.7 < found["people/accuracy"] < 1


def test_scores_and_figures_are_the_subjects():
    pairs = people("folds", noise=0.8)
    told = np.where(pairs.same, 0.9, 0.1)

    def score(state, outputs, first, second):
        assert state == 3.0
        assert outputs["embedding"].shape == (120, 16)
        return told + 0 * first * second

    subject = common.Subject("mine", pairs, common.Embedded(embed, pairs, 32), score)
    evaluator = verification.Evaluator(subject)
    found = dict(evaluator.run(3.0))
    assert found["mine/accuracy"] == 1.0
    assert evaluator.ranking == "mine/accuracy"
    with pytest.raises(ValueError, match=r"^evals\.mine\.data is missing: give 'tests' for every"):
        verification.Evaluator(common.Subject("mine"))


def test_images_are_embedded_once_for_a_state_however_many_ask():
    pairs = people("folds", noise=0.8)
    embedded = common.Embedded(embed, pairs, 32)
    subject = common.Subject("people", pairs, embedded)
    both = [common.Entry(verification.Evaluator(subject), 0, embedded)]
    both.append(common.Entry(verification.Evaluator(dataclasses.replace(subject, name="b")), 6))
    evaluators = common.Evaluators(both)
    found = evaluators.run(3.0)
    assert found["people/accuracy"] == found["b/accuracy"]
    assert pairs.source.reads == [1] * 120
    evaluators.run(3.0)  # another state may be equal: nothing is kept
    assert pairs.source.reads == [2] * 120


class Named:
    """Yields one figure."""

    def __init__(self, name):
        self.name = name

    def run(self, state):
        yield self.name, state


def test_each_evaluator_has_its_own_interval():
    every = {"a/x": 0, "b/x": 2, "c/x": 3}
    evaluators = common.Evaluators([common.Entry(Named(k), n) for k, n in every.items()])
    assert list(evaluators.run(1.5)) == list(every)
    assert {at: list(evaluators.due(at).run(0.0)) for at in (1, 2, 3, 6)} == {
        1: [],
        2: ["b/x"],
        3: ["c/x"],
        6: ["b/x", "c/x"],
    }
    assert not evaluators.due(5)
    assert evaluators.ranking is None


def test_two_evaluators_with_one_figure_are_refused():
    evaluators = common.Evaluators([common.Entry(Named("a/x"), 0), common.Entry(Named("a/x"), 0)])
    with pytest.raises(ValueError, match=r"^config\.evals: two evaluators yield a/x; give one"):
        evaluators.run(0.0)


def test_cosine_of_a_zero_embedding_is_zero():
    embeddings = np.array([[0.0, 0.0], [3.0, 4.0], [1e-30, 0.0]], np.float32)
    scores = verification.cosine_scores(embeddings, np.array([0, 1, 1]), np.array([1, 1, 2]))
    np.testing.assert_allclose(scores, [0.0, 1.0, 0.6])


# Published scores of real faces.


@pytest.fixture(scope="module")
def published(shared_data):
    with zipfile.ZipFile(shared_data / "face_pair_scores.zip") as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


@pytest.mark.parametrize(
    ("name", "area", "best", "equal_error"),
    [
        ("deepface_ensemble.txt", 0.99679, 0.97383, 0.02633),
        ("BaiduIDLFinal.TPFP", 0.99989, 0.99767, 0.00367),
        ("eigenfaces-original-roc.txt", 0.64829, 0.61070, None),
    ],
)
def test_published_lfw_curves(published, name, area, best, equal_error):
    tar, far = np.loadtxt(io.StringIO(published[f"lfw_public_rocs/{name}"])).T
    order = np.lexsort((tar, far))
    curve = curves.Roc(far[order], tar[order], np.full(len(far), np.nan))
    assert curves.auc(curve) == pytest.approx(area, abs=6e-6)
    assert np.max((1 + tar - far) / 2) == pytest.approx(best, abs=6e-6)
    if equal_error is not None:
        assert curves.eer(curve) == pytest.approx(equal_error, abs=6e-6)


@pytest.mark.parametrize(
    ("name", "area", "best", "equal_error"),
    [
        ("deepface_ensemble.txt", 0.99679, 0.97383, 0.02633),
        ("BaiduIDLFinal.TPFP", 0.99989, 0.99767, 0.00367),
    ],
)
def test_scores_rebuilt_from_published_curves(published, name, area, best, equal_error):
    # 3,000 pairs of each kind: a step of the curve says how many of each share one score.
    tar, far = np.loadtxt(io.StringIO(published[f"lfw_public_rocs/{name}"])).T
    counts = np.rint(3000 * np.stack([tar, far])).astype(int)
    counts = np.unique(np.concatenate([counts, [[0, 3000], [0, 3000]]], axis=1), axis=1)
    counts = counts[:, np.argsort(counts.sum(axis=0))]
    steps = np.diff(counts, axis=1)
    assert (steps >= 0).all()
    rank = -np.arange(steps.shape[1], dtype=float)
    scores = np.concatenate([np.repeat(rank, steps[0]), np.repeat(rank, steps[1])])
    same = np.arange(6000) < 3000
    curve = curves.roc(scores, same)
    assert curves.auc(curve) == pytest.approx(area, abs=6e-6)
    assert curves.eer(curve) == pytest.approx(equal_error, abs=6e-6)
    chosen = curves.best_threshold(scores, same)
    assert curves.accuracy(scores, same, chosen) == pytest.approx(best, abs=6e-6)


def test_celeba_distances(published):
    def distances(name):
        lines = published[f"celeba_dlib_distances/{name}.txt"].splitlines()[1:]
        return np.array([float(line.split()[2]) for line in lines])

    genuine, impostor = distances("samePersons"), distances("differentPersonsDistance")
    assert (genuine.mean(), impostor.mean()) == pytest.approx((0.4776, 0.7998), abs=5e-5)
    scores = -np.concatenate([genuine, impostor])
    same = np.arange(len(scores)) < len(genuine)
    far, tar = curves.rates(scores, same, -0.6)
    assert tar == pytest.approx(0.889)
    assert far == pytest.approx(0.00105, abs=5e-6)
    assert curves.tar_at_far(curves.roc(scores, same), far) >= tar


def vgg_face_distances(published):
    """Distances of the 25 photos' pairs that the files hold, and which show one person."""
    people = [(1, 2, 4, 5, 6, 7, 10, 11), (13, 14, 15), (8, 9), (3, 12)]
    people += [(i, i + 1) for i in range(16, 25, 2)]
    person = {f"img{i}.jpg": p for p, numbers in enumerate(people) for i in numbers}
    found = {}
    for name in ("face-recognition-pivot.fd68125.csv", "face-recognition-pivot.csv"):
        for row in csv.DictReader(io.StringIO(published[f"deepface/{name}"])):
            pair = frozenset(row[k].rsplit("/", 1)[1] for k in ("file_x", "file_y"))
            if pair <= person.keys():
                found[pair] = float(row["VGG-Face_cosine"])
    same = [len({person[image] for image in pair}) == 1 for pair in found]
    return np.array(list(found.values())), np.array(same)


def test_vgg_face_thresholds(published):
    distances, same = vgg_face_distances(published)
    genuine = distances[same]
    assert (same.sum(), (~same).sum()) == (38, 41)
    assert (genuine.mean(), genuine.std(ddof=1)) == pytest.approx((0.2263, 0.0744), abs=5e-5)
    assert genuine.max() == 0.3637
    two_sigma = genuine.mean() + 2 * genuine.std(ddof=1)
    assert two_sigma == pytest.approx(0.3751, abs=5e-5)
    assert curves.rates(-distances, same, -two_sigma)[1] == 1.0
    # A genuine pair lies exactly at this threshold and is accepted.
    assert curves.rates(-distances, same, -0.3147) == pytest.approx((0.0, 34 / 38))


def test_openface_ten_folds(published):
    lines = published["openface_lfw_10fold/nn4.small2.v1.accuracies.txt"].splitlines()[1:11]
    accuracies = np.array([float(line.split(",")[2]) for line in lines])
    # Pairs that give each fold its accuracy: 300 + 300, some genuine ones scored as impostors.
    errors = np.rint(600 * (1 - accuracies)).astype(int)
    fold, place = np.repeat(np.arange(10), 600), np.tile(np.arange(600), 10)
    same = place < 300
    scores = np.where(same & (place >= errors[fold]), 1.0, 0.0)
    found = verification.fold_accuracies(scores, same, fold, "folds")
    np.testing.assert_allclose(found.accuracies, accuracies)
    # The file prints the folds with two digits, its mean and deviation from more.
    assert found.mean == pytest.approx(0.9292, abs=5e-3)
    assert found.stderr * np.sqrt(10) == pytest.approx(0.0134, abs=5e-3)
