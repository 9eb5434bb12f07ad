"""Two versions' figures: what is equal, what is not, and what cannot be compared."""

import csv
import json
import math
import subprocess

import numpy as np
import pytest

from benchmarks import same_numbers

STEPS = 3
LOSS = float(np.float32(15.2626))
NEXT = float(np.nextafter(np.float32(LOSS), np.float32(99)))


def lines(**first):
    """The lines of a run's metrics.jsonl; `first` are more figures of step 1."""
    found = [{"step": 0, "synthetic/auc": 0.7}]
    for step in range(1, STEPS + 1):
        found.append({"step": step, "loss/total": LOSS / step, "train/gradient_norm": 2.5})
        found[-1]["time/examples_per_s"] = np.random.default_rng().random()
    found[1] |= first
    return [*found, {"step": STEPS, "synthetic/auc": 0.8}]


def folder_of(path, found):
    """A run folder with these lines."""
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    return path


def compared(tmp_path, first, second):
    sides = [folder_of(tmp_path / name, found) for name, found in (("a", first), ("b", second))]
    return same_numbers.compare("arcface", *map(same_numbers.read_figures, sides), STEPS)


def test_equal_figures_are_equal_whatever_the_time(tmp_path):
    row = compared(tmp_path, lines(), lines())
    assert row.equal
    assert (row.figures, row.result) == (2 * STEPS + 2, "equal")


def test_the_last_bit_counts(tmp_path):
    row = compared(tmp_path, lines(**{"loss/total": LOSS}), lines(**{"loss/total": NEXT}))
    assert not row.equal
    assert (row.differing, row.step, row.figure, row.ulps) == (1, "1", "loss/total", "1")
    assert (float(row.first), float(row.second)) == (LOSS, NEXT)
    assert row.result.startswith("1 differ, first step 1 loss/total: ")


def test_the_first_difference_is_that_of_the_earliest_step(tmp_path):
    second = lines()
    second[3]["loss/total"] = second[0]["synthetic/auc"] = 0.5
    row = compared(tmp_path, lines(), second)
    assert (row.differing, row.step, row.figure) == (2, "0", "synthetic/auc")


@pytest.mark.parametrize("sides", [(False, True), (True, False), (True, True)])
def test_a_missing_step_differs_on_both_sides_too(sides, tmp_path):
    found = [[x for x in lines() if x["step"] != 2] if missing else lines() for missing in sides]
    row = compared(tmp_path, *found)
    assert (row.equal, row.step, row.figure) == (False, "2", "loss/total")
    assert [not text for text in (row.first, row.second)] == list(sides)
    assert "nothing" in row.result


def test_a_term_on_one_side_differs(tmp_path):
    row = compared(tmp_path, lines(), lines(**{"loss/center": 0.1}))
    assert (row.figure, row.first, row.second) == ("loss/center", "", "0.1")


def test_what_is_not_a_number_is_equal_to_itself_alone(tmp_path):
    nan = {"loss/total": math.nan}
    assert compared(tmp_path, lines(**nan), lines(**nan)).equal
    row = compared(tmp_path / "again", lines(**nan), lines())
    assert (row.equal, row.first, row.ulps) == (False, "nan", "")


@pytest.mark.parametrize(
    ("a", "b", "apart"),
    [
        (1.0, 1.0, 0),
        (1.0, float(np.nextafter(np.float32(1), np.float32(2))), 1),
        (1.0, math.nextafter(1.0, 2.0), 1),
        (0.0, -0.0, 1),
        (float(np.finfo(np.float32).smallest_subnormal), -0.0, 2),
        (1e300, math.nextafter(math.nextafter(1e300, 0.0), 0.0), 2),
        (-1.0, -1.0 - 2**-23, 1),
        (1.0, math.nan, None),
        (math.inf, float(np.finfo(np.float32).max), 1),
    ],
)
def test_ulps_are_counted(a, b, apart):
    assert same_numbers.ulps(a, b) == same_numbers.ulps(b, a) == apart


