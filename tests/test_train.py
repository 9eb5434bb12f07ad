"""Whole runs: killed and resumed, on other device counts, in two processes, on broken ground."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket

import commands
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from commands import SMALL, finish, interrupt, run, start

from marginface.report.study import rows
from marginface.runs import metrics


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    run(*SMALL, f"--workdir={workdir}", cache=cache)
    return workdir


@pytest.fixture(scope="module")
def on_photos(tmp_path_factory):
    """Flags of a run that compiles little: on several devices nothing is kept."""
    return commands.on_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def eight(tmp_path_factory, on_photos):
    """A run on eight devices that nobody disturbed."""
    workdir, kept = tmp_path_factory.mktemp("runs") / "eight", tmp_path_factory.mktemp("compiled")
    run(*on_photos, f"--workdir={workdir}", cache=kept, devices=8)
    assert not list(kept.iterdir())  # a program would hang when it came from there
    return workdir


def figures(workdir):
    """The lines of metrics.jsonl but for the time."""
    lines = metrics.read_lines(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def losses(workdir):
    return np.array([x["loss/total"] for x in figures(workdir) if "loss/total" in x])


def final_state(workdir):
    """The last checkpoint as arrays, by name, whatever devices and processes wrote it."""
    last = max((p for p in (workdir / "checkpoints").iterdir()), key=lambda p: int(p.name))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(last).item_metadata.tree
        like = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=here) for k, v in saved.items()}
        flat = checkpointer.restore(last, like)
    return {name: np.asarray(leaf) for name, leaf in flat.items()}


def assert_same_run(found, expected):
    assert figures(found) == figures(expected)
    a, b = final_state(found), final_state(expected)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def copy_before(source, target, step):
    """A run folder as a kill shortly after `step` leaves it."""
    shutil.copytree(source, target)
    for folder in (target / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_a_killed_run_equals_one_left_alone(times, whole, tmp_path, cache):
    moments = sorted(random.sample(range(4, 60, 4), times))
    workdir = tmp_path / "killed"
    for step in moments:
        code, *_ = interrupt(start(*SMALL, f"--workdir={workdir}", cache=cache), step)
        assert code == -signal.SIGKILL, f"killed after steps {moments}"
    run(*SMALL, f"--workdir={workdir}", cache=cache)
    assert_same_run(workdir, whole)
    row, expected = rows.gather([workdir])[0], rows.gather([whole])[0]
    differing = {key for key in row | expected if row.get(key) != expected.get(key)}
    assert all(key.startswith("time/") for key in differing), differing


def test_sigterm_saves_exits_75_and_the_same_command_goes_on(whole, tmp_path, cache):
    workdir = tmp_path / "preempted"
    process = start(*SMALL, f"--workdir={workdir}", cache=cache)
    code, *_ = interrupt(process, 12, signal.SIGTERM)
    assert code == 75
    assert any((workdir / "checkpoints").iterdir())
    run(*SMALL, f"--workdir={workdir}", cache=cache)
    assert_same_run(workdir, whole)


def saved_steps(workdir):
    return {int(m.parent.name) for m in (workdir / "checkpoints").glob("*/manifest.json")}


# The plain command; under nohup it would inherit that a hangup is ignored.
WITH_A_TERMINAL = """
import runpy, signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)
runpy.run_module("marginface.main", run_name="__main__")
"""


def test_a_lost_terminal_saves_as_well(tmp_path, cache):
    workdir = tmp_path / "run"
    process = start(*SMALL, f"--workdir={workdir}", cache=cache, code=WITH_A_TERMINAL)
    code, _, err = interrupt(process, 12, signal.SIGHUP)
    assert code == 75, err
    assert "Traceback" not in err
    assert max(saved_steps(workdir)) >= 12  # that of step 10 is a regular one


WORKERS_END_FIRST = """
import os, signal, sys
from marginface import main
from marginface.data import pipeline

whole, asked = pipeline.TrainIterator.__next__, []

def following(self):
    asked.append(None)
    if len(asked) == 14:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("a worker ended")
    return whole(self)

