"""Runs the command line as a user does, on a problem small enough for tests."""

import importlib.metadata
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Tests compile a thousand small programs and run each for a moment.
COMPILE_QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# Without these, which jax 0.11 always has, half as long; XLA_FLAGS=...=true tests with them.
_EMITTERS = "--xla_cpu_use_fusion_emitters"
_asked = f"{_EMITTERS}=true" in os.environ.get("XLA_FLAGS", "")
if importlib.metadata.version("jaxlib").startswith("0.10.") and not _asked:
    COMPILE_QUICKLY += f" {_EMITTERS}=false"

SMALL = (
    "--config=experiments/arcface_regular.py",
    "--config.model.kw.depth=4",
    "--config.model.kw.width=0.0625",
    "--config.model.embedding_dim=8",
    "--config.data.kw.identities=12",
    "--config.data.kw.samples=8",
    "--config.data.kw.image_size=16",
    "--config.data.kw.test_identities=8",
    "--config.data.kw.test_samples=4",
    "--config.data.kw.pairs=32",
    "--config.data.kw.folds=2",
    "--config.batch_size=16",
    "--config.evaluate.batch_size=16",
    "--config.evaluate.every=20",
    "--config.steps=60",
    "--config.log_every=4",
    "--config.checkpoint_every=10",
)


def photos(folder, people, size=16, each=8):
    """Writes images of noise as folder/PERSON/IMAGE.png; returns the folder."""
    pixels = np.random.default_rng(0).integers(0, 256, (people, each, size, size, 3), np.uint8)
    for person, images in enumerate(pixels):
        (folder / f"person{person:02d}").mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / f"person{person:02d}" / f"{i}.png")
    return folder


def on_photos(folder):
    """SMALL on images of noise in `folder`: nothing is rendered, so half as much is compiled."""
    photos(folder, people=20)
    return (
        f"--config=experiments/arcface_regular.py:data=folder,root={folder},model=sphereface4,dim=8",
        *(flag for flag in SMALL[2:] if "data.kw." not in flag),
        "--config.data.kw.image_size=16",
        "--config.data.kw.test_identities=8",
        "--config.data.kw.test_pairs=32",
        "--config.data.kw.folds=2",
    )


def environment(cache, devices=1):
    """What a command needs beside: CPU devices, and a folder that keeps compiled programs."""
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {COMPILE_QUICKLY}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def start(*arguments, cache, devices=1, code=None):
    """Starts marginface.main (or `code`) on CPU; compiled programs are shared through `cache`."""
    return subprocess.Popen(
        [sys.executable, *(["-c", code] if code else ["-m", "marginface.main"]), *arguments],
        cwd=ROOT,
        env=os.environ | environment(cache, devices) | {"PYTHONUNBUFFERED": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process, code=0):
    """Waits; returns (stdout, stderr) once the exit code is as expected."""
    try:
        out, err = process.communicate(timeout=1800)
    finally:
        process.kill()
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def run(*arguments, cache, devices=1, code=0):
    """start and finish."""
    return finish(start(*arguments, cache=cache, devices=devices), code)


def interrupt(process, step, number=signal.SIGKILL):
    """Sends a signal once the process has logged `step`; returns what it printed from then on."""
    for line in process.stdout:
        if line.startswith("step ") and int(line.split()[1].split("/")[0]) >= step:
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err
