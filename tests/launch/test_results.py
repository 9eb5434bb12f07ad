"""Run folders to rows, rows to tables: nothing lost, nothing averaged that must not be."""

import json
import math
import pathlib
import re
import shlex

import numpy as np
import pytest

from marginface.launch import results
from marginface.report.study import comparison, tables
from marginface.report.study import rows as row_module
from marginface.runs import plan

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_run(
    folder,
    *,
    experiment="arcface",
    variant="data=small",
    seed=0,
    overrides=None,
    config=None,
    accuracy=0.9,
    seconds=30.0,
    **more,
):
    """A run folder as a run leaves it; no summary if `accuracy` is None."""
    overrides = overrides or {}
    folder.mkdir(parents=True)
    config = {"loss": {"scale": 24.0}, "name": experiment} | (config or {}) | overrides
    (folder / "config.json").write_text(json.dumps(config | {"seed": seed}, sort_keys=True))
    origin = {"experiment": experiment, "variant": variant}
    origin |= {"overrides": overrides | {"seed": seed}, "command": "python -m marginface.main"}
    (folder / "origin.json").write_text(json.dumps(origin))
    lines = [{"step": 0, "synthetic/accuracy": 0.7}, {"step": 40, "loss/total": 3.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if accuracy is not None:
        summary = {
            "loss/total": 3.0,
            "synthetic/accuracy": accuracy,
            "synthetic/auc": 0.97,
            "untrained/synthetic/accuracy": 0.7,
            "prototypes/sep_mean": 0.4,
            "time/wall_s": seconds,
            "time/examples_per_s": 1e4 / seconds,
            "config/hash": "0" * 12,
            "commit": COMMIT,
            "device/kind": "cpu",
            "device/platform": "cpu",
            "device/count": 1,
            "device/processes": 1,
            "version/python": "3.11.7",
            "version/jax": "0.10.2",
        } | more
        if math.isnan(accuracy):
            summary["synthetic/accuracy"] = None
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def stop(folder, code, message):
    (folder / "stopped.json").write_text(json.dumps({"code": code, "message": message}))


def make_sweep(root, accuracies):
    """{experiment: accuracies of seeds 0, 1, ...} as a tree of run folders."""
    for experiment, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            make_run(
                root / experiment / f"seed={seed}",
                experiment=experiment,
                seed=seed,
                accuracy=accuracy,
            )
    return root


def cells(table):
    return [[cell.text for cell in row] for row in table.rows]


# Rows


def test_a_run_is_a_row(tmp_path):
    overrides = {"loss.margin_kw.m": 0.3, "model.embedding_dim": 64}
    make_run(tmp_path / "one", seed=2, overrides=overrides)
    (row,) = results.gather([tmp_path])
    assert {name: row[name] for name in ("experiment", "variant", "overrides", "seed")} == {
        "experiment": "arcface",
        "variant": "data=small",
        "overrides": "loss.margin_kw.m=0.3 model.embedding_dim=64",
        "seed": 2,
    }
    assert (row["status"], row["commit"], row["device"]) == ("done", COMMIT, "1 x cpu")
    assert row["versions"] == "python 3.11.7 jax 0.10.2"
    assert re.fullmatch(r"[0-9a-f]{12}", row["config_hash"])
    figures = [name for name in row if name not in row_module.COLUMNS]
    assert figures == sorted(figures)
    assert (row["synthetic/accuracy"], row["time/wall_s"]) == (0.9, 30.0)
    assert not [name for name in row if name.startswith(("device/", "version/", "config/"))]


def test_the_hash_is_that_of_the_report(tmp_path):
    import hashlib

    folder = make_run(tmp_path / "one")
    text = (folder / "config.json").read_text()
    (row,) = results.gather([folder])
    assert row["config_hash"] == hashlib.sha256(text.encode()).hexdigest()[:12]


def test_equal_runs_give_equal_rows_but_for_time(tmp_path):
    make_run(tmp_path / "a" / "run", seconds=30.0)
    make_run(tmp_path / "b" / "other_name", seconds=50.0)
    (a,), (b,) = results.gather([tmp_path / "a"]), results.gather([tmp_path / "b"])
    assert a != b
    assert {k for k in a if a[k] != b[k]} == {"time/wall_s", "time/examples_per_s"}
    assert list(a) == list(b)


def test_seeds_share_the_setting_but_not_the_config(tmp_path):
    make_run(tmp_path / "a", seed=0)
    make_run(tmp_path / "b", seed=1)
    make_run(tmp_path / "c", seed=2, config={"steps": 7})
    a, b, c = results.gather([tmp_path])
    assert a["config_hash"] != b["config_hash"]
    assert a["setting_hash"] == b["setting_hash"] != c["setting_hash"]


def test_where_data_lies_is_no_part_of_a_setting(tmp_path):
    for seed, root in enumerate(("/one/data", "/two/data")):
        make_run(
            tmp_path / str(seed),
            seed=seed,
            variant=f"data=lfw,root={root},dim=64",
            config={"data": {"kw": {"root": root}, "workers": seed}},
            overrides={"data.workers": seed},
        )
    a, b = results.gather([tmp_path])
    assert (a["variant"], a["overrides"]) == ("data=lfw,dim=64", "")
    assert len(results.settings([a, b])) == 1
    assert a["setting_hash"] == b["setting_hash"]


def test_rows_are_sorted_and_found_once_at_any_depth(tmp_path):
    make_run(tmp_path / "z" / "y" / "two", experiment="cosface", seed=1)
    make_run(tmp_path / "z" / "one", experiment="cosface", seed=10)
    make_run(tmp_path / "a", experiment="softmax")
    make_run(tmp_path / "z" / "one" / "checkpoints" / "hidden", experiment="hidden")
    make_run(tmp_path / ".hidden", experiment="hidden")
    found = results.gather([tmp_path, tmp_path / "z", tmp_path / "a" / ".." / "a"])
    assert [(r["experiment"], r["seed"]) for r in found] == [
        ("cosface", 1),
        ("cosface", 10),
        ("softmax", 0),
    ]


def test_overrides_are_written_as_one_types_them(tmp_path):
    overrides = {
        "schedule.boundaries": [0.5, 0.75],
        "loss.margin": "a b",
        "loss.detach": True,
        "loss.scale": 32.0,
        "wandb.use": True,
    }
    make_run(tmp_path / "one", overrides=overrides)
    (row,) = results.gather([tmp_path])
    assert row["overrides"] == (
        "loss.detach=True 'loss.margin=a b' loss.scale=32 'schedule.boundaries=[0.5, 0.75]'"
    )


def test_a_run_from_before_origin_json_goes_by_its_folder(tmp_path):
    folder = make_run(tmp_path / "arcface_regular", seed=3)
    (folder / "origin.json").unlink()
    (row,) = results.gather([folder])
    found = (row["experiment"], row["variant"], row["overrides"], row["seed"])
    assert found == ("arcface_regular", "", "", 3)


# What ended badly, and what never began


@pytest.fixture
def troubled(tmp_path):
    """A sweep of one experiment of which every run ended in another way."""
    folder = tmp_path / "arcface-data=small"
    sweep = {
        "experiment": "arcface",
        "variant": "data=small",
        "units": {f"seed={seed}": {"seed": seed} for seed in range(7)},
    }
    for seed, accuracy in enumerate((0.9, 0.91, None, None, None, float("nan"))):
        make_run(folder / f"seed={seed}", seed=seed, accuracy=accuracy)
    stop(folder / "seed=3", 3, "the loss was not finite at step 41:\nloss/total")
    stop(folder / "seed=4", 2, "no space left on device")
    (folder / plan.SWEEP).write_text(json.dumps(sweep))
    return folder


def test_each_ending_is_named(troubled):
    found = {row["seed"]: row["status"] for row in results.gather([troubled])}
    assert found == {
        0: "done",
        1: "done",
        2: "interrupted: ended without a word after step 40",
        3: "diverged: the loss was not finite at step 41: loss/total",
        4: "failed: no space left on device",
        5: "done: not finite: synthetic/accuracy",
        6: "not run",
    }


def test_the_table_names_them_and_averages_the_rest(troubled):
    table = comparison.compare(results.gather([troubled]))
    assert table.header[:3] == ("experiment", "seeds", "accuracy (%), mean ± 95 %")
    half = 100 * 12.7062 * np.std([0.9, 0.91], ddof=1) / np.sqrt(2)
    assert cells(table)[0][:3] == ["arcface", "2 of 7", f"90.50 ± {half:.2f}"]
    assert table.notes[2:] == (
        "arcface, seed 2: interrupted: ended without a word after step 40",
        "arcface, seed 3: diverged: the loss was not finite at step 41: loss/total",
        "arcface, seed 4: failed: no space left on device",
        "arcface, seed 5: done: not finite: synthetic/accuracy",
        "arcface, seed 6: not run",
    )


def test_the_command_prints_them(troubled, capsys):
    results.run([str(troubled)])
    out, err = capsys.readouterr()
    assert "| `arcface` | 2 of 7 | 90.50" in out
    assert "arcface, seed 3: diverged: the loss was not finite" in err
    assert "arcface, seed 6: not run" in err


def test_what_never_ran_says_so(tmp_path):
    make_sweep(tmp_path, {"softmax": [0.9, 0.91]})
    sweep = {"experiment": "triplet", "variant": "data=small"}
    sweep["units"] = {f"m={m},seed=0": {"pairs.m": m, "seed": 0} for m in (1, 0.2)}
    (tmp_path / "triplet").mkdir()
    (tmp_path / "triplet" / "sweep.json").write_text(json.dumps(sweep))
    found = results.gather([tmp_path])
    assert [r["status"] for r in found] == ["done", "done", "not run", "not run"]
    assert [r["overrides"] for r in found[2:]] == ["pairs.m=0.2", "pairs.m=1"]
    table = comparison.compare(found, baseline="softmax")
    assert cells(table)[1:] == [
        ["triplet", "m=0.2", "0 of 1", "not run", "–", "–", "–", "–", "–"],
        ["triplet", "m=1", "0 of 1", "not run", "–", "–", "–", "–", "–"],
    ]
    assert len(table.notes) == 2
    nothing = comparison.compare(found[2:])
    assert [row[3] for row in cells(nothing)] == ["not run", "not run"]


def test_a_planned_run_is_the_same_setting_as_one_that_ran(tmp_path):
    folder = tmp_path / "arcface"
    make_run(folder / "s=1,seed=0", overrides={"loss.scale": 1.0})
    plan = {"s=1,seed=0": {"loss.scale": 1, "seed": 0}, "s=1,seed=1": {"loss.scale": 1, "seed": 1}}
    sweep = {"experiment": "arcface", "variant": "data=small", "units": plan}
    (folder / "sweep.json").write_text(json.dumps(sweep))
    found = results.gather([folder])
    assert [row["status"] for row in found] == ["done", "not run"]
    assert list(results.settings(found)) == [("arcface", "data=small", "loss.scale=1")]
    (alone,) = results.gather([folder / "s=1,seed=0"])
    assert alone == found[0]


def test_a_unit_that_failed_before_its_config_is_found(tmp_path):
    folder = tmp_path / "arcface"
    (folder / "seed=0").mkdir(parents=True)
    (folder / "seed=0" / "log.txt").write_text("...\nmarginface: no such folder\n")
    sweep = {"experiment": "arcface", "variant": "", "units": {"seed=0": {"seed": 0}}}
    (folder / "sweep.json").write_text(json.dumps(sweep))
    for path in (folder, folder / "seed=0"):
        (row,) = results.gather([path])
        assert row["status"] == "failed: marginface: no such folder"


# CSV


def test_csv_gives_equal_rows_back(troubled, tmp_path):
    make_run(tmp_path / "q", experiment="q", overrides={"a.b": "odd \"text\", 'here'\nand there"})
    found = results.gather([troubled, tmp_path / "q"])
    path = tmp_path / "t.csv"
    path.write_text(row_module.to_csv(found))
    assert results.read_csv(path) == found
    assert row_module.to_csv(results.read_csv(path)) == path.read_text()
    assert comparison.compare(results.read_csv(path)) == comparison.compare(found)
    header = path.read_text().splitlines()[0].split(",")
    assert tuple(header[: len(row_module.COLUMNS)]) == row_module.COLUMNS
    assert header[len(row_module.COLUMNS) :] == sorted(header[len(row_module.COLUMNS) :])
    assert row_module.is_table(path)
    assert not row_module.is_table(ROOT / "experiments/results/synthetic.csv")


def test_the_csv_is_replaced_or_appended_to(tmp_path, capsys):
    make_sweep(tmp_path / "one", {"arcface": [0.9, 0.91]})
    make_sweep(tmp_path / "two", {"arcface": [0.95], "softmax": [0.8]})
    out = tmp_path / "new" / "t.csv"
    results.run([str(tmp_path / "one"), f"--out={out}"])
    results.run([str(tmp_path / "two"), f"--out={out}", "--append"])
    found = {(r["experiment"], r["seed"]): r["synthetic/accuracy"] for r in results.read_csv(out)}
    assert found == {("arcface", 0): 0.95, ("arcface", 1): 0.91, ("softmax", 0): 0.8}
    results.run([str(tmp_path / "one"), f"--out={out}"])
    assert len(results.read_csv(out)) == 2
    assert "| `arcface` | 2 | 90.50" in capsys.readouterr().out


def test_a_table_can_be_made_of_its_csv_alone(tmp_path, capsys):
    make_sweep(tmp_path / "runs", {"arcface": [0.9, 0.91], "softmax": [0.88, 0.9]})
    path = tmp_path / "t.csv"
    arguments = ["--baseline=softmax", "--format=html"]
    results.run([str(tmp_path / "runs"), f"--out={path}", *arguments])
    first, before = capsys.readouterr().out, path.stat().st_mtime_ns
    results.run([str(path), *arguments])
    assert capsys.readouterr().out == first
    assert path.stat().st_mtime_ns == before


# Comparisons


def test_differences_are_paired_and_corrected(tmp_path):
    from scipy import stats

    seeds = np.array([0.0, 0.01, 0.02, 0.015, 0.005])
    softmax = 0.90 + seeds
    ours = {
        "arcface": softmax + np.array([0.010, 0.011, 0.009, 0.012, 0.010]),
        "cosface": softmax + np.array([0.003, -0.004, 0.006, -0.005, 0.002]),
        "normface": softmax - np.array([0.008, 0.009, 0.007, 0.010, 0.008]),
    }
    make_sweep(tmp_path, {"softmax": softmax, **ours})
    table = comparison.compare(results.gather([tmp_path]), baseline="softmax")
    assert table.header[3:5] == ("difference to softmax", "p (Holm)")
    found = {row[0]: row for row in cells(table)}
    assert [row[0] for row in cells(table)] == ["arcface", "cosface", "softmax", "normface"]
    p = {name: stats.ttest_rel(values, softmax).pvalue for name, values in ours.items()}
    low, high = stats.ttest_rel(ours["cosface"], softmax).confidence_interval()
    assert found["cosface"][3] == f"+0.04 ± {50 * (high - low):.2f}"
    assert found["cosface"][4] == f"{p['cosface']:.3f}"
    assert found["arcface"][4] == found["normface"][4] == "<0.001"
    assert found["normface"][3].startswith("−0.84 ± ")
    assert found["softmax"][3:5] == ["baseline", "–"]
    bold = [row[0].text for row in table.rows if any(cell.bold for cell in row)]
    assert bold == ["arcface"]
    assert "Holm-adjusted over 3 tests" in table.notes[0]


def test_the_best_is_not_bold_unless_it_is_shown_to_be_better(tmp_path):
    make_sweep(tmp_path, {"softmax": [0.90, 0.91, 0.92], "arcface": [0.95, 0.90, 0.93]})
    table = comparison.compare(results.gather([tmp_path]), baseline="softmax")
    assert cells(table)[0][0] == "arcface"
    assert not any(cell.bold for row in table.rows for cell in row)
    # Nor without a baseline.
    table = comparison.compare(results.gather([tmp_path]))
    assert not any(cell.bold for row in table.rows for cell in row)


def test_where_less_is_better(tmp_path):
    for name, value in (("softmax", 0.5), ("arcface", 0.3), ("cosface", 0.7)):
        for seed in range(3):
            sep = value + seed / 1000 + (seed % 2) * value / 1000
            make_run(tmp_path / f"{name}{seed}", experiment=name, seed=seed,
                     **{"prototypes/sep_mean": sep})  # fmt: skip
    rows = results.gather([tmp_path])
    table = comparison.compare(rows, metric="sep_mean", baseline="softmax")
    assert [row[0] for row in cells(table)] == ["arcface", "softmax", "cosface"]
    assert [row[0].text for row in table.rows if row[2].bold] == ["arcface"]
    assert table.header[2] == "mean Sep, mean ± 95 %"
    assert cells(table)[0][2].startswith("0.30")


def test_one_seed_has_no_interval(tmp_path):
    make_sweep(tmp_path, {"softmax": [0.9], "arcface": [0.91]})
    table = comparison.compare(results.gather([tmp_path]), baseline="softmax")
    assert cells(table)[0][1:5] == ["1", "91.00", "+1.00", "–"]
    # Where nothing was tested the note does not explain tests, nor intervals that nothing has.
    assert table.notes[0] == (
        "synthetic/accuracy in percent: mean over seeds; no interval: none has two seeds with "
        "different figures; further columns are means. Differences to softmax are paired over "
        "common seeds."
    )


def test_equal_differences_prove_nothing_and_count_in_the_family(tmp_path):
    make_sweep(tmp_path, {"softmax": [0.9, 0.9], "arcface": [0.95, 0.95], "cosface": [0.91, 0.93]})
    table = comparison.compare(results.gather([tmp_path]), baseline="softmax")
    assert cells(table)[0][1:5] == ["2", "95.00", "+5.00", "–"]
    assert cells(table)[1][4] == "0.590"  # twice 0.295
    assert "Holm-adjusted over 2 tests" in table.notes[0]
    assert not table.rows[0][2].bold


def test_only_common_seeds_are_paired(tmp_path):
    make_sweep(tmp_path, {"softmax": [0.90, 0.91, 0.93], "arcface": [0.91, 0.94]})
    table = comparison.compare(results.gather([tmp_path]), baseline="softmax")
    assert cells(table)[0][3] == "+2.00 ± 12.71"
    make_run(tmp_path / "more", seed=7, accuracy=0.95)
    table = comparison.compare(results.gather([tmp_path]), baseline="softmax")
    found = {row[0]: row[3] for row in cells(table)}["arcface"]
    assert found == "+2.00 ± 12.71 (2 pairs)"


def test_a_difference_of_fewer_pairs_than_seeds_says_so(tmp_path):
    make_sweep(tmp_path, {"softmax": [0.90], "arcface": [0.919, 0.93, 0.95]})
    table = comparison.compare(results.gather([tmp_path]), baseline="softmax")
    found = {row[0]: row[3:5] for row in cells(table)}
    assert found["arcface"] == ["+1.90 (1 pair)", "–"]
    assert "with its own 95 % interval" not in table.notes[0]
    assert "paired t test" not in table.notes[0]
    assert "half width of the 95 % interval over seeds" in table.notes[0]  # of the means


# Incomplete settings


def lose(folder, seed):
    """Makes a run of `make_sweep` one that diverged."""
    (folder / f"seed={seed}" / "summary.json").unlink()
    stop(folder / f"seed={seed}", 3, "the loss was not finite at step 41")


def bold(table):
    return [row[0].text for row in table.rows if any(cell.bold for cell in row)]


def test_survivors_of_a_setting_are_neither_first_nor_bold(tmp_path):
    softmax = [0.80, 0.81, 0.82, 0.83, 0.84]
    ours = {"arcface": 0.10, "cosface": 0.05}
    noise = [0.0, 0.001, -0.001, 0.002, 0.0]
    made = {k: [s + d + e for s, e in zip(softmax, noise, strict=True)] for k, d in ours.items()}
    make_sweep(tmp_path, {"softmax": softmax, **made})
    table = comparison.compare(results.gather([tmp_path]), baseline="softmax")
    assert (cells(table)[0][0], bold(table)) == ("arcface", ["arcface"])
    assert "stand those that lack runs" not in table.notes[0]
    lose(tmp_path / "arcface", 1)
    lose(tmp_path / "arcface", 4)
    table = comparison.compare(results.gather([tmp_path]), baseline="softmax")
    assert [row[:2] for row in cells(table)] == [
        ["cosface", "5"],
        ["softmax", "5"],
        ["arcface", "3 of 5"],
    ]
    assert {row[0]: row[4] for row in cells(table)}["arcface"] == "<0.001"
    assert bold(table) == ["cosface"]
    assert "Below the complete settings stand those that lack runs" in table.notes[0]
    assert "Bold: the best complete setting, where it is better than the baseline" in table.notes[0]
    assert "it need not be better than the next one" in table.notes[0]


@pytest.mark.parametrize("planned", [1, 3])
def test_one_lucky_seed_takes_neither_place_nor_bold(tmp_path, planned):
    make_sweep(
        tmp_path,
        {"softmax": [0.80, 0.81, 0.82], "b": [0.90, 0.911, 0.921], "a": [0.99] * planned},
    )
    for seed in range(1, planned):
        lose(tmp_path / "a", seed)
    table = comparison.compare(results.gather([tmp_path]), baseline="softmax")
    assert [row[0] for row in cells(table)] == ["b", "softmax", "a"]
    assert bold(table) == ["b"]


def test_where_all_have_one_seed_the_mean_ranks(tmp_path):
    make_sweep(tmp_path, {"softmax": [0.8], "b": [0.9], "a": [0.7], "lost": [0.99, 0.99]})
    lose(tmp_path / "lost", 1)
    table = comparison.compare(results.gather([tmp_path]), baseline="softmax")
    assert [row[0] for row in cells(table)] == ["b", "softmax", "a", "lost"]


# Runs that trained together


def test_a_share_of_a_programs_time_is_no_wall_time(tmp_path):
    for seed, more in enumerate(({}, {"time/together": 1.0}, {"time/together": 4.0})):
        make_run(tmp_path / f"a{seed}", seed=seed, seconds=(30.0, 50.0, 5.0)[seed], **more)
    make_run(tmp_path / "b", experiment="softmax", accuracy=0.8, **{"time/together": 2.0})
    rows = results.gather([tmp_path])
    table = comparison.compare(rows)
    at = table.header.index("wall time, s")
    assert {row[0]: row[at] for row in cells(table)} == {"arcface": "40", "softmax": "–"}
    assert "Wall time is without 2 runs that trained together in one program." in table.notes[0]
    alone = comparison.compare([row for row in rows if row.get("time/together", 1) == 1])
    assert "together" not in " ".join(alone.notes)
    # Nor is it one as the metric.
    by_time = comparison.compare(rows, metric="wall_s")
    assert {row[0]: row[1:3] for row in cells(by_time)}["softmax"] == ["0 of 1", "no such figure"]
    assert "Wall time is without 2 runs" in by_time.notes[0]


def test_what_is_no_repetition_is_not_averaged(tmp_path):
    make_run(tmp_path / "a0", seed=0)
    make_run(tmp_path / "a1", seed=1, config={"steps": 7})
    make_run(tmp_path / "b0", experiment="softmax", accuracy=0.8)
    make_run(tmp_path / "b0_again", experiment="softmax", accuracy=0.9, commit="f" * 40)
    table = comparison.compare(results.gather([tmp_path]))
    assert {row[0]: row[1:3] for row in cells(table)} == {
        "arcface": ["0 of 2", "not averaged"],
        "softmax": ["0 of 2", "not averaged"],
    }
    assert table.notes[2].startswith("arcface: not averaged: configs differ by more than the seed")
    assert table.notes[3] == (
        "softmax: not averaged: seed 0 stands there twice; give one of the runs"
    )


def test_different_conditions_are_told(tmp_path):
    make_run(tmp_path / "0", seed=0)
    make_run(tmp_path / "1", seed=1)
    (note,) = comparison.compare(results.gather([tmp_path])).notes[1:]
    assert note == (
        "Conditions: variant data=small; commit 0123456; device 1 x cpu; "
        "versions python 3.11.7 jax 0.10.2; seeds 0 1."
    )
    make_run(tmp_path / "2", seed=2, commit="f" * 40 + "+changes", **{"device/count": 8})
    note, warning = comparison.compare(results.gather([tmp_path])).notes[1:]
    assert warning == "Warning: different commits within 1 setting: arcface"
    assert "different commits: 0123456 (2 runs), fffffff+changes (1 run)" in note
    assert "different devices: 1 x cpu (2 runs), 8 x cpu (1 run)" in note


def test_one_line_warns_of_settings_that_mix_commits(tmp_path, capsys):
    make_sweep(tmp_path, {f"e{i}": [0.9] for i in range(8)})
    results.run([str(tmp_path)])
    assert "Warning" not in "".join(capsys.readouterr())
    for i in range(7):
        make_run(tmp_path / f"{i}", experiment=f"e{i}", seed=1, commit="f" * 40)
    # Another setting of another commit mixes nothing.
    make_run(tmp_path / "other", experiment="other", commit="e" * 40)
    results.run([str(tmp_path)])
    out, err = capsys.readouterr()
    warning = "Warning: different commits within 7 settings: e0, e1, e2, e3, e4 and 2 more"
    assert err.splitlines() == [warning]
    assert warning in out


def test_an_error_bar_is_better_when_it_is_small(tmp_path):
    for name, error in (("arcface", 0.01), ("softmax", 0.02)):
        make_run(tmp_path / name, experiment=name, **{"synthetic/accuracy_stderr": error})
    table = comparison.compare(results.gather([tmp_path]), metric="accuracy_stderr")
    assert [row[0] for row in cells(table)] == ["arcface", "softmax"]


def test_variants_and_overrides_have_columns_where_they_differ(tmp_path):
    make_run(tmp_path / "a", overrides={"loss.margin_kw.m": 0.3})
    make_run(tmp_path / "b", overrides={"loss.margin_kw.m": 0.5}, accuracy=0.8)
    make_run(tmp_path / "c", variant="data=lfw", accuracy=0.7)
    table = comparison.compare(results.gather([tmp_path]), baseline="arcface:data=small m=0.5")
    assert table.header[:3] == ("experiment", "variant", "overrides")
    assert [row[:3] for row in cells(table)] == [
        ["arcface", "data=small", "m=0.3"],
        ["arcface", "data=small", "m=0.5"],
        ["arcface", "data=lfw", ""],
    ]
    assert [row[5] for row in cells(table)] == ["+10.00", "baseline", "−10.00"]


def test_overrides_that_all_share_are_told_once(tmp_path):
    for i, m in enumerate((0.3, 0.5)):
        make_run(tmp_path / str(i), overrides={"loss.margin_kw.m": m, "steps": 450})
    found = results.gather([tmp_path])
    table = comparison.compare(found, baseline="arcface m=0.3 steps=450")
    assert {row[1] for row in cells(table)} == {"m=0.3", "m=0.5"}
    assert "variant data=small; all with steps=450; commit" in table.notes[1]
    (alone,) = cells(comparison.compare(found[:1]))
    assert alone[:2] == ["arcface", "1"]


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ("arcfase", "is not among the runs; did you mean 'arcface"),
        ("arcface m=0.4", "is not among the runs"),
        ("arcface", "fits 2 settings, such as 'arcface:data=small loss.margin_kw.m=0.3' and"),
    ],
)
def test_a_baseline_must_be_one_setting(tmp_path, baseline, message):
    for i, m in enumerate((0.3, 0.5)):
        make_run(tmp_path / str(i), overrides={"loss.margin_kw.m": m})
    with pytest.raises(ValueError, match=message):
        comparison.compare(results.gather([tmp_path]), baseline=baseline)
    make_run(tmp_path / "plain")  # the experiment without overrides is what its name alone means
    table = comparison.compare(results.gather([tmp_path]), baseline="arcface")
    assert "baseline" in {row[4] for row in cells(table) if row[1] == ""} | {
        row[3] for row in cells(table)
    }


