"""Earlier versions of this repository, whose runs the present one must continue."""

import contextlib
import json
import pathlib
import subprocess
import sys

import commands
import pytest

from benchmarks import same_numbers

ROOT = commands.ROOT


def code_of(commit, folder):
    """The folder, with the code of a commit in it; a skip that says why where git lacks it."""
    try:
        revision, _ = same_numbers.resolve(commit, ROOT)
        return same_numbers.checkout(revision, pathlib.Path(folder), ROOT)
    except ValueError as error:
        pytest.skip(f"no version {commit} to begin a run: {error}")


@contextlib.contextmanager
def version(folder):
    """Within it, commands.start and commands.run take the code in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "ROOT", folder)
        patch.setenv("PYTHONPATH", str(folder))
        yield


def figures(workdir):
    """The lines of a run folder's metrics.jsonl but for the time."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def results(*folders):
    """What `python -m launch.results` prints of run folders: its table, and what it says beside."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.results", *map(str, folders)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr
