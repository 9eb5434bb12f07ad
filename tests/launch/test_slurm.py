"""A sweep on a real SLURM: preempted, killed, and in the end as if nothing had happened."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from commands import COMPILE_QUICKLY
from PIL import Image

from marginface.runs import metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tests/launch/slurm"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
STEPS, DISTURBED_AT = 60, 10

# Rendering faces takes long to compile, and each of nine starts would: noise from files does not.
EXPERIMENT = '''"""A tiny sweep."""

from experiments import arcface_regular


def get_config(arg=None):
    """The config."""
    config = arcface_regular.get_config("data=folder,root={root},model=sphereface4")
    config.model.kw.update(width=0.0625)
    config.model.embedding_dim = 8
    config.data.kw.update(image_size=16, test_identities=4, test_pairs=16, folds=2)
    config.batch_size = 16
    config.evaluate.batch_size = 16
    config.steps = {steps}
    config.log_every = 5
    config.checkpoint_every = 2  # saving slows the run down, so that it can be caught
    return config


def sweep(add, arg=None):
    """One point."""
    add({{"loss.margin_kw.m": 0.3}})
'''

pytestmark = [pytest.mark.slurm, pytest.mark.exhaustive]


def write_experiment(folder):
    """The experiment's path; its images are noise."""
    random = np.random.default_rng(0)
    for person in range(16):
        (folder / f"images/{person}").mkdir(parents=True)
        for i in range(8):
            pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"images/{person}/{i}.png")
    path = folder / "tiny.py"
    path.write_text(EXPERIMENT.format(root=folder / "images", steps=STEPS))
    return str(path)


def call(*words, timeout=60):
    """What the command prints."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def wait_for(what, condition, seconds=480):
    """Asks until the condition holds."""
    start = time.monotonic()
    while time.monotonic() < start + seconds:
        if condition():
            print(f"{what}: after {time.monotonic() - start:.0f} s")
            return
        time.sleep(0.05)
    raise AssertionError(f"{what}: in vain for {seconds} s\n{call('squeue')}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """SLURM with two virtual nodes; commands find it by SLURM_CONF."""
    if absent := [name for name in NEEDED if not shutil.which(name)]:
        pytest.skip(f"no SLURM here: {', '.join(absent)} not installed")
    pytest.importorskip("submitit", reason="pip install marginface[slurm]")
    folder = tmp_path_factory.mktemp("slurm")
    environment = {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "JAX_PLATFORMS": "cpu",
        # Compile quickly; one device for each process.
        "XLA_FLAGS": COMPILE_QUICKLY,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            call(str(SCRIPTS / "up.sh"), str(folder))
            yield folder
        finally:
            call(str(SCRIPTS / "down.sh"), str(folder))


def sweep(experiment, runs):
    """Submits three units of two processes each; their folders."""
    words = ["--config", experiment, "--seeds", "3", "--runs", str(runs), "--backend", "slurm"]
    words += ["--slurm_nodes", "2", "--slurm_partition", "low", "--slurm_parallel", "1"]
    print(call(sys.executable, "-m", "launch.sweep", *words, "--slurm_python", sys.executable))
    units = json.loads((runs / "tiny/sweep.json").read_text())["units"]
    return [runs / "tiny" / name for name in units]


def ended():
    """Whether no job is queued or runs."""
    return not call("squeue", "--noheader")


def steps(folder):
    """The last step that the run logged."""
    try:
        return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def figures(folder):
    """The lines of metrics.jsonl but for the time."""
    lines = metrics.read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def preempt(folder):
    """A job in the partition that goes first takes both nodes for a moment."""
    call("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=:")


def kill(folder):
    """One of the unit's two processes ends at once."""
    ids = call("pgrep", "--oldest", "--full", f"marginface.main .*--workdir {folder} ").split()
    os.kill(int(ids[0]), signal.SIGKILL)


def final_state(folder):
    """The last checkpoint, which two processes wrote: name → array."""
    path = folder / "checkpoints" / str(STEPS)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(path).item_metadata.tree
        like = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=here) for k, v in saved.items()}
        return {k: np.asarray(v) for k, v in checkpointer.restore(path, like).items()}


def test_a_sweep_ends_as_if_it_had_not_been_preempted_and_killed(cluster, tmp_path):
    """Three units of two processes on two nodes each."""
    experiment = write_experiment(tmp_path)
    calm = sweep(experiment, tmp_path / "calm")
    wait_for("the undisturbed sweep", ended)

    disturbed = sweep(experiment, tmp_path / "disturbed")
    for folder, disturb in zip(disturbed, (preempt, kill, preempt), strict=True):
        wait_for(f"step {DISTURBED_AT} of {folder.name}", lambda f=folder: steps(f) >= DISTURBED_AT)
        disturb(folder)
        print(f"{disturb.__name__}: {folder.name}, at step {steps(folder)}")
    wait_for("the disturbed sweep", ended)

    folder = tmp_path / "disturbed/tiny/slurm"
    logs = {log.name.split("_")[1]: log.read_text() for log in sorted(folder.glob("*_*.log"))}
    for element, text in logs.items():
        print(f"---- element {element}\n{text}")
    assert ["exit code 75" in text for text in logs.values()] == [True, False, True]
    (crash,) = folder.glob("*.crashes")
    assert crash.read_text() == "exit code 137\n"
    for quiet, hit in zip(calm, disturbed, strict=True):
        assert (hit / "log.txt").read_text().count(
            f"\nstep 5/{STEPS}"
        ) == 1  # it did not start over
        assert figures(hit) == figures(quiet)
        expected, found = final_state(quiet), final_state(hit)
        assert expected.keys() == found.keys()
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
        summaries = [json.loads((f / "summary.json").read_text()) for f in (quiet, hit)]
        accuracies = [k for k in summaries[0] if k.endswith("accuracy")]
        assert accuracies
        assert all(summaries[0][k] == summaries[1][k] for k in accuracies)
        print(f"{hit.name}: {len(expected)} arrays and all logged figures equal bit for bit")
