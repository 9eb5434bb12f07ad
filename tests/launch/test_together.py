"""A sweep as one program gives what its units give alone."""

import json

import jax
import numpy as np
import pytest
import tiny_sweep

from marginface import build, sharding, train
from marginface.evaluators.common import NotFiniteError
from marginface.launch import units
from marginface.launch.engines import together
from marginface.report.run import plots
from marginface.runs import folder as run_folder
from marginface.runs import metrics
from marginface.training.checkpoint import Checkpoints
from marginface.training.preemption import Preemption


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "draw", lambda *_, **__: [])


@pytest.fixture(autouse=True)
def _two_devices(monkeypatch):
    """So that a device holds several units, and there are several devices."""
    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda *_: two)


@pytest.fixture(autouse=True, scope="module")
def _compiled_once(tmp_path_factory):
    """The tests run the same programs again and again: compile each once."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def expand(folder, root="together", seeds=2, **arguments):
    path = tiny_sweep.write(folder, **arguments)
    return units.expand(path, root=folder / root, seeds=seeds)


def saved(unit):
    """The arrays of the last checkpoint."""
    config, mesh = unit.config, sharding.make_mesh(1)
    faces, _ = build.load_data(config)
    like = build.make_steps(config, faces, mesh, config.steps).like
    with Checkpoints(unit.folder / "checkpoints") as checkpoints:
        step, state, _ = checkpoints.restore(like)
    return step, jax.tree.map(np.asarray, state)


def lines(unit):
    return [
        {k: v for k, v in line.items() if not k.startswith("time/")}
        for line in metrics.read_lines(unit.folder / "metrics.jsonl")
    ]


def assert_equal(one, other, rtol):
    assert [list(line) for line in lines(one)] == [list(line) for line in lines(other)]
    for a, b in zip(lines(one), lines(other), strict=True):
        for key in (k for k in a if k.startswith(("loss/", "train/target", "step"))):
            assert a[key] == pytest.approx(b[key], rel=rtol, abs=rtol), (a["step"], key)
    (step, a), (other_step, b) = saved(one), saved(other)
    assert step == other_step
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol), a, b)


def test_fifty_steps_together_are_fifty_steps_alone(tmp_path, monkeypatch):
    """Two seeds, two margins, two weights, four units on each of two devices; one program."""
    many = expand(tmp_path, steps=50)
    compilations = []
    compile_step = together._Program._step
    monkeypatch.setattr(
        together._Program,
        "_step",
        lambda self, width: compilations.append(width) or compile_step(self, width),
    )
    together.run(many)
    assert compilations == [8]
    one_device = sharding.make_mesh(1)
    monkeypatch.setattr(train.sharding, "make_mesh", lambda *_: one_device)
    for unit in (many[3], many[4]):
        alone = unit._replace(folder=tmp_path / "alone" / unit.name)
        assert train.train(alone.config, alone.folder, origin=alone.origin())
        assert_equal(unit, alone, rtol=2e-3)
        a, b = (json.loads((u.folder / "summary.json").read_text()) for u in (unit, alone))
        assert a.keys() - b.keys() == {"time/together"}
        assert not b.keys() - a.keys()
        assert (unit.folder / "origin.json").exists()
        # The plain command finds a complete run: it reports, and trains no step.
        before = (unit.folder / "metrics.jsonl").read_text()
        assert train.train(unit.config, unit.folder)
        assert (unit.folder / "metrics.jsonl").read_text() == before
    losses = {unit.name: lines(unit)[-2]["loss/total"] for unit in many}
    assert len(set(losses.values())) == len(many)  # numbers and seeds do reach the program


def test_stopped_in_the_middle_it_ends_the_same(tmp_path, monkeypatch):
    together.run(expand(tmp_path, "whole", seeds=1, steps=12))
    many = expand(tmp_path, "stopped", seeds=1, steps=12)
    monkeypatch.setattr(Preemption, "requested", lambda self, step: step == 7)
    with pytest.raises(KeyboardInterrupt):
        together.run(many)
    assert {run_folder.state(unit.folder).kind for unit in many} == {"checkpointed"}
    monkeypatch.setattr(Preemption, "requested", lambda self, step: False)
    together.run(many)
    for unit, whole in zip(many, expand(tmp_path, "whole", seeds=1, steps=12), strict=True):
        assert run_folder.state(unit.folder).kind == "done"
        assert_equal(unit, whole, rtol=0)


def test_what_the_plain_command_began_goes_on_together(tmp_path, monkeypatch):
    many = expand(tmp_path, seeds=1, steps=12)
    one_device = sharding.make_mesh(1)
    monkeypatch.setattr(train.sharding, "make_mesh", lambda *_: one_device)
    monkeypatch.setattr(Preemption, "requested", lambda self, step: step == 5)
    assert not train.train(many[1].config, many[1].folder, origin=many[1].origin())
    monkeypatch.setattr(Preemption, "requested", lambda self, step: False)
    assert sorted(len(group) for group in together.groups(many)) == [1, 3]  # not equally far
    together.run(many)
    alone = many[1]._replace(folder=tmp_path / "alone")
    assert train.train(alone.config, alone.folder)
    assert_equal(many[1], alone, rtol=1e-3)
    assert {run_folder.state(unit.folder).kind for unit in many} == {"done"}


def test_a_damaged_checkpoint_does_not_move_the_others(tmp_path, monkeypatch):
    """The unit goes back to an earlier step, alone; nobody skips or repeats an update."""
    whole = expand(tmp_path, "whole", seeds=1, steps=12, checkpoint_every=3)
    together.run(whole)
    many = expand(tmp_path, "damaged", seeds=1, steps=12, checkpoint_every=3)
    monkeypatch.setattr(Preemption, "requested", lambda self, step: step == 7)
    with pytest.raises(KeyboardInterrupt):
        together.run(many)
    monkeypatch.setattr(Preemption, "requested", lambda self, step: False)
    for file in (many[0].folder / "checkpoints" / "7").rglob("*"):
        if file.is_file() and file.name != "manifest.json":
            file.write_bytes(file.read_bytes() + b"x")
    together.run(many)
    for unit, same in zip(many, whole, strict=True):
        assert run_folder.state(unit.folder).kind == "done"
        assert_equal(unit, same, rtol=1e-5)


def test_a_unit_that_cannot_be_saved_stops_nobody(tmp_path, monkeypatch):
    many = expand(tmp_path, seeds=1, steps=12)
    save = together._Run.save

    def full(self, *arguments):
        if self.unit is many[1]:
            raise OSError(28, "No space left on device")
        save(self, *arguments)

    monkeypatch.setattr(together._Run, "save", full)
    together.run(many)
    assert [run_folder.state(u.folder).kind for u in many] == ["done", "failed", "done", "done"]
    assert "No space left" in run_folder.state(many[1].folder).why
    monkeypatch.setattr(together._Run, "save", save)
    together.run([many[1]])
    assert run_folder.state(many[1].folder).kind == "done"


def test_more_units_than_fit_take_turns(tmp_path, monkeypatch):
    many = expand(tmp_path, "narrow", seeds=2, steps=12)
    need = []

    def free(device):
        need.append(device)
        return 0.0  # nothing fits: the least is one unit a device

    monkeypatch.setattr(together.devices, "free_memory", free)
    together.run(many)
    assert need
    assert {run_folder.state(unit.folder).kind for unit in many} == {"done"}
    # A turn that is half empty: repeats of the last unit fill it, and reach no folder.
    solo = many[5]._replace(folder=tmp_path / "solo" / many[5].name)
    together.run([solo], width=2)
    assert_equal(many[5], solo, rtol=1e-5)


def test_a_unit_that_diverges_stops_nobody(tmp_path):
    path = tiny_sweep.write(tmp_path, weights=(0.0, 1.0, 1e38), margins=(0.3,), steps=12)
    many = units.expand(path, root=tmp_path / "runs")
    together.run(many)
    kinds = [run_folder.state(unit.folder) for unit in many]
    assert [state.kind for state in kinds] == ["done", "done", "diverged"]
    assert "not finite; no checkpoint was saved in" in kinds[-1].why
    assert not (many[-1].folder / "summary.json").exists()


def test_a_unit_whose_embeddings_are_not_finite_diverges_and_stops_nobody(tmp_path, monkeypatch):
    many = expand(tmp_path, seeds=1, weights=(0.0,), margins=(0.2, 0.3), steps=12)
    whole, asked = build.Evaluators.run, []

    def run(self, state):
        asked.append(None)
        if len(asked) == 2:  # the first is the untrained network, of both
            raise NotFiniteError("the embedding of image 3 of 9 is not finite")
        return whole(self, state)

    monkeypatch.setattr(build.Evaluators, "run", run)
    together.run(many)
    first, second = (run_folder.state(unit.folder) for unit in many)
    assert (first.kind, second.kind) == ("diverged", "done")
    assert "step 12: the embedding of image 3 of 9 is not finite; " in first.why


def test_other_shapes_are_other_groups(tmp_path):
    (tmp_path / "a").mkdir()
    many = expand(tmp_path / "a")
    text = "def sweep(add, arg=None):\n"
    for point in (
        "'model.embedding_dim': 8, 'seed': 0",
        "'model.embedding_dim': 4, 'seed': 1",
        "'model.embedding_dim': 4, 'optimizer.learning_rate': 0.5",
        "'loss.sample_rate': 0.5",
        "'schedule.name': 'constant'",
    ):
        text += f"    add({{{point}}})\n"
    path = tiny_sweep.write(tmp_path)
    (tmp_path / "tiny.py").write_text(
        (tmp_path / "tiny.py").read_text().split("def sweep")[0] + text
    )
    other = units.expand(path, root=tmp_path / "runs")
    assert [len(group) for group in together.groups(many)] == [8]
    assert [len(group) for group in together.groups(other)] == [1, 2, 1, 1]


def test_losses_with_other_numbers_are_other_groups(tmp_path):
    names = ("arcface", "focal_arcface", "normface", "label_smoothing")
    many = [
        unit
        for name in names
        for unit in units.expand(f"experiments/{name}.py:data=small", root=tmp_path, grid=False)
    ]
    assert [len(group) for group in together.groups(many)] == [1, 1, 1, 1]


def test_a_group_whose_data_does_not_fit_says_so_and_the_others_go_on(tmp_path):
    good = expand(tmp_path, seeds=1, steps=12, weights=(0.0,))
    bad = units.expand(
        tiny_sweep.write(tmp_path, name="bad"),
        root=tmp_path / "together",
        changes={"data.kw.test_samples": "1"},
    )
    together.run([*bad, *good])
    assert {run_folder.state(unit.folder).kind for unit in bad} == {"failed"}
    assert "test_samples" in run_folder.state(bad[0].folder).why
    other = units.expand(
        tiny_sweep.write(tmp_path, name="bad"),
        root=tmp_path / "together",
        changes={"data.kw.image_size": "17"},
    )
    other = [one._replace(folder=unit.folder) for one, unit in zip(other, bad, strict=True)]
    together.run(other)  # another mistake in the same folders is told, too
    assert "image_size=17" in run_folder.state(bad[0].folder).why
    assert {run_folder.state(unit.folder).kind for unit in good} == {"done"}


def test_a_folder_with_another_config_is_left_alone(tmp_path):
    many = expand(tmp_path, seeds=1, steps=12, weights=(0.0,))
    many[0].folder.mkdir(parents=True)
    (many[0].folder / "config.json").write_text('{"loss": {"scale": 1.0}}')
    together.run(many)
    assert (many[0].folder / "config.json").read_text() == '{"loss": {"scale": 1.0}}'
    assert not (many[0].folder / "stopped.json").exists()
    assert run_folder.state(many[1].folder).kind == "done"
