"""Where a figure comes from: the commit, the libraries, the devices."""

import importlib.metadata
import pathlib
import platform
import subprocess
from typing import Any

import marginface

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
ORIGIN = ("commit", "config/", "device/", "version/")


def commit() -> str:
    """The git commit of this code, with "+changes" if files differ from it; else "unknown"."""
    root = pathlib.Path(marginface.__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # An installed copy may lie inside the checkout of something else.
        if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return "unknown"
        changes = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "HEAD") + changes
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def devices(mesh: Any) -> dict[str, str | int]:
    """{"device/kind": "cpu", ...} of a jax.sharding.Mesh: kind, platform, count, processes."""
    import jax  # here: what only reads run folders needs none

    first = mesh.devices.flat[0]
    return {
        "device/kind": first.device_kind,
        "device/platform": first.platform,
        "device/count": mesh.size,
        "device/processes": jax.process_count(),
    }


def versions() -> dict[str, str]:
    """{"version/jax": "0.10.2", ...}; libraries that are not installed are left out."""
    found = {"version/python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[f"version/{name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
