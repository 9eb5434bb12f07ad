"""marginface search --config experiments/arcface.py experiments/cosface.py --trials 20

Tunes each experiment over the ranges of its search(space) with the same budget: as many trials by
the same sampler from the same seed, none cut short, each the plain command, validated on the same
people held out of training (data.held_out). Trial 0 is the experiment as its file has it. Then the
best setting by validation trains on everybody with several seeds: these runs alone see the test
set, once. The same command again goes on where it was stopped, with the same trials.

    ROOT/<experiment>/search/search.json        budget, ranges, trials, the best, its test
    ROOT/<experiment>/search/trial=007/         a run folder
    ROOT/<experiment>/search/best=007,seed=0/   the best setting on the full training set

In a clone also `python -m launch.search`.

Exit codes: 0 all done; 2 config or input error; 75 stopped, run the same command again.

Musgrave, Belongie and Lim, A Metric Learning Reality Check, 2020, sections 2.3 and 3.3: losses
compared without a validation set, or with one of them tuned more, owe their ranks to that.
"""

import argparse
import json
import pathlib
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from marginface import command, lookup, runtime
from marginface import config as configs
from marginface.command import Parser
from marginface.config import Config
from marginface.launch import engines
from marginface.launch.sweep import check_folders
from marginface.launch.units import Unit
from marginface.report.run import meanings
from marginface.runs import folder as run_folder
from marginface.runs import plan
from marginface.runs.files import write_atomically

SEARCH = "search.json"
BACKENDS = [name for name, backend in engines.BACKENDS.items() if backend.waits]
_ENDED = ("done", "diverged")
_DIGITS = 4  # of a value tried: it is typed and read
_ACCURACY = meanings.of("accuracy")

Runner = Callable[[Sequence[Unit]], object]
Values = dict[str, Any]


class Stopped(KeyboardInterrupt):
    """Units were stopped after saving: the same command goes on."""


class Range(NamedTuple):
    """What a value may be.

    kind: "uniform" or "log_uniform" between the first and the last of `values`, or "choice".
    """

    kind: str
    values: tuple[float, ...]


class Space:
    """What an experiment's search(space) fills: dotted key → range, each key checked at once.

    Args:
        config: the experiment's.
    """

    def __init__(self, config: Config) -> None:
        self._known = configs.dotted(config)
        self.ranges: dict[str, Range] = {}

    def uniform(self, key: str, low: float | int, high: float | int) -> None:
        """Any value from low to high."""
        self._add(key, Range("uniform", (low, high)))

    def log_uniform(self, key: str, low: float | int, high: float | int) -> None:
        """Any value from low to high, each factor as likely as another."""
        if low <= 0:
            raise ValueError(f"log_uniform {key!r} from {low}: give a lower end above 0")
        self._add(key, Range("log_uniform", (low, high)))

    def choice(self, key: str, values: Sequence[float]) -> None:
        """One of these values."""
        self._add(key, Range("choice", tuple(values)))

    def _add(self, key: str, span: Range) -> None:
        if key not in self._known:
            raise ValueError(f"config has no key {key!r}; {lookup.nearest(key, self._known)}")
        if key in self.ranges:
            raise ValueError(f"{key!r} has a range already: give it one")
        default = self._known[key]
        if type(default) is not float or not all(type(v) is float for v in span.values):
            raise ValueError(f"the range of {key!r}: search floats only, between floats")
        low, high = span.values[0], span.values[-1]
        if span.kind == "choice":
            if default not in span.values:
                raise ValueError(f"{key!r}={default} is none of {span.values}: add it")
        elif not low < high or not low <= default <= high:
            raise ValueError(f"{key!r}={default} is not from {low} to {high}: widen the range")
        self.ranges[key] = span


class Budget(NamedTuple):
    """What every experiment may spend alike.

    held_out: how many people validate.
    batch: trials proposed at a time, from what is known before them.
    sampler_seed: of the sampler.
    """

    held_out: int = 100
    batch: int = 1
    sampler_seed: int = 0


def propose(
    ranges: Mapping[str, Range], told: Sequence[tuple[Values, float]], *, number: int, seed: int
) -> Values:
    """The values of trial `number`: of these arguments alone, so a restart cannot change them.

    Args:
        ranges: of the space.
        told: values and validation accuracy of the trials known by then.
        number: of the trial; experiments that share a range draw alike from it at first.
        seed: of the sampler.

    Raises:
        ValueError: Optuna is not installed.
    """
    optuna = _optuna()
    distributions = {key: _distribution(optuna, span) for key, span in ranges.items()}
    own_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=own_seed)
    )
    for values, accuracy in told:
        study.add_trial(
            optuna.trial.create_trial(params=values, distributions=distributions, value=accuracy)
        )
    found = study.ask(distributions).params
    return {key: _short(found[key], span) for key, span in ranges.items()}


