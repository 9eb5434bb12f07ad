"""A run folder: claimed by one config; at the end summary.json, summary.md, plots, final table.

A summary is flat. Figures have their metrics' names ("lfw/accuracy"), those of the network before
training begin with "untrained/"; the rest says where they come from ("commit", "device/kind").
"""

import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import marginface
from marginface.config import dotted, from_json
from marginface.evaluators import grouping, verification
from marginface.runs import metrics

Summary = dict[str, Any]

# What may differ between a run and its continuation: where things are, not what they are; and
# whether an unreadable image stops it, which is what the message of a run so stopped advises.
MAY_CHANGE = ("data.workers", "data.kw.root", "data.kw.unreadable", "wandb.", "tensorboard")
# Keys that the configs of earlier versions lack, and the values with which such a run continues.
_SINCE = {"loss.precision": ("auto", "highest")}  # they ran on CPU, where both are float32
_UNTRAINED = "untrained/"
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
ORIGIN = ("commit", "config/", "device/", "version/")

_LOCKS: dict[pathlib.Path, int] = {}  # of the run folders that this process trains in

# The last part of a figure's name: its format, and what it means in one line.
_PLAIN = "{:.4g}"
_MEANINGS = {
    "accuracy": ("{:.2%}", "pairs decided rightly, threshold of other pairs"),
    "auc": ("{:.4f}", "chance that genuine outscores impostor pair"),
    "eer": ("{:.2%}", "error rate where both errors are equal"),
    "tar@far=1e-1": ("{:.2%}", "genuine accepted if 1 impostor in 10 may be"),
    "tar@far=1e-2": ("{:.2%}", "genuine accepted if 1 impostor in 100 may be"),
    "tar@far=1e-3": ("{:.2%}", "genuine accepted if 1 impostor in 1,000 may"),
    "threshold": ("{:.4f}", "cosine from which a pair is accepted"),
    "sep_mean": ("{:.4f}", "mean cosine to the nearest other class"),
    "sep_var": (_PLAIN, "variance of that cosine over the classes"),
    "top1": ("{:.2%}", "training images nearest to their own class"),
    "target_angle": ("{:.1f}°", "mean angle of images to their own class"),
    "learning_rate": (_PLAIN, "step size at the end"),
    "gradient_norm": (_PLAIN, "length of the last gradient"),
    "total": (_PLAIN, "the sum that is minimised"),
    "grouping": (_PLAIN, "cross-entropy of the latent groups with their own labels"),
    "margin_softmax": (_PLAIN, "mean cross-entropy with the margin"),
    "group_entropy": ("{:.3f}", "evenness of group usage: 1 even, 0 all in one"),
    "group_largest": ("{:.2f}", "largest group's share × number of groups"),
    "collapsed": ("{:.0f}", "1 if the triplet loss has collapsed to one point"),
    "spread": (_PLAIN, "variance of unit embeddings: 0 one point, 1 everywhere"),
    "exclusive": (_PLAIN, "Lr(W), mean cosine to nearest other class"),
    "unreadable": ("{:,.0f}", "training images skipped: they could not be read"),
    "examples_per_s": ("{:,.0f}", "training images per second"),
    "together": ("{:.0f}", "runs that trained in one program and shared its time"),
    "wall_s": ("{:,.0f} s", "from start to end"),
}


def claim(workdir: pathlib.Path, config_json: str, origin: Mapping[str, Any] | None = None) -> None:
    """Makes the folder with its config.json and origin.json, or sees that its config is the same.

    Args:
        workdir: the run folder.
        config_json: the run's config.
        origin: what was typed: {"experiment", "variant", "overrides", "command"}.

    Raises:
        ValueError: the folder is a file or holds another config; names the keys that differ.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{workdir} is or lies in a file: choose another --workdir") from None
    _lock(workdir)  # before anything is looked at: two that start together must not both go on
    path = workdir / "config.json"
    if not path.exists():
        if origin is not None:
            text = json.dumps(dict(origin), indent=2, default=list) + "\n"
            metrics.write_atomically(workdir / "origin.json", text)
        metrics.write_atomically(path, config_json)
        return
    try:
        changed = differing(path, config_json)
    except ValueError:
        raise ValueError(f"{path} is no config: choose another --workdir") from None
    if changed:
        more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(
            f"{workdir} holds a run with another config ({', '.join(changed[:3])}{more}): "
            "choose another --workdir"
        )
    (workdir / "stopped.json").unlink(missing_ok=True)


def release(workdir: pathlib.Path) -> None:
    """Lets other processes train in the folder again; the end of this process does so too."""
    if (handle := _LOCKS.pop(workdir.resolve(), None)) is not None:
        os.close(handle)


def _lock(workdir: pathlib.Path) -> None:
    """Two processes in one folder would undo each other's files: the second is refused."""
    if (folder := workdir.resolve()) in _LOCKS:
        return
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(
            f"{workdir} is being trained by another process: wait for it, or end it"
        ) from None
    except OSError:  # a file system without locks, as buckets are
        os.close(handle)
        return
    _LOCKS[folder] = handle


