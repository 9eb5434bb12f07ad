"""What all commands share: options, dotted overrides, and one line for an error a user can mend."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from marginface import lookup, runtime

DONE, INPUT_ERROR, DIVERGED, RUN_AGAIN = 0, 2, 3, 75


class Parser(argparse.ArgumentParser):
    """Options whose mistakes are raised as ValueError; its description keeps its lines."""

    def __init__(
        self, prog: str, description: str | None = None, epilog: str | None = None, **rest: Any
    ) -> None:
        rest |= {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(prog=prog, description=description, epilog=epilog, **rest)

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        raise ValueError(f"{message}; --help lists what there is")

    def parse_with_changes(self, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
        """The options, and {dotted key: text} of every --config.KEY=VALUE.

        Raises:
          ValueError: an option that does not exist or lacks its value.
        """
        options, rest = self.parse_known_args(argv)
        changes = {}
        for word in rest:
            if not (match := re.fullmatch(r"--config\.([\w.]+)=(.*)", word, re.DOTALL)):
                known = ["--config.KEY=VALUE", *self._option_string_actions]
                raise ValueError(f"unknown argument {word!r}; {lookup.nearest(word, known)}")
            changes[match[1]] = match[2]
        return options, changes


def main(
    run: Callable[[Sequence[str]], int | None], name: str, argv: Sequence[str] | None = None
) -> NoReturn:
    """Calls `run` with `argv`, or the process's arguments, and leaves with its exit code (none: 0).

    SIGTERM and a lost terminal arrive as KeyboardInterrupt; it ends with 75, a ValueError, an
    OSError or a device's lack of memory with 2, all with one line that begins with `name`.
    """
    runtime.collect_rarely()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        with runtime.one_line_errors():
            code = run(sys.argv[1:] if argv is None else argv) or DONE
        sys.exit(code)
    except KeyboardInterrupt:
        print(f"{name}: stopped; the same command continues", file=sys.stderr, flush=True)
        sys.exit(RUN_AGAIN)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(INPUT_ERROR)
    except (ValueError, OSError) as error:
        if os.environ.get("MARGINFACE_TRACEBACK"):
            raise
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(INPUT_ERROR)