class Search:
    """The trials of one experiment, as its search.json has them.

    Args:
        experiment: "experiments/arcface.py[:variant]".
        root: where the folders of sweeps are.
        budget: as all other experiments have it.
        changes: dotted key → text, as on the command line, for every run.

    Raises:
        ValueError: an experiment without search(space), a range that does not fit, or a
            search.json that is damaged or of another budget.
    """

    def __init__(
        self,
        experiment: str,
        *,
        root: pathlib.Path,
        budget: Budget,
        changes: Mapping[str, str] | None = None,
    ) -> None:
        module, variant = configs.find_experiment(experiment)
        if not hasattr(module, "search"):
            raise ValueError(f"{experiment} has no function search(space, arg)")
        config = configs.load(experiment)
        self.experiment, self.budget = experiment, budget
        self._common = configs.from_text(config, changes or {})
        configs.override(config, self._common)
        configs.check(config)
        space = Space(config)
        try:
            module.search(space, variant or None)
        except ValueError as error:
            raise ValueError(f"{experiment}, search: {error}") from None
        self.ranges = space.ranges
        if clash := sorted(self._common.keys() & {*self.ranges, "data.held_out", "seed"}):
            raise ValueError(f"--config.{clash[0]}: the search of {experiment} sets it itself")
        known = configs.dotted(config)
        self._defaults = {key: known[key] for key in self.ranges}
        self.folder = root / plan.folder_name(experiment, self._common) / "search"
        self.trials: list[dict[str, Any]] = []
        self.test: dict[str, dict[str, float] | None] = {}
        if (self.folder / SEARCH).exists():
            self._read()

    def check(self, trials: int) -> None:
        """That so many trials may be made of those that are there.

        Raises:
            ValueError: fewer than there are, or more after the test set was seen.
        """
        path = self.folder / SEARCH
        if len(self.trials) > trials:
            raise ValueError(
                f"{path} has {len(self.trials)} trials, more than --trials {trials}: budgets are "
                "equal; give more, or another --runs"
            )
        if self.test and len(self.trials) < trials:
            raise ValueError(
                f"{path}: the test set was seen after {len(self.trials)} trials, and must not "
                f"guide more; give --trials {len(self.trials)}, or another --runs"
            )

    def batch(self, start: int, stop: int) -> list[Unit]:
        """Trials start to stop - 1, proposed from what is known of those before `start`."""
        told = [(t["values"], _score(t)) for t in self.trials[:start]]
        for number in range(len(self.trials), stop):
            values = self._defaults
            if number:
                seed = self.budget.sampler_seed
                values = propose(self.ranges, told, number=number, seed=seed)
            trial = {"number": number, "values": values, "state": "not run", "accuracy": None}
            self.trials.append(trial)
        return [
            self._unit(
                f"trial={t['number']:03}", t["values"], seed=0, held_out=self.budget.held_out
            )
            for t in self.trials[start:stop]
            if t["state"] not in _ENDED
        ]

    def note(self) -> None:
        """Takes over what the run folders of the trials say by now, and writes search.json."""
        for trial in self.trials:
            folder = self.folder / f"trial={trial['number']:03}"
            if trial["state"] in _ENDED or not folder.exists():
                continue
            state = run_folder.state(folder)
            trial.update(state=state.kind, why=state.why)
            if state.kind == "done":
                trial["accuracy"] = accuracies(folder).get("validation")
                if trial["accuracy"] is None:
                    trial["state"] = "diverged"
        self.write()

    @property
    def best(self) -> dict[str, Any] | None:
        """The trial of the highest validation accuracy, the first of equals; None if none ended."""
        done = [t for t in self.trials if t["state"] == "done"]
        return max(done, key=lambda t: (t["accuracy"], -t["number"])) if done else None

    def finals(self, seeds: int) -> list[Unit]:
        """The best setting on the full training set, seed by seed; none if all trials diverged."""
        best = self.best
        if best is None:
            return []
        name = f"best={best['number']:03}"
        return [
            self._unit(f"{name},seed={seed}", best["values"], seed=seed, held_out=0)
            for seed in range(seeds)
        ]

    def note_test(self, units: Sequence[Unit]) -> None:
        """Takes over the test accuracies of the finals; None for a seed that is not there."""
        for unit in units:
            done = run_folder.state(unit.folder).kind == "done"
            self.test[str(unit.config.seed)] = accuracies(unit.folder) if done else None
        self.write()

    def write(self) -> None:
        """search.json, whole or not at all."""
        path, variant = configs.parts(self.experiment)
        content = {
            "experiment": path.stem,
            "variant": variant,
            "changes": self._common,
            "budget": {"trials": len(self.trials), "sampler": "TPESampler"} | self.budget._asdict(),
            "ranges": {key: [span.kind, *span.values] for key, span in self.ranges.items()},
            "trials": self.trials,
            "best": self.best,
            "test": self.test,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1, default=list) + "\n"
        write_atomically(self.folder / SEARCH, text)

    def _read(self) -> None:
        path = self.folder / SEARCH
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            budget = {key: content["budget"][key] for key in Budget._fields}
            ranges = {key: Range(kind, tuple(v)) for key, (kind, *v) in content["ranges"].items()}
            self.trials, self.test = list(content["trials"]), dict(content["test"])
            numbers = [trial["number"] for trial in self.trials]
            if any(t["values"].keys() != ranges.keys() or "state" not in t for t in self.trials):
                raise ValueError
            if numbers != list(range(len(numbers))):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{path} is damaged: remove it; the run folders beside it are used again"
            ) from None
        for key, old in budget.items():
            if old != (new := getattr(self.budget, key)):
                raise ValueError(
                    f"{path} was begun with {key}={old}, not {new}: use another --runs"
                )
        if ranges != self.ranges:
            raise ValueError(f"{path} was begun with other ranges: use another --runs")

    def _unit(self, name: str, values: Values, *, seed: int, held_out: int) -> Unit:
        overrides = self._common | values | {"data.held_out": held_out, "seed": seed}
        config = configs.load(self.experiment)
        configs.override(config, overrides)
        configs.check(config)
        return Unit(name, self.experiment, overrides, config, self.folder / name)