def test_a_metric_must_be_one_figure(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", seed=1, **{"lfw/accuracy": 0.8})
    found = results.gather([tmp_path])
    with pytest.raises(ValueError, match="fits lfw/accuracy, synthetic/accuracy: name one"):
        comparison.compare(found)
    assert cells(comparison.compare(found, metric="lfw/accuracy"))[0][1:3] == ["1 of 2", "80.00"]
    with pytest.raises(ValueError, match="no run has such a figure; did you mean 'lfw/accuracy'"):
        comparison.compare(found, metric="lfw/acuracy")


# Cited numbers


def test_cited_numbers_stand_in_a_table_of_their_own(tmp_path, capsys):
    make_sweep(tmp_path, {"arcface": [0.9], "cosface": [0.91], "siamese": [0.9]})
    found = results.gather([tmp_path])
    table = comparison.cited(found)
    assert table.header[:3] == ("experiment", "as printed", "LFW")
    assert table.header[-4:] == ("data", "network", "protocol", "cited from")
    assert {row[0] for row in cells(table)} == {"arcface", "cosface"}
    at = [row for row in cells(table) if row[1] == "ArcFace (0.5)"]
    assert [row[2:5] for row in at] == [["99.53", "95.56", "95.15"]]
    assert at[0][-4:-1] == [
        "CASIA-WebFace",
        "ResNet-50, 512-d, 112×112",
        "10 folds; batch 512, 32K steps, s = 64",
    ]
    assert at[0][-1] == "deng2019arcface, Table 2"
    assert any(note.startswith("deng2019arcface: Deng, Guo") for note in table.notes)
    assert comparison.cited([r for r in found if r["experiment"] == "siamese"]) is None
    for form in tables.FORMATS:
        results.run([str(tmp_path), "--cited", f"--format={form}"])
    out = capsys.readouterr().out
    # No number of ours below a cited heading, nor the other way round.
    ours, theirs = out.split("Cited, not measured here")[:2]
    assert "90.00" in ours
    assert "99.53" not in ours
    assert "90.00" not in theirs.split("\\begin{table}")[0]


# Pages


PAGE = "# Title\n\nbefore\n\n<!-- t -->\noutdated\n<!-- end t -->\n\nafter\n"


@pytest.mark.parametrize("more", [[], ["--baseline=softmax", "--cited"], ["--metric=/auc"]])
def test_a_page_shows_what_its_csv_gives(tmp_path, more):
    make_sweep(tmp_path / "runs", {"arcface": [0.9, 0.91], "softmax": [0.88, 0.9]})
    page, out = tmp_path / "page.md", tmp_path / "results" / "t.csv"
    page.write_text(PAGE)
    results.run([str(tmp_path / "runs"), f"--out={out}", f"--update={page}", *more])
    shown = page.read_text()
    assert shown.startswith("# Title\n\nbefore\n\n<!-- t -->\n<!-- python -m launch.results ")
    assert shown.endswith("<!-- end t -->\n\nafter\n")
    assert "outdated" not in shown
    assert "| `arcface` |" in shown
    assert results.stale(page, out.parent) == []
    # The command in the page does the same again.
    command = re.search(r"<!-- python -m launch\.results (.+) -->", shown)[1]
    results.run(shlex.split(command))
    assert page.read_text() == shown
    # A figure that is changed on either side is found.
    digits = re.search(r"0\.9\d{3}|9\d\.\d\d", shown)[0]
    page.write_text(shown.replace(digits, "98.76"))
    assert results.stale(page, out.parent) == ["t"]
    page.write_text(shown)
    lines = [{**row, "synthetic/accuracy": 0.5, "synthetic/auc": 0.5} for row in
             results.read_csv(out)]  # fmt: skip
    out.write_text(row_module.to_csv(lines))
    assert results.stale(page, out.parent) == ["t"]


def test_marks_must_be_there(tmp_path):
    make_sweep(tmp_path / "runs", {"arcface": [0.9]})
    page, out = tmp_path / "page.md", tmp_path / "t.csv"
    arguments = [str(tmp_path / "runs"), f"--out={out}", f"--update={page}"]
    for text in ("nothing", "<!-- t -->", "<!-- end t -->\n<!-- t -->"):
        page.write_text(text)
        with pytest.raises(
            ValueError, match=r"page\.md lacks <!-- t --> or <!-- end t --> after it"
        ):
            results.run(arguments)
        assert page.read_text() == text
    page.write_text("<!-- t -->\n| old |\n")
    with pytest.raises(ValueError, match=r"page\.md lacks"):
        results.stale(page, tmp_path)
    page.write_text("<!-- t -->\ntyped by hand\n<!-- end t -->\n")
    assert results.stale(page, tmp_path) == ["t"]


@pytest.mark.parametrize(
    ("page", "tables"),
    [
        ("README.md", {"study_embedded", "study_lfw"}),
        ("docs/results.md", {"losses_embedded", "study_grid"}),
    ],
)
def test_the_pages_show_their_tables(page, tables):
    text = (ROOT / page).read_text()
    assert tables <= set(re.findall(r"<!-- end (\w+) -->", text))
    assert all((results.RESULTS / f"{name}.csv").exists() for name in tables)
    assert results.stale(ROOT / page) == []


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(results.RESULTS.glob("*.csv")) if row_module.is_table(p)],
    ids=lambda path: path.stem,
)
def test_every_accuracy_has_the_untrained_one_beside_it(path):
    measured, lacking = 0, []
    for row in results.read_csv(path):
        for name in row:
            trained = name.endswith("/accuracy") and not name.startswith("untrained/")
            if comparison.kind_of(row) == "done" and trained:
                measured += 1
                if row_module.figure(row, f"untrained/{name}") is None:
                    lacking.append((row["experiment"], row["overrides"], row["seed"]))
    assert measured
    assert not lacking


