"""One global order of examples, whatever processes, workers and threads; resumed by the step."""

import itertools
import pickle
import zipfile

import cv2
import numpy as np
import pytest

from marginface.data import Faces
from marginface.data.pipeline import train_iterator
from marginface.data.readers import folder, synthetic


class Numbers:
    """Record i is the number i."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"number": np.int64(index), "label": self.labels[index]}


def numbers(length=10, labels=None):
    labels = np.arange(length, dtype=np.int32) % 3 if labels is None else np.int32(labels)
    return Faces(
        source=Numbers(labels),
        num_classes=3,
        labels=lambda: labels,
        augment=lambda record, rng: {**record, "draw": rng.random(2)},
        decode=dict,
        to_images=lambda batch: batch["image"],
        fingerprint="",
    )


def take(iterator, count):
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def same(left, right):
    return all(
        a.keys() == b.keys()
        and all(np.array_equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)
        for a, b in zip(left, right, strict=True)
    )


def together(parts):
    """Batches of every process -> global batches."""
    return [
        {key: np.concatenate([p[key] for p in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]


def test_every_epoch_holds_every_example_once_in_another_order():
    batches = take(train_iterator(numbers(10), seed=1, batch_size=4), 15)
    order = np.concatenate([batch["number"] for batch in batches]).reshape(6, 10)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(10), (6, 1)))
    assert len({tuple(epoch) for epoch in order}) == 6
    labels = np.concatenate([batch["label"] for batch in batches])
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, order.ravel() % 3)


def test_a_batch_may_be_larger_than_the_set():
    (batch,) = take(train_iterator(numbers(3), seed=0, batch_size=7), 1)
    np.testing.assert_array_equal(np.sort(batch["number"][:6]), [0, 0, 1, 1, 2, 2])


def test_random_changes_are_new_for_every_example_and_epoch():
    draws = [b["draw"] for b in take(train_iterator(numbers(10), seed=1, batch_size=10), 5)]
    assert len(np.unique(np.concatenate(draws))) == 100


def test_seeds_give_other_orders_and_changes():
    first, again, other = (
        take(train_iterator(numbers(50), seed=seed, batch_size=25), 4) for seed in (1, 1, 2)
    )
    assert same(first, again)
    for epoch in range(2):  # nor is one seed the other a number of epochs later
        for later in range(2):
            a, b = first[2 * epoch], other[2 * later]
            assert (a["number"] != b["number"]).any()
            assert (a["draw"] != b["draw"]).all()


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("threads", [1, 3])
def test_processes_share_the_same_global_batches(processes, threads):
    expected = take(train_iterator(numbers(11), seed=5, batch_size=8), 6)
    parts = [
        take(
            train_iterator(
                numbers(11),
                seed=5,
                batch_size=8,
                process_index=p,
                process_count=processes,
                threads=threads,
            ),
            6,
        )
        for p in range(processes)
    ]
    assert parts[0][0]["number"].shape == (8 // processes,)
    assert same(together(parts), expected)


def test_the_state_is_the_step_and_continues_anywhere():
    expected = take(train_iterator(numbers(), seed=3, batch_size=4), 12)
    iterator = train_iterator(numbers(), seed=3, batch_size=4)
    head = list(itertools.islice(iterator, 5))
    iterator.close()
    parts = []
    for p in range(2):
        restored = train_iterator(
            numbers(), seed=3, batch_size=4, process_index=p, process_count=2, threads=1
        )
        next(restored)
        restored.set_state({"step": 5})
        parts.append(take(restored, 7))
    assert same(head + together(parts), expected)
    assert same(take(train_iterator(numbers(), seed=3, batch_size=4, step=5), 7), expected[5:])
    forgotten = take(train_iterator(numbers(), seed=3, batch_size=4), 7)
    assert not same(forgotten, expected[5:])


def test_far_steps_are_reached_at_once():
    step = 10**9
    (batch,) = take(train_iterator(numbers(10), seed=0, batch_size=10, step=step), 1)
    np.testing.assert_array_equal(np.sort(batch["number"]), np.arange(10))


SIZES = [5, 1, 4, 2, 8, 1, 3, 6, 4, 2]  # images of each identity; eight have a pair
PEOPLE = np.random.default_rng(0).permutation(np.repeat(np.arange(len(SIZES)), SIZES))


def identities(**kw):
    """Batches of three identities, four images each."""
    options = {"seed": 5, "batch_size": 12, "images_per_identity": 4} | kw
    return train_iterator(numbers(labels=PEOPLE), **options)


def test_identities_come_in_turn_and_their_images_in_random_order():
    batches = take(identities(), 60)
    numbers = np.stack([batch["number"] for batch in batches]).reshape(60, 3, 4)
    labels = np.stack([batch["label"] for batch in batches]).reshape(60, 3, 4)
    np.testing.assert_array_equal(labels, PEOPLE[numbers])
    assert (labels == labels[:, :, :1]).all()
    whole_passes = labels[:, :, 0].reshape(30, 6)  # of eight, two wait for another pass
    assert all(len(set(people)) == 6 for people in whole_passes)
    assert len({tuple(people) for people in whole_passes}) > 25
    assert set(labels.ravel()) == set(np.flatnonzero(np.array(SIZES) > 1))
    turns, seen = numbers.reshape(-1, 4), labels.reshape(-1, 4)[:, 0]
    for turn, person in zip(turns, seen, strict=True):
        _, times = np.unique(turn, return_counts=True)
        assert len(times) == min(4, SIZES[person])  # none again before all are there
        assert times.max() - times.min() <= 1
    assert set(numbers.ravel()) == set(np.flatnonzero(np.array(SIZES)[PEOPLE] > 1))
    assert len({tuple(turn) for turn in turns[seen == 4]}) > 0.9 * (seen == 4).sum()


def test_batches_of_identities_follow_from_seed_and_step_alone():
    expected = take(identities(), 9)
    assert len(np.unique(np.concatenate([batch["draw"] for batch in expected]))) == 2 * 9 * 12
    assert same(take(identities(step=4, threads=3), 5), expected[4:])
    other = take(identities(seed=6), 9)
    assert not any((a["number"] == b["number"]).all() for a, b in zip(expected, other, strict=True))
    for processes in (2, 4):
        parts = [
            take(identities(process_index=p, process_count=processes), 9) for p in range(processes)
        ]
        assert same(together(parts), expected)
    iterator = identities()
    iterator.set_state({"step": 3})
    assert same(take(iterator, 6), expected[3:])
    (far,) = take(identities(step=10**9), 1)
    assert len(set(far["label"])) == 3


def test_every_identity_in_every_batch():
    for batch in take(identities(batch_size=16, images_per_identity=2), 5):
        assert len(set(batch["label"])) == 8


@pytest.fixture
def noise_zip(tmp_path):
    """Five people with four noise images each; the last image of person 3 is broken."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "noise.zip", "w") as archive:
        for name in (f"p{i}/{k}.jpg" for i in range(5) for k in range(4)):
            image = cv2.imencode(".jpg", rng.integers(0, 256, (24, 24, 3), np.uint8))[1].tobytes()
            archive.writestr(name, image[:50] if name == "p3/3.jpg" else image)
    return tmp_path / "noise.zip"


