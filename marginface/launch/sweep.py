"""marginface sweep --config experiments/arcface_regular.py:data=small --backend vmap --seeds 3

Expands the experiment's sweep(add), checks every key before anything starts, and runs all units.
The same command again skips what is done and continues what is not. In a clone also `python -m
launch.sweep`.

Exit codes: 0 all units done; 1 some failed or diverged (named at the end); 2 config or input error;
75 stopped by Ctrl-C or SIGTERM, run the same command again.
"""

import argparse
import pathlib
import shlex
from collections import Counter
from collections.abc import Sequence

from marginface import command, runtime
from marginface import config as configs
from marginface.command import Parser
from marginface.launch import engines, typed
from marginface.launch import units as sweeps
from marginface.launch.engines import BACKENDS, Engine, Remote
from marginface.launch.units import Unit
from marginface.runs import folder as run_folder
from marginface.runs import plan

SOME_FAILED = 1


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The command's options, and the overrides {dotted key: text} that hold for all units.

    Raises:
        ValueError: an option that does not exist or lacks its value.
    """
    parser = Parser(
        "marginface sweep",
        f"{__doc__}\nBackends:\n\n{engines.listed(BACKENDS)}",
        usage="marginface sweep --config FILE[:VARIANT] ... [--config.KEY=VALUE ...] [options]",
    )
    add = parser.add_argument
    add("--config", nargs="+", required=True, metavar="FILE[:VARIANT]", help="or a folder of them")
    add("--variant", default="", help="stands behind each file that has none of its own")
    add("--seeds", type=int, default=1, help="each point of the grid runs with seeds 0 to N - 1")
    add("--no_grid", action="store_true", help="each experiment as it stands, without its sweep")
    add("--filter", nargs="+", default=[], metavar="KEY=VALUE[,VALUE]", help="only these units")
    add("--runs", type=pathlib.Path, default=pathlib.Path("runs"), help="where the folders go")
    add("--dry_run", action="store_true", help="print what would run or be sent, and stop")
    engines.add_arguments(parser, argv, BACKENDS)
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
    engine = engines.load(options.backend)
    if options.dry_run:
        _print_rendered(todo, engine, options)
        return 0
    plan.record(units)
    ended_here = engine.submit(todo, options) if todo else True
    return _conclude(units) if ended_here else 0


def experiments(words: Sequence[str], variant: str = "") -> list[str]:
    """Each file with its variant; a folder stands for all files in it that have a get_config.

    Raises:
        ValueError: a folder without any.
    """
    found = []
    for word in words:
        folder = pathlib.Path(word)
        packaged = folder == pathlib.Path("experiments") and not folder.exists()
        if folder.is_dir() or packaged:
            files = sorted((configs.PACKAGED if packaged else folder).glob("*.py"))
            names = [f.name for f in files if "def get_config" in f.read_text(encoding="utf-8")]
            if not names:
                raise ValueError(f"--config {word}: no file in it has a get_config")
            found += [str(folder / name) for name in names]
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
    print(f"table: {typed('results')} {units[0].folder.parents[1]}", flush=True)
    return SOME_FAILED if bad else 0


def _print_rendered(units: Sequence[Unit], engine: Engine, options: argparse.Namespace) -> None:
    if isinstance(engine, Remote):
        for name, text in engine.render(units, options).items():
            print(f"# ---- {name}\n{text}", flush=True)
    else:
        for unit in units:
            print(shlex.join(unit.command()), flush=True)


def main() -> None:
    """The command."""
    command.main(run, "launch.sweep")


if __name__ == "__main__":
    runtime.restart_with_huge_pages()
    runtime.tune_cpu()
    runtime.tune_gpu()
    main()
