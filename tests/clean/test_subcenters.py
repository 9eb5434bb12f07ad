"""Dominant sub-centers, wrong labels found, and training sets without them."""

import csv
import dataclasses
import json
import pickle

import numpy as np
import pytest
from commands import ROOT
from PIL import Image

from marginface import build, main
from marginface import config as configs
from marginface.clean import __main__ as clean
from marginface.clean import subcenters
from marginface.data import cleaned
from marginface.data.readers import synthetic
from marginface.runs import trained as opener


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def angle(a, b):
    """Degrees, in float64."""
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def oracle(x, labels, rows, num_classes, max_angle, relabel):
    """One image and one class after the other."""
    index = []
    for c in range(num_classes):
        votes = [0] * rows.shape[1]
        for i in np.flatnonzero(labels == c):
            votes[np.argmin([angle(x[i], row) for row in rows[c]])] += 1
        index.append(int(np.argmax(votes)))
    angles, new = [], []
    for i, own in enumerate(labels):
        to = np.array([angle(x[i], rows[c, index[c]]) for c in range(num_classes)])
        others = np.where(np.arange(num_classes) == own, np.inf, to)
        nearest = int(np.argmin(others))
        angles.append(to[own])
        if to[own] <= max_angle:
            new.append(own)
        else:
            new.append(nearest if relabel and others[nearest] <= max_angle else -1)
    return index, np.array(angles), np.array(new)


@pytest.mark.parametrize("relabel", [True, False])
@pytest.mark.parametrize("chunk_size", [4096, 7])
def test_equals_one_image_after_the_other(chunk_size, relabel):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 6)).astype(np.float32) * rng.uniform(0.1, 9, (90, 1)).astype("f4")
    rows = rng.normal(size=(16, 3, 6)).astype(np.float32)  # from 11 on padding
    labels = rng.integers(0, 10, 90)  # class 10 has no image
    index, angles, new = oracle(x, labels, rows, 11, 60.0, relabel)
    found_index, found_rows = subcenters.dominant(x, labels, rows, 11, chunk_size=chunk_size)
    np.testing.assert_array_equal(found_index, index)
    np.testing.assert_array_equal(found_rows, rows[np.arange(11), index])
    assert found_index[10] == 0
    found = subcenters.clean(
        x, labels, rows, num_classes=11, max_angle=60.0, relabel=relabel, chunk_size=chunk_size
    )
    np.testing.assert_allclose(found.angle, angles, atol=1e-2)
    np.testing.assert_array_equal(found.keep, angles <= 60)
    np.testing.assert_array_equal(found.label, new)
    assert (found.label == subcenters.DROPPED).any()
    assert (found.label[~found.keep] >= 0).any() == relabel


def test_of_equal_subcenters_the_first():
    x = np.eye(2, dtype=np.float32)
    rows = np.eye(2, dtype=np.float32)[None, ::-1]
    assert subcenters.dominant(x, np.zeros(2, int), rows, 1)[0] == [0]


def test_with_one_class_nothing_is_relabelled():
    x, rows = -np.ones((1, 2), np.float32), np.ones((1, 1, 2), np.float32)
    found = subcenters.clean(x, np.zeros(1, int), rows, num_classes=1)
    assert found.label == [subcenters.DROPPED]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"labels": np.array([0, 2])}, "label 2 is not a class from 0 to 1"),
        ({"labels": np.array([-1, 0])}, "label -1 is not a class"),
        ({"num_classes": 3}, "2 rows for 3 classes"),
        ({"max_angle": float("nan")}, "max_angle=nan: give degrees"),
        ({"chunk_size": 0}, "chunk_size is 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, expected):
    arguments = {"labels": np.array([0, 1]), "num_classes": 2} | changes
    with pytest.raises(ValueError, match=expected):
        subcenters.clean(
            np.ones((2, 4), np.float32), rows=np.ones((2, 3, 4), np.float32), **arguments
        )


def test_wrong_labels_are_found_and_mended():
    """Embeddings around their true identity's direction, one label in five wrong."""
    faces, _ = synthetic.load(identities=40, samples=50, label_noise=0.2)
    labels = faces.labels()
    truth = np.array([faces.source[i]["identity"] for i in range(len(labels))], np.int64)
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(40, 64)) / 8  # of length about 1
    x = centers[truth] + 0.1 * rng.normal(size=(len(truth), 64))  # about 39° away
    rows = rng.normal(size=(40, 3, 64)) / 8  # two catch what is no one's; the last is the class's
    rows[:, 2] = centers + 0.03 * rng.normal(size=centers.shape)
    found = subcenters.clean(
        x.astype(np.float32), labels, rows.astype(np.float32), num_classes=40, chunk_size=512
    )
    wrong = labels != truth
    assert wrong.sum() == 400
    found_wrong, kept_right = np.mean(~found.keep[wrong]), np.mean(found.keep[~wrong])
    mended = found.label[wrong & ~found.keep] == truth[wrong & ~found.keep]
    print(f"found {found_wrong:.3f} kept {kept_right:.3f} mended {mended.mean():.3f}")
    assert found_wrong >= 0.95
    assert kept_right >= 0.95
    assert mended.mean() >= 0.95


