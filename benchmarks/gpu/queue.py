"""The queue: one process after the other, limits, what is held already, the table.

A folder holds NAME.json of every question, results.csv, NAME.log with what its processes said, and
table.txt. An answer is in the CSV file and in the JSON file before the next case begins, so a cut
costs the case that was under way and nothing else.
"""

import collections
import contextlib
import csv
import datetime
import importlib
import importlib.util
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any, NamedTuple

from benchmarks import common
from benchmarks.gpu import question as questions_of
from benchmarks.gpu.question import OURS, Contender, Held, Question
from marginface.command import DONE, INPUT_ERROR, RUN_AGAIN
from marginface.lookup import nearest

SOME_FAILED = 1
ALONE = "none"  # the peer of a row that has no peer
SETTLED = ("answered", "does not fit")
WRONG = ("failed", "timed out")
_PROBE_LIMIT = 180.0
_COMPILE_QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_LEAST = 3.0  # seconds below which no process is started

Key = tuple[str, str, str]  # question, contender, case
Todo = tuple[Question, Contender, int]


class Machine(NamedTuple):
    """What the answers are answers for.

    commit: of the sources, with their digest where they differ from it.
    sources: their digest, by which answers from outside of a checkout are known.
    """

    device: str
    backend: str
    versions: str
    commit: str
    sources: str

    @property
    def names(self) -> tuple[str, str]:
        """The commits under which its answers may be held."""
        return self.commit, self.sources


