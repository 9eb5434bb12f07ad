"""Benchmarks: the contenders compute the same thing, and rows come out as promised."""

import csv
import io
import math

import numpy as np
import oracles
import pytest

from benchmarks import class_softmax, common, exclusive, precision, startup

CASE = {"batch": 6, "dim": 256, "classes": 40, "chunk_size": 16}


def test_contenders_agree_on_the_loss():
    pytest.importorskip("torch")
    pytest.importorskip("pytorch_metric_learning")
    want = class_softmax.ours(CASE)()
    assert math.isfinite(want)
    for build in class_softmax.BENCHMARK.peers.values():
        step = build(CASE)
        assert step() == pytest.approx(want, rel=1e-4)
        assert step() == pytest.approx(want, rel=1e-4)  # nothing accumulates


def test_contenders_agree_on_lr():
    pytest.importorskip("torch")
    pytest.importorskip("pytorch_metric_learning")
    case = {"dim": 8, "classes": 40}
    want = exclusive.ours(case)()
    assert exclusive.metric_learning(case)() == pytest.approx(want, rel=1e-4)


def test_interleave_takes_turns():
    calls = []
    turns = {name: (lambda name=name: calls.append(name) or 1.0) for name in "ab"}
    assert common.interleave(turns, 3) == {"a": 1.0, "b": 1.0}
    assert calls == list("ab" * 4)  # one turn to warm up


def test_interleave_takes_the_median_of_what_counts():
    seconds = iter([50.0, 5.0, 1.0, 100.0])
    assert common.interleave({"ours": lambda: next(seconds)}, 3) == {"ours": 5.0}


def test_a_worker_measures_in_its_own_process():
    worker = common.Worker(class_softmax.BENCHMARK, "ours", CASE)
    assert worker.turn() > 0
    assert worker.mib >= 0
    worker.close()
    with pytest.raises(RuntimeError, match="--work ours failed: KeyError: 'classes'"):
        common.Worker(class_softmax.BENCHMARK, "ours", {"batch": 1, "dim": 1})


def test_what_counts_is_a_step_right_after_another(monkeypatch, capsys):
    steps = []
    build = lambda case: lambda: steps.append(case["n"]) or 0.0  # noqa: E731
    toy = common.Benchmark("toy", ({"n": 1},), 1, build, {}, (1, 1))
    monkeypatch.setattr(common.sys, "stdin", io.StringIO("\n\n"))
    monkeypatch.setattr(common, "peak_memory", lambda step, before: 0)
    common.work(toy, "ours", {"n": 1})
    assert steps == [1] * 4
    assert len(capsys.readouterr().out.splitlines()) == 3  # memory, and the seconds of two turns


class FakeWorker:
    mib = 12.4

    def __init__(self, benchmark, contender, case):
        self.turn = lambda: 2.0 if contender == "ours" else 3.0

    def close(self):
        pass


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(common, "Worker", FakeWorker)
    build = lambda case: lambda: float(case["n"])  # noqa: E731
    return common.Benchmark("toy", ({"n": 1}, {"n": 2}), 1, build, {"other": build}, (1, 2))


def test_rows_and_table(toy, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "why_no_peers", lambda: "")
    rows = common.measure(toy, quick=True)
    assert len(rows) == 1
    assert tuple(rows[0]) == common.COLUMNS
    assert rows[0]["case"] == "n=1"
    assert rows[0]["ratio"] == "1.50"
    assert "median of 1" in rows[0]["conditions"]
    path = tmp_path / "results.csv"
    common.append(rows, path)
    common.append(common.measure(toy, quick=False), path)
    with path.open() as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["n=1", "n=1", "n=2"]
    head, line = common.table(rows).splitlines()
    assert head.split()[0] == "benchmark"
    assert line.split()[:3] == ["toy", "n=1", "other"]


