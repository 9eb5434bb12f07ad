"""Units of a sweep as processes of this machine, a few at a time."""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any, NamedTuple

from marginface import runtime
from marginface.command import DIVERGED, DONE, INPUT_ERROR
from marginface.launch.engines.board import Board
from marginface.launch.units import Unit
from marginface.runs import folder as run_folder


class _Process(NamedTuple):
    unit: Unit
    process: subprocess.Popen
    log: IO[str]
    attempt: int


def add_arguments(parser: Any) -> None:
    """The options of this backend."""
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--retries", type=int, default=2, help="of a unit that crashed")


def submit(units: Sequence[Unit], options: argparse.Namespace) -> bool:
    """Runs the units as the options say; they have ended when it returns True."""
    if options.jobs < 1 or options.retries < 0:
        raise ValueError(f"--jobs {options.jobs} --retries {options.retries}: give 1 and 0 or more")
    _find_devices()
    run(units, jobs=options.jobs, retries=options.retries)
    return True


def _find_devices() -> None:
    """Finds what the environment asks for, in a process that ends and so leaves the card free.

    Raises:
        ValueError: it is not there; no unit could do more than say so.
    """
    if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu" and not os.environ.get(
        "CUDA_VISIBLE_DEVICES"
    ):
        return
    program = (
        "from marginface import runtime\n"
        "try: runtime.find_devices()\n"
        "except ValueError as error: raise SystemExit(f'\\n{error}')"
    )
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or ["JAX finds no device"])[-1])


def run(units: Sequence[Unit], *, jobs: int = 1, retries: int = 2) -> None:
    """Runs each unit's plain command; what it prints goes to log.txt in its folder.

    A unit that crashed or was stopped from outside continues, at most `retries` times; one with a
    mistake in its config or a loss that is not finite would only end the same way again. No unit
    stops another. A second signal is not waited for.

    Args:
        units: those to run.
        jobs: how many at a time; they share the machine's cores, and its card.
        retries: how often a unit may be started again.

    Raises:
        KeyboardInterrupt: Ctrl-C; the running units have saved and stopped before.
    """
    waiting = [(unit, 1) for unit in units]
    running: list[_Process] = []
    board = Board(units)
    environment = os.environ | (runtime.share_gpu() if jobs > 1 else {})
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(*waiting.pop(0), environment))
                board.started(running[-1].unit)
            ended = [p for p in running if p.process.poll() is not None]
            for one in ended:
                running.remove(one)
                one.log.close()
                again = one.process.returncode not in (DONE, INPUT_ERROR, DIVERGED)
                if again and one.attempt <= retries:
                    waiting.append((one.unit, one.attempt + 1))
                board.ended(one.unit, again=again and one.attempt <= retries)
            board.show()
            if not ended:
                time.sleep(0.2)
    except BaseException:  # whatever ends us: units that nobody watches must not go on
        for one in running:
            one.process.send_signal(signal.SIGTERM)  # each saves and leaves with 75
        for one in running:
            one.process.wait()
            one.log.close()
        raise
    finally:
        board.close()


def _start(unit: Unit, attempt: int, environment: Mapping[str, str]) -> _Process:
    unit.folder.mkdir(parents=True, exist_ok=True)
    log = (unit.folder / run_folder.LOG).open("a", encoding="utf-8")
    process = subprocess.Popen(
        unit.command(sys.executable),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches the units through us, as SIGTERM
    )
    return _Process(unit, process, log, attempt)
