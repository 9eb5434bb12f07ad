"""What figures mean stands in one table, and a figure that nobody knows is shown all the same."""

import ast
import pathlib

import pytest

from marginface.launch import figures
from marginface.report.run import meanings, page, plots

PACKAGE = pathlib.Path(__file__).resolve().parents[2] / "marginface"


def test_an_unknown_figure_has_sane_defaults(tmp_path):
    meaning = meanings.of("mine/brightness")
    assert meaning == meanings.Meaning(heading="brightness")
    assert (meaning.title, meaning.factor, meaning.form) == ("brightness", 1.0, ".4f")
    assert meaning.format.format(0.123456) == "0.1235"
    assert not meaning.less
    table = page.final_table({"mine/brightness": 0.123456, "untrained/mine/brightness": 7.0})
    assert table.splitlines()[-1].split() == ["mine/brightness", "7", "0.1235"]
    assert figures._metric("mine/brightness") == ("brightness", ".4f", False)
    records = [{"step": 1, "mine/brightness": 0.5}, {"step": 2, "mine/brightness": 0.6}]
    assert plots.draw(tmp_path, records) == []


@pytest.mark.parametrize(
    ("name", "title", "text", "cell", "less"),
    [
        ("lfw/accuracy", "accuracy (%)", "83.20%", "83.20", False),
        ("lfw/accuracy_stderr", "accuracy_stderr (%)", "83.20%", "83.20", True),
        ("lfw/eer", "eer (%)", "83.20%", "83.20", True),
        ("lfw/auc", "AUC", "0.8320", "0.8320", False),
        ("train/top1", "training top-1 (%)", "83.20%", "83.20", False),
        ("prototypes/sep_mean", "mean Sep", "0.8320", "0.8320", True),
        ("prototypes/sep_var", "var Sep", "0.832", "0.8320", True),
        ("time/wall_s", "wall time, s", "1 s", "1", True),
        ("time/examples_per_s", "training images per second", "1", "0.8320", False),
        ("loss/total", "total", "0.832", "0.8320", True),
        ("loss/my_own", "my_own", "0.832", "0.8320", True),
    ],
)
def test_how_figures_are_shown(name, title, text, cell, less):
    meaning = meanings.of(name)
    assert (meaning.title, meaning.less) == (title, less)
    assert meaning.format.format(0.832) == text
    assert format(meaning.factor * 0.832, meaning.form) == cell


def strings(node):
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]


def test_there_is_no_second_table():
    """No dict says something of figures, and no constant lists those of a kind."""
    known = set(meanings.TABLE)
    for path in PACKAGE.rglob("*.py"):
        if path.name == "meanings.py":
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                pairs = zip(node.keys, node.values, strict=True)
                said = {k.value for k, v in pairs if isinstance(k, ast.Constant) and strings(v)}
                found = {str(k).rpartition("/")[2] for k in said} & known
                assert len(found) < 2, (path, node.lineno, found)
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple | ast.Set):
                found = known.intersection(strings(node.value))  # ends of names alone
                assert len(found) < 2, (path, node.lineno, found)
