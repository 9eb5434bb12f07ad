"""A finished run is opened as it was trained; what is no finished run is named."""

import json
import shutil

import jax
import numpy as np
import pytest
from commands import SMALL

from marginface import build, main, sharding
from marginface.report.run import plots
from marginface.runs import trained
from marginface.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """The smallest complete run."""
    workdir = tmp_path_factory.mktemp("runs") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        patch.setattr(plots, "draw", lambda *_, **__: [])
        flags = (*SMALL, "--config.steps=2", "--config.evaluate.every=0")
        assert main.run([*flags, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def run(folder):
    return trained.load(folder)


def test_it_measures_what_the_run_measured(run, folder):
    summary = json.loads((folder / "summary.json").read_text())
    found = build.make_evaluators(run.config, run.faces, run.test_sets, run.steps, run.mesh)
    measured = found.run(run.state)
    assert "synthetic/accuracy" in measured
    assert {name: summary[name] for name in measured} == measured
    assert (run.folder, run.step, run.config.steps) == (folder, 2, 2)


def test_it_opens_on_other_devices(run, folder):
    other = trained.load(folder, mesh=sharding.make_mesh(1))
    assert (run.mesh.size, other.mesh.size) == (8, 1)
    jax.tree.map(np.testing.assert_array_equal, other.state, run.state)


def test_embeddings_stand_in_the_order_of_the_data(run):
    for data in (run.faces, run.test_sets["synthetic"]):
        embeddings, readable = run.embed(data)
        assert embeddings.shape == (len(data.source), 8)
        assert readable.all()
        chosen = [3, 17, 20, 9, 0, 5, 11, 30]
        records = [data.decode(data.source[i]) for i in chosen]
        batch = {k: np.stack([r[k] for r in records]) for k in records[0]}
        images = data.to_images(batch)
        alone = run.steps.embed(run.state, jax.device_put(images))
        np.testing.assert_allclose(
            embeddings[chosen], np.asarray(alone["embedding"]), rtol=1e-4, atol=1e-5
        )


def test_what_is_no_finished_run_is_named(folder, tmp_path):
    def says(message):
        with pytest.raises(ValueError, match=message) as error:
            trained.load(copy)
        assert "\n" not in str(error.value)

    copy = tmp_path / "copy"
    says(r"copy has no config\.json: give the folder of a run that is complete")
    shutil.copytree(folder, copy)
    text = (copy / "config.json").read_text()
    for damaged in ("{", "[]", "{}", '{"data": 1, "model": 2, "loss": 3}', '{"loss": {"name": 1}}'):
        (copy / "config.json").write_text(damaged)
        says(r"copy/config\.json is no config")
    (copy / "config.json").write_text(text.replace('"label_noise": 0.0', '"label_noise": 0.25'))
    says(r"copy: the data set is not the one this run began with .*: restore the data$")
    (copy / "config.json").write_text(text)
    (copy / "checkpoints").rename(tmp_path / "checkpoints")
    says(r"copy has no checkpoint: give the folder of a run that is complete")
    (copy / "summary.json").unlink()
    says(r"copy has no summary\.json: give the folder of a run that is complete")


def test_nothing_in_the_folder_is_changed(folder):
    def files():
        return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}

    before = files()
    opened = trained.load(folder)
    opened.embed(opened.test_sets["synthetic"])
    assert files() == before
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.steps()[-1] == opened.step