def search(searches: Sequence[Search], *, trials: int, seeds: int, run: Runner) -> None:
    """All trials of all experiments side by side, then each one's best setting on the test set.

    Args:
        searches: the experiments, with one budget.
        trials: of each experiment; those that ended before count.
        seeds: of the best setting, 0 to look at no test set yet.
        run: trains units and returns when they have ended, each in its folder.

    Raises:
        ValueError: trials that do not fit what is there, or a unit that failed; names its folder.
        Stopped: units were stopped from outside.
    """
    for one in searches:
        one.check(trials)
    step = searches[0].budget.batch
    for start in range(0, trials, step):
        units = [u for one in searches for u in one.batch(start, min(start + step, trials))]
        for one in searches:
            one.write()  # before they run: what was proposed is what runs, whatever happens
        if units:
            _run(units, run, [one.note for one in searches])
    finals = {one.folder: one.finals(seeds) for one in searches}
    for one in searches:
        one.test |= {
            str(u.config.seed): one.test.get(str(u.config.seed)) for u in finals[one.folder]
        }
        one.write()  # before they run: from now on the test set counts as seen
    if units := [unit for some in finals.values() for unit in some]:
        _run(units, run, [lambda o=one: o.note_test(finals[o.folder]) for one in searches])


def accuracies(folder: pathlib.Path) -> dict[str, float]:
    """{test set: accuracy} of a complete run."""
    summary = json.loads((folder / run_folder.SUMMARY).read_text(encoding="utf-8"))
    return {
        key.removesuffix("/accuracy"): value
        for key, value in summary.items()
        if key.endswith("/accuracy") and not key.startswith("untrained/") and value is not None
    }


def table(searches: Sequence[Search]) -> str:
    """One line for each experiment: trials, validation, the chosen values, the test."""
    lines = [
        "| experiment | trials | validation, file's → best | chosen values | test, mean ± sd |",
        "|---|---|---|---|---|",
    ]
    for one in searches:
        ended = [t for t in one.trials if t["state"] in _ENDED]
        diverged = sum(t["state"] == "diverged" for t in ended)
        count = f"{len(ended)}, {diverged} diverged" if diverged else f"{len(ended)}"
        first, best = one.trials[:1], one.best
        validation = " → ".join(
            _percent(t["accuracy"]) for t in [*first, *([best] if best else [])]
        )
        chosen = (
            ", ".join(f"{key}={value:g}" for key, value in best["values"].items()) if best else ""
        )
        cells = (one.folder.parent.name, count, validation, chosen, _test(one))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _test(one: Search) -> str:
    seeds = {seed: found for seed, found in one.test.items() if found}
    if not seeds:
        return "not run"
    parts = []
    for name in next(iter(seeds.values())):
        values = [_ACCURACY.factor * found[name] for found in seeds.values() if name in found]
        sd = f" ± {statistics.stdev(values):{_ACCURACY.form}}" if len(values) > 1 else ""
        parts.append(f"{name} {statistics.mean(values):{_ACCURACY.form}}{sd}")
    missing = len(one.test) - len(seeds)
    lost = f"; {missing} of {len(one.test)} seeds diverged" if missing else ""
    count = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    return ", ".join(parts) + f" ({count}{lost})"


