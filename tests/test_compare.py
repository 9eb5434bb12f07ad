"""The table of all losses: what it is made of, and that the README shows it."""

import csv
import io
import json
import pathlib

import pytest

from launch import compare

ROOT = pathlib.Path(__file__).resolve().parents[1]
TABLE = ROOT / "experiments/results/losses_embedded.csv"


def summary(accuracy, seconds=30.0):
    return {
        "synthetic/accuracy": accuracy,
        "synthetic/auc": 0.97,
        "untrained/synthetic/accuracy": 0.7,
        "untrained/synthetic/auc": 0.75,
        "prototypes/sep_mean": 0.4,
        "prototypes/sep_var": 0.001,
        "untrained/prototypes/sep_mean": 0.26,
        "time/wall_s": seconds,
        "commit": "0123456789abcdef",
        "device/count": 1,
        "device/kind": "cpu",
        "version/jax": "0.10.2",
    }


def test_a_row_is_mean_and_deviation_over_seeds():
    row = compare.row("arcface", "data=small", {0: summary(0.9), 2: summary(0.92, 50.0)})
    assert row["seeds"] == "0 2"
    assert (row["accuracy_mean"], row["accuracy_std"]) == ("0.9100", "0.0141")
    assert (row["accuracies"], row["untrained_mean"]) == ("0.9000 0.9200", "0.7")
    assert (row["auc_mean"], row["sep_mean"], row["wall_s_max"]) == ("0.97", "0.4", "50")
    assert (row["commit"], row["device"]) == ("0123456", "1 x cpu")
    assert set(row) == set(compare.COLUMNS)


def test_what_has_not_run_says_so():
    row = compare.row("arcface", "data=small", {})
    assert row["seeds"] == "not run"
    text = compare.markdown([row, compare.row("triplet", "data=small", {0: summary(0.9)})])
    assert text.splitlines()[-2:] == [
        "| `triplet` | 0 | 90.00 | 0.97 | 0.4 |",
        "| `arcface` | not run | | | |",
    ]


def test_complete_runs_are_gathered_and_not_run_again(tmp_path, monkeypatch, capsys):
    for seed in (0, 1):
        folder = tmp_path / "runs" / f"arcface-{seed}"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(summary(0.9 + seed / 100)))
    monkeypatch.setattr(compare.subprocess, "run", lambda *_, **__: pytest.fail("was run again"))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{compare.MARKS[0]}\nold\n{compare.MARKS[1]}\nafter\n")
    arguments = ["arcface", "--seeds=2", f"--runs={tmp_path / 'runs'}"]
    arguments += [f"--out={tmp_path / 't.csv'}", f"--update={page}"]
    compare.main(arguments)
    (row,) = csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text()))
    assert row["accuracies"] == "0.9000 0.9100"
    assert "arcface, seed 1: 91.00% in 30 s" in capsys.readouterr().out
    shown = page.read_text()
    assert shown.startswith("before\n")
    assert shown.endswith("after\n")
    assert "| `arcface` | 0 1 | 90.50 ± 0.71 |" in shown
    assert "old" not in shown


def test_a_failed_run_is_named_and_stops_nothing(tmp_path, monkeypatch, capsys):
    class Failed:
        returncode = 3

    monkeypatch.setattr(compare.subprocess, "run", lambda *_, **__: Failed())
    compare.main(["arcface", "--seeds=1", f"--runs={tmp_path}", f"--out={tmp_path / 't.csv'}"])
    assert "arcface, seed 0: exit code 3" in capsys.readouterr().out
    assert "not run" in (tmp_path / "t.csv").read_text()


def test_a_page_without_marks_is_named(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="put them where the table goes"):
        compare.update(page, "")


def test_the_readme_shows_the_table():
    rows = list(csv.DictReader(io.StringIO(TABLE.read_text())))
    assert {row["experiment"] for row in rows} <= set(compare.experiments())
    assert compare.markdown(rows) in (ROOT / "README.md").read_text()
    for row in rows:
        if row["seeds"] != compare.NOT_RUN:
            assert float(row["accuracy_mean"]) >= 0.85
