"""Searches: ranges that fit, equal budgets, the same trials after a stop, one look at the test."""

import json
import pathlib
import re

import pytest
from commands import SMALL, environment

from experiments import common
from marginface import config as configs
from marginface.launch import search as searches
from marginface.launch.search import Budget, Range, Search, Space, Stopped, propose, search
from marginface.training import objective

FILES = sorted(
    p
    for p in pathlib.Path(common.__file__).parent.glob("*.py")
    if p.name not in ("__init__.py", "common.py")
)
ARCFACE, COSFACE = "experiments/arcface.py:data=small", "experiments/cosface.py:data=small"
RATE, M = "optimizer.learning_rate", "loss.margin_kw.m"


# --- ranges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("data", ["synthetic", "small", "lfw", "folder", "casia"])
def test_every_experiment_has_ranges_of_traced_numbers_around_its_defaults(path, data):
    """Space itself checks keys, types and defaults; traced numbers never recompile."""
    module, variant = configs.find_experiment(f"{path}:data={data}")
    config = configs.load(f"{path}:data={data}")
    space = Space(config)
    module.search(space, variant)
    shared = Space(config)
    common.search(shared, variant)
    assert set(shared.ranges) == {RATE, "optimizer.weight_decay"}
    assert list(space.ranges.items())[:2] == list(shared.ranges.items()), "first, so drawn alike"
    for key, span in space.ranges.items():
        changed = configs.load(f"{path}:data={data}")
        configs.override(changed, {key: span.values[-1]})
        assert objective.static(changed) == objective.static(config), key


@pytest.mark.parametrize(
    ("declare", "expected"),
    [
        (lambda s: s.uniform("loss.margin_kv.m", 0.1, 0.5), r"did you mean 'loss\.margin_kw\.m'"),
        (lambda s: s.uniform("model.embedding_dim", 64.0, 512.0), "search floats only"),
        (lambda s: s.uniform(M, 0, 1), "search floats only"),
        (lambda s: s.uniform(M, 0.4, 0.5), "'loss.margin_kw.m'=0.3 is not from 0.4 to 0.5: widen"),
        (lambda s: s.uniform(M, 0.5, 0.1), "is not from 0.5 to 0.1"),
        (lambda s: s.log_uniform(M, 0.0, 0.5), "give a lower end above 0"),
        (lambda s: s.choice(M, (0.1, 0.2)), "=0.3 is none of"),
        (lambda s: (s.uniform(M, 0.1, 0.5), s.uniform(M, 0.1, 0.4)), "has a range already"),
    ],
)
def test_a_range_that_does_not_fit_is_named(declare, expected):
    with pytest.raises(ValueError, match=expected):
        declare(Space(configs.load(ARCFACE)))


# --- proposals -----------------------------------------------------------------------------------

RANGES = {
    RATE: Range("log_uniform", (1e-4, 1e-1)),
    "m": Range("uniform", (0.05, 0.6)),
    "k": Range("choice", (2.0, 3.0, 4.0)),
}


def test_a_proposal_follows_from_its_arguments_alone():
    told = []
    for number in range(1, 15):
        values = propose(RANGES, told, number=number, seed=0)
        assert values == propose(RANGES, told, number=number, seed=0)
        assert values != propose(RANGES, told, number=number, seed=1)
        for key, (kind, ends) in RANGES.items():
            assert ends[0] <= values[key] <= ends[-1]
            assert kind != "choice" or values[key] in ends
            assert (
                len(f"{values[key]:.12g}".strip("0.").replace(".", "")) <= 4 or values[key] < 1e-3
            )
        told.append((values, 1 - abs(values["m"] - 0.3)))
    assert len({tuple(v.items()) for v, _ in told}) == 14


def test_what_was_learned_guides_the_later_trials():
    told = [
        ({RATE: 0.01, "m": 0.05 + 0.01 * i, "k": 2.0}, 1 - abs(0.01 * i - 0.25)) for i in range(50)
    ]
    found = [propose(RANGES, told, number=n, seed=0)["m"] for n in range(50, 60)]
    assert sum(abs(m - 0.3) < 0.15 for m in found) >= 8


