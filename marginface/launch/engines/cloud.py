"""Each unit on a TPU or GPU of its own in the cloud, its run folder in a bucket.

--tpu_engine sky     a SkyPilot managed job: it finds a machine, and another one after a preemption
--tpu_engine gcloud  a shell script around a queued TPU: creates, waits, runs, fetches, deletes, and
                     starts over after a preemption; it needs nothing but gcloud, and this terminal

Both read the exit code of the unit's command: 75 means another machine, 0, 2 and 3 are final, and
what remains is a crash, tried again on the same machine --tpu_retries times.

A checkpoint is complete once its folder has its name, and is verified before use: a bucket, where
renaming is not atomic, can lose the newest one but cannot yield a broken one.
"""

import argparse
import hashlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import textwrap
from collections.abc import Sequence
from typing import Any

from marginface.launch.units import Unit
from marginface.runs.files import write_atomically

BUCKET_AT = "/runs"
PYTHON_AT = "$HOME/.marginface"
PROJECT = r"[a-z][a-z0-9-]{4,28}[a-z0-9]"
ZONE = r"[a-z]+-[a-z]+\d+-[a-z]"

# What runs on each kind of TPU VM; SkyPilot's own default for v5e is the one for v5p.
RUNTIMES = {
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}

_SETUP = """\
set -e
python3 -m pip install --quiet uv
python3 -m uv venv --quiet --allow-existing --python 3.12 "{python}"
python3 -m uv pip install --quiet --python "{python}/bin/python" -e '.[{extra}]'
"""

_RUN = """\
export PATH="{python}/bin:$PATH"
for attempt in $(seq {attempts}); do
  code=0
  {command} || code=$?
  case $code in 0 | 2 | 3 | 75) break ;; esac
  echo "attempt $attempt of {attempts}: exit code $code"
done
exit "$code"
"""

_SKY = """\
name: {name}
workdir: .
resources:
  infra: {infra}
  accelerators: {accelerators}
{accelerator_args}  use_spot: {spot}
  job_recovery:
    max_restarts_on_errors: 0
    recover_on_exit_codes: [75]
file_mounts:
  {bucket_at}:
    source: {bucket}
    mode: MOUNT
setup: |
{setup}
run: |
{run}
"""

_REMOTE = """\
#!/usr/bin/env bash
# {unit}: what each worker of the TPU runs.
set -euo pipefail
mkdir -p marginface && tar -xzf {name}.tgz -C marginface && cd marginface
if ! command -v gcsfuse > /dev/null; then
  file=gcsfuse_{gcsfuse}_amd64.deb
  curl -fsSL -o "/tmp/$file" \\
    "https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v{gcsfuse}/$file"
  sudo apt-get install -y -q "/tmp/$file"
fi
sudo mkdir -p {bucket_at} && sudo chown "$(id -u)" {bucket_at}
mountpoint -q {bucket_at} || gcsfuse --implicit-dirs --rename-dir-limit 10000 {mount} {bucket_at}
{setup}set +e
{run}"""

_DRIVER = """\
#!/usr/bin/env bash
# {unit}: on a queued TPU. Ending this script deletes the TPU.
set -euo pipefail
name={name}
options=({options})
here=$(dirname "$0")

tpus() {{ gcloud compute tpus "$@" "${{options[@]}}"; }}

state() {{
  local said
  if said=$(tpus queued-resources describe "$name" --format='value(state.state)' 2>&1); then
    echo "$said"
  elif [[ $said == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo UNKNOWN  # no network, or a login that has expired: it may well run
  fi
}}

delete() {{
  tpus queued-resources delete "$name" --force --quiet || [ "$(state)" = ABSENT ] || {{
    echo "$name is not deleted and may cost money: gcloud compute tpus queued-resources list" >&2
    return 1
  }}
}}

create() {{
  tpus queued-resources create "$name" --node-id="$name" --accelerator-type={accelerator} \\
    --runtime-version={runtime}{spot} --quiet
}}

its_turn() {{
  while true; do
    case $(state) in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | ABSENT) return 1 ;;
    esac
    sleep "${{POLL_SECONDS:-30}}"
  done
}}

fetch() {{
  mkdir -p {here}
  gcloud storage rsync --recursive \\
    {there} \\
    {here}
}}

run() {{
  tpus tpu-vm scp "$here/$name.tgz" "$here/$name-remote.sh" "$name:" --worker=all --quiet &&
    tpus tpu-vm ssh "$name" --worker=all --quiet --command="bash $name-remote.sh"
}}

git ls-files -z --cached --others --exclude-standard |
  tar --null --files-from=- --ignore-failed-read -czf "$here/$name.tgz"
trap delete EXIT
[ "$(state)" = ABSENT ] || delete
for _ in $(seq {machines}); do
  create
  code=255
  if its_turn; then
    code=0
    run || code=$?
  fi
  case $code in
    0)
      fetch
      exit 0
      ;;
    75 | 255) ;;  # saved, or the connection is lost
    *)
      if [ "$(state)" = ACTIVE ]; then
        fetch || true  # what it says of its end
        exit "$code"
      fi
      ;;
  esac
  delete  # a TPU that was preempted never comes back by itself
done
echo "$name: {machines} machines were not enough; the same command continues" >&2
exit 75
"""
_GCSFUSE = "2.2.0"