def record_stop(workdir: pathlib.Path, config_json: str, code: int, message: str) -> None:
    """Leaves {"code", "message"} in stopped.json: why the run is not complete; claim removes it.

    Does nothing where the folder is not this config's, where another process trains in it, and
    where the run is complete: what is there is not to be marked by a command that was refused.
    """
    try:
        if differing(workdir / "config.json", config_json) or (workdir / "summary.json").exists():
            return
        _lock(workdir)
        text = json.dumps({"code": code, "message": message}) + "\n"
        metrics.write_atomically(workdir / "stopped.json", text)
    except (OSError, ValueError):  # no folder yet, or a full disk: the command's own line says so
        return


def differing(path: pathlib.Path, config_json: str) -> list[str]:
    """ "loss.scale was 24.0, is 32.0" for each key that a continued run must not change.

    Args:
        path: a config.json.
        config_json: another config.
    """
    old = dotted(from_json(path.read_text(encoding="utf-8")))
    new = dotted(json.loads(config_json))
    old |= {k: new[k] for k, known in _SINCE.items() if k not in old and new.get(k) in known}
    return [
        f"{key} was {old.get(key, 'absent')}, is {new.get(key, 'absent')}"
        for key in sorted(old | new)
        if old.get(key, ...) != new.get(key, ...) and not key.startswith(MAY_CHANGE)
        # Where a walk over classes is cut decides rounding alone.
        if not key.endswith(".chunk_size")
    ]


def report(
    workdir: pathlib.Path,
    *,
    results: Mapping[str, float],
    evaluators: Sequence[verification.Evaluator],
    mesh: Mesh,
    seconds: float,
    command: str | None = None,
    separability: np.ndarray | None = None,
    groupings: Sequence[grouping.Evaluator] = (),
    walk: Mapping[str, Any] | None = None,
) -> None:
    """Writes summary.json, plots/, separability.npy and summary.md, and prints the final table.

    Args:
        workdir: holds config.json and metrics.jsonl.
        results: the final evaluation.
        evaluators: those that have run; their scores are drawn.
        mesh: the devices of the run.
        seconds: how long it took.
        command: what to type to run it again.
        separability: Sep_i of every class, if there are prototypes.
        groupings: evaluators of latent groups, if there are groups.
        walk: what loss.precision and loss.chunk_size came to, if classes are walked over.
    """
    from marginface.report import plots  # here: Matplotlib's import is a tenth of a run's start

    config_json = (workdir / "config.json").read_text(encoding="utf-8")
    records = metrics.read_lines(workdir / "metrics.jsonl")
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
    if separability is not None:
        np.save(workdir / "separability.npy", separability)
    pictures = plots.draw(
        workdir, records, evaluators, separability=separability, groupings=groupings
    )
    config = json.loads(config_json)
    write_page(
        workdir, summary, title=workdir.name, command=command, config=config, pictures=pictures
    )
    print(f"\n{final_table(summary)}\n\nreport: {workdir / 'summary.md'}", flush=True)


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


def versions() -> dict[str, str]:
    """{"version/jax": "0.10.2", ...}; libraries that are not installed are left out."""
    found = {"version/python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[f"version/{name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


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
    device = mesh.devices.flat[0]
    return {
        **figures,
        **{_UNTRAINED + name: value for name, value in (untrained or {}).items()},
        "time/wall_s": wall_s,
        "config/hash": config_hash,
        **{f"config/{name}": value or 0 for name, value in (walk or {}).items()},
        "commit": commit(),
        "device/kind": device.device_kind,
        "device/platform": device.platform,
        "device/count": mesh.size,
        "device/processes": jax.process_count(),
        **versions(),
    }


def write_summary(workdir: pathlib.Path, summary: Mapping[str, Any]) -> None:
    """Writes <workdir>/summary.json, whole or not at all; what is not finite becomes null."""
    broken = {k: None for k, v in _figures(summary).items() if not _is_finite(v)}
    text = json.dumps({**summary, **broken}, indent=2, allow_nan=False)
    metrics.write_atomically(workdir / "summary.json", text + "\n")


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
    metrics.write_atomically(workdir / "summary.md", "\n".join(lines))


def _figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """All but the words that say where the figures come from."""
    return {k: v for k, v in summary.items() if not k.startswith(ORIGIN)}


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
        rows.append([name, *cells, _with_error(summary, name), _meaning(name)[1]])
    return rows


def _meaning(name: str) -> tuple[str, str]:
    return _MEANINGS.get(name.rsplit("/", 1)[-1], (_PLAIN, ""))


def _text(name: str, value: float | None) -> str:
    return "not finite" if not _is_finite(value) else _meaning(name)[0].format(value)


def _with_error(summary: Mapping[str, Any], name: str) -> str:
    error = summary.get(f"{name}_stderr")
    text = _text(name, summary[name])
    return text if error is None else f"{text} ± {_text(name, error)}"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
