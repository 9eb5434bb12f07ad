"""What `pip install` of a wheel leaves, and that every command works from an empty folder."""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import site
import subprocess
import sys
import venv

import pytest
from commands import COMPILE_QUICKLY, ROOT, SMALL

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        not importlib.util.find_spec("hatchling"), reason="pip install marginface[test]"
    ),
]

TINY = [word for word in SMALL if not word.startswith(("--config=", "--config.steps="))]
TINY += ["--config.steps=4"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A Python with the wheel in its site-packages, and our libraries but not the clone behind."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    install = [*pip, "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)
    # Behind what is installed; a .pth file in there, as that of an editable clone, is not read.
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


@pytest.fixture(scope="module")
def place(installed, tmp_path_factory):
    """An empty folder to work in, and what runs a command there: words → what it printed."""
    folder = tmp_path_factory.mktemp("empty")
    cache = tmp_path_factory.mktemp("cache")
    packages = installed.parents[1]
    before = sorted(packages.rglob("*"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {
        "PATH": f"{installed.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": COMPILE_QUICKLY,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(*words, code=0):
        done = subprocess.run(
            words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    run.folder = folder
    yield run
    assert sorted(packages.rglob("*")) == before  # nothing is written where it is installed


def test_it_brings_one_name(installed):
    (packages,) = installed.parents[1].glob("lib/python*/site-packages")
    names = {path.name for path in packages.iterdir()} - {"libraries.pth", "__pycache__"}
    assert {re.sub(r"-\d+(\.\d+)+", "", name) for name in names} == {
        "marginface",
        "marginface.dist-info",
    }
    experiments = {path.name for path in packages.glob("marginface/_experiments/*.*")}
    assert experiments == {path.name for path in (ROOT / "experiments").glob("*.py")}


def test_the_clone_is_not_there(place):
    program = (
        "import importlib.util, marginface\n"
        "names = ('experiments', 'launch', 'benchmarks', 'tests')\n"
        "print(marginface.__file__, *filter(importlib.util.find_spec, names))\n"
    )
    found = place("python", "-c", program).stdout.split()
    assert len(found) == 1
    assert not pathlib.Path(found[0]).is_relative_to(ROOT)


def test_the_version_is_the_wheels(place):
    assert place("marginface", "--version").stdout.startswith("marginface 0.1.0 ")


def test_an_experiment_that_is_not_here_trains(place):
    arguments = [*TINY, "--config.steps=20", "--config.evaluate.every=0"]
    (place.folder / "own.py").write_text("def margin(c, *, m):\n    return c - m\n")
    arguments += ["--config.loss.margin=own:margin"]
    words = ["train", "--config", "experiments/arcface_regular.py", *arguments]
    said = place("marginface", *words, "--workdir=runs/one").stderr
    assert said.count("no experiments here: what comes with marginface") == 1
    run = place.folder / "runs" / "one"
    assert json.loads((run / "summary.json").read_text())["commit"] == "unknown"
    command = json.loads((run / "origin.json").read_text())["command"]
    place(*shlex.split(command))  # as recorded: it finds the run complete
    assert not (place.folder / "experiments").exists()
    listed = place("marginface", "trian", code=2).stderr
    assert "did you mean 'train'?" in listed


def test_a_sweep_its_table_and_its_pictures(place):
    sweep = ["--config", "experiments/arcface.py:data=small", *TINY, "--no_grid", "--seeds", "2"]
    out = place("marginface", "sweep", *sweep, "--runs", "runs/sweep").stdout
    assert "done 2 · running 0 · failed 0 · waiting 0" in out
    assert "table: marginface results runs/sweep" in out
    again = place("marginface", "sweep", *sweep, "--runs", "runs/sweep").stdout
    assert "2 units, 2 of them ended before" in again
    together = place("marginface", "sweep", *sweep, "--backend", "vmap", "--runs", "runs/vmap")
    assert "done 2 · running 0 · failed 0 · waiting 0" in together.stdout
    page = place.folder / "page.md"
    page.write_text("# Mine\n<!-- mine -->\n<!-- end mine -->\n")
    words = ["results", "runs/sweep", "--name", "mine", "--update", "page.md"]
    assert "| `arcface` | 2 |" in place("marginface", *words).stdout
    rows = (place.folder / "experiments" / "results" / "mine.csv").read_text()
    assert len(rows.splitlines()) == 3
    text = page.read_text()
    command = re.search(r"<!-- (marginface results experiments/results/mine\.csv .*) -->", text)
    place(*shlex.split(command[1]))
    assert page.read_text() == text
    figures = ["experiments/results/mine.csv", "--out", "figures", "--only", "forest"]
    place("marginface", "figures", *figures)
    assert (place.folder / "figures" / "forest.png").is_file()


def test_a_search_knows_the_experiments(place):
    pytest.importorskip("optuna", reason="pip install marginface[search]")
    words = ["search", "--config", "experiments/arcface.py:data=small", "--dry_run"]
    assert "loss.margin_kw.m: uniform 0.05, 0.6" in place("marginface", *words).stdout


def test_the_losses_are_drawn(place):
    place("marginface", "report", "losses", "--only", "margins", "--out", "losses")
    assert (place.folder / "losses" / "margins.png").is_file()


def test_init_copies_what_then_counts(place):
    place("marginface", "init", "mine")
    file = place.folder / "mine" / "common.py"
    file.write_text(file.read_text().replace("config.log_every = 20", "config.log_every = 3"))
    place("marginface", "init", "mine", code=2)
    words = ["--config", "mine/arcface.py", "--runs", "runs/mine", "--no_grid", "--dry_run"]
    command = place("marginface", "sweep", *words).stdout.splitlines()[-1]
    assert command.startswith("python -m marginface.main --config mine/arcface.py ")
    program = "import sys; from marginface import config; print(config.load(sys.argv[1]).log_every)"
    assert place("python", "-c", program, "mine/arcface.py").stdout.split() == ["3"]
    assert place("python", "-c", program, "experiments/arcface.py").stdout.split() == ["20"]
