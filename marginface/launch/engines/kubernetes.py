"""Each unit as a workload of a Kubernetes cluster of Google's, through xpk (JobSet and Kueue).

One script for each unit; it takes further options: `bash FILE --dry-run --skip-validation` prints
the JobSet. A JobSet starts again, at most --k8s_restarts times, after a preemption (75), an error
that Python did not catch (1) and a signal (127 and more), but not after 2 and 3.

The run folders need a storage that was attached to the cluster before (`xpk storage attach`).
"""

import argparse
import shlex
from collections.abc import Sequence
from typing import Any

from marginface.launch.engines import cloud
from marginface.launch.units import Unit


def add_arguments(parser: Any) -> None:
    """The options of this backend."""
    add = parser.add_argument
    add("--k8s_cluster", help="needed")
    add("--k8s_project", help="needed")
    add("--k8s_zone", help="of the cluster; needed")
    add("--k8s_accelerator", default="tpu-v5e-8", metavar="KIND", help="or xpk's h100-80gb-8")
    add("--k8s_slices", type=int, default=1, help="of TPUs for each unit")
    add("--k8s_image", help="with marginface and its experiments; default: made from this folder")
    add("--k8s_storage", help="xpk's name of it; needed")
    add("--k8s_mount", default="/runs", help="where that storage is mounted")
    add("--k8s_spot", action=argparse.BooleanOptionalAction, default=False)
    add("--k8s_priority", default="medium")
    add("--k8s_restarts", type=int, default=50, help="of a unit, after all it survives")
    add("--k8s_grace", type=int, default=120, help="seconds to save in when told to end")


def render(units: Sequence[Unit], options: argparse.Namespace) -> dict[str, str]:
    """For each unit the script with its command of xpk.

    Returns:
        path below the folder of all sweeps → text.

    Raises:
        ValueError: an option is missing or is no name of the kind that is needed.
    """
    _check(options)
    return {
        f"{unit.folder.parent.name}/k8s/{cloud.job_name(unit)}.sh": _script(unit, options)
        for unit in units
    }


def submit(units: Sequence[Unit], options: argparse.Namespace) -> bool:
    """Creates the workloads; False, as they only begin.

    Raises:
        ValueError: as render; this folder is no clone and there is no image; or xpk is not there
            or refuses one.
    """
    if not options.k8s_image:
        cloud.require_code()
    refused = []
    for file in cloud.write(units, render(units, options), "xpk"):
        try:
            cloud.call("bash", str(file))
        except ValueError as error:  # one that is there already must not keep back the others
            refused.append(str(error))
    if refused:
        raise ValueError(f"{len(refused)} of {len(units)} not created, the first: {refused[0]}")
    print(f"xpk workload list --cluster {options.k8s_cluster} shows them", flush=True)
    return False


def _check(options: argparse.Namespace) -> None:
    name = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"
    cloud.require("--k8s_cluster", options.k8s_cluster, name, "my-cluster")
    cloud.require("--k8s_storage", options.k8s_storage, name, "my-runs")
    cloud.require("--k8s_mount", options.k8s_mount, r"(/[\w.-]+)+", "/runs")
    cloud.require("--k8s_project", options.k8s_project, cloud.PROJECT, "my-project")
    cloud.require("--k8s_zone", options.k8s_zone, cloud.ZONE, "us-central1-a")
    if not cloud.tpu(options.k8s_accelerator):
        cloud.require("--k8s_accelerator", options.k8s_accelerator, r"[a-z0-9-]+", "h100-80gb-8")
        if options.k8s_slices > 1:
            raise ValueError("--k8s_slices is for TPUs: for GPUs of several nodes use slurm")
    if options.k8s_image:
        cloud.require("--k8s_image", options.k8s_image, r"[\w./:@-]+", "REPOSITORY/marginface:1")
    levels = "very-low|low|medium|high|very-high"
    cloud.require("--k8s_priority", options.k8s_priority, levels, levels)


def _script(unit: Unit, options: argparse.Namespace) -> str:
    words = [f"{key}={value}" if value else key for key, value in _options(unit, options).items()]
    lines = ["xpk workload create", *map(shlex.quote, words), '"$@"']
    return f"#!/usr/bin/env bash\n# {unit.name}\n" + " \\\n  ".join(lines) + "\n"


def _options(unit: Unit, options: argparse.Namespace) -> dict[str, str]:
    tpu = cloud.tpu(options.k8s_accelerator)
    several = options.k8s_slices > 1 or bool(tpu and tpu[1] > 8)
    run = f"exec {cloud.command(unit, options.k8s_mount, hosts=several)}"
    found = {
        "--workload": cloud.job_name(unit),
        "--cluster": options.k8s_cluster,
        "--project": options.k8s_project,
        "--zone": options.k8s_zone,
    }
    if tpu:
        found |= {"--tpu-type": f"{tpu[0]}-{tpu[1]}", "--num-slices": str(options.k8s_slices)}
    else:
        found |= {"--device-type": options.k8s_accelerator}
    if options.k8s_image:
        found |= {"--docker-image": options.k8s_image}
    else:
        found |= {"--base-docker-image": "python:3.12", "--script-dir": "."}
        run = f"pip install --quiet -e '.[{'tpu' if tpu else 'cuda12'}]' && {run}"
    found |= {
        "--storage": options.k8s_storage,
        "--priority": options.k8s_priority,
        "--restart-on-exit-codes": "1,75",
        "--max-restarts": str(options.k8s_restarts),
        "--termination-grace-period-seconds": str(options.k8s_grace),
        "--command": run,  # exec: SIGTERM reaches Python itself
    }
    return found | ({"--spot": ""} if options.k8s_spot else {})
