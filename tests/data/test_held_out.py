"""People held out: never trained on, the same for all, verified in place of the test."""

import dataclasses
import pickle

import cv2
import numpy as np
import pytest

from marginface import build
from marginface import config as configs
from marginface.data import cleaned, held_out, pipeline
from marginface.data.readers import folder, synthetic


@pytest.fixture(scope="module")
def faces():
    """30 people, photographed 1 to 9 times."""
    return synthetic.load(identities=30, samples=9, long_tail=0.6, image_size=16)[0]


def people(records):
    return {int(record["identity"]) for record in map(records.__getitem__, range(len(records)))}


def test_nobody_is_trained_on_and_verified(faces):
    trained, pairs = held_out.hold_out(faces, 6)
    verified = people(pairs.source)
    assert len(verified) == 6
    assert not verified & people(trained.source)
    assert people(trained.source) | verified == set(range(30))
    assert len(trained.source) == len(faces.source) - sum(
        int(label) in verified for label in faces.labels()
    )


def test_labels_are_renumbered_in_order_in_records_as_in_the_list(faces):
    trained, _ = held_out.hold_out(faces, 6)
    labels = trained.labels()
    assert labels.dtype == np.int32
    assert trained.num_classes == 24
    records = [trained.source[i] for i in range(len(trained.source))]
    assert [int(r["label"]) for r in records] == labels.tolist()
    assert np.unique(labels).tolist() == list(range(24))
    order = {int(r["label"]): int(r["identity"]) for r in records}
    assert [order[k] for k in range(24)] == sorted(order.values())
    again = pickle.loads(pickle.dumps(trained.source))  # for worker processes
    assert again[3] == trained.source[3]
    with pytest.raises(IndexError, match=f"index {len(labels)} in a data set of {len(labels)}"):
        trained.source[len(labels)]


def test_pairs_are_right_balanced_and_in_folds_without_a_common_person(faces):
    _, pairs = held_out.hold_out(faces, 12)
    assert (pairs.name, pairs.protocol) == ("validation", "folds")
    who = np.array([pairs.source[i]["identity"] for i in range(len(pairs.source))])
    np.testing.assert_array_equal(pairs.same, who[pairs.first] == who[pairs.second])
    assert (pairs.first != pairs.second).all()
    seen = []
    for fold in range(6):
        here = pairs.fold == fold
        assert pairs.same[here].sum() == (~pairs.same[here]).sum() > 0
        seen.append(set(who[np.r_[pairs.first[here], pairs.second[here]]].tolist()))
    assert sum(map(len, seen)) == len(set.union(*seen)) == len(people(pairs.source))


def test_of_nobody_more_than_twenty_images_are_verified():
    faces, _ = synthetic.load(identities=10, samples=60, image_size=16)
    _, pairs = held_out.hold_out(faces, 4)
    who = [int(pairs.source[i]["identity"]) for i in range(len(pairs.source))]
    assert max(map(who.count, who)) <= 20
    assert len(pairs.same) == 2 * 4 * 190, "genuine and impostor pairs"


def test_the_choice_and_the_fingerprint_follow_data_and_number_alone(faces):
    (one, first), (two, second) = (held_out.hold_out(faces, 6) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    np.testing.assert_array_equal(first.first, second.first)
    assert people(first.source) == people(second.source)
    fewer = held_out.hold_out(faces, 5)[0]
    other = held_out.hold_out(dataclasses.replace(faces, fingerprint="x"), 6)[0]
    assert len({faces.fingerprint, one.fingerprint, fewer.fingerprint, other.fingerprint}) == 4


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (3, "data.held_out=3: give 4 or more"),
        (-1, "data.held_out=-1: give 4"),
        (29, "data.held_out=29: of 30 identities 30 have two images or more, and two must be left"),
    ],
)
def test_numbers_that_do_not_fit_are_named(number, expected):
    faces = synthetic.load(identities=30, samples=2, image_size=16)[0]
    with pytest.raises(ValueError, match=expected):
        held_out.hold_out(faces, number)


def test_people_with_one_image_are_not_held_out(faces):
    counts = np.bincount(faces.labels())
    several = int((counts > 1).sum())
    assert several < 28, "the long tail leaves people with one image"
    _, pairs = held_out.hold_out(faces, several)
    assert people(pairs.source) == set(np.flatnonzero(counts > 1).tolist())
    with pytest.raises(ValueError, match=f"of 30 identities {several} have two images"):
        held_out.hold_out(faces, several + 1)


