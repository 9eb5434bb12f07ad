"""What a config says is measured: the evaluators of config.evals, and those of earlier configs."""

import json

import pytest
from ml_collections import ConfigDict

from experiments import arcface, common, groupface, triplet
from marginface import build, sharding
from marginface import config as configs
from marginface.runs import folder as run_folder
from marginface.training import step

TINY = {"identities": 12, "samples": 8, "image_size": 16}
TINY |= {"test_identities": 8, "test_samples": 4, "pairs": 32, "folds": 2}


def tiny(module=arcface, **evals):
    """An experiment's config on few small images, with further evaluators."""
    config = module.get_config()
    config.data.kw.update(TINY)
    config.evals.update(evals)
    return config


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(1)


def make(config, mesh):
    """The evaluators of a config; nothing is embedded, so there need be no network."""
    faces, test_sets = build.load_data(config)
    nothing = step.Step(None, None, None, {})
    return build.make_evaluators(config, faces, test_sets, nothing, mesh)


def kinds(evaluators):
    return [(type(e).__module__.rpartition(".")[2], e.name) for e in evaluators]


def test_the_default_measures_pairs_prototypes_and_groups(mesh):
    made = make(tiny(), mesh)
    wanted = [("verification", "synthetic"), ("geometry", "prototypes"), ("grouping", "synthetic")]
    assert kinds(made) == wanted
    assert made.ranking == "synthetic/accuracy"
    assert [entry.every for entry in made.entries] == [0, 0, 0]
    pairs, _, usage = made.entries
    assert pairs.embedded is usage.embedded  # the images are embedded once
    _, prototypes, _ = make(tiny(triplet), mesh)
    assert prototypes.prototypes is None  # there are none: it says nothing


def test_validation_takes_the_place_of_the_test(mesh):
    config = tiny()
    config.data.held_out = 4
    assert make(config, mesh).ranking == "validation/accuracy"