def probe() -> Machine:
    """Asks a process of its own, since one that has asked JAX keeps a part of the card.

    Raises:
        RuntimeError: JAX does not start; one line.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.work", "probe"]
    with subprocess.Popen(
        command,
        cwd=common.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    ) as process:
        timer = threading.Timer(_PROBE_LIMIT, process.kill)
        timer.start()
        assert process.stdout is not None
        line = process.stdout.readline()
        timer.cancel()
        _, errors = process.communicate()
    if not line:
        raise RuntimeError(f"JAX does not start: {last_line(errors) or 'no message'}")
    # Of Python files: the rows that are added to results.csv change no answer.
    commit, sources = common.commit("*.py"), f"files-{common.sources()}"
    if commit == "unknown":
        commit = sources
    elif commit.endswith("+"):
        commit += sources.removeprefix("files-")
    return Machine(commit=commit, sources=sources, **json.loads(line))


def last_line(words: str) -> str:
    """What a failed process said last."""
    lines = [line for line in words.strip().splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else ""


class Answers:
    """What is held in the folder and in the CSV files, and the writing of more."""

    def __init__(
        self,
        questions: Sequence[Question],
        machine: Machine,
        folder: pathlib.Path,
        rows: pathlib.Path,
        known: Sequence[pathlib.Path] = (),
    ) -> None:
        """Reads what is held; `rows` is the CSV file that gets more, `known` are others."""
        self._questions, self._machine, self._folder, self._rows = questions, machine, folder, rows
        self._held: dict[Key, Held] = {}
        self._foreign: dict[str, list[Held]] = collections.defaultdict(list)
        folder.mkdir(parents=True, exist_ok=True)
        for path in dict.fromkeys((*known, folder / "results.csv", rows)):
            self._read_rows(path)
        for question in questions:
            self._read_json(question.name)

    def _mine(self, value: Mapping[str, Any]) -> bool:
        machine = self._machine
        return value.get("commit") in machine.names and value.get("device") == machine.device

    def _read_rows(self, path: pathlib.Path) -> None:
        if not path.exists():
            return
        with path.open(newline="", errors="replace") as file:
            reader = csv.DictReader(file)
            for row in reader if reader.fieldnames == list(common.COLUMNS) else ():
                if None in row or None in row.values() or not self._mine(row):
                    continue  # a torn line, or another card's
                if not row["benchmark"].startswith("gpu/"):
                    continue
                alone = row["peer"] == ALONE
                seconds = _number(row["ours_seconds" if alone else "peer_seconds"])
                contender = OURS if alone else row["peer"]
                self._held[row["benchmark"].removeprefix("gpu/"), contender, row["case"]] = {
                    "contender": contender,
                    "case": row["case"],
                    "state": "answered" if seconds is not None else "does not fit",
                    "seconds": seconds,
                    "mib": _number(row["ours_mib" if alone else "peer_mib"]),
                    "note": "from a CSV file",
                    **{k: row[k] for k in ("date", "commit", "device", "versions")},
                }

    def _read_json(self, name: str) -> None:
        try:
            answers = json.loads((self._folder / f"{name}.json").read_text())["answers"]
            for value in answers:
                if self._mine(value):
                    self._held[name, value["contender"], value["case"]] = value
                else:
                    self._foreign[name].append(value)
        except (OSError, ValueError, KeyError, TypeError):
            return  # none, or a file of another kind: it is asked anew

    def of(self, question: Question, contender: Contender, number: int, smoke: bool) -> Held | None:
        """What is held of a case."""
        return self._held.get(_key(question, contender, number, smoke))

    def all(self, question: Question) -> list[Held]:
        """What is held of a question, in the order of its cases."""
        order = [
            (contender.name, questions_of.text(case))
            for contender in question.contenders
            for case in (*contender.cases, *contender.smoke)
        ]
        found = {key[1:]: value for key, value in self._held.items() if key[0] == question.name}
        return [found[key] for key in dict.fromkeys(order) if key in found]

    def add(self, todo: Todo, smoke: bool, value: Held) -> None:
        """Writes an answer, or the reason why there is none."""
        question, contender, number = todo
        key = _key(question, contender, number, smoke)
        value = {
            "contender": contender.name,
            "case": key[2],
            **value,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "commit": self._machine.commit,
            "device": self._machine.device,
            "versions": self._machine.versions,
        }
        self._held.pop(key, None)
        self._held[key] = value
        if value["state"] in SETTLED:
            _append(self._row(question, value), self._rows)
        self.write(question)

    def write(self, question: Question, state: str = "", remarks: Sequence[str] = ()) -> None:
        """Replaces the question's file, whole."""
        path = self._folder / f"{question.name}.json"
        found = {
            "question": question.name,
            "asks": question.asks,
            "state": state or "under way",
            "remarks": remarks,
            "answers": [*self._foreign[question.name], *self.all(question)],
        }
        partial = path.with_suffix(".json.partial")
        with partial.open("w") as file:
            json.dump(found, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def peaks(self) -> dict[str, float]:
        """The best measured FLOP/s of a matrix product, by precision."""
        best: dict[str, float] = {}
        for (name, _, case), value in self._held.items():
            found = questions_of.words(case)
            if name == "ceilings" and found.get("what") == "product" and value.get("seconds"):
                flops = 2.0 * int(found["m"]) * int(found["k"]) * int(found["n"])
                rate = flops / value["seconds"]
                best[found["precision"]] = max(rate, best.get(found["precision"], 0.0))
        return best

    def ours_beside(self, question: Question, value: Held) -> Held | None:
        """Our fastest answer that a peer's is compared with."""
        found = questions_of.words(value["case"])
        same = {key: found.get(key) for key in question.same}
        return questions_of.fastest(self.all(question), OURS, **same) if same else None

    def _row(self, question: Question, value: Held) -> dict[str, str]:
        ours, peer = value, None
        if value["contender"] != OURS:
            ours, peer = self.ours_beside(question, value), value
        ratio = common.NOT_RUN
        if ours and peer and ours["seconds"] and peer["seconds"]:
            ratio = f"{peer['seconds'] / ours['seconds']:.2f}"
        said = [value.get("reason", ""), rates(value, self.peaks()), value.get("note", "")]
        said += [f"{k} {v:.6g}" for k, v in value.get("figures", {}).items()]
        return {
            "date": value["date"],
            "commit": value["commit"],
            "benchmark": f"gpu/{question.name}",
            "case": value["case"],
            "peer": ALONE if value["contender"] == OURS else value["contender"],
            "ours_seconds": _cell(ours, "seconds", "{:.6g}"),
            "peer_seconds": _cell(peer, "seconds", "{:.6g}"),
            "ratio": ratio,
            "ours_mib": _cell(ours, "mib", "{:.0f}"),
            "peer_mib": _cell(peer, "mib", "{:.0f}"),
            "device": value["device"],
            "conditions": ", ".join(filter(None, said)),
            "versions": value["versions"],
        }


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _cell(value: Held | None, key: str, form: str) -> str:
    number = (value or {}).get(key)
    return common.NOT_RUN if number is None else form.format(number)


def _append(row: Mapping[str, str], path: pathlib.Path) -> None:
    """Adds a row behind whatever a cut left of the last one."""
    if path.exists():
        held = path.read_bytes()
        if not held.startswith(",".join(common.COLUMNS).encode() + b"\n"):
            path.replace(path.with_suffix(".torn"))
        elif not held.endswith(b"\n"):
            with path.open("a") as file:
                file.write("\n")
    common.append([row], path)


def _key(question: Question, contender: Contender, number: int, smoke: bool) -> Key:
    cases = contender.smoke if smoke else contender.cases
    return question.name, contender.name, questions_of.text(cases[number])


def rates(value: Held, peaks: Mapping[str, float]) -> str:
    """Work a second, and its share of the measured peak."""
    seconds = value.get("seconds")
    if not seconds:
        return ""
    found = []
    if flops := value.get("flops"):
        found.append(f"{flops / seconds / 1e12:.4g} TFLOP/s")
        if peak := peaks.get(value.get("precision", "")):
            found.append(f"{flops / seconds / peak:.2f} of the {value['precision']} peak")
    if moved := value.get("bytes"):
        found.append(f"{moved / seconds / 1e9:.4g} GB/s")
    if images := value.get("images"):
        found.append(f"{images / seconds:.5g} images/s")
    return ", ".join(found)


class Queue:
    """Questions asked one after the other until all are answered or the time is up."""

    def __init__(
        self, module: str, answers: Answers, folder: pathlib.Path, seconds: float, smoke: bool
    ) -> None:
        """`module` has the QUESTIONS; the processes import it by this name."""
        self._module, self._answers, self._folder, self._smoke = module, answers, folder, smoke
        self._end = time.monotonic() + seconds
        self._spent: dict[str, float] = collections.defaultdict(float)

    def run(self, questions: Sequence[Question]) -> None:
        """Asks what is not held; what failed before comes last."""
        for jobs in self._jobs(questions):
            left = collections.deque(jobs)
            while left:
                if self._left(left[0][0]) < _LEAST:
                    left.popleft()
                else:
                    self._process(left)

    def unasked(self, question: Question) -> list[Todo]:
        """Cases of which nothing is held."""
        return [t for t in self._cases(question) if self._held(t) is None]

    def _cases(self, question: Question) -> list[Todo]:
        return [
            (question, contender, number)
            for contender in question.contenders
            for number in range(len(contender.smoke if self._smoke else contender.cases))
        ]

    def _held(self, todo: Todo) -> Held | None:
        return self._answers.of(*todo, self._smoke)

    def _jobs(self, questions: Sequence[Question]) -> list[list[Todo]]:
        """The cases that one process answers, in the order of their processes."""
        jobs: dict[tuple, list[Todo]] = {}
        again: dict[tuple, list[Todo]] = {}
        for question in questions:
            for todo in self._cases(question):
                held, contender = self._held(todo), todo[1]
                absent = [n for n in contender.needs if not importlib.util.find_spec(n)]
                if held and held["state"] in SETTLED:
                    continue
                if absent:
                    reason = f"{' and '.join(absent)} not installed"
                    self._answers.add(todo, self._smoke, {"state": "skipped", "reason": reason})
                    continue
                own = (contender.kind, tuple(contender.environment.items()))
                own = own if self._smoke else (question.name, contender.name, *own)
                failed = held and held["state"] in WRONG
                (again if failed else jobs).setdefault(own, []).append(todo)
        return [*jobs.values(), *again.values()]

    def _left(self, question: Question) -> float:
        """Seconds that a question may still take."""
        own = question.limit - self._spent[question.name]
        return min(own, self._end - time.monotonic())

    def _process(self, left: collections.deque[Todo]) -> None:
        """Runs one process and takes from `left` what is done with."""
        question, contender, _ = left[0]
        todo = [[q.name, c.name, number] for q, c, number in left]
        words = [self._module, json.dumps({"smoke": self._smoke, "todo": todo})]
        log = self._folder / f"{question.name}.log"
        with log.open("a+") as errors:
            start = errors.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.work", *words],
                cwd=common.ROOT,
                env=self._environment(contender),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                text=True,
            )
            try:
                ended = self._listen(process, left)
            finally:
                _kill(process)
            # One that has answered and begun nothing more asks for another in its place.
            if ended and left and (self._begun or not self._answered):
                errors.seek(start)
                self._crashed(left, process.returncode, last_line(errors.read()))

    def _environment(self, contender: Contender) -> dict[str, str]:
        found = os.environ | dict(contender.environment)
        if self._smoke:  # many programs that run once, some of them in two processes
            found["JAX_COMPILATION_CACHE_DIR"] = str(self._folder / "compiled")
            found["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
            found["XLA_FLAGS"] = f"{found.get('XLA_FLAGS', '')} {_COMPILE_QUICKLY}".strip()
        return found

    def _listen(self, process: subprocess.Popen, left: collections.deque[Todo]) -> bool:
        """Writes what a process answers; whether it ended by itself before its time was up."""
        assert process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        self._begun, self._answered, self._since = False, False, time.monotonic()
        while left:
            question, since = left[0][0], time.monotonic()
            try:
                line = lines.get(timeout=max(0.0, self._left(question)))
            except queue.Empty:
                self._spent[question.name] += time.monotonic() - since
                self._timed_out(left)
                return False
            self._spent[question.name] += time.monotonic() - since
            if line is None:
                process.wait()
                return True
            value = json.loads(line)
            if "begin" in value:
                self._begun, self._since = True, time.monotonic()
                continue
            value["took"] = round(time.monotonic() - self._since, 2)
            self._answers.add(left[0], self._smoke, value)
            self._say(left.popleft(), value)
            self._begun, self._answered = False, True
        return False

    def _timed_out(self, left: collections.deque[Todo]) -> None:
        """The question is left for the next call; of it a case that took half the time alone fails.

        One that had less may only have come late, and is asked again.
        """
        question, now = left[0][0], time.monotonic()
        if now < self._end and now - self._since > question.limit / 2:
            reason = f"the question's {question.limit:.0f} s are up"
            self._failed(left[0], {"state": "timed out", "reason": reason})
        rest = [todo for todo in left if todo[0] is not question]
        left.clear()
        left.extend(rest)

    def _crashed(self, left: collections.deque[Todo], code: int, reason: str) -> None:
        """A process that ended by itself; one that began nothing would begin nothing again."""
        ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        value = {"state": "failed", "reason": f"{ended}: {reason}" if reason else ended}
        first = left[0]
        for todo in [first] if self._begun else list(left):
            self._failed(todo, value)
            left.remove(todo)

    def _failed(self, todo: Todo, value: Held) -> None:
        self._answers.add(todo, self._smoke, value)
        self._say(todo, value)

    def _say(self, todo: Todo, value: Held) -> None:
        question, contender, number = todo
        name, who, case = _key(question, contender, number, self._smoke)
        found = value["state"] if not value.get("seconds") else _seconds(value["seconds"])
        why = value.get("reason") or rates(value, self._answers.peaks())
        print(f"{name}: {case}, {who}: {', '.join(filter(None, (found, why)))}", flush=True)


def _read(stream: IO[str], lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _kill(process: subprocess.Popen) -> None:
    """Ends a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            stream.close()


def _seconds(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.4g} µs"
    return f"{seconds * 1e3:.4g} ms" if seconds < 1 else f"{seconds:.4g} s"


def conclude(questions: Iterable[Question], asked: Queue, answers: Answers) -> tuple[str, int]:
    """The table, and the exit code: 0 all answered or skipped, 1 some failed, 75 some not asked."""
    lines, states = [], []
    for question in questions:
        held = answers.all(question)
        kinds = {value["state"] for value in held}
        remarks = list(question.remarks(held, answers.peaks()))
        state = "answered"
        if wrong := kinds & set(WRONG) or {"failed" for r in remarks if not r.good}:
            state = sorted(wrong)[0]
        elif asked.unasked(question):
            state = "not asked to its end"
        elif kinds == {"skipped"}:
            state = "skipped"
        states.append(state)
        answers.write(question, state, [remark.text for remark in remarks])
        lines.append(f"{question.name}: {state}. {question.asks}")
        lines += _aligned([_cells(question, value, answers) for value in held])
        lines += [f"  {'' if remark.good else 'WRONG: '}{remark.text}" for remark in remarks]
    code = DONE
    if any(state in WRONG for state in states):
        code = SOME_FAILED
    elif "not asked to its end" in states:
        code = RUN_AGAIN
        lines.append("the time is up: the same command goes on")
    return "\n".join(lines), code


def _cells(question: Question, value: Held, answers: Answers) -> list[str]:
    ratio, theirs = "", value["contender"] != OURS and value.get("seconds")
    if theirs and (ours := answers.ours_beside(question, value)):
        ratio = f"{theirs / ours['seconds']:.2f} × ours"
    time_ = value["state"] if not value.get("seconds") else _seconds(value["seconds"])
    mib = "" if value.get("mib") is None else f"{value['mib']:.0f} MiB"
    said = [rates(value, answers.peaks()), value.get("reason", ""), value.get("note", "")]
    return [
        value["case"],
        value["contender"],
        time_,
        mib,
        ratio,
        ", ".join(filter(None, said)),
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        ("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


def choose(questions: Sequence[Question], names: Sequence[str]) -> list[Question]:
    """The questions of these names, or all; in the queue's order.

    Raises:
        ValueError: an unknown name; the nearest known one.
    """
    known = [question.name for question in questions]
    for name in names:
        if name not in known:
            raise ValueError(f"--only {name}: no such question; {nearest(name, known)}")
    return [question for question in questions if not names or question.name in names]


def ask(
    module: str,
    *,
    names: Sequence[str] = (),
    folder: pathlib.Path,
    rows: pathlib.Path | None = None,
    known: Sequence[pathlib.Path] = (),
    minutes: float = 8.0,
    smoke: bool = False,
    machine: Machine | None = None,
) -> int:
    """Asks the QUESTIONS of a module and prints the table; returns the exit code.

    Args:
        module: its name.
        names: only these questions; none for all.
        folder: where the answers go.
        rows: the CSV file that gets the rows; None for the folder's.
        known: CSV files that may hold answers too.
        minutes: for everything together.
        smoke: tiny sizes, on any device.
        machine: what the answers are answers for; None to find out.
    """
    start = time.monotonic()
    questions = importlib.import_module(module).QUESTIONS
    try:
        chosen = choose(questions, names)
        machine = machine or probe()
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return INPUT_ERROR
    if not smoke and machine.backend != "gpu":
        print(
            f"no GPU: JAX computes on {machine.backend} here ({machine.device}); --smoke asks "
            "everything at tiny sizes on any device",
            file=sys.stderr,
        )
        return INPUT_ERROR
    print(f"{machine.device}; {machine.versions}; commit {machine.commit}", flush=True)
    answers = Answers(questions, machine, folder, rows or folder / "results.csv", known)
    seconds = 60.0 * minutes - (time.monotonic() - start)
    asked = Queue(module, answers, folder, seconds, smoke)
    asked.run(chosen)
    table, code = conclude(chosen, asked, answers)
    (folder / "table.txt").write_text(table + "\n")
    print(table)
    return code
