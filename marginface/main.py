"""python -m marginface.main --config experiments/arcface_regular.py[:data=lfw] [--config.a.b=x].

Exit codes: 0 done; 75 checkpointed, run the same command again; 2 config or input error;
3 diverged (a loss was not finite).
"""

import errno
import hashlib
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from marginface import config as configs
from marginface import runtime

_CONFIG = config_flags.DEFINE_config_file("config", None, "experiment file", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "run folder; default runs/<experiment>")
_CHANGED_DATA = flags.DEFINE_bool("allow_changed_data", False, "resume though the data changed")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, to start several processes by hand"
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "with --coordinator: how many")
_PROCESS = flags.DEFINE_integer("process_id", None, "with --coordinator: which one this is")

DONE, CONFIG_ERROR, DIVERGED, RUN_AGAIN = 0, 2, 3, 75


def parse(argv: Sequence[str]) -> list[str]:
    """Parses flags; every mistake is a one-line ValueError or FileNotFoundError."""
    given = _value_of("--config", argv)
    if given is None:
        raise ValueError("give an experiment: --config experiments/arcface_regular.py")
    configs.path_of(given)
    try:
        rest = flags.FLAGS(list(argv))
    except AttributeError:
        # ml_collections only says which attribute it missed: find the override that named it.
        flags.FLAGS.unparse_flags()
        flags.FLAGS([argv[0], f"--config={given}"])
        known = configs.dotted(_CONFIG.value)
        for key in re.findall(r"--config\.([\w.]+)", " ".join(argv)):
            if key not in known:
                hint = configs.nearest(key, known)
                raise ValueError(f"config has no key {key!r}; {hint}") from None
        raise
    except flags.Error as error:
        raise ValueError(str(error)) from None
    if len(rest) > 1:
        raise ValueError(f"unexpected argument {rest[1]!r}: overrides are --config.key=value")
    return rest


def default_workdir(argv: Sequence[str]) -> pathlib.Path:
    """runs/<experiment>[-<variant>][-<digest of the overrides>]: the same command resumes."""
    given = _value_of("--config", argv) or ""
    name = re.sub(r"[^\w.=-]+", "-", given.replace(".py", "").split("/")[-1])
    changes = sorted(a for a in argv if a.startswith("--config."))
    if changes:
        name += "-" + hashlib.sha256("\n".join(changes).encode()).hexdigest()[:6]
    return pathlib.Path("runs") / name


def _value_of(flag: str, argv: Sequence[str]) -> str | None:
    for i, word in enumerate(argv):
        if word.startswith(f"{flag}="):
            return word[len(flag) + 1 :]
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
    return None


def _fail(message: str, code: int) -> NoReturn:
    print(f"marginface: {' '.join(message.split())}", file=sys.stderr, flush=True)
    # A failed background save or data thread must not hold the process, nor print after this line.
    os._exit(code)


def run(argv: Sequence[str]) -> int:
    """Trains as `argv` says; returns the exit code."""
    parse(argv)
    runtime.tune_cpu()
    import jax  # after the flags, which its backend reads once

    from marginface import train

    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    if _COORDINATOR.value:
        jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    workdir = pathlib.Path(_WORKDIR.value) if _WORKDIR.value else default_workdir(argv)
    try:
        finished = train.train(_CONFIG.value, workdir, allow_changed_data=_CHANGED_DATA.value)
    except train.DivergedError as error:
        _fail(str(error), DIVERGED)
    return DONE if finished else RUN_AGAIN


def main() -> None:
    """The command: `run`, with errors a user can mend in one line."""
    try:
        sys.exit(run(sys.argv))
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        if os.environ.get("MARGINFACE_TRACEBACK"):
            raise
        _fail(str(error), CONFIG_ERROR)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail(f"{error}: free some space, then run the same command again", CONFIG_ERROR)


if __name__ == "__main__":
    main()