def test_a_broken_folder_is_named(tmp_path):
    path = folder_of(tmp_path / "a", lines())
    (path / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(ValueError, match="no whole metrics"):
        same_numbers.read_figures(path)


# ---- versions ------------------------------------------------------------------------------------


MAIN = """
import json, pathlib, sys
name = pathlib.Path(sys.argv[1].partition(":")[0]).stem
steps = next(int(w.partition("=")[2]) for w in sys.argv if w.startswith("--config.steps="))
if name == "broken":
    sys.exit("marginface: no face was found")
folder = pathlib.Path(sys.argv[-1].partition("=")[2])
folder.mkdir()
with open(folder / "metrics.jsonl", "w") as file:
    for step in range(1, steps + 1):
        print(json.dumps({"step": step, "loss/total": LOSS / step}), file=file)
for left in ("config.json", "summary.json"):
    (folder / left).write_text("{}")
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of two commits, "one" and "two", whose runs take no time."""
    root = tmp_path / "repository"
    identity = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false"]

    def write(loss, *experiments):
        for room in same_numbers.PARTS:
            (root / room).mkdir(parents=True, exist_ok=True)
        (root / "marginface" / "__init__.py").write_text("")
        (root / "marginface" / "main.py").write_text(f"LOSS = {loss}\n{MAIN}")
        (root / "experiments" / "common.py").write_text("def base(arg): ...\n")
        for name in experiments:
            (root / "experiments" / f"{name}.py").write_text("def get_config(arg=None): ...\n")

    def commit(tag):
        for words in (["add", "-A"], [*identity, "commit", "-qm", tag], ["tag", tag]):
            subprocess.run(["git", *words], cwd=root, check=True)

    try:
        subprocess.run(["git", "init", "-q", str(root)], check=True)
    except OSError:
        pytest.skip("no git")
    write(1.5, "arcface", "broken")
    commit("one")
    write(1.5, "new")
    commit("two")
    monkeypatch.setattr(same_numbers, "ROOT", root)
    return root, write


def command(*words, tmp_path):
    """The exit code, and the rows as a CSV has them by experiment."""
    out = tmp_path / "rows.csv"
    kept = ["--answers", str(tmp_path / "answers"), "--out", str(out), "--steps", "2"]
    code = same_numbers.run([*words, *kept])
    with out.open(newline="") as file:
        return code, {row["experiment"]: row for row in csv.DictReader(file)}


def test_commits_are_run_and_what_cannot_be_compared_is_named(checkout, tmp_path, capsys):
    code, rows = command("one", "two", tmp_path=tmp_path)
    assert code == 1
    assert rows["arcface"]["differing"] == "0"
    assert rows["arcface"]["problem"] == ""
    assert rows["new"]["problem"] == "not in one"
    failure = "exit code 1: marginface: no face was found"
    assert rows["broken"]["problem"] == f"fails in one: {failure}; fails in two: {failure}"
    assert "arcface           2  equal" in capsys.readouterr().out
    assert command("one", "two", "--only", "arcface", tmp_path=tmp_path)[0] == 0
    assert "one arcface: kept" in capsys.readouterr().err


def test_the_working_tree_is_what_it_is_now(checkout, tmp_path):
    root, write = checkout
    only = ("--only", "arcface")
    assert command("one", *only, tmp_path=tmp_path)[0] == 0
    write(1.25)
    code, rows = command("one", *only, tmp_path=tmp_path)
    assert (code, rows["arcface"]["figure"], rows["arcface"]["ulps"]) == (
        1,
        "loss/total",
        "2097152",
    )
    write(1.5)
    (root / "experiments" / "untracked.py").write_text("def get_config(arg=None): ...\n")
    code, rows = command("one", tmp_path=tmp_path)
    assert (code, rows["untracked"]["problem"]) == (1, "not in one")


def test_other_settings_have_answers_of_their_own(checkout, tmp_path):
    for words in ([], ["--variant="], ["--config.seed=1"]):
        assert command("one", "two", "--only", "arcface", *words, tmp_path=tmp_path)[0] == 0
    assert len(list((tmp_path / "answers").iterdir())) == 6


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "'nowhere' is no commit here"),
        (["one", "one"], "one and one are the same commit"),
        (["one", "two", "--only", "arcfoce"], "no experiment arcfoce"),
        (["one", "two", "--steps", "0"], "--steps 0"),
        (["one", "two", "--config.steps=9"], "--steps says"),
        (["one", "two", "--stops=9"], "unknown argument '--stops=9'"),
    ],
)
def test_mistakes_are_one_line(words, expected, checkout, tmp_path):
    with pytest.raises(ValueError, match=expected) as caught:
        same_numbers.run([*words, "--answers", str(tmp_path / "answers")])
    assert "\n" not in str(caught.value)


def test_no_checkout_and_no_git_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is no git checkout"):
        same_numbers.resolve("HEAD", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="git cannot be started"):
        same_numbers.resolve("HEAD", tmp_path)
