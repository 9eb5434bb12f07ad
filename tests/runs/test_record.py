"""One run while it trains: what is written when, what a checkpoint keeps, what ends a run."""

import contextlib
import json
import types

import jax.numpy as jnp
import pytest
from absl import logging
from ml_collections import ConfigDict

from marginface.evaluators.common import NotFiniteError
from marginface.runs import folder as run_folder
from marginface.runs import record
from marginface.runs.files import read_lines
from marginface.runs.record import DivergedError, Record


@pytest.fixture(autouse=True)
def seconds(monkeypatch):
    """The clock: a list whose last number is now."""
    now = [100.0]
    monkeypatch.setattr(record, "time", types.SimpleNamespace(monotonic=lambda: now[-1]))
    return now


@pytest.fixture
def begin(tmp_path, request):
    """Opens the run folder; a second call continues as another process would."""

    def opened(data="photos", allow_changed_data=False, together=0):
        run = Record(
            tmp_path / "run",
            CONFIG,
            fingerprint=data * 12,
            total_steps=10,
            best_metric="lfw/accuracy",
            started=100.0,
        )
        request.addfinalizer(lambda: run_folder.release(run.workdir))
        state = run.restore(LIKE, allow_changed_data=allow_changed_data)
        run.together = together
        run.begin()
        request.addfinalizer(run.close)
        return run, state

    return opened


CONFIG = ConfigDict({"batch_size": 8, "log_every": 3, "wandb": {"use": False}}).lock()
LIKE = {"w": jnp.zeros(2)}


def lines(run):
    return read_lines(run.workdir / "metrics.jsonl")


def test_a_checkpoint_keeps_all_that_the_next_process_needs(begin, seconds):
    run, state = begin()
    assert (state, run.fresh, run.step) == (None, True, 0)
    for step in range(1, 6):
        run.add(step, {"loss/total": jnp.float32(step), "data/unreadable": jnp.int32(step == 2)})
    seconds.append(107.0)
    run.save(5, {"w": jnp.ones(2)}, {"lfw/accuracy": 0.5})
    run.close()
    run_folder.release(run.workdir)

    seconds.append(1000.0)
    run, state = begin()
    run.started = 1000.0
    assert state["w"].tolist() == [1, 1]
    assert (run.fresh, run.step) == (False, 5)
    run.add(6, {"loss/total": jnp.float32(6), "data/unreadable": jnp.int32(0)})
    seconds.append(1001.0)
    run.settle()
    assert [(x["step"], x["loss/total"]) for x in lines(run)] == [(3, 2.0), (6, 5.0)]
    assert [x["data/unreadable"] for x in lines(run)] == [1, 1]
    assert run.seconds == 8.0


def test_figures_of_the_newest_steps_are_not_waited_for(begin):
    run, _ = begin()
    for step in range(1, 5):
        run.add(step, {"loss/total": 1.0})
        assert [x["step"] for x in lines(run)] == []
    run.add(5, {"loss/total": 1.0})
    assert [x["step"] for x in lines(run)] == [3]
    run.add(10, {"loss/total": 1.0})  # the last is logged, whatever log_every is
    run.settle()
    assert [x["step"] for x in lines(run)] == [3, 10]


def test_a_run_that_shares_its_program_has_a_share_of_the_time(begin, seconds):
    run, _ = begin(together=4)
    run.log(3, {"loss/total": 1.0})
    seconds.append(108.0)
    assert run.seconds == 2.0
    assert [x["time/together"] for x in lines(run)] == [4.0]


@pytest.mark.parametrize("saved", [(), (2, 4)])
def test_a_divergence_names_the_step_the_figure_and_the_last_good_checkpoint(begin, saved):
    run, _ = begin()
    for step in saved:
        run.save(step, LIKE)
    run.add(5, {"loss/total": float("nan")})
    last = f"the last good checkpoint in {run.workdir} is that of step 4"
    if not saved:
        last = f"no checkpoint was saved in {run.workdir} before"
    with pytest.raises(DivergedError) as end:
        run.save(5, LIKE)  # what is not finite is never saved
    message = f"step 5: loss/total not finite; {last}; lower the learning rate or the margin"
    assert str(end.value) == message
    assert {p.name for p in run.workdir.glob("checkpoints/*")} == set(map(str, saved))


def test_embeddings_that_are_not_finite_are_a_divergence(begin):
    run, _ = begin()

    def measure(state):
        if state == "broken":
            raise NotFiniteError("the embedding of image 3 of 9 is not finite")
        return {"lfw/accuracy": 0.5}

    run.add(3, {"loss/total": 1.0})
    assert run.evaluate(3, measure, "good") == {"lfw/accuracy": 0.5}
    assert [x["step"] for x in lines(run)] == [3]  # all steps are logged before
    with pytest.raises(DivergedError, match=r"step 6: the embedding of image 3 of 9 is not finite"):
        run.evaluate(6, measure, "broken")


def test_another_data_set_is_refused_and_the_folder_left_as_it_is(begin):
    run, _ = begin()
    run.write(1, {"lfw/accuracy": 0.5})
    run.save(1, LIKE)
    run.close()
    run_folder.release(run.workdir)
    with pytest.raises(ValueError, match=r"one this run began with \(fingerprint .*restore the da"):
        begin("others")
    assert len(read_lines(run.workdir / "metrics.jsonl")) == 1
    run_folder.release(run.workdir)
    run, state = begin("others", allow_changed_data=True)
    assert (run.step, state["w"].tolist()) == (1, [0, 0])


def test_a_collapse_is_told(begin, monkeypatch):
    told = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: told.append(text % values))
    run, _ = begin()
    for step, collapsed in ((1, 1.0), (2, 1.0), (3, 0.0), (4, 1.0), (5, 1.0), (6, 1.0)):
        run.log(step, {"loss/total": 1.0, "train/collapsed": collapsed})
    (line,) = told
    assert line.startswith("step 6: collapse: ")


def test_what_is_being_written_is_waited_for_and_saving_goes_on_after_it(begin):
    run, _ = begin()
    for step in (1, 2):
        run.save(step, LIKE)
        run.wait()
        manifest = json.loads(
            (run.workdir / "checkpoints" / str(step) / "manifest.json").read_text()
        )
        assert manifest["meta"]["step"] == step
    with contextlib.closing(run):
        run.save(3, LIKE)
    assert (run.workdir / "checkpoints" / "3" / "manifest.json").exists()


def test_only_the_first_process_writes(begin, monkeypatch, tmp_path):
    monkeypatch.setattr(record.jax, "process_index", lambda: 1)
    run = Record(tmp_path / "run", CONFIG, fingerprint="", total_steps=10, started=100.0)
    run.begin()
    run.log(3, {"loss/total": 1.0})
    run.close()
    assert not (tmp_path / "run").exists()
