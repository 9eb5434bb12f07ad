"""A network, a reader and an evaluator of the user's own; the evaluator is CONTRIBUTING.md's."""

import json
import pathlib
import re

import pytest

from experiments import arcface, softmax
from marginface import build, sharding, train
from marginface import config as configs

NETWORK = """
import flax.linen as nn


class Model(nn.Module):
    embedding_dim: int
    width: int = 8

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.relu(nn.Dense(self.width)(images.reshape(len(images), -1)))
        return {"embedding": nn.Dense(self.embedding_dim)(x), "hidden": x}
"""

READER = '''
import dataclasses

import numpy as np

from marginface.data import Faces, Pairs


@dataclasses.dataclass(frozen=True)
class Grey:
    """Grey squares; those of a person are alike."""

    people: int

    def __len__(self):
        return 8 * self.people

    def __getitem__(self, i):
        return {"grey": np.float32(i // 8), "label": np.int32(i // 8), "unreadable": np.int32(0)}


def to_images(batch):
    return batch["grey"][:, None, None, None] / 8 - np.ones((1, 8, 8, 3), np.float32)


def load(*, people=6):
    source = Grey(people)
    i = np.arange(16)
    pairs = Pairs(
        source, lambda r: r, to_images, i, i + 1 + 8 * (i % 2), i % 2 == 0, i % 4 // 2,
        "folds", "grey",
    )
    labels = np.repeat(np.arange(people, dtype=np.int32), 8)
    faces = Faces(source, people, lambda: labels, lambda r, rng: r, lambda r: r, to_images, "1")
    return faces, {"grey": pairs}
'''

TEXT = (pathlib.Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text("utf-8")
EVALUATOR, CHANGES = re.findall(
    r"```python\n(.*?)```", TEXT.partition("## A network, a reader, an evaluator")[2], re.DOTALL
)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The config of an experiment that names the three files as CONTRIBUTING.md does."""
    for name, text in (("network", NETWORK), ("reader", READER), ("evaluator", EVALUATOR)):
        (tmp_path / f"my_{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    config = softmax.get_config()
    with config.unlocked():
        exec(CHANGES, {"config": config})
        config.model.embedding_dim = 4
    config.batch_size, config.steps, config.evaluate.batch_size, config.log_every = 8, 4, 8, 1
    return config.lock()


def test_a_run_of_them_alone(own, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.train(own, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = {f"{name}/accuracy" for name in ("grey", "apart")} | {"grey/in_use"}
    found = {(x["step"], name) for x in lines for name in figures & set(x)}
    assert found == {(step, name) for step in (0, 4) for name in figures} | {
        (2, "grey/in_use"),
        (3, "apart/accuracy"),
    }
    summary = json.loads((run / "summary.json").read_text())
    assert 0 <= summary["grey/in_use"] <= 1
    assert "untrained/apart/accuracy" in summary
    page = (run / "summary.md").read_text()
    assert (
        "![grey_hidden](plots/grey_hidden.png)\n\nMean of each output over the images of the test."
        in page
    )
    assert all((run / p).is_file() for p in re.findall(r"!\[.*\]\((.*)\)", page))
    assert (run / "hidden.npy").is_file()
    assert re.search(r"grey/in_use +\S+ +\S+\n", capsys.readouterr().out)
    assert train.train(own, run)  # complete: only reported again
    assert json.loads((run / "config.json").read_text())["evals"]["mine"]["least"] == 0.01


def make(config):
    """All that a config names."""
    faces, test_sets = build.load_data(config)
    mesh = sharding.make_mesh(1)
    steps = build.make_steps(config, faces, mesh, 4)
    return build.make_evaluators(config, faces, test_sets, steps, mesh)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.name": "my_netwrk.py:Model"},
            "model.name='my_netwrk.py:Model': no such file; did you",
        ),
        (
            {"model.name": "my_network.py:Modl"},
            "model.name='my_network.py:Modl': my_network.py has no 'Mo",
        ),
        (
            {"model.name": "my_reader.py:load"},
            "model.name='my_reader.py:load': give a flax.linen.Module",
        ),
        (
            {"model.kw": {"widht": 3}},
            "model.kw.widht is not an argument of my_network.py:Model; did",
        ),
        (
            {"data.name": "my_reader.py:lode"},
            "data.name='my_reader.py:lode': my_reader.py has no 'lode'; ",
        ),
        ({"data.kw": {"persons": 3}}, "data.kw.persons is not an argument of load; .*people"),
        ({"evals.mine.least": None, "evals.mine.most": 1}, "evals.mine.most is unknown; .*least"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(changes, message, own):
    values = json.loads(configs.to_json(own))
    for key, value in changes.items():
        *path, last = key.split(".")
        section = values
        for part in path:
            section = section[part]
        section[last] = value
    config = configs.from_json(json.dumps(values))
    with pytest.raises(ValueError, match=message) as error:
        make(config)
    assert "\n" not in str(error.value)


def test_an_own_network_has_an_embedding_dim(own, tmp_path):
    (tmp_path / "my_network.py").write_text(
        "import flax.linen as nn\nclass Model(nn.Module): pass\n"
    )
    with pytest.raises(ValueError, match=r"'my_network.py:Model': give a flax.linen.Module wi"):
        build.make_model(own)


def test_a_module_of_a_package_is_found_too():
    config = arcface.get_config()
    config.model.name = "marginface.models.sphereface:Model"
    assert build.make_model(config) == build.make_model(arcface.get_config())