# --- the list ------------------------------------------------------------------------------------


@pytest.fixture
def faces():
    """Six images of three identities, two labels wrong."""
    return synthetic.load(identities=3, samples=2, label_noise=0.34, image_size=16)[0]


def lines(faces, new_labels):
    rows = zip(faces.labels(), new_labels, strict=True)
    return [cleaned.COLUMNS, *(f"{i},{old},{new},40.125" for i, (old, new) in enumerate(rows))]


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_only_what_is_kept_shows_under_its_new_label(faces, tmp_path):
    path = write(tmp_path / "list.csv", lines(faces, [0, -1, 2, 1, -1, 2]))
    found = cleaned.relabel(faces, path)
    assert found.num_classes == 3
    np.testing.assert_array_equal(found.labels(), [0, 2, 1, 2])
    assert found.labels().dtype == np.int32
    records = [found.source[i] for i in range(len(found.source))]
    assert [r["label"] for r in records] == [0, 2, 1, 2]
    expected = [faces.source[i] for i in (0, 2, 3, 5)]
    for key in ("identity", "sample"):
        assert [r[key] for r in records] == [r[key] for r in expected]
    with pytest.raises(IndexError, match="index 4 in a data set of 4"):
        found.source[4]
    assert pickle.loads(pickle.dumps(found.source))[1]["label"] == 2  # for worker processes


def test_the_fingerprint_follows_the_list_and_the_data(faces, tmp_path):
    one = write(tmp_path / "one.csv", lines(faces, [0, 1, 2, 0, 1, 2]))
    two = write(tmp_path / "two.csv", lines(faces, [0, 1, 2, 0, 1, -1]))
    other = dataclasses.replace(faces, fingerprint="another")
    prints = {f.fingerprint for f in (faces, cleaned.relabel(faces, one))}
    prints |= {cleaned.relabel(faces, two).fingerprint, cleaned.relabel(other, one).fingerprint}
    assert len(prints) == 4
    assert cleaned.relabel(faces, one).fingerprint in prints


def test_an_image_that_can_no_longer_be_read_is_named(faces, tmp_path):
    class Broken:
        def __len__(self):
            return len(faces.source)

        def __getitem__(self, index):
            return {**faces.source[index], "unreadable": np.int32(index == 5)}

    path = write(tmp_path / "list.csv", lines(faces, [0, -1, 2, 1, -1, 2]))
    found = cleaned.relabel(dataclasses.replace(faces, source=Broken()), path)
    assert found.source[2]["label"] == 1
    with pytest.raises(ValueError, match="image 5 cannot be read"):
        found.source[3]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda t: ["index,label,angle", *t[1:]], "list.csv, line 1: the columns must be index,"),
        (lambda t: [], "list.csv, line 1: the columns"),
        (lambda t: t[:-1], "list.csv ends after 5 of 6 images"),
        (lambda t: [*t, "6,0,0,1.0"], "list.csv, line 8: the data set has only 6 images"),
        (lambda t: [*t[:2], *t[:1:-1]], "list.csv, line 3: index 5 stands where 1 must"),
        (lambda t: [*t[:3], "2,x,1,3", *t[4:]], "list.csv, line 4: '2,x,1,3' is not index,label"),
        (lambda t: [*t[:3], "2,1,1", *t[4:]], "list.csv, line 4: '2,1,1' is not"),
        (lambda t: [*t[:3], "", *t[4:]], "list.csv, line 4: '' is not"),
        (lambda t: [*t[:3], "\0ü", *t[4:]], "list.csv, line 4: "),
        (lambda t: [t[0], "0,7,0,3.0", *t[2:]], "line 2: image 0 has label 7 here and . in the d"),
        (lambda t: [t[0], t[1].replace(",0,4", ",3,4"), *t[2:]], "line 2: new_label 3 is no class"),
        (lambda t: [t[0], t[1].replace(",0,4", ",-2,4"), *t[2:]], "line 2: .* is not index"),
        (lambda t: [*t, "x" * 999], "list.csv is too large for a list of 6 images"),
    ],
)
def test_a_bad_list_is_named(damage, expected, faces, tmp_path):
    path = write(tmp_path / "list.csv", damage(lines(faces, [0, 1, 2, 0, 1, 2])))
    with pytest.raises(ValueError, match=expected) as error:
        cleaned.relabel(faces, path)
    assert "\n" not in str(error.value)


