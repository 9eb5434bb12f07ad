"""Folders and zip files of identities: order, safety, unreadable images, held-out pairs."""

import os
import pickle
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor

import cv2
import jax.numpy as jnp
import numpy as np
import pytest

from marginface.data.archives import FolderFiles, ZipFiles, open_files
from marginface.data.readers import folder
from marginface.data.readers.folder import by_identity, draw_pairs


def picture(number):
    """A picture that tells its number: a flat colour, stored without loss."""
    return np.full((20, 20, 3), (number % 256, number // 256, 7), np.uint8)


def png(number):
    return cv2.imencode(".png", picture(number)[..., ::-1])[1].tobytes()


def number_of(record):
    red, green, _ = record["image"][0, 0]
    return int(red) + 256 * int(green)


PEOPLE = {f"person_{i}": [f"{k}.png" for k in range(2 + i % 3)] for i in range(9)}
CONTENT = {
    f"{person}/{file}": png(10 * i + k)
    for i, (person, files) in enumerate(PEOPLE.items())
    for k, file in enumerate(files)
}


def write_zip(path, content, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def write_folder(path, content):
    for name, data in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.fixture(params=["folder", "deflated", "stored"])
def root(request, tmp_path):
    extra = {"README.txt": b"read me", "person_0/.DS_Store": b"x", "loose.png": png(999)}
    shuffled = dict(reversed([*CONTENT.items(), *extra.items()]))
    if request.param == "folder":
        return write_folder(tmp_path / "faces", shuffled)
    method = zipfile.ZIP_DEFLATED if request.param == "deflated" else zipfile.ZIP_STORED
    return write_zip(tmp_path / "faces.zip", shuffled, method)


def load(root, **kw):
    return folder.load(root=root, image_size=16, **kw)


def test_every_image_once_in_order_under_its_person(root):
    faces, tests = load(root)
    assert tests == {}
    assert faces.num_classes == len(PEOPLE)
    records = [faces.source[i] for i in range(len(faces.source))]
    assert [number_of(r) for r in records] == [
        10 * i + k for i, files in enumerate(PEOPLE.values()) for k in range(len(files))
    ]
    assert [int(r["label"]) for r in records] == [number_of(r) // 10 for r in records]
    assert {r["label"].dtype for r in records} == {np.dtype(np.int32)}
    assert {int(r["unreadable"]) for r in records} == {0}
    with pytest.raises(IndexError):
        faces.source[len(faces.source)]


def test_records_of_a_pickled_source_and_of_threads_are_the_same(root):
    source = load(root)[0].source
    expected = [number_of(source[i]) for i in range(len(source))]
    again = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda i: number_of(again[i]), [*range(len(source))] * 20))
    assert got == expected * 20


def test_decode_augment_and_to_images(root):
    faces, _ = load(root, crop=0.8, augment={"flip": 0, "shift": 0.1})
    record = faces.source[5]
    assert record["image"].shape == (20, 20, 3)
    plain, changed = faces.decode(record), faces.augment(record, np.random.default_rng(0))
    assert plain["image"].shape == changed["image"].shape == (16, 16, 3)
    assert set(plain) == set(changed) == {"image", "label", "unreadable"}
    images = faces.to_images({"image": jnp.array([[[[0, 127, 255]]]], jnp.uint8)})
    assert images.dtype == jnp.float32
    np.testing.assert_allclose(images, [[[[-1, -0.5 / 127.5, 1]]]], atol=1e-6)


def test_people_with_few_images_are_left_out(root):
    faces, _ = load(root, min_images=4)
    assert faces.num_classes == 3
    assert {number_of(faces.source[i]) // 10 for i in range(len(faces.source))} == {2, 5, 8}
    with pytest.raises(ValueError, match="no identity/image files of 5 images"):
        load(root, min_images=5)


def test_folders_above_the_identities_do_not_matter(tmp_path):
    write_zip(tmp_path / "a.zip", {f"set/train/{n}": d for n, d in CONTENT.items()})
    files = open_files(tmp_path / "a.zip")
    assert [len(rows) for rows in by_identity(files).values()] == [len(f) for f in PEOPLE.values()]


# Fingerprints.


@pytest.mark.parametrize("write", [write_zip, write_folder])
def test_fingerprint_sees_changes_and_nothing_else(write, tmp_path):
    def fingerprint(name, content, **kw):
        return load(write(tmp_path / name, content), **kw)[0].fingerprint

    first = fingerprint("a", CONTENT)
    assert fingerprint("b", dict(reversed(CONTENT.items()))) == first
    name, other = "person_3/0.png", "person_3/zero.png"
    changed = {**CONTENT, name: png(77)}
    assert len(changed[name]) == len(CONTENT[name])
    renamed = {(other if n == name else n): d for n, d in CONTENT.items()}
    fewer = {n: d for n, d in CONTENT.items() if n != name}
    prints = [first, *(fingerprint(*x) for x in (("c", changed), ("d", renamed), ("e", fewer)))]
    prints.append(fingerprint("f", CONTENT, min_images=3))
    assert len(set(prints)) == 5


def test_fingerprint_sees_who_is_tested_and_how(tmp_path):
    def read(name, content, **kw):
        root = write_folder(tmp_path / name, content)
        return load(root, test_identities=4, **({"test_pairs": 4, "folds": 2} | kw))

    faces, tests = read("a", CONTENT)
    tested = tests["held_out"].source.path(0).removeprefix(f"{tmp_path / 'a'}/")
    changed = {**CONTENT, tested: png(77)}
    others = [read("b", changed), read("c", CONTENT, test_pairs=8)]
    np.testing.assert_array_equal(others[0][0].source.rows, faces.source.rows)
    assert len({faces.fingerprint, *(f.fingerprint for f, _ in others)}) == 3


# Hostile or damaged input.


@pytest.mark.parametrize("name", ["../x/a.png", "x/../../a.png", "/etc/a.png", "C:/x/a.png"])
def test_names_that_lead_out_are_refused(name, tmp_path):
    path = write_zip(tmp_path / "a.zip", {**CONTENT, name: png(1)})
    with pytest.raises(ValueError, match="leads out of the archive"):
        load(path)


def test_too_many_files_are_refused(root):
    with pytest.raises(ValueError, match="more than 5 files"):
        load(root, max_members=5)


def test_a_name_twice_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", CONTENT)
    with (
        zipfile.ZipFile(path, "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr("person_3/1.png", png(5))
    with pytest.raises(ValueError, match=r"holds person_3/1\.png twice"):
        load(path)


def test_links_out_of_the_folder_are_refused(tmp_path):
    write_folder(tmp_path / "outside", {"secret.png": png(1)})
    root = write_folder(tmp_path / "faces", CONTENT)
    (root / "person_1" / "inside.png").symlink_to(root / "person_0" / "0.png")
    assert len(load(root)[0].source) == len(CONTENT) + 1
    for link, target in (("person_1/out.png", "outside/secret.png"), ("everybody", "outside")):
        (root / link).symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match=rf"{link} is a symbolic link out of"):
            load(root)
        (root / link).unlink()


def test_a_pipe_in_the_folder_does_not_block(tmp_path):
    root = write_folder(tmp_path / "faces", CONTENT)
    os.mkfifo(root / "person_1" / "pipe.png")
    assert len(load(root)[0].source) == len(CONTENT)


def central(path, name, offset, layout, value):
    """Overwrites a field of a member's entry in the index of a zip file."""
    data = bytearray(path.read_bytes())
    at = data.rindex(name.encode()) - 46
    assert data[at : at + 4] == b"PK\1\2"
    struct.pack_into(layout, data, at + offset, value)
    path.write_bytes(data)


def test_members_declared_too_large_encrypted_or_odd_are_refused(tmp_path):
    for offset, layout, value, message in (
        (24, "<I", 2**30, "declared over"),
        (8, "<H", 1, "encrypted or oddly"),
        (10, "<H", 12, "encrypted or oddly"),
    ):
        path = write_zip(tmp_path / "a.zip", CONTENT)
        central(path, "person_4/0.png", offset, layout, value)
        with pytest.raises(ValueError, match=rf"person_4/0.png is {message}"):
            ZipFiles(path)


def test_a_member_larger_than_declared_stops_at_its_size(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a/0.png": bytes(10_000_000), "b/0.png": png(1)})
    central(path, "a/0.png", 24, "<I", 100)
    files = ZipFiles(path)
    with pytest.raises(ValueError, match="size or checksum differs"):
        files.read(0)
    assert files.read(1) == png(1)


def test_damage_is_found_by_the_checksum(tmp_path):
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = write_zip(tmp_path / "a.zip", {"a/0.png": png(1)}, method)
        data = bytearray(path.read_bytes())
        data[60] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match="damaged zip member"):
            ZipFiles(path).read(0)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 not really", bytes(1000)])
def test_files_that_are_no_zip(content, tmp_path):
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.zip is not a readable zip file"):
        load(tmp_path / "a.zip")


def test_nothing_there_and_nothing_inside(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; give a folder or zip"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no identity/image files"):
        load(tmp_path)


# Unreadable images.


@pytest.fixture(params=["folder", "zip"])
def broken(request, tmp_path):
    """Images 1 and 2 of person_2 and the very last one are broken."""
    content = dict(CONTENT)
    for name in ("person_2/1.png", "person_2/2.png", "person_8/3.png"):
        content[name] = content[name][:40]
    write = write_zip if request.param == "zip" else write_folder
    return write(tmp_path / "faces", content)


def test_stop_names_the_image_in_one_line(broken):
    source = load(broken)[0].source
    at = list(CONTENT).index("person_2/1.png")
    number_of(source[at - 1])
    with pytest.raises(ValueError, match=r"cannot read image .*faces/person_2/1.png: ") as error:
        source[at]
    assert "\n" not in str(error.value)


def test_skip_takes_the_next_readable_record_and_counts(broken):
    source = load(broken, unreadable="skip")[0].source
    records = [source[i] for i in range(len(source))]
    at = list(CONTENT).index("person_2/1.png")
    assert [int(r["unreadable"]) for r in records[at - 1 : at + 3]] == [0, 2, 1, 0]
    assert [number_of(r) for r in records[at - 1 : at + 3]] == [20, 23, 23, 23]
    assert (number_of(records[-1]), int(records[-1]["label"])) == (0, 0)
    assert sum(int(r["unreadable"]) for r in records) == 4


def test_a_test_image_cannot_be_skipped_and_nothing_says_so(tmp_path):
    root = write_folder(tmp_path / "faces", dict.fromkeys(CONTENT, b"nonsense"))
    _, tests = load(root, unreadable="skip", test_identities=4, test_pairs=8, folds=2)
    with pytest.raises(ValueError, match=r"repair or remove it$"):
        tests["held_out"].source[0]
    with pytest.raises(ValueError, match=r"or set data.kw.unreadable=\"skip\" to train on$"):
        load(root)[0].source[0]


def test_skip_gives_up_when_nothing_is_readable(tmp_path):
    content = dict.fromkeys(CONTENT, b"nonsense")
    source = load(write_folder(tmp_path / "faces", content), unreadable="skip")[0].source
    with pytest.raises(ValueError, match=r"no readable image in 27 in a row; .*not a JPEG"):
        source[0]


def test_a_file_that_went_away_is_unreadable(tmp_path):
    root = write_folder(tmp_path / "faces", CONTENT)
    source = load(root)[0].source
    (root / "person_0" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"person_0/1.png.*No such file"):
        source[1]


def test_images_with_too_many_pixels_are_unreadable(root):
    with pytest.raises(ValueError, match="its header says 20 x 20; 1 to 399 pixels"):
        load(root, max_pixels=399)[0].source[0]


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"unreadable": "ignore"}, 'unreadable is \'ignore\'; use "stop" or "skip"'),
        ({"augment": {"flop": 0.5}}, "did you mean 'flip'"),
        ({"test_identities": 9}, "test_identities 9 must leave somebody of the 9"),
        ({"test_identities": 4, "folds": 5}, "fold 0 of the 4 test identities has no same"),
    ],
)
def test_bad_settings(root, kw, message):
    with pytest.raises(ValueError, match=message):
        load(root, **kw)


