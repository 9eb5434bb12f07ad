"""Everything is imported, 20 steps train, a run that was stopped goes on: on every jax."""

import importlib
import json
import pkgutil

import commands
import pytest

import marginface

pytestmark = [pytest.mark.smoke, pytest.mark.exhaustive]

SMALL = (*commands.SMALL, "--config.steps=20", "--config.evaluate.every=0", "--config.log_every=1")

# The plain command, told to stop after step 10.
STOPPED = """
from marginface import main
from marginface.training.preemption import Preemption
Preemption.requested = lambda self, step: step >= 10
main.main()
"""


def test_every_module_is_imported_without_a_warning():
    names = [m.name for m in pkgutil.walk_packages(marginface.__path__, "marginface.")]
    assert len(names) > 60
    for name in names:
        importlib.import_module(name)


def history(folder):
    """The lines of metrics.jsonl but for the time."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def test_a_run_of_20_steps_that_is_stopped_goes_on_bit_for_bit(tmp_path, cache):
    commands.run(*SMALL, f"--workdir={tmp_path / 'whole'}", cache=cache)
    expected = history(tmp_path / "whole")
    assert [line["step"] for line in expected] == [*range(21), 20]
    assert all(line["loss/total"] > 0 for line in expected[1:-1])
    arguments = [*SMALL, f"--workdir={tmp_path / 'parts'}"]
    commands.finish(commands.start(*arguments, cache=cache, code=STOPPED), code=75)
    assert history(tmp_path / "parts")[-1]["step"] == 10
    commands.run(*arguments, cache=cache)
    assert history(tmp_path / "parts") == expected
