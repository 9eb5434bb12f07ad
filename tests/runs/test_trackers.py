"""wandb and TensorBoard behind the writer: what they hold, and that no run ever needs them."""

import json
import os
import struct
import sys

import pytest
from commands import SMALL, interrupt, run, start

from marginface.runs import folder as run_folder
from marginface.runs import metrics, trackers
from marginface.runs.trackers import Trackers, start_trackers


def config(*, wandb=False, tensorboard=False, mode="offline", **more):
    settings = {"use": wandb, "project": "test", "mode": mode, "group": "", "tags": ()}
    return {"wandb": settings | more, "tensorboard": tensorboard, "loss": {"scale": 24.0}}


def log(workdir, started, steps, *, resume_step=-1):
    """Writes {"loss/total": step + 0.5} for each step, as a run does."""
    writer = metrics.Writer(workdir, resume_step=resume_step, total_steps=9, trackers=started)
    for step in steps:
        writer.write(step, {"loss/total": step + 0.5})
    writer.sync()
    writer.close()


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# --- TensorBoard ---------------------------------------------------------------------------------


def events(folder):
    """All events in the order in which TensorBoard reads them; checks each record's length."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            found.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += length + 16
        assert at == len(content)
    return found


def shown(folder):
    """{(step, name): value}, what TensorBoard shows: a START purges its step and all after it."""
    values = {}
    for event in events(folder):
        if event.HasField("session_log"):
            assert event.session_log.status == event.session_log.START
            values = {key: v for key, v in values.items() if key[0] < event.step}
        for value in event.summary.value:
            values[event.step, value.tag] = value.simple_value
    return values


def test_tensorboard_holds_every_figure_under_its_own_name(tmp_path):
    started = start_trackers(config(tensorboard=True), tmp_path)
    started.write(3, {"loss/total": 0.1, "synthetic/tar@far=1e-3": 0.75, "x": float("nan")})
    started.close()
    found = shown(tmp_path / "tensorboard")
    assert found[3, "loss/total"] == pytest.approx(0.1)
    assert found[3, "synthetic/tar@far=1e-3"] == 0.75
    assert found[3, "x"] != found[3, "x"]
    assert events(tmp_path / "tensorboard")[0].file_version == "brain.Event:2"


def test_a_resumed_run_takes_back_what_a_crash_undid(tmp_path):
    log(tmp_path, start_trackers(config(tensorboard=True), tmp_path), range(1, 6))
    resumed = start_trackers(config(tensorboard=True), tmp_path, resume_step=3)
    log(tmp_path, resumed, [4], resume_step=3)
    found = shown(tmp_path / "tensorboard")
    assert found == {(step, "loss/total"): step + 0.5 for step in (1, 2, 3, 4)}
    log(tmp_path, start_trackers(config(tensorboard=True), tmp_path), [1])
    assert shown(tmp_path / "tensorboard") == {(1, "loss/total"): 1.5}, "begun anew: nothing stays"


def test_what_precedes_a_checkpoint_is_on_disk(tmp_path):
    started = start_trackers(config(tensorboard=True), tmp_path)
    writer = metrics.Writer(tmp_path, resume_step=-1, total_steps=9, trackers=started)
    writer.write(1, {"loss/total": 2.0})
    writer.sync()
    assert shown(tmp_path / "tensorboard") == {(1, "loss/total"): 2.0}
    writer.close()


# --- wandb ---------------------------------------------------------------------------------------


def test_runs_in_one_process_do_not_share_a_wandb_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    started = [start_trackers(config(wandb=True), tmp_path / "sweep" / name) for name in ("a", "b")]
    runs = [one._running["wandb"]._run for one in started]
    assert runs[0].id != runs[1].id
    for one in started:
        one.write(1, {"x": 1.0})
        one.close()


class FakeWandb:
    """Remembers how it was called."""

    def init(self, **arguments):
        self.arguments, self.logged = arguments, []
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.logged.append("end")


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.mark.parametrize(
    ("folder", "settings", "group"),
    [
        ("arcface-data=small/m=0.3,seed=0", {}, "arcface-data=small"),
        ("arcface/search/trial=007", {}, "arcface-search"),
        ("arcface/m=0.3", {"group": "mine", "tags": ("a", "b")}, "mine"),
    ],
)
def test_a_wandb_run_has_its_folder_s_name_and_its_sweep_s_group(
    tmp_path, wandb, folder, settings, group
):
    workdir = tmp_path / folder
    workdir.mkdir(parents=True)
    log(workdir, start_trackers(config(wandb=True, **settings), workdir), [1, 2])
    assert wandb.arguments["group"] == group
    assert wandb.arguments["name"] == workdir.name
    assert wandb.arguments["tags"] == list(settings.get("tags", ()))
    assert wandb.arguments["config"]["loss"] == {"scale": 24.0}
    assert wandb.logged == [(1, {"loss/total": 1.5}), (2, {"loss/total": 2.5}), "end"]


def test_a_wandb_run_goes_on_with_its_run_folder_and_is_no_other_s(tmp_path, wandb):
    ids = []
    for name in ("a/seed=0", "b/seed=0", "a/seed=0"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        start_trackers(config(wandb=True), tmp_path / name)
        ids.append(wandb.arguments["id"])
        assert wandb.arguments["resume"] == "allow"
    assert ids[0] == ids[2] != ids[1]


def test_settings_of_an_earlier_version_do(tmp_path, wandb):
    old = {"wandb": {"use": True, "project": "p", "mode": "offline"}}
    start_trackers(old, tmp_path)
    assert wandb.arguments["project"] == "p"
    start_trackers({"wandb": {"use": False}}, tmp_path)


def test_wandb_runs_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log(tmp_path, start_trackers(config(wandb=True, tags=("x",)), tmp_path), [1])
    (found,) = tmp_path.glob("wandb/offline-run-*")
    assert found.name.endswith((tmp_path / "wandb" / "id.txt").read_text())


def test_wandb_that_cannot_log_in_says_what_to_do_and_goes_on(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    log(tmp_path, start_trackers(config(wandb=True, mode="online"), tmp_path), [1])
    assert "--config.wandb.mode=offline" in caplog.text
    assert len(lines(tmp_path)) == 1


# --- no run needs them ---------------------------------------------------------------------------


def test_none_is_started_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "importlib", None)
    log(tmp_path, start_trackers(config(), tmp_path), [1])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("name", "module"), [("wandb", "wandb"), ("tensorboard", "tensorboardX.proto.event_pb2")]
)
def test_one_that_is_not_installed_is_a_warning_with_its_extra(
    tmp_path, monkeypatch, caplog, name, module
):
    monkeypatch.setitem(sys.modules, module, None)
    log(tmp_path, start_trackers(config(**{name: True}), tmp_path), [1, 2])
    assert f"{name} is not installed: pip install 'marginface[{name}]'" in caplog.text
    assert len(caplog.records) == 1
    assert len(lines(tmp_path)) == 2


def test_one_that_cannot_start_is_a_warning(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file where its folder goes")
    log(tmp_path, start_trackers(config(tensorboard=True), tmp_path), [1])
    assert "tensorboard: " in caplog.text
    assert "going on without" in caplog.text
    assert len(lines(tmp_path)) == 1


class Failing:
    """Works until its step 3, then fails at everything."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def write(self, step, values):
        self.calls += 1
        if step >= 3:
            raise self.error

    def flush(self):
        raise self.error

    def close(self):
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError(), ValueError("two\nlines")]
)
def test_one_that_fails_later_is_one_warning_and_the_others_go_on(tmp_path, caplog, error):
    bad, good = Failing(error), FakeWandb().init()
    good.write, good.flush, good.close = (lambda s, v: good.log(v, s)), print, good.finish
    log(tmp_path, Trackers({"bad": bad, "good": good}), range(1, 6))
    assert bad.calls == 3
    assert [step for step, *_ in good.logged[:-1]] == [1, 2, 3, 4, 5]
    assert good.logged[-1] == "end"
    (record,) = caplog.records
    assert "bad: " in record.getMessage()
    assert "\n" not in record.getMessage()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_ends_tensorboard_and_not_the_run(tmp_path, caplog):
    started = start_trackers(config(tensorboard=True), tmp_path)
    records = started._running["tensorboard"]._file._py_recordio_writer
    records.close()
    with open("/dev/full", "wb", buffering=0) as records._writer:
        log(tmp_path, started, range(1, 4))
    assert "No space left on device" in caplog.text
    assert len(lines(tmp_path)) == 3


def test_trackers_may_change_when_a_run_goes_on(tmp_path):
    run_folder.claim(tmp_path, json.dumps(config()))
    run_folder.claim(tmp_path, json.dumps(config(wandb=True, tensorboard=True, group="x")))


def test_a_killed_run_goes_on_in_tensorboard(tmp_path, cache):
    words = [*SMALL, f"--workdir={tmp_path / 'run'}", "--config.tensorboard=True"]
    interrupt(start(*words, cache=cache), step=24)
    run(*words, cache=cache)
    found = shown(tmp_path / "run" / "tensorboard")
    written = {
        (line["step"], name): value
        for line in lines(tmp_path / "run")
        for name, value in line.items()
        if name != "step"
    }
    assert found.keys() == written.keys()
    for key, value in written.items():
        assert found[key] == pytest.approx(value)
