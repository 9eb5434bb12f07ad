"""What a stranger adds, each in a copy of the repository and in three places at most.

CONTRIBUTING.md names the places. Its blocks are used where it has one for the task.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from commands import SMALL

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
MARGIN, MARGIN_TEST, MARGIN_EXPERIMENT, LOSSES, _, EVALUATOR, _ = BLOCKS
LOSS = re.search(r"def growing.*?\n\n\n", LOSSES, re.DOTALL)[0]

STATE_EXPERIMENT = '''"""CosFace with a margin that grows."""

from experiments import common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = common.base(arg)
    common.class_loss(config, "growing", without=("margin",), most=0.4)
    return config


def sweep(add, arg=None):
    """One point."""
    add({"loss.kw.most": 0.2})
'''

READER = '''"""Embedded faces of few people."""

from marginface.data.readers import synthetic


def load(*, people: int = 12):
    """Training and test sets of `people` people."""
    faces, tests = synthetic.load(
        identities=people, samples=8, image_size=16, test_identities=8, pairs=32, folds=2
    )
    return faces, {"few": tests["synthetic"]}
'''

ENGINE = '''"""One unit after the other, in this process's own shell."""

import subprocess
import sys


def add_arguments(parser):
    """It has no options."""


def submit(units, options):
    """Runs each unit's plain command."""
    for unit in units:
        subprocess.run(unit.command(sys.executable), check=False)
    return True
'''

RMSPROP = '''def rmsprop(hyper, decay):
    """Hinton, Neural Networks for Machine Learning, lecture 6e, 2012."""
    return decay, optax.scale_by_rms(decay=hyper["b2"])


'''

# Task → what it changes: a file → its text if it is new, else (before what, what is put there).
# The last place of each is its test, which this file stands for.
TASKS = {
    "margin": {
        "marginface/losses/margins.py": [
            ("MARGINS = {", f"{MARGIN}\n\n"),
            ('    "identity": identity,', '    "tapered": tapered,\n'),
        ],
        "experiments/tapered.py": MARGIN_EXPERIMENT,
        "tests/losses/test_margins.py": [("CASES_AT_START", f"{MARGIN_TEST}\n")],
    },
    "class loss with state": {
        "marginface/losses/class_losses.py": [
            ("def margin_rows(", LOSS),
            (
                '    "margin_softmax": Loss(',
                '    "growing": Loss(growing, running=lambda: {"m": jnp.float32(0)}),\n',
            ),
        ],
        "experiments/growing.py": STATE_EXPERIMENT,
        "tests/losses/test_class_losses.py": [],
    },
    "reader": {
        "marginface/data/readers/few.py": READER,
        "experiments/common.py": [
            (
                "def rendered(",
                "def few(config: ConfigDict, root: str) -> None:\n"
                '    """Embedded faces of few people."""\n'
                "    small(config, root)\n"
                '    config.data.name, config.data.kw = "few", ConfigDict({"people": 12})\n\n\n',
            ),
            ('    "synthetic": Preset(', '    "few": Preset(few),\n'),
        ],
        "tests/data/test_synthetic.py": [],
    },
    "evaluator with a picture": {
        "marginface/evaluators/in_use.py": EVALUATOR,
        "marginface/report/run/meanings.py": [],
        "tests/evaluators/test_evals.py": [],
    },
    "optimizer": {
        "marginface/training/optim.py": [
            ("# (numbers of config.optimizer", RMSPROP),
            ('"sgd": sgd', '"rmsprop": rmsprop, '),
        ],
        "tests/training/test_optim.py": [],
    },
    "engine": {
        "marginface/launch/engines/plain.py": ENGINE,
        "marginface/launch/engines/__init__.py": [
            (
                '    "slurm": Backend(',
                '    "plain": Backend("plain", "one after the other", waits=True),\n',
            ),
        ],
        "tests/launch/test_engines.py": [],
    },
}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_three_places_and_contributing_names_them(task):
    assert len(TASKS[task]) <= 3
    for name in TASKS[task]:
        if name.startswith("tests/") and task == "reader":
            continue  # a file of its own
        path = pathlib.PurePath(name)
        new = isinstance(TASKS[task][name], str) or path.stem == "__init__"
        named = path.parent.name if new else path.name  # a new file's folder
        assert named in TEXT, f"{task}: CONTRIBUTING.md does not say {named}"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with all tasks done."""
    root = tmp_path_factory.mktemp("copy") / "a clone"
    for name in ("marginface", "experiments", "launch", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "golden", "slurm")
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for places in TASKS.values():
        for name, change in places.items():
            path = root / name
            if isinstance(change, str):
                assert not path.exists(), f"{name} is there already: choose another example"
                path.write_text(change, encoding="utf-8")
                continue
            text = path.read_text(encoding="utf-8")
            for before, new in change:
                assert text.count(before) >= 1, (name, before)
                text = text.replace(before, new + before, 1)
            path.write_text(text, encoding="utf-8")
    return root


def run(root, *words):
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.exhaustive
def test_what_was_added_trains_and_is_reported(copy):
    small = [word for word in SMALL if ".data.kw" not in word and "--config=" not in word]
    evaluator = "--config.evals.usage.type=in_use"
    run(
        copy,
        "marginface.main",
        "--config=experiments/tapered.py:data=few",
        *small,
        "--config.steps=4",
        "--config.optimizer.name=rmsprop",
        evaluator,
        "--workdir=run",
    )
    summary = json.loads((copy / "run" / "summary.json").read_text())
    assert 0 <= summary["few/in_use"] <= 1
    assert (copy / "run" / "plots" / "few_embedding.png").is_file()
    page = (copy / "run" / "summary.md").read_text(encoding="utf-8")
    assert "plots/few_embedding.png" in page
    assert "loss.margin = tapered" in page


@pytest.mark.exhaustive
def test_what_was_added_is_swept_by_the_engine_that_was_added(copy):
    small = [word for word in SMALL if ".data.kw" not in word and "--config=" not in word]
    words = ("--config", "experiments/growing.py:data=few", "--backend", "plain", "--runs", "runs")
    out = run(copy, "launch.sweep", *words, *small, "--config.steps=4")
    assert "launch.results" in out
    (summary,) = (copy / "runs").rglob("summary.json")
    found = json.loads(summary.read_text())
    margins = [0.2 * (1 - 0.99**step) for step in (1, 2, 3, 4)]  # a line tells their mean
    assert found["train/growing_m"] == pytest.approx(sum(margins) / 4, rel=1e-4)


@pytest.mark.exhaustive
def test_the_row_of_the_margin_is_tested_in_the_copy(copy):
    options = ("-q", "-n", "0", "-p", "no:cacheprovider", "-k", "tapered", "--rootdir", ".")
    out = run(copy, "pytest", *options, "tests/losses/test_margins.py")
    assert re.search(r"[1-9]\d* passed", out)
