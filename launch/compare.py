"""Every experiment on the same small data with several seeds, gathered in one table.

    python -m launch.compare                 # every file of experiments/, seeds 0, 1, 2
    python -m launch.compare arcface triplet --seeds 5

One run after the other, each the plain command a user would type, in its own run folder; a run that
is complete is not run again, one that was stopped continues. The table is a CSV with one row for
each experiment: verification accuracy as mean and standard deviation over seeds, and where the
figures come from.
"""

import argparse
import csv
import io
import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from marginface import metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOT_RUN = "not run"
MARKS = ("<!-- losses_embedded -->", "<!-- end -->")
COLUMNS = (
    *("experiment", "variant", "seeds", "accuracy_mean", "accuracy_std", "accuracies"),
    *("untrained_mean", "auc_mean", "sep_mean", "sep_var", "wall_s_max"),
    *("commit", "device", "versions"),
)


def experiments() -> list[str]:
    """The names of all files in experiments/ that hold an experiment."""
    files = (ROOT / "experiments").glob("*.py")
    return sorted(f.stem for f in files if f.stem not in ("__init__", "common"))


def run(name: str, variant: str, seed: int, folder: pathlib.Path) -> dict[str, Any] | None:
    """The summary of one run, made now if it is not there yet; None if it failed."""
    summary = folder / "summary.json"
    if not summary.exists():
        command = [sys.executable, "-m", "marginface.main"]
        command += ["--config", f"experiments/{name}.py:{variant}", f"--config.seed={seed}"]
        command += ["--workdir", str(folder)]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log).returncode
        if code:
            print(f"{name}, seed {seed}: exit code {code}; see {folder / 'log.txt'}", flush=True)
            return None
    return json.loads(summary.read_text(encoding="utf-8"))


def row(name: str, variant: str, runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One line of the table; an experiment without a complete run says so.

    Args:
        name: the experiment.
        variant: what stood behind its file's name.
        runs: seed to summary.
    """
    if not runs:
        return dict.fromkeys(COLUMNS, "") | {
            "experiment": name,
            "variant": variant,
            "seeds": NOT_RUN,
        }

    def values(ending: str, untrained: bool = False) -> list[float]:
        return [
            value
            for summary in runs.values()
            for key, value in summary.items()
            if key.endswith(ending) and key.startswith("untrained/") == untrained
        ]

    def mean(ending: str, untrained: bool = False) -> str:
        found = values(ending, untrained)
        return f"{statistics.mean(found):.4g}" if found else ""

    accuracies = values("/accuracy")
    summaries = list(runs.values())
    first = summaries[0]
    names = ("jax", "flax", "optax", "python")
    return {
        "experiment": name,
        "variant": variant,
        "seeds": " ".join(map(str, runs)),
        "accuracy_mean": f"{statistics.mean(accuracies):.4f}",
        "accuracy_std": f"{statistics.stdev(accuracies):.4f}" if len(runs) > 1 else "",
        "accuracies": " ".join(f"{a:.4f}" for a in accuracies),
        "untrained_mean": mean("/accuracy", untrained=True),
        "auc_mean": mean("/auc"),
        "sep_mean": mean("prototypes/sep_mean"),
        "sep_var": mean("prototypes/sep_var"),
        "wall_s_max": f"{max(s['time/wall_s'] for s in summaries):.0f}",
        "commit": " ".join(sorted({s["commit"][:7] for s in summaries})),
        "device": f"{first['device/count']} x {first['device/kind']}",
        "versions": " ".join(f"{n} {first.get(f'version/{n}', '?')}" for n in names),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table, best mean first, for the README."""
    lines = [
        "| experiment | seeds | accuracy, mean ± sd | AUC | mean Sep |",
        "|---|---|---|---|---|",
    ]
    ran = [r for r in rows if r["seeds"] != NOT_RUN]
    for r in sorted(ran, key=lambda r: (-float(r["accuracy_mean"]), r["experiment"])):
        accuracy = f"{100 * float(r['accuracy_mean']):.2f}"
        if r["accuracy_std"]:
            accuracy += f" ± {100 * float(r['accuracy_std']):.2f}"
        cells = (f"`{r['experiment']}`", r["seeds"], accuracy, r["auc_mean"], r["sep_mean"] or "–")
        lines.append(f"| {' | '.join(cells)} |")
    for r in rows:
        if r["seeds"] == NOT_RUN:
            lines.append(f"| `{r['experiment']}` | {NOT_RUN} | | | |")
    return "\n".join(lines) + "\n"


def update(page: pathlib.Path, text: str) -> None:
    """Puts a table between the page's two marks.

    Raises:
        ValueError: the page lacks them.
    """
    old = page.read_text(encoding="utf-8")
    head, mark, rest = old.partition(MARKS[0])
    _, end, tail = rest.partition(MARKS[1])
    if not mark or not end:
        raise ValueError(f"{page} has no {MARKS[0]} ... {MARKS[1]}: put them where the table goes")
    metrics.write_atomically(page, f"{head}{mark}\n{text}{end}{tail}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m launch.compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("names", nargs="*", help="experiments; all if none is given")
    add("--variant", default="data=small", help="what stands behind each file's name")
    add("--seeds", type=int, default=3, help="how many, from 0")
    add("--runs", type=pathlib.Path, default=pathlib.Path("runs/compare"), help="run folders")
    add(
        "--out",
        type=pathlib.Path,
        default=ROOT / "experiments/results/losses_embedded.csv",
        help="the table",
    )
    add("--update", type=pathlib.Path, metavar="PAGE", help="also put the table into this page")
    options = parser.parse_args(argv)
    names = options.names or experiments()
    if unknown := set(names) - set(experiments()):
        parser.error(f"no experiment {', '.join(sorted(unknown))}; there are {experiments()}")
    folder = options.runs.resolve()
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
    rows: list[dict[str, Any]] = []
    # Seed by seed, so that a run cut short has compared all losses with the same seeds.
    for seed in range(options.seeds):
        for name in names:
            summary = run(name, options.variant, seed, folder / f"{name}-{seed}")
            if summary is not None:
                found[name][seed] = summary
                accuracy = next(v for k, v in summary.items() if k.endswith("/accuracy"))
                seconds = summary["time/wall_s"]
                print(f"{name}, seed {seed}: {accuracy:.2%} in {seconds:.0f} s", flush=True)
            rows = [row(n, options.variant, runs) for n, runs in found.items()]
            options.out.parent.mkdir(parents=True, exist_ok=True)
            metrics.write_atomically(options.out, table(rows))
    if options.update:
        update(options.update, markdown(rows))
    print(f"table: {options.out}")


if __name__ == "__main__":
    main()