# Mistakes and damaged files


def test_names_and_options(tmp_path):
    make_run(tmp_path / "a")
    for arguments, message in (
        (["--update=page.md"], "need a CSV: give --name NAME or --out"),
        (["--append"], "need a CSV"),
        (["--name=../x"], "use letters, digits"),
        (["--nmae=x"], "unrecognized arguments"),
        (["--format=word"], "invalid choice: 'word'"),
    ):
        with pytest.raises(ValueError, match=message):
            results.run([str(tmp_path), *arguments])


def test_errors_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["results", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        results.main()
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err == (
        f"marginface: {tmp_path} holds no run: give run folders, folders of them, or a CSV\n"
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", '{"loss":', "config.json is not JSON"),
        ("config.json", "[]", "config.json is not a JSON object"),
        ("config.json", "[" * 100_000, "config.json is not JSON"),
        ("config.json", "{}", "its config has no seed"),
        ("config.json", b"\xff\xfe{}", "config.json is not text"),
        ("origin.json", "{", "origin.json is not JSON"),
        ("origin.json", '{"overrides": 3}', "origin.json is damaged"),
    ],
)
def test_damaged_runs_are_named(tmp_path, name, text, message):
    folder = make_run(tmp_path / "one")
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        results.gather([tmp_path])
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("text", ['{"synthetic/acc', '{"a":' * 100_000])
def test_a_damaged_summary_is_a_failed_run(tmp_path, text):
    folder = make_run(tmp_path / "one")
    (folder / "metrics.jsonl").write_text("5\n")
    (row,) = results.gather([folder])
    assert row["status"].startswith("failed: metrics.jsonl is damaged")
    (folder / "metrics.jsonl").unlink()
    (folder / "summary.json").write_text(text)
    (row,) = results.gather([folder])
    assert row["status"].startswith("failed: summary.json is damaged")
    assert "synthetic/accuracy" not in row


