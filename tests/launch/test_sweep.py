"""python -m launch.sweep: what it checks, prints, skips, retries; units as processes."""

import json
import sys
import time

import pytest
import tiny_sweep
from commands import environment

from marginface.launch import sweep, units
from marginface.launch.engines import local
from marginface.launch.units import Unit
from marginface.runs import folder as run_folder


@pytest.fixture
def experiment(tmp_path):
    return tiny_sweep.write(tmp_path)


def arguments(experiment, tmp_path, *more):
    return ["--config", experiment, "--runs", str(tmp_path / "runs"), *more]


def finish(folder, accuracy=0.9):
    """What a complete run leaves, as far as a sweep looks at it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps({"synthetic/accuracy": accuracy}))


@pytest.fixture
def scripted(monkeypatch):
    """Units whose command is a script: name → Python text, or one text for all."""

    def use(scripts):
        def command(self, python="python"):
            text = scripts if isinstance(scripts, str) else scripts.get(self.name, "")
            return [
                sys.executable,
                "-c",
                f"import pathlib; folder = pathlib.Path({str(self.folder)!r})\n{text}",
            ]

        monkeypatch.setattr(Unit, "command", command)

    return use


DONE = """
(folder / "summary.json").write_text("{}".replace("{}", '{"a/accuracy": 0.9}'))
with (folder / "times").open("a") as f: f.write("x")
"""


def test_a_dry_run_prints_the_commands_and_writes_nothing(experiment, tmp_path, capsys):
    assert sweep.run(arguments(experiment, tmp_path, "--dry_run", "--seeds", "2")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("python -m marginface.main")]) == 8
    assert "--config.loss.margin_kw.m=0.3 --config.regularizers.exclusive.weight=1.0" in lines[-1]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--backend", "slrum"], "invalid choice"),
        (["--jbos", "2"], "did you mean '--jobs'"),
        (["--seeds", "0"], "--seeds 0: give 1 or more"),
        (["--jobs", "0"], "--jobs 0"),
        (["--width", "-1", "--backend", "vmap"], "--width -1"),
        (["--config.loss.margn=1"], "did you mean 'loss.margin'"),
        (["--filter", "mm=1"], "fits none"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_starts(
    experiment, tmp_path, more, message, capsys, monkeypatch
):
    monkeypatch.setattr("sys.argv", ["sweep", *arguments(experiment, tmp_path, *more)])
    with pytest.raises(SystemExit) as left:
        sweep.main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.glob("runs/*/*/config.json"))


def test_a_typo_in_a_sweep_stops_before_the_first_unit(tmp_path, scripted):
    experiment = tiny_sweep.write(tmp_path)
    path = tmp_path / "tiny.py"
    path.write_text(path.read_text().replace('"loss.margin_kw.m": m', '"loss.margin_kw.mm": m'))
    scripted(DONE)
    with pytest.raises(
        ValueError, match=r"no key 'loss.margin_kw.mm'; did you mean 'loss.margin_kw.m'"
    ):
        sweep.run(arguments(experiment, tmp_path))
    assert not (tmp_path / "runs").exists()


def test_finished_units_are_skipped_and_failed_ones_stop_nobody(
    experiment, tmp_path, scripted, capsys
):
    names = [unit.name for unit in units.expand(experiment, root=tmp_path / "runs")]
    finish(tmp_path / "runs/tiny" / names[0])
    broken = 'print("marginface: no such data"); raise SystemExit(2)'
    nan = """
(folder / "stopped.json").write_text('{"code": 3, "message": "step 4: loss/total not finite"}')
raise SystemExit(3)
"""
    scripted({names[1]: broken, names[2]: nan, names[3]: DONE})
    assert sweep.run(arguments(experiment, tmp_path, "--jobs", "2")) == sweep.SOME_FAILED
    out = capsys.readouterr().out
    assert "4 units, 1 of them ended before" in out
    assert "failed: " in out
    assert "marginface: no such data" in out
    assert "diverged: " in out
    assert "step 4: loss/total not finite" in out
    kinds = [run_folder.state(tmp_path / "runs/tiny" / name).kind for name in names]
    assert kinds == ["done", "failed", "diverged", "done"]
    # Again: what failed is tried again, what diverged would only diverge again.
    scripted(DONE)
    assert sweep.run(arguments(experiment, tmp_path)) == sweep.SOME_FAILED
    assert (tmp_path / "runs/tiny" / names[3] / "times").read_text() == "x"
    assert run_folder.state(tmp_path / "runs/tiny" / names[1]).kind == "done"
    assert not (tmp_path / "runs/tiny" / names[2] / "times").exists()


def test_a_crash_is_retried_a_bounded_number_of_times(experiment, tmp_path, scripted):
    crash = """
with (folder / "times").open("a") as f: f.write("x")
import os, signal
if len((folder / "times").read_text()) < {}: os.kill(os.getpid(), signal.SIGKILL)
"""
    (unit,) = units.expand(experiment, root=tmp_path / "runs", filters=["m=0.3", "weight=1"])
    scripted(crash.format(3) + DONE)
    local.run([unit], retries=2)
    assert run_folder.state(unit.folder).kind == "done"
    (other,) = units.expand(experiment, root=tmp_path / "runs", filters=["m=0.3", "weight=0"])
    scripted(crash.format(9) + DONE)
    local.run([other], retries=2)
    assert (other.folder / "times").read_text() == "xxx"
    assert run_folder.state(other.folder).kind == "failed"


@pytest.mark.parametrize(("jobs", "expected"), [(1, "None"), (2, "false")])
def test_units_side_by_side_leave_the_card_to_each_other(
    jobs, expected, experiment, tmp_path, scripted, monkeypatch
):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    scripted(
        DONE
        + """
