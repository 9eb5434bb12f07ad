"""What must be set before JAX starts, and what a first look at its devices finds."""

import contextlib
import gc
import glob
import importlib.util
import logging
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Generator, Iterable
from typing import Any

# XLA's CPU backend hands single convolutions to a library path that is slow on several threads:
# IResNet-18 trained at 0.45 of PyTorch's speed. benchmarks/results.csv has what this flag gives.
_CPU_FLAGS = ("--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION",)

# Both name a part of a card's memory: JAX takes one of them.
_MEMORY = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")

_USUAL_THRESHOLD = gc.get_threshold()

CACHE_BYTES = 2 * 2**30
# Of what compiles faster, a file each would cost as much.
WORTH_KEEPING_SECONDS = 0.03
_CACHE_WARNING = r"Error (reading|writing) persistent compilation cache entry for '(.*?)'"

_NO_GPU_WANTED = ("", "-1", "NoDevFiles")  # the last is what SLURM gives to jobs without a GPU
_NO_DEVICE = "no supported devices|NO_DEVICE|INVALID_DEVICE"

OUT_OF_MEMORY = (
    "the device has too little memory (RESOURCE_EXHAUSTED): take a smaller batch_size, or parts of "
    "it with optimizer.accumulate=2 or more; loss.chunk_size=4096, where there are many classes; "
    "model.kw.remat=True, where the network has that; fewer --jobs or --width of a sweep"
)


def tune_cpu() -> None:
    """Adds the CPU flags to XLA_FLAGS unless the user set them; call before JAX first computes."""
    flags = os.environ.get("XLA_FLAGS", "")
    for flag in _CPU_FLAGS:
        if flag.split("=")[0] not in flags:
            flags = f"{flags} {flag}".strip()
    os.environ["XLA_FLAGS"] = flags


def tune_gpu() -> None:
    """Lets a run that is alone on a card take nearly all of it, unless the user set that.

    Call before JAX first computes. JAX's own part is three quarters.
    """
    if not any(os.environ.get(name) for name in _MEMORY):
        os.environ[_MEMORY[-1]] = ".92"


def share_gpu() -> dict[str, str]:
    """What the environment of processes that share a card needs beside what the user set.

    One that preallocated would leave nothing to the next.
    """
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    return {} if os.environ.get(name) else {name: "false"}


# XLA asks for a step's memory anew each time. In pages of 4 KiB the kernel needs a tenth of
# IResNet-18's step to hand it out; glibc asks for huge pages only if told when a process starts.
CPU_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def restart_with_huge_pages() -> None:
    """Starts this command again, in its place, with CPU_ENVIRONMENT; returns if it has that.

    Nothing happens where the user set these variables or the system has no glibc.
    """
    if sys.platform != "linux" or any(name in os.environ for name in CPU_ENVIRONMENT):
        return
    os.environ |= CPU_ENVIRONMENT
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def collect_rarely() -> None:
    """Lets Python look for garbage rarely.

    Tracing makes millions of objects that stay: looking through them again and again is a sixth of
    the time until the first step.
    """
    gc.set_threshold(100_000, 20, 100)


