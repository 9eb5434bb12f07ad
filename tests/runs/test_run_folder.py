import json
import pathlib
import re
import shutil
import struct
import subprocess
import sys

import jax
import numpy as np
import pytest

from marginface.data import Pairs
from marginface.evaluators import common, curves, geometry, grouping, verification
from marginface.report.run import page, plots
from marginface.runs import folder as run_folder
from marginface.runs import metrics, provenance

FIGURES = {
    "loss/total": 3.25,
    "train/top1": 0.5,
    "lfw/accuracy": 0.832,
    "lfw/accuracy_stderr": 0.0118,
    "lfw/tar@far=1e-2": 0.43,
    "prototypes/sep_mean": 0.21,
}
UNTRAINED = {"lfw/accuracy": 0.659, "lfw/accuracy_stderr": 0.02, "lfw/tar@far=1e-2": 0.09}


@pytest.fixture
def summary(mesh8):
    return page.summarise(
        FIGURES, config_hash="abc123", wall_s=812.4, mesh=mesh8, untrained=UNTRAINED
    )


# One folder, one config


def test_claim(tmp_path):
    workdir = tmp_path / "runs" / "one"
    config = {"loss": {"scale": 64.0, "margin": "cosine"}, "steps": 3}
    run_folder.claim(workdir, json.dumps(config))
    assert json.loads((workdir / "config.json").read_text()) == config
    run_folder.claim(workdir, json.dumps(config, indent=4))  # the same, written differently
    config["loss"] = {"scale": 32.0}
    message = r"another config \(loss.margin was cosine, is absent, loss.scale was 64.0, is 32.0\)"
    with pytest.raises(ValueError, match=message):
        run_folder.claim(workdir, json.dumps(config))
    (workdir / "config.json").write_text('{"loss":')
    with pytest.raises(ValueError, match=r"config.json is no config"):
        run_folder.claim(workdir, json.dumps(config))
    with pytest.raises(ValueError, match=r"file: choose another --workdir"):
        run_folder.claim(workdir / "config.json", "{}")
    with pytest.raises(ValueError, match=r"file: choose another --workdir"):
        run_folder.claim(workdir / "config.json" / "below", "{}")


def test_a_run_of_an_earlier_version_goes_on_where_the_walk_is_as_it_was(tmp_path):
    before = {"loss": {"scale": 64.0, "chunk_size": 0}}
    run_folder.claim(tmp_path, json.dumps(before))
    for precision in ("auto", "highest"):
        now = {"loss": {"scale": 64.0, "chunk_size": "auto", "precision": precision}}
        run_folder.claim(tmp_path, json.dumps(now))
    now["loss"]["precision"] = "bfloat16"
    with pytest.raises(ValueError, match=r"loss\.precision was absent, is bfloat16"):
        run_folder.claim(tmp_path, json.dumps(now))


def test_a_run_of_an_earlier_version_goes_on_under_the_words_of_this_one(tmp_path):
    def config(name, target):
        return json.dumps({"loss": {"name": name, "kw": {"target": target, "m": 0.5}}})

    run_folder.claim(tmp_path / "run", config("elasticface", "arc"))
    run_folder.claim(tmp_path / "run", config("elasticface", "additive_angular"))
    run_folder.claim(tmp_path / "run", config("elasticface", "arc"))  # as its command may say
    message = "loss.kw.target was additive_angular, is additive_cosine"
    with pytest.raises(ValueError, match=message):
        run_folder.claim(tmp_path / "run", config("elasticface", "cos"))
    run_folder.claim(tmp_path / "own", config("mine.py:mine", "arc"))
    with pytest.raises(ValueError, match=r"loss.kw.target was arc, is additive_angular"):
        run_folder.claim(tmp_path / "own", config("mine.py:mine", "additive_angular"))


def test_a_summary_says_what_became_of_auto(mesh8):
    kw = {"config_hash": "abc123", "wall_s": 1.0, "mesh": mesh8}
    walk = {"precision": "tf32", "chunk_size": None}
    summary = page.summarise(FIGURES, walk=walk, **kw)
    assert (summary["config/precision"], summary["config/chunk_size"]) == ("tf32", 0)