import os
(folder / "card").write_text(str(os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE")))
"""
    )
    found = units.expand(experiment, root=tmp_path / "runs")[:2]
    local.run(found, jobs=jobs)
    assert {(unit.folder / "card").read_text() for unit in found} == {expected}


def test_a_card_that_is_not_there_stops_a_sweep_before_its_units(
    experiment, tmp_path, scripted, monkeypatch
):
    scripted(DONE)
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    with pytest.raises(ValueError, match=r"JAX_PLATFORMS=nonsense: .*known backends"):
        sweep.run(arguments(experiment, tmp_path))
    assert not list(tmp_path.rglob("times"))


def test_an_interrupt_lets_the_running_units_save(experiment, tmp_path, scripted, monkeypatch):
    scripted("""
import signal, sys, time
def leave(*_):
    (folder / "saved").write_text("yes")
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
(folder / "begun").write_text("yes")
time.sleep(60)
""")
    found = units.expand(experiment, root=tmp_path / "runs")

    class Interrupted(local.Board):
        def show(self):
            if (found[0].folder / "begun").exists():
                raise KeyboardInterrupt

    monkeypatch.setattr(local, "Board", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        local.run(found)
    assert (found[0].folder / "saved").exists()
    assert not found[1].folder.exists()


def test_a_folder_with_another_config_is_no_finished_unit(experiment, tmp_path, scripted):
    from marginface import config as configs

    unit = units.expand(experiment, root=tmp_path / "runs")[0]
    finish(unit.folder)
    text = configs.to_json(unit.config)
    (unit.folder / "config.json").write_text(text)
    sweep.check_folders([unit])
    (unit.folder / "config.json").write_text(text.replace('"batch_size": 16', '"batch_size": 8'))
    scripted(DONE)
    with pytest.raises(ValueError, match=r"another config .*batch_size was 8, is 16"):
        sweep.run(arguments(experiment, tmp_path))


def test_two_units_of_one_folder_are_refused(experiment, tmp_path):
    words = ["--config", experiment, experiment, "--runs", str(tmp_path / "runs")]
    with pytest.raises(ValueError, match="would hold 2 units"):
        sweep.run(words)


def test_a_sweep_that_adds_nothing_says_so(tmp_path):
    experiment = tiny_sweep.write(tmp_path, margins=())
    with pytest.raises(ValueError, match="adds nothing"):
        sweep.run(arguments(experiment, tmp_path))


def test_units_do_not_outlive_a_sweep_that_breaks(experiment, tmp_path, scripted, monkeypatch):
    scripted("""
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").write_text("yes"), sys.exit(75)))
(folder / "begun").write_text("yes")
time.sleep(60)
""")
    found = units.expand(experiment, root=tmp_path / "runs")[:2]
    found[1].folder.parent.mkdir(parents=True)
    found[1].folder.write_text("a file where a folder must go")

    def start(unit, *rest, start=local._start):
        while unit is found[1] and not (found[0].folder / "begun").exists():
            time.sleep(0.05)
        return start(unit, *rest)

    monkeypatch.setattr(local, "_start", start)
    with pytest.raises(OSError, match="exists"):
        local.run(found, jobs=2)
    assert (found[0].folder / "saved").exists()


def test_a_folder_stands_for_its_experiments(tmp_path):
    first = tiny_sweep.write(tmp_path, name="one")
    second = tiny_sweep.write(tmp_path, name="two")
    (tmp_path / "common.py").write_text("x = 1\n")
    found = sweep.experiments([str(tmp_path), f"{first}:dim=4"], "data=small")
    assert found == [f"{first}:data=small", f"{second}:data=small", f"{first}:dim=4"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no file in it has a get_config"):
        sweep.experiments([str(tmp_path / "empty")])


def test_seeds_come_in_turn(experiment, tmp_path, scripted, capsys):
    scripted(DONE)
    assert sweep.run(arguments(experiment, tmp_path, "--seeds", "2", "--filter", "weight=0")) == 0
    order = [
        line.split(":")[0] for line in capsys.readouterr().out.splitlines() if ": done" in line
    ]
    assert [name.rsplit("=", 1)[1] for name in order] == ["0", "0", "1", "1"]


def test_a_real_unit_runs_as_the_plain_command(experiment, tmp_path, monkeypatch, cache):
    for name, value in environment(cache).items():
        monkeypatch.setenv(name, value)
    options = ["--filter", "m=0.3", "weight=1", "--config.steps=3"]
    assert sweep.run(arguments(experiment, tmp_path, *options)) == 0
    (folder,) = (tmp_path / "runs").glob("tiny-*/m=*")
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 <= summary["synthetic/accuracy"] <= 1
    origin = json.loads((folder / "origin.json").read_text())
    assert origin["experiment"] == "tiny"
    assert origin["overrides"]["steps"] == 3
