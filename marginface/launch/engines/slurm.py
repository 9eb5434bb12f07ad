"""Each experiment's units as one SLURM job array, through submitit.

submitit checks the parameters and writes the #SBATCH lines. What runs is our own batch script and
not a function that submitit pickles, because that would not keep a sweep alive: where the cluster
keeps no accounts (no slurmdbd) submitit never notices a job killed with -9, and with a time limit
of ten minutes or less it takes every preemption for a time-out. So element i of the array runs the
plain command in the file i.sh beside the script, and its exit code decides:

    0, 2, 3   it ends: done, config or input error, diverged
    75        it saved after SIGTERM (preempted, or near the time limit) and requeues itself
    another   a crash: it requeues itself, --slurm_retries times
"""

import argparse
import pathlib
import re
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

from marginface import lookup
from marginface.launch.units import Unit
from marginface.runs import folder as run_folder
from marginface.runs.files import write_atomically

SCRIPT = "array.sh"

# bash outlives the signals, so that it can requeue when the processes have saved; then it drops the
# trap, or the end of this run would wait for it. SLURM_JOB_ID will not do for requeueing: in the
# last element it stands for the whole array. --wait and not --kill-on-bad-exit: the first process
# that leaves with 75 must not have the others killed, which would read as a crash; but one whose
# peer was killed may wait for it for ever.
_BODY = """\
trap : TERM USR2
code=0
srun --kill-on-bad-exit=0 --wait=30 bash {folder}/"$SLURM_ARRAY_TASK_ID.sh" || code=$?
case $code in
  0 | 2 | 3) exit "$code" ;;
  75) ;;
  *)
    crashes={folder}/${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID.crashes
    echo "exit code $code" >> "$crashes" || exit "$code"
    [ "$(wc -l < "$crashes")" -le {retries} ] || exit "$code"
    ;;
esac
echo "exit code $code, restarts before: ${{SLURM_RESTART_COUNT:-0}}; requeued"
trap - TERM
scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
exit "$code\""""


def add_arguments(parser: Any) -> None:
    """The options of this backend."""
    add = parser.add_argument
    add("--slurm_partition", help="default: the cluster's")
    add("--slurm_nodes", type=int, default=1, help="of each unit; several: jax.distributed")
    add("--slurm_gpus_per_node", type=int, default=0, help="on several nodes: a process for each")
    add("--slurm_cpus_per_task", type=int, default=1)
    add("--slurm_time", type=int, default=240, help="minutes; a longer unit saves and requeues")
    add("--slurm_grace", type=int, default=120, help="seconds before that when it is told to")
    add("--slurm_parallel", type=int, default=256, help="units at a time")
    add("--slurm_retries", type=int, default=3, help="of a unit that crashed")
    add("--slurm_python", default="python", help="the interpreter on the nodes")
    add(
        "--slurm_set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another of submitit's parameters: account, qos, constraint, mem, exclude ...",
    )


def render(units: Sequence[Unit], options: argparse.Namespace) -> dict[str, str]:
    """For each experiment the batch script, and a script i.sh for each of its units.

    Returns:
        path below the folder of all sweeps → text.

    Raises:
        ValueError: an option that does not fit, or submitit is not installed.
    """
    files = {}
    for folder, group in _by_folder(units).items():
        name = pathlib.PurePath(folder.parent.name, folder.name)
        body = _BODY.format(folder=shlex.quote(str(folder)), retries=options.slurm_retries)
        executor = _executor(folder, len(group), options)
        files[str(name / SCRIPT)] = executor._make_submission_file_text(body, "")
        for i, unit in enumerate(group):
            files[str(name / f"{i}.sh")] = _unit_script(unit, options)
    return files


def submit(units: Sequence[Unit], options: argparse.Namespace) -> bool:
    """Writes what `render` returns and submits the arrays; False, as they only begin.

    Raises:
        ValueError: as render; or SLURM is not there, holds a sweep already, or refuses it.
    """
    files = render(units, options)
    for folder in _by_folder(units):
        name = _job_name(folder)
        if ids := _call("squeue", "--me", "--noheader", f"--name={name}", "--format=%A").split():
            raise ValueError(f"{name} is queued as job {ids[0]}: wait for it, or scancel {ids[0]}")
    for path, text in files.items():
        file = units[0].folder.parents[1] / path
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
    for folder, group in _by_folder(units).items():
        job = _call("sbatch", "--parsable", str(folder / SCRIPT)).strip()
        print(f"job {job}: {len(group)} units, logs in {folder}; squeue --me shows it", flush=True)
    return False


def _by_folder(units: Sequence[Unit]) -> dict[pathlib.Path, list[Unit]]:
    """Where the files of each array go → its units."""
    groups: dict[pathlib.Path, list[Unit]] = {}
    for unit in units:
        groups.setdefault(unit.folder.parent / "slurm", []).append(unit)
    return groups


def _executor(folder: pathlib.Path, elements: int, options: argparse.Namespace) -> Any:
    """submitit's executor with all parameters of the array."""
    try:
        import submitit
    except ImportError:
        raise ValueError("--backend slurm needs submitit: pip install marginface[slurm]") from None

    class Executor(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # writing the script takes no srun on this machine

    executor = Executor(folder)
    parameters = {
        "job_name": _job_name(folder),
        "partition": options.slurm_partition,
        "nodes": options.slurm_nodes,
        # Under SLURM jax.distributed takes one device for each process.
        "ntasks_per_node": max(1, options.slurm_gpus_per_node) if options.slurm_nodes > 1 else 1,
        "cpus_per_task": options.slurm_cpus_per_task,
        "gpus_per_node": options.slurm_gpus_per_node or None,
        "time": options.slurm_time,
        "array_parallelism": options.slurm_parallel,
        "stderr_to_stdout": True,
        "use_srun": False,
        "additional_parameters": {
            "signal": f"TERM@{options.slurm_grace}",  # the one signal that the processes know
            "requeue": True,
            "output": str(folder / "%A_%a.log"),
        },
    }
    known = executor._valid_parameters() - parameters.keys() - {"setup", "teardown", "srun_args"}
    parameters |= _set(options.slurm_set, known)
    executor.update_parameters(**{k: v for k, v in parameters.items() if v is not None})
    executor.parameters["map_count"] = elements
    return executor


def _set(words: Sequence[str], known: set[str]) -> dict[str, str]:
    pairs = dict(word.partition("=")[::2] for word in words)
    for key, value in pairs.items():
        if key not in known or not value:
            raise ValueError(f"--slurm_set {key}={value}: no such; {lookup.nearest(key, known)}")
    return pairs


def _unit_script(unit: Unit, options: argparse.Namespace) -> str:
    """The unit's command; bash becomes it, so that signals reach it."""
    words = unit.command(options.slurm_python)
    if options.slurm_nodes > 1:
        words += ["--coordinator", "auto"]
    folder = shlex.quote(str(unit.folder))
    return f"mkdir -p {folder}\nexec {shlex.join(words)} >> {folder}/{run_folder.LOG} 2>&1\n"


def _job_name(folder: pathlib.Path) -> str:
    """The sweep's, without commas: to squeue they separate names."""
    return re.sub(r"[^\w.-]+", "-", f"marginface-{folder.parent.name}")


def _call(*words: str) -> str:
    try:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise ValueError(f"no {words[0]} here: run this where SLURM takes jobs") from None
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{words[0]}: {' '.join(error.stderr.split())}") from None