def test_a_list_that_keeps_nothing_or_is_not_there(faces, tmp_path):
    path = write(tmp_path / "list.csv", lines(faces, [-1] * 6))
    with pytest.raises(ValueError, match=r"list.csv leaves out every image"):
        cleaned.relabel(faces, path)
    for nothing in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no cleaned list at .*marginface.clean RUN"):
            cleaned.relabel(faces, nothing)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Twelve people × 4 images of noise, one image broken; what trains on them for a moment."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for person in range(12):
        folder = root / f"person{person:02d}"
        folder.mkdir()
        for image in range(4):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(
                folder / f"{image}.png"
            )
    (root / "person03" / "1.png").write_bytes(b"broken")
    return [
        f"--config=experiments/subcenter_arcface.py:data=folder,root={root},model=sphereface4,dim=8",
        "--config.model.kw.width=0.0625",
        "--config.data.kw.image_size=16",
        "--config.data.kw.unreadable=skip",
        "--config.data.kw.test_identities=4",
        "--config.data.kw.test_pairs=8",
        "--config.data.kw.folds=2",
        "--config.batch_size=8",
        "--config.evaluate.batch_size=8",
        "--config.steps=2",
    ]


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """The smallest run with sub-centers that is complete."""
    workdir = tmp_path_factory.mktemp("runs") / "subcenters"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main.run([*flags, f"--workdir={workdir}"]) == 0
    return workdir


def config_of(flags):
    options, overrides = main.parse(flags)
    config = configs.load(options.config)
    configs.override(config, configs.from_text(config, overrides))
    return config


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def message(arguments, capsys, monkeypatch):
    """The line on which the command ends."""
    monkeypatch.setattr("sys.argv", ["clean", *map(str, arguments)])
    monkeypatch.delenv("MARGINFACE_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end:
        clean.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("marginface: ")
    return line


def test_from_a_run_to_a_training_set_without_wrong_labels(
    trained, flags, tmp_path, capsys, monkeypatch
):
    opened = opener.load(trained)
    embedded = opened.embed(opened.faces)
    monkeypatch.setattr(opener, "load", lambda folder: opened)  # once is enough
    monkeypatch.setattr(opener.Trained, "embed", lambda self, data: embedded)
    clean.run([str(trained), "--max_angle=80"])
    rows = read(trained / "cleaned.csv")
    labels = build.load_data(config_of(flags))[0].labels()
    assert [int(row["index"]) for row in rows] == list(range(32))
    assert [int(row["label"]) for row in rows] == labels.tolist()
    new = np.array([int(row["new_label"]) for row in rows])
    angles = np.array([float(row["angle"]) for row in rows])
    np.testing.assert_array_equal(new == labels, angles <= 80)
    (broken,) = np.flatnonzero(np.isnan(angles))  # the next image stood in for it
    assert new[broken] == -1
    counts = [(new == labels).sum(), ((new != labels) & (new >= 0)).sum(), (new < 0).sum()]
    assert all(counts)
    expected = "kept {}, relabelled {}, dropped {} of 32 images".format(*counts)
    assert expected in capsys.readouterr().out

    config = config_of([*flags, f"--config.data.cleaned={trained / 'cleaned.csv'}"])
    faces, tests = build.load_data(config)
    assert len(faces.source) == (new >= 0).sum()
    assert faces.num_classes == 8
    np.testing.assert_array_equal(faces.labels(), new[new >= 0])
    assert [faces.source[i]["label"] for i in range(len(faces.source))] == faces.labels().tolist()
    assert "held_out" in tests

    out = tmp_path / "dropped.csv"
    clean.run([str(trained), "--max_angle=80", "--no_relabel", f"--out={out}"])
    dropped = np.array([int(row["new_label"]) for row in read(out)])
    np.testing.assert_array_equal(dropped, np.where(new == labels, labels, -1))


def changed(run, folder, **changes):
    """A copy of a run's files, without checkpoints, with another config."""
    config = json.loads((run / "config.json").read_text())
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text("{}")
    return folder


def test_a_run_that_does_not_fit_is_named(trained, tmp_path, capsys, monkeypatch):
    def say(*arguments):
        return message(arguments, capsys, monkeypatch)

    assert "/nowhere has no config.json" in say("/nowhere")
    assert "--max_angle=200.0: give degrees from 0 to 180" in say(trained, "--max_angle=200")
    assert "--out=/nowhere/list.csv: give a file" in say(trained, "--out=/nowhere/list.csv")
    assert "unrecognized arguments: --max" in say(trained, "--max=3")
    plain = changed(trained, tmp_path / "plain", loss__similarity="cosine")
    assert "plain has no sub-centers" in say(plain)
    assert "experiments/subcenter_arcface.py" in say(plain)
    again = changed(trained, tmp_path / "again", data__cleaned="a.csv")
    assert "again was trained on a.csv" in say(again)
    (again / "config.json").write_text("[]")
    assert "again/config.json is no config" in say(again)
    (again / "config.json").write_text("{")
    assert "again/config.json is no config" in say(again)
    lost = changed(trained, tmp_path / "lost")
    assert "lost has no checkpoint" in say(lost)
    (lost / "summary.json").unlink()
    assert "lost has no summary.json: give the folder of a run that is complete" in say(lost)
    other = changed(trained, tmp_path / "other")
    (other / "checkpoints").symlink_to(trained / "checkpoints")
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    assert "other: the data set is not the one this run began with" in say(other)
