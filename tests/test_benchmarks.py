"""Benchmarks: the contenders compute the same thing, and rows come out as promised."""

import csv
import itertools
import math

import pytest

from benchmarks import class_softmax, common

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


def test_interleave_takes_turns():
    calls = []
    steps = {name: (lambda name=name: calls.append(name) or 0.0) for name in "ab"}
    medians = common.interleave(steps, 3)
    assert calls == list("ab" * 4)  # one turn to warm up
    assert set(medians) == {"a", "b"}
    assert min(medians.values()) >= 0


def test_interleave_takes_the_median(monkeypatch):
    clock = itertools.accumulate([0, 5, 0, 1, 0, 100])
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    assert common.interleave({"ours": lambda: 0.0}, 3) == {"ours": 5}


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(common, "_memory_in_subprocess", lambda *_: 12.4)
    build = lambda case: lambda: float(case["n"])  # noqa: E731
    return common.Benchmark("toy", ({"n": 1}, {"n": 2}), 1, build, {"other": build}, (1, 2))


def test_rows_and_table(toy, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "why_no_peers", lambda: "")
    rows = common.measure(toy, quick=True)
    assert len(rows) == 1
    assert tuple(rows[0]) == common.COLUMNS
    assert rows[0]["case"] == "n=1"
    assert float(rows[0]["ratio"]) > 0
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
    (row,) = common.measure(toy, quick=True)
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