def test_odd_figures_do_no_harm(tmp_path):
    folder = make_run(tmp_path / "one")
    odd = {"a/text": "x", "a/list": [1], "a/flag": True, "seed": 99, "status": 3}
    odd |= {"a/huge": 10**400, "a/inf": float("inf"), "a/whole": 7}
    summary = json.loads((folder / "summary.json").read_text()) | odd
    (folder / "summary.json").write_text(json.dumps(summary))
    (row,) = results.gather([folder])
    assert (row["seed"], row["status"]) == (0, "done")
    assert {k: v for k, v in row.items() if k.startswith("a/")} == {
        "a/huge": None,
        "a/inf": None,
        "a/whole": 7,
    }
    (tmp_path / "t.csv").write_text(row_module.to_csv([row]))
    assert results.read_csv(tmp_path / "t.csv") == [row]


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "summary.json"])
def test_large_files_are_not_read(tmp_path, name):
    folder = make_run(tmp_path / "one")
    with (folder / name).open("r+b") as file:
        file.truncate(row_module._LARGEST + 1)  # takes no room on the disk
    with pytest.raises(ValueError, match=f"{name} is larger than 64 MiB"):
        results.gather([tmp_path])


def test_a_sweep_names_only_its_own_folders(tmp_path):
    make_run(tmp_path / "private")
    (tmp_path / "sweep").mkdir()
    sweep = {"experiment": "a", "variant": "", "units": {"../private": {"seed": 0}}}
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(sweep))
    with pytest.raises(ValueError, match="is no name of a run folder"):
        results.gather([tmp_path / "sweep"])
    (tmp_path / "sweep" / "sweep.json").write_text('{"units": 3}')
    with pytest.raises(ValueError, match=r"sweep\.json is damaged"):
        results.gather([tmp_path / "sweep"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "no column 'experiment'"),
        (lambda text: text.replace("config_hash", "hash"), "no column 'config_hash'"),
        (lambda text: text.replace("time/wall_s", "loss/total"), "names a column twice"),
        (lambda text: text + "arcface,data=small\n", "row 3 has 2 cells"),
        (lambda text: text.replace(",30.0,", ",fast,"), "time/wall_s: 'fast' is not a number"),
        (lambda text: text.replace(",0,done", ",0.5,done"), "seed: 0.5 is not a whole number"),
        (lambda text: text.replace(",0,done", ",,done"), "seed: '' is not a number"),
        (lambda text: text + '"never closed', "is not a table of runs"),
    ],
)
def test_damaged_tables_are_named(tmp_path, change, message):
    make_run(tmp_path / "one")
    path = tmp_path / "t.csv"
    text = row_module.to_csv(results.gather([tmp_path]))
    path.write_text(change(text))
    with pytest.raises(ValueError, match=message) as caught:
        results.gather([path])
    assert str(path) in str(caught.value)


def test_old_tables_are_refused_by_name():
    with pytest.raises(ValueError, match=r"synthetic\.csv has no column 'overrides'"):
        results.gather([ROOT / "experiments/results/synthetic.csv"])
