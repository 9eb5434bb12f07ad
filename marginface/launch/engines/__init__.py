"""Where the units of a sweep run.

A new engine is a module of this folder that keeps to `Engine`, a line of `BACKENDS`, and its test.
"""

import argparse
import importlib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from marginface.command import Parser
from marginface.launch.units import Unit


@runtime_checkable
class Engine(Protocol):
    """What a module of this folder owes."""

    def add_arguments(self, parser: Any) -> None:
        """Adds its options, which no other engine has."""

    def submit(self, units: Sequence[Unit], options: argparse.Namespace) -> bool:
        """Runs units that have not ended, or sends them to where they run.

        A unit is its plain command (`Unit.command`), its exit code says what to do next, and its
        folder tells how far it is: done, input errors and divergences are final, the rest goes on.

        Returns:
            whether the units have ended and their folders are here.

        Raises:
            ValueError: an option does not fit, or the engine is not there or refuses a unit.
            KeyboardInterrupt: stopped from outside; what ran here has saved.
        """


@runtime_checkable
class Remote(Engine, Protocol):
    """An engine that sends files; the others start the plain commands."""

    def render(self, units: Sequence[Unit], options: argparse.Namespace) -> dict[str, str]:
        """What it would send: path below the folder of all sweeps → text; --dry_run prints it."""


class Backend(NamedTuple):
    """A value of --backend.

    module: its engine's, in this folder.
    about: one line.
    waits: whether the units have always ended when submit returns.
    """

    module: str
    about: str
    waits: bool = False


BACKENDS = {
    "local": Backend("local", "processes of this machine, --jobs of them at a time", waits=True),
    "vmap": Backend(
        "together", "one program: units that differ in numbers only train together", waits=True
    ),
    "slurm": Backend("slurm", "a job array"),
    "tpu": Backend("cloud", "cloud TPUs or GPUs, through SkyPilot or plain gcloud scripts"),
    "k8s": Backend("kubernetes", "Kubernetes, through xpk"),
}


def load(backend: str) -> Engine:
    """The engine of a backend."""
    engine: Any = importlib.import_module(f"marginface.launch.engines.{BACKENDS[backend].module}")
    return engine


def add_arguments(parser: Parser, argv: Sequence[str], backends: Collection[str]) -> None:
    """Adds --backend and the options of all engines; --help shows those of the chosen one."""

    def add_choice(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--backend", default="local", choices=backends, help="see above")

    add_choice(parser)
    first = Parser("", add_help=False)
    add_choice(first)
    chosen = first.parse_known_args(argv)[0].backend
    for backend in backends:
        group = parser.add_argument_group(f"--backend {backend}")
        load(backend).add_arguments(group)
        if backend != chosen:
            for action in group._group_actions:
                action.help = argparse.SUPPRESS


def listed(backends: Collection[str]) -> str:
    """The backends for --help, one line each."""
    lines = [f"    {name:7} {BACKENDS[name].about}" for name in backends]
    return "\n".join([*lines, "", "--backend NAME --help shows the options of that one."])
