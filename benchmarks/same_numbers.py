"""Whether two versions train to the same numbers: python -m benchmarks.same_numbers COMMIT [OTHER].

Takes both versions out of git (OTHER is the working tree unless it is given), runs the first steps
of every experiment of each by the command line, on one core, and compares every figure of
metrics.jsonl but the times bit for bit: each loss, the length of the gradient, the evaluations
before and after. The table names for each experiment the first figure that differs. What a version
answered is kept below --answers, in a folder for each commit, settings, libraries and processor:
the same command again runs only what is missing. --config.KEY=VALUE holds for both sides.

Exit codes: 0 all equal; 1 something differs, fails or is on one side only; 2 a mistake in the
command; 75 stopped, the same command continues.
"""

import argparse
import contextlib
import csv
import hashlib
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
ANSWERS = ROOT / "runs" / "same_numbers"
WORKING_TREE = "working tree"
PARTS = ("marginface", "experiments")  # what a run needs of a version
KEPT = ("metrics.jsonl", "config.json", "summary.json")  # the last says that the run is complete
# The embedded faces' test: 128 images, one batch, in place of 1,200. Evaluating takes longest.
FEW_PAIRS = {
    "data.kw.test_identities": "32",
    "data.kw.test_samples": "4",
    "data.kw.pairs": "200",
}
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy", "scipy")
_MADE_HERE = ("JAX_", "XLA_", "MARGINFACE_", "PYTHONPATH", "PYTHONSAFEPATH")

Figures = dict[tuple[int, str], float]  # (step, name) → value


class Side(NamedTuple):
    """A version.

    Attributes:
        name: as the user calls it.
        code: the folder with its files.
        answers: the folder where its figures are kept.
    """

    name: str
    code: pathlib.Path
    answers: pathlib.Path


class Row(NamedTuple):
    """How one experiment compares; the fields from `step` on are those of the first difference.

    Attributes:
        experiment: its name.
        figures: how many were compared.
        differing: how many of them are not equal bit for bit.
        step, figure: where the first difference is.
        first, second: the two values; empty for one that is not there.
        ulps: how many floats apart they are.
        problem: why there is nothing to compare.
    """

    experiment: str
    figures: int = 0
    differing: int = 0
    step: str = ""
    figure: str = ""
    first: str = ""
    second: str = ""
    ulps: str = ""
    problem: str = ""

    @property
    def equal(self) -> bool:
        """Whether there was something to compare and nothing differs."""
        return not self.problem and not self.differing and self.figures > 0

    @property
    def result(self) -> str:
        """In words."""
        if self.problem or self.equal:
            return self.problem or "equal"
        apart = f", {self.ulps} ulps" if self.ulps else ""
        values = f"{self.first or 'nothing'} | {self.second or 'nothing'}"
        return f"{self.differing} differ, first step {self.step} {self.figure}: {values}{apart}"


# ---- figures -------------------------------------------------------------------------------------


def read_figures(folder: pathlib.Path) -> Figures:
    """All figures of a run folder but the times.

    Raises:
        ValueError: metrics.jsonl is not there or broken.
    """
    found: Figures = {}
    try:
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            step = record.pop("step")
            found |= {(step, k): float(v) for k, v in record.items() if not k.startswith("time/")}
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder}: no whole metrics.jsonl ({error}): remove it") from error
    return found


def compare(name: str, first: Figures, second: Figures, steps: int) -> Row:
    """How an experiment's figures compare.

    Args:
        name: of the experiment.
        first, second: from read_figures.
        steps: how many there must be: a step without a loss differs, on both sides too.
    """
    keys = dict.fromkeys([*first, *second, *((step, "loss/total") for step in range(1, steps + 1))])
    ordered = sorted(keys, key=lambda key: key[0])
    texts = [[_text(side.get(key)) for key in ordered] for side in (first, second)]
    bad = [i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b or not a]
    if not bad:
        return Row(name, len(ordered))
    key = ordered[bad[0]]
    a, b = first.get(key), second.get(key)
    apart = None if a is None or b is None else ulps(a, b)
    return Row(
        name,
        len(ordered),
        len(bad),
        str(key[0]),
        key[1],
        *(_text(value) for value in (a, b)),
        ulps="" if apart is None else str(apart),
    )


def _text(value: float | None) -> str:
    """The shortest text that stands for no other float; nothing for none."""
    return "" if value is None else repr(value)


def ulps(a: float, b: float) -> int | None:
    """How many floats lie from one to the other: of 32 bits if both are such, else of 64.

    None where one is not a number.
    """
    if a != a or b != b:
        return None
    kinds = ("<f", "<i", 31) if _is_float32(a) and _is_float32(b) else ("<d", "<q", 63)

    def place(value: float) -> int:
        number, bits, sign = kinds
        (found,) = struct.unpack(bits, struct.pack(number, value))
        return found if found >= 0 else -1 - (found + (1 << sign))  # −0 lies one below 0

    return abs(place(a) - place(b))


def _is_float32(value: float) -> bool:
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0] == value
    except OverflowError:
        return False