def test_a_cleaned_list_comes_first(faces, tmp_path):
    """Classes that the list has emptied are kept, as it keeps them."""
    labels = faces.labels()
    rows = (f"{i},{k},{-1 if k == 4 else k},1.0\n" for i, k in enumerate(labels))
    path = tmp_path / "list.csv"
    path.write_text(f"{cleaned.COLUMNS}\n{''.join(rows)}")
    trained, pairs = held_out.hold_out(cleaned.relabel(faces, path), 6)
    assert trained.num_classes == 24
    assert 4 not in people(trained.source) | people(pairs.source)
    assert len(np.unique(trained.labels())) == 23


def test_batches_by_identity_hold_people_left_only(faces):
    trained, pairs = held_out.hold_out(faces, 6)
    batches = pipeline.train_iterator(trained, seed=0, batch_size=16, images_per_identity=4)
    for _ in range(4):
        batch = next(batches)
        assert not set(batch["identity"].tolist()) & people(pairs.source)
        assert (batch["label"].reshape(4, 4) == batch["label"].reshape(4, 4)[:, :1]).all()
    batches.close()


@pytest.fixture
def files(tmp_path):
    """Twelve people with three pictures each; a flat colour tells the person."""
    for person in range(12):
        for image in range(3):
            path = tmp_path / f"person_{person:02}" / f"{image}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(cv2.imencode(".png", np.full((20, 20, 3), person, np.uint8))[1])
    return tmp_path


def colours(source):
    return [int(source[i]["image"][0, 0, 0]) for i in range(len(source))]


def test_nobody_held_out_stands_in_for_an_unreadable_image(files):
    whole, _ = folder.load(root=files, image_size=16)
    _, pairs = held_out.hold_out(whole, 4)
    verified = set(colours(pairs.source))
    before = next(p for p in range(11) if p not in verified and p + 1 in verified)
    (files / f"person_{before:02}" / "2.png").write_bytes(b"broken")
    trained, _ = held_out.hold_out(folder.load(root=files, image_size=16, unreadable="skip")[0], 4)
    assert not set(colours(trained.source)) & verified
    left = sorted(set(range(12)) - verified)
    records = [trained.source[i] for i in range(len(trained.source))]
    assert [left[int(r["label"])] for r in records] == colours(trained.source)


def test_an_unreadable_image_of_the_validation_is_named(files):
    whole, _ = folder.load(root=files, image_size=16)
    _, pairs = held_out.hold_out(whole, 4)
    person = min(colours(pairs.source))
    (files / f"person_{person:02}" / "1.png").write_bytes(b"broken")
    faces, _ = folder.load(root=files, image_size=16, unreadable="skip")
    _, pairs = held_out.hold_out(faces, 4)
    with pytest.raises(ValueError, match=f"image {3 * person + 1} cannot be read, but it is held"):
        colours(pairs.source)


def config_with(**data):
    config = configs.load("experiments/arcface.py:data=small")
    kw = {"identities": 40, "samples": 6, "test_identities": 20, "pairs": 200}
    changes = {f"data.kw.{k}": v for k, v in kw.items()}
    configs.override(config, changes | {f"data.{k}": v for k, v in data.items()})
    return config


def test_the_test_set_is_not_there_while_one_validates():
    faces, tests = build.load_data(config_with())
    assert (faces.num_classes, list(tests)) == (40, ["synthetic"])
    faces, tests = build.load_data(config_with(held_out=10))
    assert (faces.num_classes, list(tests)) == (30, ["validation"])
    seeds = (build.load_data(c)[1]["validation"] for c in map(with_seed, (0, 1)))
    assert people(next(seeds).source) == people(next(seeds).source)


def with_seed(seed):
    config = config_with(held_out=10)
    configs.override(config, {"seed": seed})
    return config


def test_a_config_of_an_earlier_version_holds_nobody_out():
    config = config_with().unlock()
    del config.data.held_out
    assert list(build.load_data(config)[1]) == ["synthetic"]


def test_lfw_is_validated_on_its_training_people(shared_data):
    config = configs.load(f"experiments/arcface.py:data=lfw,root={shared_data}")
    before, _ = build.load_data(config)
    configs.override(config, {"data.held_out": 100})
    faces, tests = build.load_data(config)
    assert list(tests) == ["validation"]
    assert faces.num_classes == before.num_classes - 100
    assert tests["validation"].source[0]["image"].ndim == 3