# Verification pairs.


def test_held_out_people_are_never_trained_on(root):
    faces, tests = load(root, test_identities=6, test_pairs=24, folds=3)
    pairs = tests["held_out"]
    trained = {number_of(faces.source[i]) // 10 for i in range(len(faces.source))}
    shown = np.array([number_of(pairs.source[i]) for i in range(len(pairs.source))])
    assert faces.num_classes == len(trained) == 3
    assert not trained & set(shown // 10)
    assert sorted({faces.source[i]["label"] for i in range(len(faces.source))}) == [0, 1, 2]
    np.testing.assert_array_equal(pairs.same, shown[pairs.first] // 10 == shown[pairs.second] // 10)
    assert (shown[pairs.first] != shown[pairs.second]).all()
    assert pairs.decode(pairs.source[0])["image"].shape == (16, 16, 3)
    assert set(np.unique(pairs.fold)) == {0, 1, 2}
    assert len(np.unique(shown)) == len(shown)
    again = load(root, test_identities=6, test_pairs=24, folds=3)[1]["held_out"]
    np.testing.assert_array_equal(again.first, pairs.first)
    other = load(root, test_identities=6, test_pairs=24, folds=3, seed=1)[0]
    assert other.fingerprint != faces.fingerprint


def test_drawn_pairs_are_balanced_distinct_and_fold_disjoint():
    people = np.split(np.arange(400), np.arange(4, 400, 4))
    first, second, same, fold = draw_pairs(people, num_pairs=600, folds=10, seed=3)
    assert len(first) == 600
    np.testing.assert_array_equal(first // 4 == second // 4, same)
    for k in range(10):
        assert same[fold == k].sum() == (~same[fold == k]).sum() == 30
    assert len({frozenset(p) for p in zip(first, second, strict=True)}) == 600
    who = [set(np.r_[first[fold == k], second[fold == k]] // 4) for k in range(10)]
    assert sum(len(w) for w in who) == len(set.union(*who))


def test_a_broken_test_image_always_stops(broken):
    _, tests = load(broken, test_identities=8, folds=2, unreadable="skip")
    source = tests["held_out"].source
    with pytest.raises(ValueError, match="cannot read image"):
        list(map(source.__getitem__, range(len(source))))


def test_folder_files_are_read_two_levels_deep(tmp_path):
    write_folder(tmp_path, {"a/1.png": b"x", "b.png": b"y", "a/deep/2.png": b"z"})
    files = FolderFiles(tmp_path)
    assert files.names.tolist() == [b"a/1.png", b"b.png"]
    assert files.read(0) == b"x"
