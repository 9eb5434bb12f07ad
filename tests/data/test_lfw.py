"""LFW's lists, on LFW itself where it is at hand and on a small stand-in of noise."""

import zipfile

import cv2
import numpy as np
import pytest

from marginface.data.readers import lfw

PEOPLE = {f"P_{i}": 1 + i % 3 for i in range(12)}


def people_list(names):
    return "".join(f"{name}\t{PEOPLE[name]}\n" for name in names)


def small(folder, **replaced):
    """Twelve people in two sets: P_0 to P_5 (1, 2, 3, 1, 2, 3 images) and P_6 to P_11."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(folder / lfw.IMAGES, "w") as archive:
        for name, count in PEOPLE.items():
            for k in range(1, count + 1):
                image = cv2.imencode(".jpg", rng.integers(0, 256, (24, 24, 3), np.uint8))[1]
                archive.writestr(f"{name}/{name}_{k:04d}.jpg", image.tobytes())
    head, tail = list(PEOPLE)[:6], list(PEOPLE)[6:]
    lists = {
        "peopleDevTrain": "6\n" + people_list(head),
        "pairsDevTrain": "2\nP_1 1 2\nP_2 1 3\nP_0 1 P_5 3\nP_3 1 P_4 2\n",
        "pairsDevTest": "1\nP_8 2 3\nP_6 1 P_11 1\n",
        "people": "2\n6\n" + people_list(head) + "6\n" + people_list(tail),
        "pairs": "2\t1\nP_1 1 2\nP_0 1 P_5 3\nP_8 2 3\nP_6 1 P_11 1\n",
        **replaced,
    }
    with zipfile.ZipFile(folder / lfw.LISTS, "w") as archive:
        for name, text in lists.items():
            if text is not None:
                archive.writestr(f"{name}.txt", text)
    return folder


def load(root, **kw):
    return lfw.load(root=root, image_size=16, **kw)


def names(source, indices):
    return [source.path(i).rsplit("/", 1)[-1].removesuffix(".jpg") for i in indices]


def test_view1_of_the_small_stand_in(tmp_path):
    faces, tests = load(small(tmp_path))
    pairs = tests["lfw"]
    assert (faces.num_classes, len(faces.source)) == (6, 12)
    assert names(pairs.source, pairs.first) == [
        "P_1_0001", "P_2_0001", "P_0_0001", "P_3_0001", "P_8_0002", "P_6_0001"
    ]  # fmt: skip
    assert names(pairs.source, pairs.second) == [
        "P_1_0002", "P_2_0003", "P_5_0003", "P_4_0002", "P_8_0003", "P_11_0001"
    ]  # fmt: skip
    assert pairs.same.tolist() == [True, True, False, False, True, False]
    assert pairs.fold.tolist() == [0, 0, 0, 0, 1, 1]
    assert (pairs.protocol, pairs.name) == ("dev", "lfw")
    assert pairs.decode(pairs.source[0])["image"].shape == (16, 16, 3)


def test_view2_leaves_one_set_out(tmp_path):
    root = small(tmp_path)
    for fold, trained in ((0, list(PEOPLE)[6:]), (1, list(PEOPLE)[:6])):
        faces, tests = load(root, protocol="view2", fold=fold)
        seen = {n.rsplit("_", 1)[0] for n in names(faces.source, range(len(faces.source)))}
        assert seen == set(trained)
        assert tests["lfw"].fold.tolist() == [int(fold == k) for k in (0, 0, 1, 1)]
    folds = lfw.verification(root=root, image_size=16)
    assert (folds.protocol, folds.fold.tolist()) == ("folds", [0, 0, 1, 1])


def test_the_fingerprint_holds_images_lists_and_protocol(tmp_path):
    prints = set()
    for i, (replaced, kw) in enumerate(
        [
            ({}, {}),
            ({}, {"min_images": 2}),
            ({}, {"protocol": "view2"}),
            ({}, {"protocol": "view2", "fold": 1}),
            ({"pairsDevTest": "1\nP_8 2 3\nP_7 1 P_11 1\n"}, {}),
        ]
    ):
        (tmp_path / str(i)).mkdir()
        prints.add(load(small(tmp_path / str(i), **replaced), **kw)[0].fingerprint)
    assert len(prints) == 5


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"set data.kw.root to a folder that holds lfw_"):
        load(tmp_path)
    small(tmp_path)
    (tmp_path / lfw.LISTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*lfw_lists.zip; set data.kw.root"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("replaced", "error", "message"),
    [
        ({"pairsDevTest": None}, FileNotFoundError, "holds no pairsDevTest.txt"),
        ({"pairsDevTest": "1\nP_8 2 3\n"}, ValueError, "pairsDevTest.txt has 1 pairs"),
        ({"pairsDevTest": "many\n"}, ValueError, "line 1: not `folds pairs`"),
        ({"pairsDevTest": "1\nP_8 2 3\nP_6 P_11 1 1\n"}, ValueError, "line 3: not a pair"),
        ({"pairsDevTest": "1\nP_8 2 9\nP_6 1 P_11 1\n"}, FileNotFoundError, "no P_8_0009.jpg"),
        ({"pairsDevTest": "0\n"}, ValueError, "pairsDevTest.txt has 0 pairs"),
        ({"pairsDevTest": ""}, ValueError, "pairsDevTest.txt is empty"),
        ({"peopleDevTrain": "7\nP_0 1\n"}, ValueError, r"lists \[1\] people, not \[7\]"),
        ({"peopleDevTrain": "1\nP_0 one\n"}, ValueError, "line 2: not `person images`"),
        ({"peopleDevTrain": "1\nP_0 2\n"}, FileNotFoundError, "no P_0_0002.jpg"),
    ],
)
def test_damaged_lists_are_named(tmp_path, replaced, error, message):
    with pytest.raises(error, match=message):
        load(small(tmp_path, **replaced))


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"protocol": "view3"}, "protocol is 'view3'; use"),
        ({"protocol": "view2", "fold": 2}, "fold is 2; use 0 to 1"),
        ({"min_images": 9}, "nobody to train on"),
        ({"augment": {"mirror": 1.0}}, "augment has no key 'mirror'"),
    ],
)
def test_bad_settings(tmp_path, kw, message):
    with pytest.raises(ValueError, match=message):
        load(small(tmp_path), **kw)


def test_lfw_view1_counts(shared_data):
    faces, tests = load(shared_data, crop=0.9, augment={"shift": 0.05})
    pairs = tests["lfw"]
    assert (faces.num_classes, len(faces.source)) == (4038, 9525)
    assert np.bincount(pairs.fold).tolist() == [2200, 1000]
    assert [int(pairs.same[pairs.fold == k].sum()) for k in (0, 1)] == [1100, 500]
    counts = np.bincount(faces.source.labels)
    assert (counts.min(), counts.max()) == (1, 530)  # George_W_Bush
    trained = set(faces.source.rows)
    tested = np.r_[pairs.first[pairs.fold == 1], pairs.second[pairs.fold == 1]]
    assert not trained & set(pairs.source.rows[tested])
    picked = faces.augment(faces.source[17], np.random.default_rng(0))
    assert picked["image"].shape == (16, 16, 3)
    assert picked["image"].std() > 10


def test_lfw_development_test_people(shared_data):
    people = lfw.Lists(shared_data, lfw.IMAGES, lfw.LISTS).people("peopleDevTest.txt")
    assert [(len(p), sum(map(len, p))) for p in people] == [(1711, 3708)]


def test_lfw_view2_counts(shared_data):
    faces, tests = load(shared_data, protocol="view2", fold=3)
    pairs = tests["lfw"]
    assert np.bincount(pairs.fold).tolist() == [5400, 600]
    assert pairs.same.sum() == 3000
    people = lfw.Lists(shared_data, lfw.IMAGES, lfw.LISTS).people("people.txt")
    assert len(people) == 10
    assert sum(len(p) for p in people) == 5749
    assert faces.num_classes == 5749 - len(people[3])
    assert len(faces.source) == 13233 - sum(map(len, people[3]))
    tested = np.r_[pairs.first[pairs.fold == 1], pairs.second[pairs.fold == 1]]
    assert not set(faces.source.rows) & set(pairs.source.rows[tested])
    folds = lfw.verification(root=shared_data, image_size=16)
    assert np.bincount(folds.fold).tolist() == [600] * 10
