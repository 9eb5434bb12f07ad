"""What a first run meets: kept programs, devices that are not there, a card's memory."""

import gc
import os
import subprocess
import sys

import jax
import pytest
from commands import ROOT

from marginface import runtime

PROGRAM = """
from marginface import runtime
runtime.start()
import jax
print(jax.jit(lambda x: x * 2 + 1)(20.5))
"""


def start(folder, **more):
    """Runs PROGRAM with a cache below `folder`; returns what it wrote to stderr."""
    environment = {k: v for k, v in os.environ.items() if "CACHE" not in k and k != "XLA_FLAGS"}
    environment |= {"XDG_CACHE_HOME": str(folder)}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | more
    words = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "42.0\n"), done.stderr
    return done.stderr


def test_programs_are_kept_and_a_damaged_one_is_written_anew(tmp_path):
    assert start(tmp_path) == ""
    (kept,) = (tmp_path / "marginface").glob("jit__lambda*-cache")
    assert kept.parent.stat().st_mode & 0o077 == 0  # who can write here can run code as the user
    before = kept.stat()
    assert start(tmp_path) == ""
    assert kept.stat().st_mtime_ns == before.st_mtime_ns
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    assert start(tmp_path) == ""
    assert len(kept.read_bytes()) > len(whole) // 2


def test_where_nothing_can_be_kept_one_line_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    (line,) = start(tmp_path / "file").splitlines()
    assert line.startswith("marginface: compiled programs are not kept: ")


@pytest.mark.parametrize(
    "setting",
    [
        {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        {"JAX_COMPILATION_CACHE_DIR": ""},
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    ],
)
def test_nothing_is_kept_against_the_users_word_or_where_it_would_hang(setting, tmp_path):
    assert start(tmp_path, **setting) == ""
    assert not list(tmp_path.rglob("*-cache"))


def test_what_was_unused_for_longest_goes_first(tmp_path):
    (tmp_path / "below").mkdir()
    for age, name in enumerate(("new", "below/middle", "old")):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    runtime.prune(tmp_path, 300)
    assert (tmp_path / "old").exists()
    runtime.prune(tmp_path, 299)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["middle", "new"]
    runtime.prune(tmp_path / "absent", 0)


def test_the_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert runtime.cache_folder() == tmp_path / ".cache/marginface"


def test_garbage_is_looked_for_as_usual_after_the_start():
    runtime.collect_as_usual()  # whatever a command that ran before in this process has set
    usual = gc.get_threshold()
    runtime.collect_rarely()
    assert gc.get_threshold()[0] > 10 * usual[0]
    runtime.collect_as_usual()
    assert gc.get_threshold() == usual
    gc.unfreeze()


@pytest.fixture
def found(monkeypatch):
    """Sets what JAX finds where, and asks."""

    def ask(platforms, *, error=None, plugin=False, gpu=False, visible=None):
        for name, value in {"JAX_PLATFORMS": platforms, "CUDA_VISIBLE_DEVICES": visible}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

        def backend():
            if error is not None:
                raise error
            return "cpu"

        monkeypatch.setattr(jax, "default_backend", backend)
        monkeypatch.setattr(runtime, "has_nvidia_gpu", lambda: gpu)
        monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda _: plugin or None)
        runtime.find_devices()

    return ask


UNKNOWN = RuntimeError(
    "Unable to initialize backend 'metall': Backend 'metall' is not in the list of known backends: "
    "['cpu']. (set JAX_PLATFORMS='' to automatically choose an available backend)"
)


@pytest.mark.parametrize(
    ("platforms", "arguments", "expected"),
    [
        ("metall", {"error": UNKNOWN}, "JAX_PLATFORMS=metall: .* known backends: .'cpu'.*=cpu"),
        ("cuda", {"error": AssertionError()}, r"pip install 'marginface\[cuda13\]'"),
        ("cuda", {"error": AssertionError(), "plugin": True}, "no NVIDIA GPU on this machine"),
        (
            "cuda",
            {"error": RuntimeError("no supported devices found"), "plugin": True, "visible": "7"},
            "CUDA_VISIBLE_DEVICES=7 leaves no GPU",
        ),
        (
            "cuda",
            {"error": RuntimeError("the driver is too old"), "plugin": True, "visible": "0"},
            "JAX_PLATFORMS=cuda: the driver is too old",
        ),
        (None, {"plugin": True, "gpu": True, "visible": "7"}, "=7, and JAX finds no GPU: give num"),
    ],
)
def test_devices_that_are_not_there_are_an_input_error(platforms, arguments, expected, found):
    with pytest.raises(ValueError, match=expected):
        found(platforms, **arguments)


def test_a_gpu_that_jax_cannot_use_is_pointed_out(found, capsys):
    found(None, gpu=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'marginface[cuda13]'" in line
    for platforms, arguments in (
        (None, {}),
        ("cpu", {"gpu": True}),
        (None, {"gpu": True, "visible": ""}),
        (None, {"gpu": True, "visible": "-1", "plugin": True}),
        (None, {"gpu": True, "visible": "NoDevFiles", "plugin": True}),
    ):
        found(platforms, **arguments)
    assert capsys.readouterr().err == ""


def test_commands_say_it_in_one_line(tmp_path):
    command = [sys.executable, "-m", "marginface.main", "--config=experiments/arcface.py"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"],
        env=os.environ | {"JAX_PLATFORMS": "nonsense"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("marginface: JAX_PLATFORMS=nonsense: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes.",
        "INTERNAL: Failed to load in-memory CUBIN: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
    ],
)
def test_too_little_memory_says_what_helps(message):
    with pytest.raises(ValueError, match="batch_size") as caught, runtime.one_line_errors():
        raise jax.errors.JaxRuntimeError(message)
    for setting in ("loss.chunk_size", "model.kw.remat", "optimizer.accumulate"):
        assert setting in str(caught.value)


def test_another_crash_stays_one():
    with pytest.raises(jax.errors.JaxRuntimeError), runtime.one_line_errors():
        raise jax.errors.JaxRuntimeError("INTERNAL: illegal memory access")


def test_a_run_alone_takes_the_card_and_several_share_it(monkeypatch):
    names = ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for name in (*names, "XLA_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert runtime.share_gpu() == {names[0]: "false"}
    runtime.tune_gpu()
    assert os.environ.pop(names[1]) == ".92"
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", ".5")
    monkeypatch.setenv(names[0], "true")
    runtime.tune_gpu()
    assert names[1] not in os.environ
    assert runtime.share_gpu() == {}