# ---- versions ------------------------------------------------------------------------------------


def git(*words: str, root: pathlib.Path, index: pathlib.Path | None = None) -> bytes:
    """What git prints.

    Raises:
        ValueError: git is not there, or its last words.
    """
    environment = os.environ | ({"GIT_INDEX_FILE": str(index)} if index else {})
    try:
        done = subprocess.run(["git", *words], cwd=root, env=environment, capture_output=True)
    except OSError as error:
        raise ValueError(f"git cannot be started ({error}): install it") from error
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
        raise ValueError(f"git {words[0]}: {message.splitlines()[-1]}")
    return done.stdout


def resolve(version: str, root: pathlib.Path = ROOT) -> tuple[str, str]:
    """What git calls a version, and the name of its folder of answers.

    Args:
        version: a commit, branch or tag, or "working tree": the files as they are now, those that
            git does not know yet among them.
        root: of the checkout.

    Raises:
        ValueError: there is no git, no checkout or no such commit.
    """
    git("version", root=root)
    try:
        top = git("rev-parse", "--show-toplevel", root=root).decode().strip()
    except ValueError:  # or git trusts no folder of another user
        top = ""
    if not top or pathlib.Path(top).resolve() != root.resolve():
        raise ValueError(f"{root} is no git checkout of this user: clone the repository")
    if version == WORKING_TREE:
        with tempfile.TemporaryDirectory() as folder:
            index = pathlib.Path(folder, "index")
            git("add", "--all", "--", *PARTS, root=root, index=index)
            tree = git("write-tree", root=root, index=index).decode().strip()
        return tree, f"tree-{tree[:12]}"
    try:
        words = ("rev-parse", "--verify", "--quiet", f"{version}^{{commit}}")
        commit = git(*words, root=root).decode().strip()
    except ValueError:
        raise ValueError(
            f"{version!r} is no commit here: give a hash, branch or tag that git knows "
            "(a shallow clone lacks the earlier ones: git fetch --unshallow)"
        ) from None
    return commit, commit[:12]


def checkout(revision: str, folder: pathlib.Path, root: pathlib.Path = ROOT) -> pathlib.Path:
    """Puts the code of a revision into a folder, from which Python then imports it; returns that.

    Raises:
        ValueError: git does not have it, or Python imports other code there.
    """
    packed = git("archive", "--format=zip", revision, *PARTS, root=root)
    zipfile.ZipFile(io.BytesIO(packed)).extractall(folder)
    done = subprocess.run(
        [sys.executable, "-c", "import marginface; print(marginface.__file__)"],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
    )
    found = pathlib.Path(done.stdout.strip() or ".").resolve()
    if not found.is_relative_to(folder.resolve()):
        raise ValueError(f"{revision[:12]}: not its code is imported, but {done.stdout or 'none'}")
    return folder


# ---- runs ----------------------------------------------------------------------------------------