def test_report(tmp_path, mesh8, capsys):
    run_folder.claim(tmp_path, '{"loss": {"scale": 64.0}}')
    lines = [
        {"step": 0, "squares/accuracy": 0.5},
        *lines_of(6),
        {"step": 6, "squares/accuracy": 0.75},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluator = evaluated([0.9, 0.2, 0.8, 0.6], [True, False, True, False])
    page.report(
        tmp_path,
        results={"squares/accuracy": 0.75},
        evaluators=[evaluator],
        mesh=mesh8,
        seconds=61.0,
    )
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (found["squares/accuracy"], found["untrained/squares/accuracy"]) == (0.75, 0.5)
    assert (found["loss/total"], found["time/wall_s"]) == (1.5, 61.0)
    assert "step" not in found
    assert re.search(r"squares/accuracy +50.00% +75.00%", capsys.readouterr().out)
    text = (tmp_path / "summary.md").read_text()
    embedded = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(embedded) == 5
    assert all((tmp_path / path).is_file() for path in embedded)
    # Running the same command again reports again.
    page.report(tmp_path, results={}, evaluators=[], mesh=mesh8, seconds=1.0)


# summary.json


def test_summary_is_flat_and_says_where_it_comes_from(summary, tmp_path):
    page.write_summary(tmp_path, summary)
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found.items() >= FIGURES.items()
    assert {found[f"untrained/{k}"] for k in UNTRAINED} == set(UNTRAINED.values())
    assert found["version/jax"] == jax.__version__
    assert found["version/numpy"] == np.__version__
    assert {
        f"version/{k}" for k in ("python", "flax", "optax", "orbax-checkpoint", "grain")
    } <= set(found)
    assert (found["device/count"], found["device/kind"]) == (8, jax.devices()[0].device_kind)
    assert (found["time/wall_s"], found["config/hash"]) == (812.4, "abc123")
    assert re.fullmatch(r"unknown|[0-9a-f]{40}(\+changes)?", found["commit"])
    assert not any(isinstance(value, dict | list) for value in found.values())


def test_summary_is_strict_json_where_figures_are_not_finite(tmp_path):
    page.write_summary(tmp_path, {"loss/total": float("nan"), "a": float("inf"), "b": 1.0})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text, parse_constant=refuse) == {"loss/total": None, "a": None, "b": 1.0}


def test_a_failed_write_leaves_the_old_file(tmp_path, summary, monkeypatch):
    page.write_summary(tmp_path, {"a": 1.0})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        page.write_summary(tmp_path, summary)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"a": 1.0}


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit(tmp_path, monkeypatch):
    package = tmp_path / "marginface" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    monkeypatch.setattr(provenance.marginface, "__file__", str(package))
    assert provenance.commit() == "unknown"

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    assert provenance.commit() == git("rev-parse", "HEAD")
    package.write_text("changed = True\n")
    assert provenance.commit() == git("rev-parse", "HEAD") + "+changes"
    # Installed somewhere below another project's checkout: its commit is not ours.
    inner = tmp_path / "site-packages" / "marginface" / "__init__.py"
    inner.parent.mkdir(parents=True)
    inner.write_text("")
    monkeypatch.setattr(provenance.marginface, "__file__", str(inner))
    assert provenance.commit() == "unknown"


# The table and the page


def test_final_table(summary):
    lines = page.final_table(summary).splitlines()
    assert max(map(len, lines)) <= 100
    assert re.split(r" {2,}", lines[0]) == ["figure", "untrained", "trained", "meaning"]
    rows = [re.split(r" {2,}", line) for line in lines[2:]]
    assert rows[0][:3] == ["lfw/accuracy", "65.90%", "83.20% ± 1.18%"]
    assert rows[1][:3] == ["lfw/tar@far=1e-2", "9.00%", "43.00%"]
    names = [row[0] for row in rows]
    order = ["prototypes/sep_mean", "train/top1", "loss/total", "time/wall_s"]
    assert names[2:] == order
    assert all(row[-1].count(" ") >= 2 for row in rows)  # each says what it means
    ends = {line.index(" ± 1.18%") + 8 for line in lines[2:3]} | {lines[0].index("trained  m") + 7}
    assert len(ends) == 1  # numbers stand under the end of their heading


def test_final_table_without_a_baseline_and_with_unknown_figures():
    table = page.final_table({"lfw/accuracy": float("nan"), "mine/strange": 12.345678})
    assert "untrained" not in table
    assert re.search(r"lfw/accuracy +not finite  pairs", table)
    assert re.search(r"mine/strange +12.35$", table)


