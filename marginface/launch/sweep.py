"""python -m launch.sweep --config experiments/arcface_regular.py[:variant] --backend local

Expands the experiment's sweep(add), checks every key before anything starts, and runs all units.
The same command again skips what is done and continues what is not. Backends:

    local   processes of this machine, --jobs of them at a time
    vmap    one process: units that differ in numbers only train together in one compiled program
    slurm   a job array
    tpu     cloud TPUs or GPUs, through SkyPilot or plain gcloud scripts
    k8s     Kubernetes, through xpk

Exit codes: 0 all units done; 1 some failed or diverged (named at the end); 2 config or input error;
75 stopped by Ctrl-C or SIGTERM, run the same command again.
"""

import argparse
import importlib
import pathlib
import shlex
from collections import Counter
from collections.abc import Sequence

from marginface import command, runtime
from marginface import config as configs
from marginface.command import Parser
from marginface.launch import units as sweeps
from marginface.launch.units import Unit
from marginface.runs import folder as run_folder
from marginface.runs import plan

BACKENDS = {
    "local": "local",
    "vmap": "together",
    "slurm": "slurm",
    "tpu": "cloud",
    "k8s": "kubernetes",
}
SOME_FAILED = 1


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The command's options, and the overrides {dotted key: text} that hold for all units.

    Raises:
        ValueError: an option that does not exist or lacks its value.
    """
    parser = Parser("python -m launch.sweep", __doc__)
    add = parser.add_argument
    add("--config", nargs="+", required=True, metavar="FILE[:VARIANT]", help="or a folder of them")
    add("--variant", default="", help="stands behind each file that has none of its own")
    add("--backend", default="local", choices=BACKENDS)
    add("--seeds", type=int, default=1, help="each point of the grid runs with seeds 0 to N - 1")
    add("--no_grid", action="store_true", help="each experiment as it stands, without its sweep")
    add("--filter", nargs="+", default=[], metavar="KEY=VALUE[,VALUE]", help="only these units")
    add("--runs", type=pathlib.Path, default=pathlib.Path("runs"), help="where the folders go")
    add("--dry_run", action="store_true", help="print what would run or be sent, and stop")
    for name in dict.fromkeys(BACKENDS.values()):
        module = importlib.import_module(f"marginface.launch.engines.{name}")
        module.add_arguments(parser.add_argument_group(f"--backend {_backend_of(name)}"))
    return parser.parse_with_changes(argv)


def run(argv: Sequence[str]) -> int:
    """Sweeps as `argv` says; returns the exit code."""
    options, changes = parse(argv)
    if options.seeds < 1:
        raise ValueError(f"--seeds {options.seeds}: give 1 or more")
    units = [
        unit
        for experiment in experiments(options.config, options.variant)
        for unit in sweeps.expand(
            experiment,
            root=options.runs,
            seeds=options.seeds,
            grid=not options.no_grid,
            filters=options.filter,
            changes=changes,
        )
    ]
    if not units:
        raise ValueError(f"{' '.join(options.config)}: sweep(add) adds nothing; use --no_grid")
    check_folders(units)
    # Seed by seed, so that a sweep cut short has compared everything with the same seeds.
    units.sort(key=lambda unit: unit.config.seed)
    states = {unit.folder: run_folder.state(unit.folder) for unit in units}
    todo = [u for u in units if states[u.folder].kind not in ("done", "diverged")]
    print(f"{len(units)} units, {len(units) - len(todo)} of them ended before", flush=True)
    backend = importlib.import_module(f"marginface.launch.engines.{BACKENDS[options.backend]}")
    if options.dry_run:
        _print_rendered(todo, backend, options)
        return 0
    plan.record(units)
    ended_here = backend.submit(todo, options) if todo else True
    return _conclude(units) if ended_here else 0


def experiments(words: Sequence[str], variant: str = "") -> list[str]:
    """Each file with its variant; a folder stands for all files in it that have a get_config.

    Raises:
        ValueError: a folder without any.
    """
    found = []
    for word in words:
        folder = pathlib.Path(word)
        if folder.is_dir():
            files = [f for f in sorted(folder.glob("*.py")) if "def get_config" in f.read_text()]
            if not files:
                raise ValueError(f"--config {word}: no file in it has a get_config")
            found += map(str, files)
        else:
            found.append(word)
    return [f"{w}:{variant}" if variant and w.endswith(".py") else w for w in found]


def check_folders(units: Sequence[Unit]) -> None:
    """That no two units share a folder, and that what lies there is of the same config.

    Raises:
        ValueError: names the folder, and what differs.
    """
    for folder, count in Counter(unit.folder for unit in units).items():
        if count > 1:
            raise ValueError(
                f"{folder} would hold {count} units: give each experiment once, or rename a file"
            )
    for unit in units:
        path = unit.folder / run_folder.CONFIG
        if path.exists() and (changed := run_folder.differing(path, configs.to_json(unit.config))):
            raise ValueError(
                f"{unit.folder} holds a run with another config ({', '.join(changed[:3])}): "
                "remove it, or use another --runs"
            )


def _conclude(units: Sequence[Unit]) -> int:
    """Names what is not done."""
    bad = 0
    for unit in units:
        state = run_folder.state(unit.folder)
        if state.kind != "done":
            bad += 1
            why = f": {state.why}" if state.why else ""
            print(f"{state.kind}: {unit.folder}{why}", flush=True)
    print(f"table: python -m launch.results {units[0].folder.parents[1]}", flush=True)
    return SOME_FAILED if bad else 0


def _print_rendered(units: Sequence[Unit], backend, options: argparse.Namespace) -> None:
    if hasattr(backend, "render"):
        for name, text in backend.render(units, options).items():
            print(f"# ---- {name}\n{text}", flush=True)
    else:
        for unit in units:
            print(shlex.join(unit.command()), flush=True)


def _backend_of(module: str) -> str:
    return next(name for name, value in BACKENDS.items() if value == module)


def main() -> None:
    """The command."""
    command.main(run, "launch.sweep")


if __name__ == "__main__":
    runtime.restart_with_huge_pages()
    runtime.tune_cpu()
    runtime.tune_gpu()
    main()