def test_without_pytorch_ours_is_measured_alone(toy, monkeypatch, capsys):
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda _: None)
    floor, row = common.measure(toy._replace(floors={"a part": toy.ours}), quick=True)
    assert (floor["peer"], floor["ratio"]) == ("a part", "1.50")
    assert row["peer_seconds"] == row["ratio"] == row["peer_mib"] == "not run"
    assert float(row["ours_seconds"]) >= 0
    message = capsys.readouterr().err.splitlines()
    assert len(message) == 1
    assert "torch and pytorch_metric_learning not installed" in message[0]


def test_results_have_the_columns():
    with common.RESULTS.open() as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == common.COLUMNS
    assert all(len(row) == len(rows[0]) for row in rows)


def test_the_start_is_measured_with_an_empty_cache_and_again(monkeypatch):
    seen = []

    def run(experiment, folder, flags):
        seen.append((folder, list(folder.iterdir())))
        (folder / "kept").write_text("")
        return startup.Seconds(10.0 + len(seen), 5.0 + len(seen))

    monkeypatch.setattr(startup, "until_first_step", run)
    first, second = startup.measure(3)
    assert (first, second) == (startup.Seconds(13.0, 8.0), startup.Seconds(14.0, 9.0))
    assert [len(files) for _, files in seen] == [0, 1] * 3
    assert len({folder for folder, _ in seen}) == 3


def test_a_start_that_fails_is_no_measurement(tmp_path):
    with pytest.raises(RuntimeError, match=r"ended with 2: marginface: .*arcfase"):
        startup.until_first_step("experiments/arcfase.py", tmp_path)


@pytest.mark.parametrize("make", [precision.at_random, precision.untrained, precision.as_trained])
def test_the_exact_gradients_are_those_of_the_textbook_form(make):
    problem = make(np.random.default_rng(0), 4, 20, 6)._replace(scale=8.0)
    want = precision.exact(problem, chunk=7)

    def loss(x, w):
        def psi(theta):
            return oracles.additive_angular(theta, 0.5)

        return oracles.margin_softmax(x, w, problem.labels, psi, 8.0).mean()

    at = np.float64(problem.x), np.float64(problem.w)
    assert want.loss == pytest.approx(loss(*at), rel=1e-12)
    for got, wanted in zip((want.x, want.w), oracles.gradient(loss, *at), strict=True):
        assert oracles.relative_error(got, wanted) < 1e-7
    assert want.sep == pytest.approx(oracles.exclusive(at[1])[problem.labels].mean())


def test_prototypes_as_trained_lie_as_said():
    problem = precision.as_trained(np.random.default_rng(0), 64, 2000, 512)
    want = precision.exact(problem)
    assert want.angle == pytest.approx(38, abs=2)
    assert want.sep == pytest.approx(0.44, abs=0.03)


def test_errors_are_relative():
    want = precision.Exact(2.0, np.ones((2, 2)), np.full((3, 2), 2.0), 0.0, 0.0)
    got = 2.5, np.array([[1.0, 1.0], [1.0, 2.0]]), np.full((3, 2), 2.2)
    found = precision.errors(got, want, chunk=2)
    assert found == pytest.approx((0.25, 0.5, 0.1, 0.5**0.5))


def test_the_tables_of_precision_come_by_one_command(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- precision -->\nold\n<!-- end precision -->\nafter\n")
    precision.main(["--smoke", "--out", str(page)])
    text = page.read_text()
    assert text.startswith("before\n<!-- precision -->\nCommit ")
    assert text.endswith("|\n<!-- end precision -->\nafter\n")
    for way in precision.WAYS:
        assert text.count(f"| {way} |") == 4  # the largest, and one for each problem
    errors = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in precision.WAYS:
            errors[cells[0]] = [float(cell) for cell in cells[1:5]]
    assert max(errors["highest"]) < 1e-4
    assert errors["highest"][1] < errors["TPU, three bfloat16 products"][1] < errors["tf32"][1]
    assert errors["tf32"][1] < errors["bfloat16"][1] < 0.1