def environment(code: pathlib.Path) -> dict[str, str]:
    """The variables of a run of the code in a folder: one CPU device, and no other settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_MADE_HERE)}
    return kept | {
        "PYTHONPATH": str(code),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }


@contextlib.contextmanager
def one_core() -> Generator[None]:
    """What starts within it stays on one core, where the system can: the order of sums is fixed."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def settings(variant: str, overrides: Mapping[str, str]) -> dict[str, Any]:
    """All that a version's figures depend on beside its code."""
    info = pathlib.Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {
        "variant": variant,
        "overrides": dict(sorted(overrides.items())),
        "processor": model[1] if model else platform.machine(),
        "cores": 1 if hasattr(os, "sched_setaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


def experiments(code: pathlib.Path) -> list[str]:
    """The names of the experiments in a folder of code."""
    files = sorted((code / "experiments").glob("*.py"))
    return [p.stem for p in files if re.search(r"^def get_config\(", p.read_text("utf-8"), re.M)]


def answer(side: Side, name: str, settings: Mapping[str, Any]) -> str:
    """Runs an experiment of a side unless its answer is kept; returns why it failed, or nothing."""
    if (side.answers / name / KEPT[-1]).exists():
        return ""
    variant = f":{settings['variant']}" if settings["variant"] else ""
    words = [f"--config.{key}={value}" for key, value in settings["overrides"].items()]
    words = [f"--config=experiments/{name}.py{variant}", *words]
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder, "run")
        with one_core():
            done = subprocess.run(
                [sys.executable, "-m", "marginface.main", *words, f"--workdir={workdir}"],
                cwd=side.code,
                env=environment(side.code),
                capture_output=True,
                text=True,
            )
        lines = [line for out in (done.stdout, done.stderr) for line in out.splitlines() if line]
        if done.returncode:
            return f"exit code {done.returncode}: {lines[-1].strip() if lines else 'no message'}"
        if missing := [file for file in KEPT if not (workdir / file).exists()]:
            return f"left no {missing[0]}"
        whole = pathlib.Path(folder, "whole")
        whole.mkdir()
        for file in KEPT:
            shutil.copy(workdir / file, whole)
        shutil.rmtree(side.answers / name, ignore_errors=True)
        beside = side.answers / f".{name}"
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(whole, beside)
        beside.rename(side.answers / name)
    return ""


def row_of(name: str, sides: Sequence[Side], settings: Mapping[str, Any]) -> Row:
    """Runs an experiment on both sides, where it is not answered, and compares."""
    problems = []
    for side in sides:
        if name not in experiments(side.code):
            problems.append(f"not in {side.name}")
            continue
        kept, begun = (side.answers / name).exists(), time.monotonic()
        print(f"{side.name} {name}: ", end="", file=sys.stderr, flush=True)
        failure = answer(side, name, settings)
        passed = "kept" if kept and not failure else f"{time.monotonic() - begun:.0f} s"
        print(f"{passed} {failure}".strip(), file=sys.stderr, flush=True)
        problems += [f"fails in {side.name}: {failure}"] if failure else []
    if problems:
        return Row(name, problem="; ".join(problems))
    first, second = (read_figures(side.answers / name) for side in sides)
    return compare(name, first, second, int(settings["overrides"]["steps"]))


# ---- the command ---------------------------------------------------------------------------------


def table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Experiment, figures compared, result: aligned columns under a header."""
    header = ("experiment", "figures", " | ".join(names))
    cells = [header, *((row.experiment, str(row.figures or "–"), row.result) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(2)]
    return "\n".join(f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c}" for a, b, c in cells)


def write_csv(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """The rows with a header, one an experiment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([Row._fields, *rows])


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The command's options, and the overrides {dotted key: text} of both sides.

    Raises:
        ValueError: an unknown argument, or fewer than one step.
    """
    parser = argparse.ArgumentParser(
        "python -m benchmarks.same_numbers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("first", metavar="COMMIT", help="a version")
    add("second", metavar="OTHER", nargs="?", default=WORKING_TREE, help="default: %(default)s")
    add("--only", nargs="+", default=[], metavar="NAME", help="these experiments alone")
    add("--variant", default="data=small", help="of every experiment; default: %(default)s")
    add("--steps", type=int, default=20, help="of each run; default: %(default)s")
    add("--answers", type=pathlib.Path, default=ANSWERS, metavar="DIR", help="kept answers")
    add("--out", type=pathlib.Path, metavar="CSV", help="writes the rows there too")
    options, rest = parser.parse_known_args(argv)
    if options.steps < 1:
        raise ValueError(f"--steps {options.steps}: give at least 1")
    embedded = not (found := re.search(r"\bdata=(\w+)", options.variant)) or found[1] in (
        "small",
        "synthetic",
    )
    overrides = dict(FEW_PAIRS) if embedded else {}
    overrides |= {"steps": str(options.steps), "log_every": "1"}
    for word in rest:
        if not (match := re.fullmatch(r"--config\.([\w.]+)=(.*)", word, re.DOTALL)):
            raise ValueError(f"unknown argument {word!r}; --help lists what there is")
        if match[1] in ("steps", "log_every"):
            raise ValueError(f"{word}: every step is compared; --steps says how many there are")
        overrides[match[1]] = match[2]
    return options, overrides


def run(argv: Sequence[str]) -> int:
    """Does what `argv` (without the program's name) asks for; returns the exit code.

    Raises:
        ValueError: a mistake in the command; one line that says which.
    """
    options, overrides = parse(argv)
    given = settings(options.variant, overrides)
    digest = hashlib.sha256(json.dumps(given).encode()).hexdigest()[:8]
    versions = [(name, *resolve(name, ROOT)) for name in (options.first, options.second)]
    if versions[0][1:] == versions[1][1:]:
        raise ValueError(f"{options.first} and {options.second} are the same commit")
    with tempfile.TemporaryDirectory() as folder:
        sides = []
        for number, (name, revision, short) in enumerate(versions):
            kept = options.answers.resolve() / f"{short}-{digest}"
            kept.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"revision": revision, **given}, indent=2) + "\n"
            (kept / "settings.json").write_text(text, encoding="utf-8")
            code = checkout(revision, pathlib.Path(folder, str(number)), ROOT)
            sides.append(Side(name, code, kept))
            print(f"{name}: answers in {kept}", file=sys.stderr, flush=True)
        names = sorted({name for side in sides for name in experiments(side.code)})
        if unknown := set(options.only) - set(names):
            raise ValueError(f"--only: no experiment {', '.join(sorted(unknown))} on either side")
        names = [name for name in names if not options.only or name in options.only]
        rows = [row_of(name, sides, given) for name in names]
    print(table(rows, [side.name for side in sides]), flush=True)
    if options.out:
        write_csv(options.out, rows)
    return 0 if all(row.equal for row in rows) else 1


def main() -> None:
    """The command: `run`, with one line for each error that its user can mend."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:
        print("same_numbers: stopped; the same command continues", file=sys.stderr, flush=True)
        sys.exit(75)
    except (ValueError, OSError) as error:
        print(f"same_numbers: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
