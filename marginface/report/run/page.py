"""What a complete run leaves: summary.json, summary.md, pictures, and the final table.

A summary is flat. Figures have their metrics' names ("lfw/accuracy"), those of the network before
training begin with "untrained/"; the rest says where they come from ("commit", "device/kind").
"""

import hashlib
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from marginface.config import dotted
from marginface.report.run import meanings
from marginface.runs import folder as run_folder
from marginface.runs import provenance
from marginface.runs.files import read_lines, write_atomically

Summary = dict[str, Any]

_UNTRAINED = "untrained/"


def report(
    workdir: pathlib.Path,
    *,
    results: Mapping[str, float],
    evaluators: Iterable[Any],
    mesh: Mesh,
    seconds: float,
    command: str | None = None,
    walk: Mapping[str, Any] | None = None,
) -> None:
    """Writes summary.json, plots/, evaluators' arrays and summary.md, and prints the final table.

    Args:
        workdir: holds config.json and metrics.jsonl.
        results: the final evaluation.
        evaluators: those that have run; see marginface.evaluators for what they may leave.
        mesh: the devices of the run.
        seconds: how long it took.
        command: what to type to run it again.
        walk: what loss.precision and loss.chunk_size came to, if classes are walked over.
    """
    from marginface.report.run import plots

    config_json = (workdir / run_folder.CONFIG).read_text(encoding="utf-8")
    records = read_lines(workdir / run_folder.METRICS)
    training = [record for record in records if "loss/total" in record]
    figures = {k: v for k, v in (training or [{}])[-1].items() if k != "step"}
    untrained = {k: v for record in records if record["step"] == 0 for k, v in record.items()}
    summary = summarise(
        {**figures, **results},
        config_hash=hashlib.sha256(config_json.encode()).hexdigest()[:12],
        wall_s=seconds,
        mesh=mesh,
        walk=walk,
        untrained={k: v for k, v in untrained.items() if k in results},
    )
    write_summary(workdir, summary)
    for evaluator in evaluators:
        if hasattr(evaluator, "arrays"):
            for name, array in evaluator.arrays().items():
                np.save(workdir / f"{name}.npy", array)
    pictures = plots.draw(workdir, records, evaluators)
    config = json.loads(config_json)
    write_page(
        workdir, summary, title=workdir.name, command=command, config=config, pictures=pictures
    )
    print(f"\n{final_table(summary)}\n\nreport: {workdir / run_folder.PAGE}", flush=True)


def summarise(
    figures: Mapping[str, float],
    *,
    config_hash: str,
    wall_s: float,
    mesh: Mesh,
    walk: Mapping[str, Any] | None = None,
    untrained: Mapping[str, float] | None = None,
) -> Summary:
    """Figures, and all that is needed to say where they come from.

    Args:
        figures: the last value of each metric.
        config_hash: the digest of the config.
        wall_s: seconds that the run took.
        mesh: the devices of the run.
        walk: what loss.precision and loss.chunk_size came to, see objective.walk.
        untrained: the same evaluation before the first step.
    """
    return {
        **figures,
        **{_UNTRAINED + name: value for name, value in (untrained or {}).items()},
        "time/wall_s": wall_s,
        "config/hash": config_hash,
        **{f"config/{name}": value or 0 for name, value in (walk or {}).items()},
        "commit": provenance.commit(),
        **provenance.devices(mesh),
        **provenance.versions(),
    }


def write_summary(workdir: pathlib.Path, summary: Mapping[str, Any]) -> None:
    """Writes <workdir>/summary.json, whole or not at all; what is not finite becomes null."""
    broken = {k: None for k, v in _figures(summary).items() if not _is_finite(v)}
    text = json.dumps({**summary, **broken}, indent=2, allow_nan=False)
    write_atomically(workdir / run_folder.SUMMARY, text + "\n")


def final_table(summary: Mapping[str, Any]) -> str:
    """Figure, untrained, trained, meaning: aligned columns of plain text, without a last newline.

    Standard errors stand behind their accuracy; the untrained column only where there is one.
    """
    header, *rows = _rows(summary)
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        name, *values, meaning = cells
        middle = [v.rjust(w) for v, w in zip(values, widths[1:-1], strict=True)]
        return "  ".join([name.ljust(widths[0]), *middle, meaning]).rstrip()

    rule = "-" * max(len(line(row)) for row in (header, *rows))
    return "\n".join([line(header), rule, *map(line, rows)])