def add_arguments(parser: Any) -> None:
    """The options of this backend."""
    add = parser.add_argument
    add("--tpu_engine", choices=("sky", "gcloud"), default="sky")
    add("--tpu_accelerator", default="tpu-v5e-8", metavar="KIND", help="or a GPU: A100:8")
    add("--tpu_spot", action=argparse.BooleanOptionalAction, default=True)
    add("--tpu_bucket", metavar="gs://BUCKET[/PATH]", help="where the run folders live")
    add("--tpu_region", help="sky: only there")
    add("--tpu_zone", help="gcloud: needed")
    add("--tpu_project", help="gcloud: default: gcloud's own")
    add("--tpu_retries", type=int, default=3, help="of a unit that crashed")
    add("--tpu_machines", type=int, default=50, help="gcloud: at most, one after the other")


def render(units: Sequence[Unit], options: argparse.Namespace) -> dict[str, str]:
    """For each unit the job's YAML, or the two shell scripts.

    Returns:
        path below the folder of all sweeps → text.

    Raises:
        ValueError: an option is missing or is no name of the kind that is needed.
    """
    _check(options)
    files = {}
    for unit in units:
        folder, name = f"{unit.folder.parent.name}/tpu", job_name(unit)
        if options.tpu_engine == "sky":
            files[f"{folder}/{name}.yaml"] = _sky(unit, options)
        else:
            files[f"{folder}/{name}.sh"] = _driver(unit, options)
            files[f"{folder}/{name}-remote.sh"] = _remote(unit, options)
    return files


def submit(units: Sequence[Unit], options: argparse.Namespace) -> bool:
    """Queues the jobs with SkyPilot, or runs the gcloud scripts side by side until all have ended.

    Returns:
        whether the units have ended and their folders are here.

    Raises:
        ValueError: as render; this folder is no clone; or the engine's command is not there or
            refuses a job.
    """
    require_code()
    program = {"sky": "sky", "gcloud": "gcloud"}[options.tpu_engine]
    files = write(units, render(units, options), program)
    if options.tpu_engine == "gcloud":
        _run_all([file for file in files if not file.name.endswith("-remote.sh")])
        return True
    for file in files:
        call("sky", "jobs", "launch", "--yes", "--async", str(file))
    root = units[0].folder.parents[1]
    print("sky jobs queue shows them; then fetch what they left:", flush=True)
    print(f"gcloud storage rsync --recursive {options.tpu_bucket} {shlex.quote(str(root))}")
    print("queue nothing twice: the same command takes what is not fetched for not run", flush=True)
    return False


def job_name(unit: Unit) -> str:
    """A name that all clouds and Kubernetes take: at most 40 of a-z, 0-9 and -."""
    full = f"{unit.folder.parent.name}/{unit.name}"
    short = re.sub(r"[^a-z0-9]+", "-", full.lower())[:24].strip("-")
    return f"mf-{short}-{hashlib.sha256(full.encode()).hexdigest()[:6]}"


def command(unit: Unit, folder: str, *, hosts: bool) -> str:
    """The unit's command on a machine that has the bucket at `folder`.

    Args:
        unit: the unit.
        folder: an absolute path.
        hosts: whether several hosts run it together.

    Raises:
        ValueError: the experiment's file is not below this folder, or holds a control character.
    """
    if pathlib.PurePath(unit.experiment).is_absolute() or ".." in unit.experiment:
        raise ValueError(f"--config {unit.experiment}: give a path below this folder; it is sent")
    place = pathlib.Path(folder, unit.folder.parent.name, unit.name)
    words = unit._replace(folder=place).command() + (["--coordinator", "auto"] if hosts else [])
    if not all(map(str.isprintable, words)):
        raise ValueError(f"{unit.name}: a value has a character that cannot be printed; remove it")
    return shlex.join(words)


def tpu(accelerator: str) -> tuple[str, int] | None:
    """("v5litepod", 8) for "tpu-v5e-8"; None for a GPU.

    Raises:
        ValueError: no such TPU.
    """
    if not accelerator.startswith("tpu"):
        return None
    match = re.fullmatch(r"tpu-(\w+)-(\d+)", accelerator)
    kind = match[1].replace("v5e", "v5litepod") if match else ""
    if not match or kind not in RUNTIMES:
        known = ", ".join(RUNTIMES).replace("v5litepod", "v5e")
        raise ValueError(f"{accelerator!r} is no TPU: write tpu-KIND-SIZE with KIND of {known}")
    return kind, int(match[2])


def require(option: str, value: str | None, pattern: str, example: str) -> None:
    """Raises a ValueError unless the option's value has the form of the example."""
    if not re.fullmatch(pattern, value or ""):
        what = f"{option} {value!r} is no such name" if value else f"{option} is missing"
        raise ValueError(f"{what}: write it like {example}")