def test_every_figure_that_evaluators_yield_has_a_meaning():
    named = [
        "accuracy",
        "auc",
        "eer",
        "threshold",
        *(f"tar@far={far}" for far in curves.FARS),
    ]
    named += ["sep_mean", "sep_var"]
    table = page.final_table({f"x/{name}": 0.5 for name in named})
    assert all(re.search(r"  \w+ \w+", line) for line in table.splitlines()[2:])
    assert len(table.splitlines()) == 2 + len(named)


def test_page(summary, tmp_path):
    pictures = plots.draw(
        tmp_path, [{"step": 1, "loss/total": 1.0}, {"step": 2, "loss/total": 0.5}]
    )
    page.write_page(
        tmp_path,
        summary,
        title="arcface_regular",
        command="python -m marginface.main --config experiments/arcface_regular.py",
        config={"loss": {"margin": "additive_angular", "scale": 64.0}, "steps": 3},
        pictures=pictures,
    )
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("# arcface_regular\n")
    assert "lfw/accuracy: **83.20% ± 1.18%**, untrained 65.90%: +17.30 points by training" in text
    assert "0 h 13 min 32 s" in text
    assert "| lfw/accuracy | 65.90% | 83.20% ± 1.18% |" in text
    assert "loss.margin = additive_angular\nloss.scale = 64.0\nsteps = 3" in text
    embedded = re.findall(r"!\[.*\]\((.*)\)", text)
    assert embedded == ["plots/loss.png"]
    assert all((tmp_path / path).is_file() for path in embedded)


# Pictures


def png_width(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">I", content[16:20])[0]


def lines_of(count):
    steps = np.arange(1, count + 1)
    for k in steps:
        record = {"step": int(k), "loss/total": 9 / k, "loss/exclusive": 0.1, "train/top1": 0.0}
        record |= {"train/learning_rate": 0.1 / k, "time/examples_per_s": 100.0}
        yield record
        if k % 3 == 1:
            yield {"step": int(k), "lfw/accuracy": 0.5, "lfw/accuracy_stderr": 0.01}
            yield {"step": int(k), "prototypes/sep_mean": 0.4, "prototypes/sep_var": 0.01}