def _percent(accuracy: float | None) -> str:
    if accuracy is None:
        return "diverged"
    return f"{_ACCURACY.factor * accuracy:{_ACCURACY.form}}"


def _run(units: Sequence[Unit], run: Runner, notes: Sequence[Callable[[], None]]) -> None:
    """Runs those that have not ended; whatever happens, what has ended is noted."""
    check_folders(units)
    try:
        todo = [u for u in units if run_folder.state(u.folder).kind not in _ENDED]
        if todo:
            run(todo)
    finally:
        for note in notes:
            note()
    states = {unit.folder: run_folder.state(unit.folder) for unit in units}
    bad = {folder: state for folder, state in states.items() if state.kind not in _ENDED}
    for folder, (kind, why, _) in bad.items():
        if kind == "checkpointed":
            raise Stopped(f"{folder}: {why}")
        raise ValueError(f"{folder}: {kind}{f', {why}' if why else ''}")


def _score(trial: Mapping[str, Any]) -> float:
    # A diverged trial is told as worse than any network, so that the sampler learns to stay away;
    # a failed one it would forget. It compares ranks only.
    return 0.0 if trial["accuracy"] is None else trial["accuracy"]


def _short(value: float, span: Range) -> float:
    if span.kind == "choice":
        return value
    return min(max(float(f"{value:.{_DIGITS}g}"), span.values[0]), span.values[1])


def _distribution(optuna: Any, span: Range) -> Any:
    if span.kind == "choice":
        return optuna.distributions.CategoricalDistribution(span.values)
    low, high = span.values
    return optuna.distributions.FloatDistribution(low, high, log=span.kind == "log_uniform")


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ValueError("a search needs Optuna: pip install 'marginface[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The command's options, and the overrides {dotted key: text} that hold for all runs.

    Raises:
        ValueError: an option that does not exist, lacks its value or is out of range.
    """
    parser = Parser(
        "marginface search",
        f"{__doc__}\nBackends:\n\n{engines.listed(BACKENDS)}",
        usage="marginface search --config FILE[:VARIANT] ... [--config.KEY=VALUE ...] [options]",
    )
    add = parser.add_argument
    add("--config", nargs="+", required=True, metavar="FILE[:VARIANT]", help="experiments")
    add("--trials", type=int, default=20, help="of each experiment")
    add("--seeds", type=int, default=3, help="of the best setting; 0: no test yet")
    add("--held_out", type=int, default=100, help="people held out of training for validation")
    add("--batch", type=int, default=1, help="trials proposed at a time, to run side by side")
    add("--sampler_seed", type=int, default=0, help="of the sampler of all experiments")
    add("--runs", type=pathlib.Path, default=pathlib.Path("runs"), help="where the folders go")
    add("--dry_run", action="store_true", help="print ranges and first commands, and stop")
    engines.add_arguments(parser, argv, BACKENDS)
    options, changes = parser.parse_with_changes(argv)
    for name, least in {"trials": 1, "seeds": 0, "held_out": 4, "batch": 1}.items():
        if (given := getattr(options, name)) < least:
            raise ValueError(f"--{name} {given}: give {least} or more")
    return options, changes


def run(argv: Sequence[str]) -> None:
    """Searches as `argv` says and prints the table."""
    options, changes = parse(argv)
    budget = Budget(options.held_out, options.batch, options.sampler_seed)
    searches = [
        Search(experiment, root=options.runs, budget=budget, changes=changes)
        for experiment in dict.fromkeys(options.config)
    ]
    if options.dry_run:
        _print_plan(searches, options)
        return
    _optuna()
    engine = engines.load(options.backend)
    search(
        searches,
        trials=options.trials,
        seeds=options.seeds,
        run=lambda units: engine.submit(units, options),
    )
    print(table(searches), flush=True)


def _print_plan(searches: Sequence[Search], options: argparse.Namespace) -> None:
    for one in searches:
        print(f"# {one.experiment}: {options.trials} trials, then {options.seeds} seeds")
        for key, (kind, values) in one.ranges.items():
            print(f"#   {key}: {kind} {', '.join(f'{v:g}' for v in values)}")
        for unit in one.batch(0, 1):
            print(shlex.join(unit.command()))
    runs = len(searches) * (options.trials + options.seeds)
    print(f"# {runs} runs at most; the other trials follow from those before them", flush=True)


def main() -> None:
    """The command."""
    command.main(run, "launch.search")


if __name__ == "__main__":
    runtime.restart_with_huge_pages()
    runtime.tune_cpu()
    runtime.tune_gpu()
    main()