def test_experiments_that_share_a_range_draw_alike_from_it_at_first():
    one, other = ({RATE: RANGES[RATE], name: RANGES[name]} for name in ("m", "k"))
    draws = [[propose(r, [], number=n, seed=0)[RATE] for n in range(1, 6)] for r in (one, other)]
    assert draws[0] == draws[1]


# --- searches, with a runner that does not train --------------------------------------------------


class Runner:
    """Leaves what a run would: an accuracy that is best at m = 0.33, or a divergence above 0.5."""

    def __init__(self, *, stop_after=None):
        self.ran, self.calls, self.stop_after = [], [], stop_after

    def __call__(self, units):
        self.calls.append([unit.name for unit in units])
        for unit in units:
            if len(self.ran) == self.stop_after:
                raise KeyboardInterrupt
            self.ran.append(unit)
            unit.folder.mkdir(parents=True, exist_ok=True)
            (unit.folder / "config.json").write_text(configs.to_json(unit.config))
            m, validating = unit.overrides[M], unit.overrides["data.held_out"] > 0
            if validating and m > 0.5:
                stopped = {"code": 3, "message": "step 7: loss/total not finite"}
                (unit.folder / "stopped.json").write_text(json.dumps(stopped))
            else:
                name = "validation" if validating else "synthetic"
                accuracy = 0.9 - abs(m - 0.33) / 10 + unit.config.seed / 1000
                summary = {f"{name}/accuracy": accuracy, f"untrained/{name}/accuracy": 0.7}
                (unit.folder / "summary.json").write_text(json.dumps(summary))


def make(root, *, experiments=(ARCFACE, COSFACE), changes=None, **budget):
    chosen = Budget(**({"held_out": 10} | budget))
    return [Search(e, root=root, budget=chosen, changes=changes) for e in experiments]


def read(root, name="arcface-data=small"):
    return json.loads((root / name / "search" / "search.json").read_text())


def test_every_experiment_has_the_same_budget_and_the_test_is_seen_last(tmp_path, capsys):
    runner = Runner()
    both = make(tmp_path)
    search(both, trials=12, seeds=3, run=runner)
    assert len(runner.ran) == 2 * (12 + 3)
    held_out = [unit.config.data.held_out for unit in runner.ran]
    assert held_out == [10] * 24 + [0] * 6
    assert {unit.config.seed for unit in runner.ran[:24]} == {0}
    assert [unit.config.seed for unit in runner.ran[24:]] == [0, 1, 2] * 2
    assert runner.calls[0] == ["trial=000", "trial=000"], "side by side"
    assert runner.ran[0].overrides[M] == 0.3, "trial 0 is the file's own setting"
    arcface, cosface = ([u for u in runner.ran if u.experiment == e] for e in (ARCFACE, COSFACE))
    assert arcface[3].overrides[RATE] == cosface[3].overrides[RATE]
    found = read(tmp_path)
    assert found["budget"]["trials"] == 12
    assert found["budget"]["held_out"] == 10
    assert found["ranges"][M] == ["uniform", 0.05, 0.6]
    done = [t for t in found["trials"] if t["state"] == "done"]
    assert found["best"] == max(done, key=lambda t: t["accuracy"])
    assert [u.overrides[M] for u in arcface[12:]] == [found["best"]["values"][M]] * 3
    assert arcface[12].folder.name == f"best={found['best']['number']:03},seed=0"
    assert set(found["test"]) == {"0", "1", "2"}
    lines = searches.table(both).splitlines()
    assert len(lines) == 4
    assert "| arcface-data=small | 12" in lines[2]
    assert "± 0.10 (3 seeds)" in lines[2]


def test_a_diverged_trial_is_spent_told_as_the_worst_and_not_run_again(tmp_path):
    runner = Runner()
    (one,) = make(tmp_path, experiments=[ARCFACE])
    search([one], trials=14, seeds=0, run=runner)
    diverged = [t for t in read(tmp_path)["trials"] if t["state"] == "diverged"]
    assert diverged
    assert len(runner.ran) == 14
    assert all(t["accuracy"] is None and "not finite" in t["why"] for t in diverged)
    assert all(searches._score(t) == 0.0 for t in diverged)
    search(make(tmp_path, experiments=[ARCFACE]), trials=14, seeds=0, run=pytest.fail)
    assert f"14, {len(diverged)} diverged |" in searches.table([one])
    assert searches.table([one]).endswith("| not run |")


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("stop_after", [0, 1, 7, 17, 29])
def test_a_search_that_was_stopped_ends_with_the_same_trials(tmp_path, batch, stop_after):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    search(make(whole, batch=batch), trials=14, seeds=2, run=Runner())
    first, second = Runner(stop_after=stop_after), Runner()
    with pytest.raises(KeyboardInterrupt):
        search(make(cut, batch=batch), trials=14, seeds=2, run=first)
    search(make(cut, batch=batch), trials=14, seeds=2, run=second)
    for name in ("arcface-data=small", "cosface-data=small"):
        assert read(whole, name) == read(cut, name)
    ran = [unit.folder for unit in [*first.ran, *second.ran]]
    assert len(ran) == len(set(ran)) == 2 * (14 + 2), "nothing runs twice"