def require_code() -> None:
    """Raises a ValueError unless the working directory, which is sent, can be installed there."""
    if not pathlib.Path("pyproject.toml").is_file():
        raise ValueError(f"{pathlib.Path.cwd()} is sent and installed: do this in a clone")


def write(units: Sequence[Unit], files: dict[str, str], program: str) -> list[pathlib.Path]:
    """Writes rendered files below the folder of all sweeps.

    Raises:
        ValueError: `program`, which is to read them, is not installed.
    """
    if not shutil.which(program):
        raise ValueError(f"{program} is not installed: put it on the PATH, or use --dry_run")
    paths = [units[0].folder.parents[1] / name for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    return paths


def call(*words: str) -> None:
    """Runs a command, its output to the terminal.

    Raises:
        ValueError: it failed.
    """
    if code := subprocess.run(words).returncode:
        raise ValueError(f"{shlex.join(words)}: exit code {code}")


def _check(options: argparse.Namespace) -> None:
    kind = tpu(options.tpu_accelerator)
    bucket = r"gs://[a-z0-9][a-z0-9._-]+[a-z0-9](/[\w.=-]+)*"
    require("--tpu_bucket", options.tpu_bucket, bucket, "gs://my-bucket/runs")
    if not kind:
        require("--tpu_accelerator", options.tpu_accelerator, r"[A-Z][\w-]*(:\d+)?", "A100:8")
    if options.tpu_region:
        require("--tpu_region", options.tpu_region, r"[a-z]+-[a-z]+\d+", "us-central1")
    if options.tpu_engine == "gcloud":
        if not kind:
            raise ValueError("--tpu_engine gcloud is for TPUs: use --tpu_engine sky for GPUs")
        require("--tpu_zone", options.tpu_zone, ZONE, "us-central1-a")
        if options.tpu_project:
            require("--tpu_project", options.tpu_project, PROJECT, "my-project")


def _on_the_machine(unit: Unit, options: argparse.Namespace) -> tuple[str, str]:
    """The installation and the run, as shell scripts."""
    kind = tpu(options.tpu_accelerator)
    setup = _SETUP.format(python=PYTHON_AT, extra="tpu" if kind else "cuda12")
    run = _RUN.format(
        python=PYTHON_AT,
        attempts=options.tpu_retries + 1,
        command=command(unit, BUCKET_AT, hosts=bool(kind and kind[1] > 8)),  # a host has up to 8
    )
    return setup, run


def _sky(unit: Unit, options: argparse.Namespace) -> str:
    kind = tpu(options.tpu_accelerator)
    setup, run = _on_the_machine(unit, options)
    return _SKY.format(
        name=job_name(unit),
        infra=f"gcp/{options.tpu_region}" if options.tpu_region else "gcp",
        accelerators=f"tpu-{kind[0]}-{kind[1]}" if kind else options.tpu_accelerator,
        accelerator_args=(
            f"  accelerator_args:\n    runtime_version: {RUNTIMES[kind[0]]}\n" if kind else ""
        ),
        spot=json.dumps(options.tpu_spot),
        bucket_at=BUCKET_AT,
        bucket=options.tpu_bucket,
        setup=textwrap.indent(setup.rstrip("\n"), "  "),
        run=textwrap.indent(run.rstrip("\n"), "  "),
    )


def _remote(unit: Unit, options: argparse.Namespace) -> str:
    setup, run = _on_the_machine(unit, options)
    bucket, _, path = options.tpu_bucket.removeprefix("gs://").partition("/")
    return _REMOTE.format(
        unit=unit.name,
        name=job_name(unit),
        gcsfuse=_GCSFUSE,
        bucket_at=BUCKET_AT,
        mount=f"--only-dir {path} {bucket}" if path else bucket,
        setup=setup.removeprefix("set -e\n"),
        run=run,
    )


def _driver(unit: Unit, options: argparse.Namespace) -> str:
    kind, size = tpu(options.tpu_accelerator) or ("", 0)
    project = f" --project={options.tpu_project}" if options.tpu_project else ""
    folder = f"{unit.folder.parent.name}/{unit.name}"
    return _DRIVER.format(
        unit=unit.name,
        name=job_name(unit),
        options=f"--zone={options.tpu_zone}{project}",
        accelerator=f"{kind}-{size}",
        runtime=RUNTIMES[kind],
        spot=" --spot" if options.tpu_spot else "",
        machines=options.tpu_machines,
        there=shlex.quote(f"{options.tpu_bucket}/{folder}"),
        here=shlex.quote(str(unit.folder)),
    )


def _run_all(scripts: Sequence[pathlib.Path]) -> None:
    """Runs scripts side by side: it is Google's queue that orders them."""
    running = {}
    try:
        for script in scripts:
            with script.with_suffix(".log").open("a") as log:
                running[script] = subprocess.Popen(
                    ["bash", script], stdout=log, stderr=log, start_new_session=True
                )
        for script, process in running.items():
            print(f"{script.stem}: exit code {process.wait()}; {script.with_suffix('.log')}")
    finally:
        left = [process for process in running.values() if process.poll() is None]
        for process in left:
            os.killpg(process.pid, signal.SIGTERM)  # each deletes its TPU as it ends
        for process in left:
            process.wait()