class Squares:
    """Grey squares, lighter with the index."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return {"image": np.full((16, 16, 3), 20 * i, np.uint8)}


def evaluated(scores, same, protocol="folds"):
    n = len(scores)
    pairs = Pairs(
        source=Squares(),
        decode=lambda record: record,
        to_images=lambda batch: batch["image"].astype("float32") / 127.5 - 1,
        first=np.arange(n) % 12,
        second=(np.arange(n) + 1) % 12,
        same=np.asarray(same),
        fold=np.arange(n) % 2,
        protocol=protocol,
        name="squares",
    )
    evaluator = verification.Evaluator(common.Subject("squares", pairs, lambda state: state))
    evaluator.scores, evaluator.threshold = np.asarray(scores), 0.5
    return evaluator


def test_groups_are_counted_on_the_images_that_were_verified():
    pairs = evaluated(np.zeros(40), np.arange(40) % 2 == 0).pairs
    evaluator = grouping.Evaluator(common.Subject("squares", pairs, lambda state: state))
    assert list(evaluator.run({"embedding": np.ones((12, 3))})) == []  # a network without groups
    logits = np.eye(4)[[0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2]]
    found = dict(evaluator.run({"embedding": np.ones((12, 3)), "group_logits": logits}))
    np.testing.assert_array_equal(evaluator.chosen, logits.argmax(axis=1))
    shares = np.array([0.5, 0.25, 0.25])
    assert found["squares/group_entropy"] == pytest.approx(
        -(shares * np.log(shares)).sum() / np.log(4), rel=1e-6
    )
    assert found["squares/group_largest"] == pytest.approx(2.0)


def test_everything_is_drawn(tmp_path):
    rng = np.random.default_rng(0)
    same = np.arange(40) % 4 < 2
    evaluator = evaluated(rng.normal(0.3, 0.1, 40) + 0.3 * same, same, "dev")
    used = grouping.Evaluator(common.Subject("squares", evaluator.pairs, lambda state: state))
    used.chosen = np.arange(12) % 3 // 2
    separated = geometry.Evaluator(common.Subject("prototypes"))
    separated.separability = rng.normal(0.4, 0.1, 50)
    pictures = plots.draw(tmp_path, list(lines_of(80)), [evaluator, separated, used])
    names = ["loss", "learning", "squares_roc", "squares_scores", "squares_hardest"]
    names += ["separability", "squares_groups"]
    assert [picture.path.stem for picture in pictures] == names
    assert {png_width(picture.path) for picture in pictures} == {1200}
    assert len(list((tmp_path / "plots").iterdir())) == 7  # no temporary file is left
    assert all(picture.caption.endswith(".") for picture in pictures)


@pytest.mark.parametrize(
    "records",
    [
        [{"step": 7, "loss/total": 1.0, "train/top1": 0.0, "train/learning_rate": 0.0}],
        [
            {"step": 1, "loss/total": float("nan")},
            {"step": 2, "loss/total": 2.0, "a/accuracy": 1.0},
        ],
        [{"step": 1, "loss/total": None, "loss/other": 1.0, "prototypes/sep_mean": 0.3}],
    ],
    ids=["one point", "not finite", "missing"],
)
def test_short_and_broken_series_are_drawn(records, tmp_path):
    pictures = plots.draw(tmp_path, records)
    assert {picture.path.stem for picture in pictures} == {"loss", "learning"}


def test_nothing_to_draw(tmp_path):
    fresh = evaluated([0.1, 0.9], [False, True])
    fresh.scores = None
    assert list(fresh.pictures(tmp_path)) == []
    assert plots.draw(tmp_path, []) == []
    assert plots.draw(tmp_path, [{"step": 1, "loss/total": float("inf")}]) == []


def test_equal_scores_and_few_pairs_are_drawn(tmp_path):
    assert len(list(evaluated([0.5, 0.5], [True, False]).pictures(tmp_path))) == 3


def test_hardest_pairs():
    same = [True, False, True, False, True, False]
    evaluator = evaluated([0.9, 0.8, 0.1, 0.3, 0.4, 0.95], same)
    impostor, genuine = verification.hardest_pairs(evaluator.pairs, evaluator.scores, count=2)
    assert (impostor.tolist(), genuine.tolist()) == ([5, 1], [2, 4])
    # The pairs that chose the threshold (fold 0: even ones) are not shown.
    evaluator = evaluated(
        [0.9, 0.8, 0.1, 0.3, 0.4, 0.95], [True, True, False, False] + [True] * 2, "dev"
    )
    impostor, genuine = verification.hardest_pairs(evaluator.pairs, evaluator.scores, count=2)
    assert (impostor.tolist(), genuine.tolist()) == ([3], [1, 5])


def test_metrics_with_a_broken_last_line_are_drawn(tmp_path):
    path = pathlib.Path(tmp_path / "metrics.jsonl")
    path.write_text('{"step": 1, "loss/total": 2.0}\n{"step": 2, "loss/to')
    records = metrics.read_lines(path)
    assert records == [{"step": 1, "loss/total": 2.0}]
    assert len(plots.draw(tmp_path, records)) == 1


def test_a_second_process_is_kept_out(tmp_path):
    run_folder.claim(tmp_path / "run", "{}")
    run_folder.claim(tmp_path / "run", "{}")  # the same process may come back
    code = f"""
import pathlib
from marginface.runs import folder as run_folder
run_folder.claim(pathlib.Path({str(tmp_path / "run")!r}), "{{}}")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "is being trained by another process" in done.stderr
    # Before there is a config too, and what it says of itself does not mark this run.
    (tmp_path / "run" / "config.json").unlink()
    assert subprocess.run(command, capture_output=True).returncode == 1
    (tmp_path / "run" / "config.json").write_text("{}")
    stop = code.replace("claim(", "record_stop(").replace('"{}")', '"{}", 2, "refused")')
    assert subprocess.run([sys.executable, "-c", stop]).returncode == 0
    assert not (tmp_path / "run" / "stopped.json").exists()
    run_folder.release(tmp_path / "run")
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert subprocess.run([sys.executable, "-c", stop]).returncode == 0
    assert (tmp_path / "run" / "stopped.json").exists()


def test_a_complete_run_is_not_marked_as_stopped(tmp_path):
    run_folder.claim(tmp_path, "{}")
    (tmp_path / "summary.json").write_text("{}")
    run_folder.record_stop(tmp_path, "{}", 2, "the data set changed")
    assert not (tmp_path / "stopped.json").exists()
