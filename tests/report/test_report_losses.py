"""The pictures of the losses: curves have the papers' values, every loss is described and drawn."""

import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marginface.report import __main__ as command
from marginface.report import loss_pictures as losses

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(
    p.stem for p in (ROOT / "experiments").glob("*.py") if p.stem not in ("__init__", "common")
)
RADIANS = np.radians(losses.DEGREES)


@pytest.fixture
def faces():
    labels = np.tile(np.arange(10), 2).astype(np.int32)
    images = np.random.default_rng(0).uniform(-1, 1, (20, 16, 16, 3)).astype(np.float32)
    return losses.Faces(images, labels)


# The page


def test_every_experiment_is_described_and_pictures_know_no_others():
    page = (ROOT / "docs" / "losses.md").read_text()
    described = re.findall(r"^### .*\(experiments/(\w+)\.py\)", page, re.MULTILINE)
    assert sorted(described) == EXPERIMENTS
    shown = list(itertools.chain(*losses.FAMILIES.values()))
    assert len(shown) == len(set(shown))
    assert set(shown) <= set(EXPERIMENTS)


def test_the_page_s_pictures_exist_and_are_small():
    folder = ROOT / "docs"
    page = (folder / "losses.md").read_text()
    pictures = re.findall(r"!\[.+\]\((\S+)\)", page)
    drawn = [*losses.NAMES, "separability"]
    assert sorted(pictures) == sorted(f"figures/{name}.png" for name in drawn)
    assert sum((folder / path).stat().st_size for path in pictures) < 1.5e6
    assert set(re.findall(r"\((figures/[^)]+)\)", page)) == set(pictures)
    assert "python -m marginface.report losses --seed 0" in page


# Measured curves


def test_target_logits_are_those_of_the_papers():
    exact, slope = losses.target_logit(losses.probe("arcface"))
    shifted = np.minimum(RADIANS + 0.5, np.pi)
    np.testing.assert_allclose(exact, np.cos(shifted), atol=2e-6)
    np.testing.assert_allclose(slope, -np.sin(shifted), atol=1e-3)
    detached, slope = losses.target_logit(losses.probe("arcface", detach=True))
    np.testing.assert_allclose(detached, exact, atol=2e-6)
    np.testing.assert_allclose(slope, -np.sin(RADIANS), atol=1e-3)
    norm, _ = losses.target_logit(losses.probe("magface"), length=60.0)
    np.testing.assert_allclose(norm, np.cos(np.minimum(RADIANS + 0.625, np.pi)), atol=2e-6)


def test_a_negative_s_logit_and_the_boundary():
    loss = losses.probe("mv_softmax")
    cosine = np.cos(RADIANS)
    raised = np.where(cosine > np.cos(np.radians(60)) - 0.35, 1.12 * cosine + 0.12, cosine)
    found = losses.negative_logit(loss, 60.0)
    np.testing.assert_allclose(found, raised, atol=2e-6)
    assert np.isnan(losses._broken(found)).sum() == 1
    degrees = np.linspace(0, 180, 7)
    first, second = np.meshgrid(np.cos(np.radians(degrees)), np.cos(np.radians(degrees)))
    ahead = losses.boundary(loss, degrees)
    np.testing.assert_array_equal(ahead > 0, first - 0.35 > second)


@pytest.mark.parametrize("name", losses.CURVES)
def test_curves_are_drawn(name, tmp_path, monkeypatch):
    def probe(name, **overrides):
        return lambda own, other, length=1.0: jax.nn.softplus(jnp.cos(other) - jnp.cos(own))

    monkeypatch.setattr(losses, "probe", probe)
    monkeypatch.setattr(losses, "of_points", lambda *_, **__: np.zeros(len(losses.DEGREES)))
    (path,) = losses.draw(tmp_path / "new", only=[name])
    assert path == tmp_path / "new" / f"{name}.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert len(list(path.parent.iterdir())) == 1  # no temporary file is left


# Embeddings


@pytest.mark.parametrize("name", ["arcface", "triplet"])
def test_embed(name, faces):
    found = losses.embed(name, 2, faces, steps=2)
    assert (found.points.shape, found.rows.shape) == ((20, 2), (10, 2))
    np.testing.assert_allclose(np.linalg.norm(found.rows, axis=1), 1, rtol=1e-5)
    cosines = found.rows @ found.rows.T - 2 * np.eye(10)
    assert found.sep == pytest.approx(cosines.max(axis=1).mean(), abs=1e-5)
    assert 0 < found.intra < 90


def test_embeddings_are_drawn(faces, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)

    def embed(name, dim, faces, *, steps, seed):
        assert (steps, seed) == (300, 3)
        rows = losses._unit(rng.normal(size=(10, dim)))
        return losses.Embedded(rng.normal(size=(20, dim)), rows, 0.5, 9.0)

    monkeypatch.setattr(losses, "embed", embed)
    monkeypatch.setattr(losses, "render", lambda: faces)
    monkeypatch.setattr(losses, "FAMILIES", {"embeddings_pairs": ("softmax", "triplet")})
    command.run(["losses", "--out", str(tmp_path), "--only", "embeddings_pairs", "--seed", "3"])
    assert [path.name for path in tmp_path.iterdir()] == ["embeddings_pairs.png"]


def test_mistakes_end_in_one_line(monkeypatch, capsys):
    for words, message in ((["losses", "--only", "x"], "invalid choice: 'x'"), (["los"], "'los'")):
        monkeypatch.setattr("sys.argv", ["marginface.report", *words])
        with pytest.raises(SystemExit, match="2"):
            command.main()
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_separability_of_two_runs_is_drawn(tmp_path):
    for name, mean in (("plain", 0.5), ("regular", 0.3)):
        (tmp_path / name).mkdir()
        values = np.random.default_rng(0).normal(mean, 0.05, 200)
        np.save(tmp_path / name / "separability.npy", values)
    out = tmp_path / "both.png"
    command.run(
        ["separability", str(tmp_path / "plain"), str(tmp_path / "regular"), f"--out={out}"]
    )
    assert out.stat().st_size > 5000
    with pytest.raises(ValueError, match=r"has no separability.npy: give run folders"):
        command.run(["separability", str(tmp_path)])
    np.save(tmp_path / "separability.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match="not one float a class"):
        command.run(["separability", str(tmp_path)])
