"""What must be set before JAX starts: XLA flags and memory pages on CPU."""

import os
import sys

# XLA's CPU backend hands single convolutions to a library path that is slow on several threads:
# IResNet-18 trained at 0.45 of PyTorch's speed. benchmarks/results.csv has what this flag gives.
_CPU_FLAGS = ("--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION",)


def tune_cpu() -> None:
    """Adds the CPU flags to XLA_FLAGS unless the user set them; call before JAX first computes."""
    flags = os.environ.get("XLA_FLAGS", "")
    for flag in _CPU_FLAGS:
        if flag.split("=")[0] not in flags:
            flags = f"{flags} {flag}".strip()
    os.environ["XLA_FLAGS"] = flags


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


def keep_out_of_the_cache() -> None:
    """Turns JAX's compilation cache off where several CPU devices work together.

    A program from the cache has lost the order of its collectives: two devices that begin with
    different ones wait for each other, and XLA aborts (jax 0.10.2). Call it once the processes
    know of each other and before anything is compiled: JAX asks only once.
    """
    import jax  # here, so that tune_cpu can come before it

    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
