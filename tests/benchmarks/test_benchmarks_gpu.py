"""The queue of GPU questions: what is held is not asked again, whatever went wrong before."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
import toy_questions

from benchmarks import common
from benchmarks.gpu import ceilings, queue
from benchmarks.gpu.questions import QUESTIONS
from marginface.models import iresnet

TESTS = pathlib.Path(__file__).parent
MACHINE = queue.Machine("toy card", "gpu", "python 0", "abc1234", "files-12345678")


@pytest.fixture
def asking(tmp_path, monkeypatch):
    """ask(*names, ...) → (exit code, what was asked in this call)."""
    log = tmp_path / "log"
    paths = [str(TESTS), str(common.ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("TOY_LOG", str(log))
    monkeypatch.setattr(queue, "_LEAST", 0.1)

    def ask(*names, **kw):
        log.write_text("")
        kw = {"machine": MACHINE, "folder": tmp_path / "out"} | kw
        code = queue.ask("toy_questions", names=names, **kw)
        return code, [line.rsplit(" ", 1)[0] for line in log.read_text().splitlines()]

    return ask


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def states(tmp_path, name):
    found = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    return found["state"], [a["state"] for a in found["answers"]]


def test_answers_are_written_and_not_asked_again(asking, tmp_path, capsys):
    code, asked = asking("plain", "ceilings")
    assert (code, asked) == (0, ["answer 1", "answer 2", "answer 3"])
    assert states(tmp_path, "plain") == ("answered", ["answered"] * 3 + ["skipped"])
    peak, first, second, peer = rows(tmp_path / "out" / "results.csv")
    assert tuple(first) == common.COLUMNS
    assert (peak["benchmark"], first["benchmark"]) == ("gpu/ceilings", "gpu/plain")
    assert (first["peer"], first["ours_seconds"], first["peer_seconds"]) == (
        "none",
        "0.5",
        "not run",
    )
    assert second["ours_mib"] == "7"
    assert (peer["peer"], peer["ours_seconds"], peer["peer_seconds"]) == ("peer", "0.5", "1.5")
    assert peer["ratio"] == "3.00"
    assert "2 TFLOP/s, 0.20 of the tf32 peak" in first["conditions"]
    table = capsys.readouterr().out
    assert "no_such_one not installed" in table
    assert "3.00 × ours" in table
    assert "1.50 × ours" not in table
    assert asking("plain", "ceilings") == (0, [])
    assert len(rows(tmp_path / "out" / "results.csv")) == 4


def test_what_fails_is_recorded_and_the_queue_goes_on(asking, tmp_path, monkeypatch, capsys):
    names = ("failing", "crashing", "waiting", "absent", "wrong", "last")
    code, asked = asking(*names)
    assert code == queue.SOME_FAILED
    assert asked == [
        *("fail 1", "large 1", "answer 1"),
        *("crash 1", "answer 1"),
        *("answer 1", "wait 1"),
        *("absent 1", "answer 1", "answer 1"),
    ]
    assert states(tmp_path, "failing") == ("failed", ["failed", "does not fit", "answered"])
    assert states(tmp_path, "crashing") == ("failed", ["failed", "answered"])
    assert states(tmp_path, "waiting") == ("timed out", ["answered", "timed out"])
    assert states(tmp_path, "absent") == ("skipped", ["skipped"])
    assert states(tmp_path, "wrong") == ("failed", ["answered"])
    assert states(tmp_path, "last") == ("answered", ["answered"])
    out = capsys.readouterr().out
    assert "ValueError: no such thing" in out
    assert "and more" not in out
    assert "exit code 3" in out
    assert "the question's 6 s are up" in out
    assert "WRONG: three is not four" in out
    assert "its data is not here" in out

    monkeypatch.setenv("TOY_FINE", "")
    code, asked = asking(*names[:-2], "last")
    assert asked == ["answer 2", "absent 1", "fail 1", "crash 1", "wait 1"], "what failed is last"
    assert code == 0


def test_when_the_time_is_up_the_next_call_goes_on(asking, tmp_path, monkeypatch, capsys):
    code, asked = asking("waiting", "last", minutes=5.0 / 60)
    assert (code, asked) == (75, ["answer 1", "wait 1"])
    assert states(tmp_path, "waiting") == ("not asked to its end", ["answered"])
    assert "the same command goes on" in capsys.readouterr().out
    monkeypatch.setenv("TOY_FINE", "")
    assert asking("waiting", "last") == (0, ["wait 1", "answer 2", "answer 1"])


def test_torn_files_cost_what_was_torn(asking, tmp_path):
    asking("plain", "failing")
    path = tmp_path / "out" / "results.csv"
    lines = path.read_text().splitlines(keepends=True)
    assert "answer n=3" in lines[3]
    path.write_text("".join(lines[:3]) + lines[3][:40])
    (tmp_path / "out" / "plain.json").write_text('{"answers": [{"contender"')
    code, asked = asking("plain")
    assert (code, asked) == (0, ["answer 3"])
    answers = json.loads((tmp_path / "out" / "plain.json").read_text())["answers"]
    assert [a.get("seconds") for a in answers] == [0.5, 1.0, 1.5, None]
    assert path.read_text().splitlines()[-1].count(",") >= len(common.COLUMNS) - 1
    assert asking("plain") == (0, [])


@pytest.mark.parametrize("left", ["", "date,com"])
def test_a_torn_header_is_put_aside(asking, tmp_path, left):
    path = tmp_path / "out" / "results.csv"
    path.parent.mkdir()
    path.write_text(left)
    assert asking("last") == (0, ["answer 1"])
    (tmp_path / "out" / "last.json").unlink()
    assert asking("last") == (0, [])
    assert len(rows(path)) == 1


def test_the_queue_keeps_off_the_card():
    program = (
        "import benchmarks.gpu.__main__, benchmarks.gpu.questions\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=common.ROOT, check=True)


def test_rows_of_another_file_count(asking, tmp_path):
    asking("last")
    held = tmp_path / "out" / "results.csv"
    assert asking("last", folder=tmp_path / "new", known=[held]) == (0, [])


def test_answers_of_another_card_or_commit_are_kept_and_not_taken(asking, tmp_path):
    asking("last")
    for other in (MACHINE._replace(device="card 2"), MACHINE._replace(commit="d", sources="e")):
        assert asking("last", machine=other) == (0, ["answer 1"])
    same = MACHINE._replace(commit=MACHINE.sources)  # the same files, outside of a checkout
    assert asking("last", machine=same)[1] == ["answer 1"]
    assert len(states(tmp_path, "last")[1]) == 4
    assert asking("last") == (0, [])


def test_killed_in_the_middle_nothing_answered_is_asked_again(asking, tmp_path, monkeypatch):
    log = tmp_path / "log"
    log.write_text("")
    program = (
        "import pathlib, test_benchmarks_gpu as t\n"
        f"t.queue.ask('toy_questions', names=['waiting', 'last'], machine=t.MACHINE,"
        f" folder=pathlib.Path({str(tmp_path / 'out')!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL) as parent:
        while "wait" not in log.read_text():
            assert parent.poll() is None
            time.sleep(0.05)
        parent.kill()
    child = int(log.read_text().split()[-1])
    while alive(child):  # it sees that nobody listens
        time.sleep(0.05)
    monkeypatch.setenv("TOY_FINE", "")
    assert asking("waiting", "last") == (0, ["wait 1", "answer 2", "answer 1"])


def alive(process):
    try:
        state = pathlib.Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_killed_process_is_a_failed_case(asking, tmp_path, monkeypatch):
    listen = queue.Queue._listen

    def listening(self, process, left):
        if left[0][0].name == "waiting":
            os.kill(process.pid, signal.SIGKILL)
        return listen(self, process, left)

    monkeypatch.setattr(queue.Queue, "_listen", listening)
    code, asked = asking("waiting", "last")
    assert (code, asked) == (1, ["answer 1"])
    assert states(tmp_path, "waiting") == ("failed", ["failed"] * 3)
    answers = json.loads((tmp_path / "out" / "waiting.json").read_text())["answers"]
    assert "SIGKILL" in answers[0]["reason"]


def test_an_unknown_question_names_the_nearest(asking, capsys):
    assert asking("crushing") == (2, [])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--only crushing: no such question; did you mean 'crashing'?")


def test_without_a_gpu_it_says_what_to_do(asking, capsys):
    assert asking(machine=MACHINE._replace(backend="cpu")) == (2, [])
    (line,) = capsys.readouterr().err.splitlines()
    assert "--smoke" in line


def test_names_and_cases_are_told_apart():
    names = [question.name for question in QUESTIONS]
    assert len(set(names)) == len(names)
    for question in (*QUESTIONS, *toy_questions.QUESTIONS):
        for contender in question.contenders:
            for cases in (contender.cases, contender.smoke):
                texts = [queue.questions_of.text(case) for case in cases]
                assert len(set(texts)) == len(texts)
                for case, text in zip(cases, texts, strict=True):
                    assert queue.questions_of.words(text) == {k: str(v) for k, v in case.items()}
    docs = (common.ROOT / "docs" / "gpu.md").read_text()
    assert all(f"`{name}`" in docs for name in names)


@pytest.mark.parametrize("depth", [18, 50])
def test_the_convolutions_are_those_of_the_network(depth):
    model = iresnet.Model(depth=depth)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    want = sorted(leaf.shape for leaf in jax.tree.leaves(like["params"]) if leaf.ndim == 4)
    found = ceilings.convolutions(depth, 32)
    have = [(c.kernel, c.kernel, c.inputs, c.outputs) for c in found for _ in range(c.count)]
    assert sorted(have) == want
    # The published 6.3 G multiplications and additions of IResNet-50 at 112×112.
    if depth == 50:
        assert ceilings.forward_flops(50, 112, 512) / 2 == pytest.approx(6.3e9, rel=0.02)


def test_the_stand_in_for_ml_collections_gives_the_same_configs():
    program = (
        "import json, sys\n"
        "from benchmarks.gpu import losses, settings\n"
        "if sys.argv[1] == 'without':\n"
        "    settings.importlib.util.find_spec = lambda _: None\n"
        "for name in losses.NAMES:\n"
        "    c = settings.experiment(name, 'data=small,model=sphereface4')\n"
        "    ours = type(c).__module__ == 'benchmarks.gpu.settings'\n"
        "    assert ours == (sys.argv[1] == 'without')\n"
        "    plain = lambda v: {k: plain(x) for k, x in v.items()} if hasattr(v, 'items') else v\n"
        "    print(name, json.dumps(plain(c), sort_keys=True))\n"
    )
    texts = [
        subprocess.run(
            [sys.executable, "-c", program, how],
            cwd=common.ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for how in ("with", "without")
    ]
    assert texts[0].count("\n") > 30
    assert texts[0] == texts[1]


def test_smoke_answers_once(tmp_path):
    before = common.RESULTS.read_bytes()
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--out", str(tmp_path / "out")]
    command += ["--only", "ceilings", "exclusive"]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    texts = []
    for _ in range(2):
        done = subprocess.run(
            command, cwd=common.ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        texts.append((tmp_path / "out" / "results.csv").read_text())
    assert texts[0] == texts[1]
    cases = sum(
        len(q.contenders[0].smoke) for q in QUESTIONS if q.name in ("ceilings", "exclusive")
    )
    assert len(rows(tmp_path / "out" / "results.csv")) == cases
    assert common.RESULTS.read_bytes() == before


def test_the_pack_is_one_readable_script():
    path = common.ROOT / "benchmarks" / "gpu_pack.sh"
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "://" not in path.read_text()
    ignored = (common.ROOT / ".gitignore").read_text().splitlines()
    assert "benchmarks/wheels/" in ignored
