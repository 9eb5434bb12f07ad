"""Units of a sweep: their names, their keys, how far they are."""

import json

import pytest
import tiny_sweep

from marginface import main
from marginface.launch import units
from marginface.runs import folder as run_folder
from marginface.runs import plan


def expand(folder, text=None, **arguments):
    path = tiny_sweep.write(folder)
    if text is not None:
        (folder / "tiny.py").write_text(
            (folder / "tiny.py").read_text().split("def sweep")[0] + text
        )
    return units.expand(path, root=folder / "runs", **arguments)


def test_every_point_with_every_seed_named_by_its_overrides(tmp_path):
    found = expand(tmp_path, seeds=2)
    assert [unit.name for unit in found[:5]] == [
        "m=0,exclusive.weight=0,seed=0",
        "m=0,exclusive.weight=1,seed=0",
        "m=0.3,exclusive.weight=0,seed=0",
        "m=0.3,exclusive.weight=1,seed=0",
        "m=0,exclusive.weight=0,seed=1",
    ]
    last = found[-1]
    assert len(found) == 8
    assert last.config.loss.margin_kw.m == 0.3
    assert (last.config.regularizers.exclusive.weight, last.config.seed) == (1.0, 1)
    assert last.folder == tmp_path / "runs/tiny" / last.name


def test_the_command_is_the_one_a_user_would_type(tmp_path):
    from marginface import config as configs

    unit = expand(tmp_path)[3]
    assert unit.command()[:3] == ["python", "-m", "marginface.main"]
    options, overrides = main.parse(unit.command()[3:])
    config = configs.load(options.config)
    configs.override(config, configs.from_text(config, overrides))
    assert configs.to_json(config) == configs.to_json(unit.config)
    assert options.workdir == unit.folder


def test_without_its_grid_an_experiment_is_one_unit(tmp_path):
    (unit,) = expand(tmp_path, grid=False)
    assert (unit.name, unit.overrides) == ("seed=0", {"seed": 0})
    (unit,) = expand(tmp_path, grid=False, seeds=3, changes={"seed": "4"})
    assert (unit.name, unit.overrides) == ("seed=4", {"seed": 4})


def test_changes_hold_for_all_units_and_have_a_folder_of_their_own(tmp_path):
    plain, changed = expand(tmp_path), expand(tmp_path, changes={"steps": "7", "data.workers": "1"})
    assert [unit.name for unit in changed] == [unit.name for unit in plain]
    assert {unit.config.steps for unit in changed} == {7}
    assert changed[0].folder.parent != plain[0].folder.parent
    tracked = expand(tmp_path, changes={"tensorboard": "True", "data.workers": "1"})
    assert tracked[0].folder == plain[0].folder
    with pytest.raises(ValueError, match=r"--config\.loss\.margin_kw\.m: .* use --filter"):
        expand(tmp_path, changes={"loss.margin_kw.m": "0.1"})


@pytest.mark.parametrize(
    ("variant", "changes", "sweep", "one_run"),
    [
        ("", {}, "arcface", "arcface"),
        (":data=lfw,dim=8", {}, "arcface-data=lfw,dim=8", "arcface-data=lfw-dim=8"),
        (":root=../a b", {}, "arcface-root=..-a-b", "arcface-root=..-a-b"),
        ("", {"loss.scale": "8.0"}, "arcface-8683ef", "arcface-8683ef"),
        ("", {"tensorboard": "True"}, "arcface", "arcface-42a900"),
    ],
)
def test_run_folders_have_the_names_they_always_had(variant, changes, sweep, one_run):
    experiment = f"experiments/arcface.py{variant}"
    assert plan.folder_name(experiment, changes) == sweep
    assert plan.folder_name(experiment, changes, of_one_run=True) == one_run
    assert main.default_workdir(experiment, changes).as_posix() == f"runs/{one_run}"


def test_a_seed_of_its_own_runs_once(tmp_path):
    text = "def sweep(add, arg=None):\n    add({'seed': 5})\n    add({'loss.scale': 8.0})\n"
    names = [unit.name for unit in expand(tmp_path, text, seeds=2)]
    assert names == ["seed=5", "scale=8,seed=0", "scale=8,seed=1"]


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("{'loss.margin_kv.m': 0.1}", r"tiny\.py, sweep: .*'loss\.margin_kw\.m'"),
        ("{'loss.margin_kw.m': 'wide'}", "is str, not float"),
        ("{'loss.scale': 8.0}", r"scale=8,seed=0 stands there twice"),
    ],
)
def test_a_bad_point_is_named_before_anything_starts(tmp_path, point, message):
    text = f"def sweep(add, arg=None):\n    add({{'loss.scale': 8.0}})\n    add({point})\n"
    with pytest.raises(ValueError, match=message):
        expand(tmp_path, text)
    assert not (tmp_path / "runs").exists()