def test_each_entry_has_its_own_data_interval_and_score(mesh):
    config = tiny(
        groupface,
        other={
            "type": "verification",
            "data": {"name": "synthetic", "kw": TINY | {"seed": 1}},
            "every": 7,
            "score": "cosine",
            "batch_size": 6,
        },
        again={"type": "verification", "data": "synthetic", "every": 0},
        usage_there={
            "type": "grouping",
            "data": {"kw": TINY | {"seed": 1}, "name": "synthetic"},
            "batch_size": 6,
        },
    )
    config.evaluate.every = 3
    made = make(config, mesh)
    assert [(e.evaluator.name, e.every) for e in made.entries] == [
        ("again", 0),
        ("other", 7),
        ("synthetic", 3),
        ("prototypes", 3),
        ("synthetic", 3),
        ("usage_there", 3),
    ]
    again, other, pairs, _, _, there = made.entries
    assert there.embedded is other.embedded  # read once, embedded once
    assert again.embedded is pairs.embedded is not other.embedded
    assert other.evaluator.pairs is not pairs.evaluator.pairs
    assert [e.evaluator.name for e in made.due(7).entries] == ["other"]
    x = {"embedding": [[1.0, 0.0], [0.0, 1.0]], "group_feature": [[0.0], [8.0]]}
    x = {name: build.np.array(value) for name, value in x.items()}
    at = build.np.array([0]), build.np.array([1])
    assert other.evaluator.score(None, x, *at) == 0.0
    assert pairs.evaluator.score(None, x, *at) == pytest.approx(-0.2)  # 0 − 0.1 · 8^(1/3)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"data": "tests"}, r"evals\.x=\{'data': 'tests'\}: give a dict with a type"),
        ({"type": "verify"}, r"evals\.x\.type='verify' is unknown; did you mean 'verification'\?"),
        ({"type": "verification"}, r"evals\.x\.data is missing: give 'tests' for every test set"),
        (
            {"type": "verification", "data": "sinthetic"},
            r"evals\.x\.data='sinthetic' is no test set of the reader; did you mean 'synthetic'\?",
        ),
        (
            {"type": "geometry", "evry": 3},
            r"evals\.x\.evry is unknown; did you mean 'every'\? known: batch_size, data, every, sc",
        ),
        ({"type": "geometry", "every": -1}, r"evals\.x\.every=-1: give a whole number, 0 or more"),
        ({"type": "geometry", "every": 2.0}, r"evals\.x\.every=2\.0: give a whole number, 0 or m"),
        ({"type": "geometry", "batch_size": 0}, r"evals\.x\.batch_size=0: give a whole number, 1"),
        (
            {"type": "verification", "data": "tests", "score": "cosin"},
            r"evals\.x\.score='cosin' is unknown; did you mean 'cosine'\?",
        ),
        (
            {"type": "verification", "data": "tests", "score": "siamese"},
            r"evals\.x\.score='siamese' needs the term pairs\.siamese",
        ),
        (
            {"type": "verification", "data": "tests", "score": "group_aware"},
            r"evals\.x\.score='group_aware' needs model\.name='group_head'",
        ),
        (
            {"type": "verification", "data": {"nam": "lfw"}},
            r"evals\.x\.data=\{'nam': 'lfw'\}: give \{name, kw\} of a reader",
        ),
        (
            {"type": "verification", "data": {"name": "lwf"}},
            r"evals\.x\.data\.name='lwf' is unknown; did you mean 'lfw'\?",
        ),
        (
            {"type": "verification", "data": {"name": "synthetic", "kw": {"identites": 3}}},
            r"evals\.x\.data\.kw\.identites is not an argument of load; did you mean 'identities'",
        ),
        (
            {
                "type": "verification",
                "data": {"name": "synthetic", "kw": TINY | {"image_size": 24}},
            },
            r"evals\.x\.data: images of 24 × 24, and the network is trained on 16 × 16: set its im",
        ),
        ({"type": "no_file.py:Mine"}, r"evals\.x\.type='no_file\.py:Mine': no such file"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(entry, message, mesh):
    with pytest.raises(ValueError, match=message) as error:
        make(tiny(x=entry), mesh)
    assert "\n" not in str(error.value)


def test_the_shared_score_is_named_where_it_stands(mesh):
    config = tiny()
    config.evaluate.score = "siamese"
    with pytest.raises(ValueError, match=r"^evaluate\.score='siamese' needs the term pairs"):
        make(config, mesh)


# A config.json of a version before config.evals.


def earlier(config):
    """As that version wrote it."""
    values = config.to_dict()
    del values["evals"]
    return json.dumps(values, indent=2, sort_keys=True, default=list) + "\n"


@pytest.mark.parametrize("module", [arcface, groupface, triplet])
def test_an_earlier_config_measures_what_it_did(module, mesh):
    config = tiny(module)
    assert configs.from_json(earlier(config)) == configs.from_json(configs.to_json(config))
    assert kinds(make(configs.from_json(earlier(config)), mesh)) == kinds(make(config, mesh))


def test_an_experiment_of_an_earlier_version_still_runs(mesh):
    config = tiny()
    del config.evals
    assert kinds(make(config, mesh)) == kinds(make(tiny(), mesh))


def test_an_earlier_run_goes_on(tmp_path):
    config = common.base(None)
    (tmp_path / "config.json").write_text(earlier(config))
    run_folder.claim(tmp_path, configs.to_json(config))
    config.evals.pairs.every = 5
    with pytest.raises(ValueError, match=r"another config \(evals\.pairs\.every was absent, is 5"):
        run_folder.claim(tmp_path, configs.to_json(config))


def test_where_an_evaluators_data_lie_may_change(tmp_path):
    config = common.base(None)
    data = {"name": "lfw", "kw": {"root": "here", "crop": 0.9}}
    config.evals.lfw = ConfigDict({"type": "verification", "data": data})
    run_folder.claim(tmp_path, configs.to_json(config))
    config.evals.lfw.data.kw.root = "there"
    run_folder.claim(tmp_path, configs.to_json(config))
    config.evals.lfw.data.kw.crop = 0.8
    with pytest.raises(ValueError, match=r"evals\.lfw\.data\.kw\.crop was 0\.9, is 0\.8"):
        run_folder.claim(tmp_path, configs.to_json(config))