def write_page(
    workdir: pathlib.Path,
    summary: Mapping[str, Any],
    *,
    title: str,
    command: str | None = None,
    config: Mapping[str, Any],
    pictures: Sequence[tuple[pathlib.Path, str]] = (),
) -> None:
    """Writes <workdir>/summary.md: what was run, the table, the pictures, every setting.

    Args:
        workdir: the run folder.
        summary: from `summarise`.
        title: the experiment's name.
        command: what to type to run it again, if known.
        config: nested; shown with dotted keys.
        pictures: drawn files below workdir, embedded by relative path, and their captions.
    """
    header, *rows = _rows(summary)
    seconds = round(summary["time/wall_s"])
    libraries = [f"{k.removeprefix('version/')} {v}" for k, v in summary.items() if "version/" in k]
    lines = [
        f"# {title}",
        "",
        *(f"- {line}" for line in _headlines(summary)),
        "",
        "## What was run",
        "",
        *(["```sh", command, "```", ""] if command else []),
        f"- time: {seconds // 3600} h {seconds // 60 % 60:02d} min {seconds % 60:02d} s",
        f"- device: {summary['device/count']} × {summary['device/kind']}",
        f"- commit: {summary['commit']}; config: {summary['config/hash']}",
        f"- versions: {', '.join(libraries)}",
        "",
        "## Figures",
        "",
        _markdown_row(header),
        _markdown_row(["---", *["---:"] * (len(header) - 2), "---"]),
        *map(_markdown_row, rows),
        "",
    ]
    if pictures:
        lines += ["## Pictures", ""]
    for path, caption in pictures:
        relative = path.relative_to(workdir).as_posix()
        lines += [f"![{path.stem}]({relative})", "", caption, ""]
    settings = [f"{k} = {v}" for k, v in sorted(dotted(config).items())]
    lines += ["## Settings", "", "```text", *settings, "```", ""]
    write_atomically(workdir / run_folder.PAGE, "\n".join(lines))


def _figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """All but the words that say where the figures come from."""
    return {k: v for k, v in summary.items() if not k.startswith(provenance.ORIGIN)}


def _headlines(summary: Mapping[str, Any]) -> list[str]:
    """A sentence for each verification accuracy."""
    sentences = []
    for name, value in summary.items():
        if not name.endswith("/accuracy") or name.startswith(_UNTRAINED):
            continue
        sentence = f"{name}: **{_with_error(summary, name)}**"
        before = summary.get(_UNTRAINED + name)
        if _is_finite(value) and _is_finite(before):
            gain = 100 * (value - before)
            sentence += f", untrained {_text(name, before)}: {gain:+.2f} points by training"
        sentences.append(sentence)
    return sentences


def _rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """The header and one row of cells for each figure: evaluation first, time last."""

    groups = ("prototypes/", "train/", "loss/", "data/", "time/")

    def rank(name: str) -> int:
        return next((i for i, group in enumerate(groups, 1) if name.startswith(group)), 0)

    names = [n for n in _figures(summary) if not n.startswith(_UNTRAINED)]
    names = sorted((n for n in names if not n.endswith("_stderr")), key=rank)
    baseline = any(name.startswith(_UNTRAINED) for name in summary)
    rows = [["figure", *(["untrained"] if baseline else []), "trained", "meaning"]]
    for name in names:
        before = summary.get(_UNTRAINED + name)
        cells = ["" if before is None else _text(name, before)] if baseline else []
        rows.append([name, *cells, _with_error(summary, name), meanings.of(name).line])
    return rows


def _text(name: str, value: float | None) -> str:
    return "not finite" if not _is_finite(value) else meanings.of(name).format.format(value)


def _with_error(summary: Mapping[str, Any], name: str) -> str:
    error = summary.get(f"{name}_stderr")
    text = _text(name, summary[name])
    return text if error is None else f"{text} ± {_text(name, error)}"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