def test_an_experiment_without_a_sweep_says_so(tmp_path):
    with pytest.raises(ValueError, match="has no function sweep"):
        expand(tmp_path, "")


def test_filters_keep_what_fits(tmp_path):
    assert len(expand(tmp_path, filters=["m=0.3", "weight=0,1"])) == 2
    for word, message in (
        ("m", "write KEY=VALUE"),
        ("wight=1", "fits none; .*known: loss.margin_kw.m"),
        ("m=0.7", r"leaves no unit; loss.margin_kw.m is \['0', '0.3'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            expand(tmp_path, filters=[word])


def test_keys_that_end_alike_are_told_apart(tmp_path):
    text = "def sweep(add, arg=None):\n    add({'loss.scale': 8.0, 'data.kw.augment.scale': 0.1})\n"
    path = tiny_sweep.write(tmp_path)
    source = (tmp_path / "tiny.py").read_text().split("def sweep")[0]
    (tmp_path / "tiny.py").write_text(
        source.replace("config.steps", "config.data.kw.augment = {'scale': 0.0}; config.steps")
        + text
    )
    (unit,) = units.expand(path, root=tmp_path)
    assert unit.name == "loss.scale=8,augment.scale=0.1,seed=0"


def test_a_sweep_is_written_down_and_grows(tmp_path):
    plan.record(expand(tmp_path, seeds=1))
    plan.record(expand(tmp_path, seeds=2, filters=["m=0.3"]))
    content = plan.recorded(tmp_path / "runs/tiny")
    assert (content["experiment"], content["variant"]) == ("tiny", "")
    assert len(content["units"]) == 4 + 2
    assert content["units"]["m=0.3,exclusive.weight=1,seed=1"]["loss.margin_kw.m"] == 0.3
    (tmp_path / "runs/tiny/sweep.json").write_text('{"units": [1]}')
    with pytest.raises(ValueError, match=r"sweep\.json is damaged"):
        plan.recorded(tmp_path / "runs/tiny")
    plan.record(expand(tmp_path))
    assert len(plan.recorded(tmp_path / "runs/tiny")["units"]) == 4


def test_filters_know_what_a_point_does_not_set(tmp_path):
    text = "def sweep(add, arg=None):\n    add({})\n    add({'loss.scale': 8.0})\n"
    (unit,) = expand(tmp_path, text, filters=["scale=24"])
    assert unit.name == "seed=0"


def test_states(tmp_path):
    def state(**files):
        for path in tmp_path.iterdir():
            path.unlink()
        for name, content in files.items():
            (tmp_path / name.replace("_", ".")).write_text(content)
        return run_folder.state(tmp_path)

    line = json.dumps({"step": 20, "loss/total": 1.0}) + "\n"
    stopped = {"code": 3, "message": "step 21: loss/total not finite"}
    assert state() == ("not run", "", 0)
    assert state(log_txt="x\nmarginface: no data\n") == ("failed", "marginface: no data", 0)
    begun = {"config_json": "{}", "metrics_jsonl": line + '{"st'}
    assert state(**begun) == ("interrupted", "ended without a word after step 20", 20)
    assert state(**begun, stopped_json=json.dumps(stopped)) == ("diverged", stopped["message"], 20)
    assert state(**begun, stopped_json=json.dumps({"code": 75, "message": "a"}))[:2] == (
        "checkpointed",
        "a",
    )
    assert state(**begun, stopped_json=json.dumps({"code": 2, "message": "a"}))[:2] == (
        "failed",
        "a",
    )
    assert state(**begun, summary_json='{"a/accuracy": 0.9}') == ("done", "", 20)
    assert state(**begun, summary_json='{"a/accuracy": null}')[1] == "not finite: a/accuracy"
    assert state(**begun, summary_json='{"a/acc')[0] == "failed"
    for broken in ('{"loss/total": 1.0}', "[1]", '{"step": []}', "x\n" + line):
        found = state(config_json="{}", metrics_jsonl=broken)
        assert found.kind == "failed"
        assert "metrics.jsonl" in found.why