def collect_as_usual() -> None:
    """Looks for garbage as often as Python does, but never again through what is there now."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_USUAL_THRESHOLD)


def start() -> None:
    """Finds the devices and keeps what is compiled for the next process.

    Call it once the processes know of each other and before anything is compiled: JAX asks for its
    cache only once.

    Raises:
        ValueError: the devices that were asked for are not there.
    """
    find_devices()
    keep_compiled()


def find_devices() -> None:
    """Starts JAX's backend; says so where a GPU of this machine stays unused.

    Raises:
        ValueError: the devices that were asked for are not there.
    """
    import jax  # here, so that tune_cpu can come before it

    asked = os.environ.get("JAX_PLATFORMS", "")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    plugins = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
    jax_logger = logging.getLogger("jax._src.xla_bridge")
    jax_logger.addFilter(_says_more)  # in place of a line that names no command
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # a bare assertion where "cuda" finds no card
        why = str(error).partition(" (set JAX_PLATFORMS=")[0].partition(" (you may need to")[0]
        if "cuda" in asked.split(",") or "gpu" in asked.split(","):
            if not plugins:
                why = "this JAX knows no GPU: pip install 'marginface[cuda13]'"
            elif visible is not None and (not why or re.search(_NO_DEVICE, why)):
                why = f"CUDA_VISIBLE_DEVICES={visible} leaves no GPU{f' ({why})' if why else ''}"
            else:
                why = why or "no NVIDIA GPU on this machine"
        why = why.rstrip(".")
        setting = f"JAX_PLATFORMS={asked}: " if asked else ""
        raise ValueError(f"{setting}{why}; JAX_PLATFORMS=cpu runs on the processor") from error
    finally:
        jax_logger.removeFilter(_says_more)
    if found != "cpu" or asked or not has_nvidia_gpu() or visible in _NO_GPU_WANTED:
        return
    if not plugins:
        print(
            "marginface: a GPU is here, but this JAX knows only the processor, which is slow: "
            "pip install 'marginface[cuda13]' (or JAX_PLATFORMS=cpu, to say no more of it)",
            file=sys.stderr,
            flush=True,
        )
    elif visible is not None:
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES={visible}, and JAX finds no GPU: give numbers that nvidia-smi "
            "lists, and see that it lists any; JAX_PLATFORMS=cpu runs on the processor"
        )


def has_nvidia_gpu() -> bool:
    """Whether the machine shows one, whatever JAX can use."""
    return any(map(os.path.exists, ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")))


def _says_more(record: logging.LogRecord) -> bool:
    """Drops JAX's own line about a GPU without a plugin."""
    return "CUDA-enabled jaxlib is not installed" not in record.getMessage()


def keep_compiled() -> None:
    """Keeps compiled programs in the user's cache folder, cut to CACHE_BYTES at each start.

    Where several CPU devices work together the cache is off, whatever the user set. A program from
    it has lost the order of its collectives: two devices that begin with different ones wait for
    each other, and XLA aborts (jax 0.10.2).

    Else nothing changes where the user set JAX_COMPILATION_CACHE_DIR or
    JAX_ENABLE_COMPILATION_CACHE; where the folder cannot be written, one line says so. Any number
    of processes may share it. JAX's own bound (jax_compilation_cache_max_size) is not used: it
    holds a lock for every read, and a process killed between an entry and the note of its age ends
    all later writes.
    """
    import jax

    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    asked = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    if any(name in os.environ for name in asked):
        return
    if getattr(jax.config, "jax_compilation_cache_dir", None):  # a second call
        return
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} cannot be written")
        prune(folder, CACHE_BYTES)
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody's home
        print(f"marginface: compiled programs are not kept: {error}", file=sys.stderr, flush=True)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING_SECONDS)
    _mend(folder)


def cache_folder() -> pathlib.Path:
    """Where compiled programs lie: $XDG_CACHE_HOME/marginface, else ~/.cache/marginface.

    Raises:
        RuntimeError: the user has no home.
    """
    given = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = given if given.is_absolute() else pathlib.Path.home() / ".cache"
    return base / "marginface"


def prune(folder: pathlib.Path, limit: int) -> None:
    """Removes the files unused for longest until the others take at most `limit` bytes.

    Another process that wanted one of them compiles it again.
    """
    found = []
    for path in _files(folder):
        with contextlib.suppress(OSError):  # another process removed it
            status = path.stat()
            found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size


def _files(folder: pathlib.Path) -> Iterable[pathlib.Path]:
    return (pathlib.Path(top, name) for top, _, names in os.walk(folder) for name in names)


def _mend(folder: pathlib.Path) -> None:
    """Removes what JAX cannot read, so that it is written anew, and keeps its warnings silent.

    A process that is killed, or a full disk, leaves half an entry; JAX would compile that program
    in every run and never write over it. All programs of that one's name go with it.
    """
    show = warnings.showwarning

    def shown(message: Any, *rest: Any, **more: Any) -> None:
        if not (found := re.match(_CACHE_WARNING, str(message))):
            show(message, *rest, **more)
        elif found[1] == "reading":
            for path in folder.glob(f"{glob.escape(found[2])}-*"):
                with contextlib.suppress(OSError):
                    path.unlink()

    warnings.showwarning = shown  # ty: ignore[invalid-assignment]


@contextlib.contextmanager
def one_line_errors() -> Generator[None]:
    """JAX's out of memory as a ValueError that says which settings help.

    Raises:
        ValueError: the device's memory did not suffice.
    """
    try:
        yield
    except RuntimeError as error:  # JAX's own errors are of this kind
        if re.search(r"RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)):
            raise ValueError(OUT_OF_MEMORY) from error
        raise