CHANGES = {"shift": 0.1, "scale": 0.1, "rotation": 10, "colour": 0.2, "grey": 0.2, "cutout": 0.5}


def test_workers_change_nothing(noise_zip):
    faces, _ = folder.load(
        root=noise_zip, image_size=16, augment=CHANGES, unreadable="skip", crop=0.8
    )
    expected = take(train_iterator(faces, seed=3, batch_size=6), 11)
    images = np.concatenate([batch["image"] for batch in expected])
    assert images.shape == (66, 16, 16, 3)
    assert len(np.unique(images.reshape(66, -1), axis=0)) == 66
    assert sum(int(batch["unreadable"].sum()) for batch in expected[:10]) == 3  # one an epoch
    # Each continues where the one before stopped, with another number of workers.
    got = []
    for workers, count in ((1, 4), (2, 5), (0, 2)):
        iterator = train_iterator(faces, seed=3, batch_size=6, workers=workers)
        iterator.set_state({"step": len(got)})
        got += list(itertools.islice(iterator, count))
        iterator.close()
    assert same(got, expected)
    assert {type(value) for batch in got for value in batch.values()} == {np.ndarray}


def test_workers_change_nothing_in_batches_of_identities(noise_zip):
    faces, _ = folder.load(root=noise_zip, image_size=16, augment=CHANGES, unreadable="skip")
    options = {"seed": 3, "batch_size": 6, "images_per_identity": 3}
    expected = take(train_iterator(faces, **options), 5)
    assert same(take(train_iterator(faces, **options, workers=1), 5), expected)


def test_labels_are_those_of_the_records(noise_zip):
    for faces in (
        folder.load(root=noise_zip, image_size=16, unreadable="skip", min_images=2)[0],
        synthetic.load(identities=30, samples=6, long_tail=0.5, label_noise=0.2)[0],
        synthetic.load(identities=30, samples=6, long_tail=0.5)[0],
    ):
        labels = faces.labels()
        assert labels.dtype == np.int32
        records = [faces.source[i] for i in range(len(faces.source))]
        own = [not record.get("unreadable") for record in records]  # and not the next one's
        np.testing.assert_array_equal(labels[own], np.array([r["label"] for r in records])[own])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_with_its_name(noise_zip, workers):
    faces, _ = folder.load(root=noise_zip, image_size=16)
    iterator = train_iterator(faces, seed=3, batch_size=20, workers=workers)
    with pytest.raises(ValueError, match=r"cannot read image .*noise.zip/p3/3.jpg: "):
        next(iterator)
    iterator.close()


def test_the_source_is_small_to_send_to_a_worker(noise_zip):
    faces, _ = folder.load(root=noise_zip, image_size=16)
    faces.source[0]
    assert len(pickle.dumps(faces.source)) < 5000


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"batch_size": 6, "process_count": 4}, "batch_size 6 is not a positive multiple of the 4"),
        ({"batch_size": 0}, "batch_size 0 is not"),
        ({"process_index": 2, "process_count": 2}, r"process_index 2 is not in \[0, 2\)"),
        ({"seed": -1}, r"seed -1 is not in \[0, 2\*\*32\)"),
        ({"workers": -1}, "workers is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"step": -1}, "step is -1"),
        ({"faces": numbers(0)}, "the training set has no examples"),
        ({"images_per_identity": 1}, "images_per_identity is 1; use 0, or 2 or more"),
        ({"images_per_identity": -2}, "images_per_identity is -2"),
        ({"images_per_identity": 3}, "batch_size 4 is not a multiple of images_per_identity 3"),
        (
            {"faces": numbers(4), "images_per_identity": 2},
            "a batch of 4 = 2 identities x 2 images needs 2 identities of 2 images or more; "
            "the training set has 1$",
        ),
    ],
)
def test_bad_settings(kw, message):
    with pytest.raises(ValueError, match=message):
        train_iterator(**{"faces": numbers(), "seed": 0, "batch_size": 4, **kw})
    with pytest.raises(ValueError, match="step is -3"):
        train_iterator(numbers(), seed=0, batch_size=4).set_state({"step": -3})