def test_more_trials_go_on_from_those_there_are(tmp_path):
    search(make(tmp_path / "a", batch=4), trials=6, seeds=0, run=Runner())
    search(make(tmp_path / "a", batch=4), trials=11, seeds=0, run=Runner())
    search(make(tmp_path / "b", batch=4), trials=11, seeds=0, run=Runner())
    assert read(tmp_path / "a") == read(tmp_path / "b")


def test_more_seeds_may_follow_but_no_trials_once_the_test_was_seen(tmp_path):
    search(make(tmp_path), trials=3, seeds=1, run=Runner())
    runner = Runner()
    search(make(tmp_path), trials=3, seeds=2, run=runner)
    assert [unit.config.seed for unit in runner.ran] == [1, 1]
    with pytest.raises(ValueError, match=r"the test set was seen after 3 trials"):
        search(make(tmp_path), trials=4, seeds=2, run=pytest.fail)
    with pytest.raises(ValueError, match=r"has 3 trials, more than --trials 2"):
        search(make(tmp_path), trials=2, seeds=2, run=pytest.fail)


def test_when_all_trials_diverge_nothing_is_tested(tmp_path):
    search(make(tmp_path, changes={"steps": "1"}), trials=1, seeds=1, run=diverge)
    (folder,) = tmp_path.glob("arcface-*")
    found = read(tmp_path, folder.name)
    assert (found["best"], found["test"]) == (None, {})
    again = make(tmp_path, changes={"steps": "1"})
    assert "| 1, 1 diverged | diverged |  | not run |" in searches.table(again)


def diverge(units):
    for unit in units:
        unit.folder.mkdir(parents=True)
        (unit.folder / "stopped.json").write_text('{"code": 3, "message": "not finite"}')


@pytest.mark.parametrize(
    ("code", "error", "expected"),
    [
        (2, ValueError, "trial=000: failed, data.held_out=10: hold out fewer"),
        (75, Stopped, "trial=000: data.held_out"),
        (None, ValueError, "trial=000: not run"),
    ],
)
def test_a_unit_that_did_not_end_stops_the_search(tmp_path, code, error, expected):
    def fail(units):
        for unit in units if code else []:
            unit.folder.mkdir(parents=True)
            stopped = {"code": code, "message": "data.held_out=10: hold out fewer"}
            (unit.folder / "stopped.json").write_text(json.dumps(stopped))

    with pytest.raises(error, match=expected):
        search(make(tmp_path), trials=3, seeds=1, run=fail)
    for folder in tmp_path.glob("*/search/trial=000/stopped.json"):
        folder.unlink()
    search(make(tmp_path), trials=3, seeds=1, run=Runner())


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"held_out": 20}, "was begun with held_out=10, not 20: use another --runs"),
        ({"batch": 2}, "was begun with batch=1, not 2"),
        ({"sampler_seed": 1}, "was begun with sampler_seed=0, not 1"),
    ],
)
def test_a_search_of_another_budget_is_not_continued(tmp_path, changed, expected):
    search(make(tmp_path), trials=2, seeds=0, run=Runner())
    with pytest.raises(ValueError, match=expected):
        make(tmp_path, **changed)


def test_other_ranges_are_not_continued(tmp_path):
    text = "from experiments.arcface import *\nfrom experiments import common\n\n"
    text += "def search(space, arg=None):\n    common.search(space, arg)\n"
    path = tmp_path / "mine.py"
    path.write_text(text)
    search(make(tmp_path, experiments=[str(path)]), trials=1, seeds=0, run=lambda u: diverge(u))
    path.write_text(text + "    space.uniform('loss.margin_kw.m', 0.1, 0.5)\n")
    with pytest.raises(ValueError, match="was begun with other ranges"):
        make(tmp_path, experiments=[str(path)])