pipeline.TrainIterator.__next__ = following
sys.exit(main.run(sys.argv[1:]))
"""


def test_a_signal_that_ended_the_workers_first_saves_as_well(tmp_path, cache):
    """A signal to the whole process group, while we wait for the batch of step 14."""
    workdir = tmp_path / "run"
    process = start(*SMALL, f"--workdir={workdir}", cache=cache, code=WORKERS_END_FIRST)
    _, err = finish(process, code=75)
    assert "Traceback" not in err
    assert max(saved_steps(workdir)) == 13


def test_eight_devices_then_four(eight, on_photos, tmp_path, cache):
    four = tmp_path / "four"
    copy_before(eight, four, 40)
    (four / "summary.json").unlink()
    run(*on_photos, f"--workdir={four}", cache=cache, devices=4)
    np.testing.assert_allclose(losses(four), losses(eight), rtol=1e-5)
    assert json.loads((four / "summary.json").read_text())["device/count"] == 4


def test_two_processes_train_and_evaluate_as_one(eight, on_photos, tmp_path, cache):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workdir = tmp_path / "two"
    flags = [*on_photos, f"--workdir={workdir}", f"--coordinator=127.0.0.1:{port}"]
    both = [start(*flags, "--num_processes=2", f"--process_id={i}", cache=cache) for i in (0, 1)]
    for process in both:
        finish(process)
    one_process = tmp_path / "one"
    run(*on_photos, f"--workdir={one_process}", cache=cache, devices=2)
    assert_same_run(workdir, one_process)  # two devices either way: bit for bit
    np.testing.assert_allclose(losses(workdir), losses(eight), rtol=1e-4)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(whole, tmp_path, cache):
    workdir = tmp_path / "flipped"
    shutil.copytree(whole, workdir)
    newest = workdir / "checkpoints" / "60"
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    _, err = run(*SMALL, f"--workdir={workdir}", cache=cache)
    assert f"{newest} is not used" in err
    assert victim.name in err
    assert figures(workdir) == figures(whole)


def test_changed_data_is_refused_unless_told(whole, tmp_path, cache):
    workdir = tmp_path / "changed"
    copy_before(whole, workdir, 50)
    manifest = next((workdir / "checkpoints").glob("50/manifest.json"))
    assert "data" in json.loads(manifest.read_text())["meta"]
    config = workdir / "config.json"
    config.write_text(config.read_text().replace('"label_noise": 0.0', '"label_noise": 0.25'))
    noisy = [*SMALL, f"--workdir={workdir}", "--config.data.kw.label_noise=0.25"]
    _, err = run(*noisy, cache=cache, code=2)
    assert "the data set is not the one this run began with" in err
    run(*noisy, "--allow_changed_data", cache=cache)


def test_divergence_names_step_and_term_and_keeps_the_last_good_checkpoint(tmp_path, cache):
    workdir = tmp_path / "diverged"
    _, err = run(
        *SMALL,
        f"--workdir={workdir}",
        "--config.optimizer.learning_rate=1e30",
        cache=cache,
        code=3,
    )
    line = err.strip().splitlines()[-1]
    assert line.startswith("marginface: step ")
    assert "loss/margin_softmax" in line
    assert all("NaN" not in line for line in (workdir / "metrics.jsonl").read_text().splitlines())


def test_a_workdir_with_another_config_is_refused(whole, cache):
    before = sorted(p.stat().st_mtime_ns for p in whole.rglob("*"))
    _, err = run(*SMALL, f"--workdir={whole}", "--config.loss.scale=9.0", cache=cache, code=2)
    assert "loss.scale was 24.0, is 9.0" in err
    assert sorted(p.stat().st_mtime_ns for p in whole.rglob("*")) == before


def test_a_full_disk_stops_the_run_with_the_last_good_step_intact(tmp_path, cache):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or os.system(f"mount -t tmpfs -o size=16m tmpfs {disk} 2>/dev/null"):
        pytest.skip("mounting a small disk is not permitted here")
    try:
        workdir = disk / "run"
        process = start(*SMALL, f"--workdir={workdir}", cache=cache)
        for line in process.stdout:
            if line.startswith("step 24/"):
                break
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        _, err = finish(process, code=2)
        assert "No space left on device" in err or "no space left" in err
        assert err.strip().splitlines()[-1].startswith("marginface: ")
        assert "Traceback" not in err
        filler.unlink()
        run(*SMALL, f"--workdir={workdir}", cache=cache)
        assert figures(workdir)[-1]["step"] == 60
    finally:
        os.system(f"umount {disk}")


def test_the_run_folder_is_one_a_person_can_read(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert 0 <= summary["synthetic/accuracy"] <= 1
    for key in ("commit", "device/kind", "time/wall_s", "version/jax", "untrained/synthetic/auc"):
        assert key in summary, key
    page = (whole / "summary.md").read_text()
    for picture in ("loss", "learning", "synthetic_roc", "synthetic_scores", "synthetic_hardest"):
        assert f"plots/{picture}.png" in page
        assert (whole / "plots" / f"{picture}.png").stat().st_size > 1000
    steps = [line["step"] for line in figures(whole)]
    assert steps == sorted(steps)
    assert steps[0] == 0
    assert steps[-1] == 60


def test_the_comparison_notices_an_iterator_that_was_not_restored(whole, tmp_path, cache):
    """Negative control: the same resume, but the batches start again from the first."""
    workdir = tmp_path / "control"
    copy_before(whole, workdir, 50)
    broken = (
        "import sys; from marginface.data import pipeline; from marginface import main;"
        "pipeline.TrainIterator.set_state = lambda self, state: None;"
        "sys.exit(main.run(sys.argv[1:]))"
    )
    process = start(*SMALL, f"--workdir={workdir}", cache=cache, code=broken)
    finish(process)
    assert figures(workdir) != figures(whole)