@pytest.mark.parametrize("damage", ["", "[]", '{"budget": {}}', '"trials"', "{"])
def test_a_damaged_search_json_is_named(tmp_path, damage):
    search(make(tmp_path), trials=2, seeds=0, run=Runner())
    path = tmp_path / "arcface-data=small" / "search" / "search.json"
    path.write_text(damage)
    with pytest.raises(ValueError, match=r"search\.json is damaged: remove it"):
        make(tmp_path)
    path.unlink()
    search(make(tmp_path), trials=2, seeds=0, run=pytest.fail)  # the run folders are used again


def test_a_folder_with_a_run_of_other_values_is_not_taken_for_the_trial(tmp_path):
    search(make(tmp_path), trials=3, seeds=0, run=Runner())
    (tmp_path / "arcface-data=small" / "search" / "search.json").unlink()
    (tmp_path / "cosface-data=small" / "search" / "search.json").unlink()
    with pytest.raises(ValueError, match=r"trial=001 holds a run with another config \(.* is "):
        search(make(tmp_path, sampler_seed=5), trials=3, seeds=0, run=pytest.fail)


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--trials", "0"], "--trials 0: give 1 or more"),
        (["--held_out", "3"], "--held_out 3: give 4 or more"),
        (["--seeds", "-1"], "--seeds -1: give 0 or more"),
        (["--trial", "3"], "unknown argument '--trial'; did you mean '--trials'"),
        (["--config.loss.margin_kw.m=0.2"], "the search of .* sets it itself"),
        (["--config.batch_size=0"], "config.batch_size=0: give 1 or more"),
        (["--config.seed=3"], "--config.seed: the search"),
        (["--config.batch_sise=3"], "did you mean 'batch_size'"),
        (["--backend", "cloud"], "invalid choice"),
    ],
)
def test_mistakes_end_in_one_line(arguments, expected, capsys, monkeypatch, tmp_path):
    words = ["search", "--config", ARCFACE, "--runs", str(tmp_path), *arguments]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as exit:
        searches.main()
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(expected, said)
    assert not list(tmp_path.iterdir())


def test_an_experiment_without_ranges_is_named(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from experiments.arcface import get_config\n")
    with pytest.raises(ValueError, match=r"mine\.py has no function search\(space, arg\)"):
        make(tmp_path, experiments=[str(path)])


def test_a_dry_run_shows_ranges_and_commands_and_writes_nothing(tmp_path, capsys):
    words = ["--config", ARCFACE, COSFACE, "--trials", "5", "--held_out", "12", "--dry_run"]
    searches.run([*words, "--runs", str(tmp_path), "--config.steps=7"])
    out = capsys.readouterr().out
    assert out.count("# experiments/") == 2
    assert "#   loss.margin_kw.m: uniform 0.05, 0.6" in out
    assert "--config.steps=7" in out
    assert "--config.data.held_out=12" in out
    assert "# 16 runs at most" in out
    assert not list(tmp_path.iterdir())


def test_a_real_search_of_one_trial_and_one_test(tmp_path, monkeypatch, capsys, cache):
    monkeypatch.chdir(pathlib.Path(common.__file__).parents[1])
    for name, value in environment(cache).items():
        monkeypatch.setenv(name, value)
    words = [w for w in SMALL if not w.startswith(("--config=", "--config.steps"))]
    arguments = ["--config", "experiments/arcface.py", "--trials", "2", "--seeds", "1"]
    arguments += ["--held_out", "4", "--runs", str(tmp_path), *words, "--config.steps=6"]
    searches.run(arguments)
    (folder,) = tmp_path.glob("arcface-*")
    found = read(tmp_path, folder.name)
    assert [t["state"] for t in found["trials"]] == ["done", "done"]
    assert set(found["test"]["0"]) == {"synthetic"}
    summary = json.loads((folder / "search" / "trial=001" / "summary.json").read_text())
    assert not [key for key in summary if "synthetic/" in key], "a trial sees no test set"
    assert "| 2 |" in capsys.readouterr().out
