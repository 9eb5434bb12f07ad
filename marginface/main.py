"""marginface train --config experiments/arcface_regular.py:data=small --config.loss.scale=48

Trains, evaluates and reports one experiment; the same command resumes it. --config.KEY=VALUE
overrides any value of the config. `python -m marginface.main` is the same command.

Exit codes: 0 done; 75 checkpointed, run the same command again; 2 config or input error;
3 diverged (a loss was not finite).
"""

import argparse
import errno
import os
import pathlib
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import logging

from marginface import config as configs
from marginface import runtime
from marginface.command import DIVERGED, DONE, INPUT_ERROR, RUN_AGAIN, Parser
from marginface.runs import plan

_PEER_LOST = r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED)\b"


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The command's options, and the overrides {dotted key: text}.

    Raises:
      ValueError: an option that does not exist, lacks its value or those that belong to it.
    """
    parser = Parser(
        "marginface train",
        __doc__,
        usage="marginface train --config FILE[:VARIANT] [--config.KEY=VALUE ...] [options]",
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:VARIANT]", help="an experiment")
    add("--workdir", type=pathlib.Path, help="run folder; default: runs/<experiment>")
    add("--allow_changed_data", action="store_true", help="resume though the data set changed")
    add(
        "--coordinator",
        metavar="auto|HOST:PORT",
        help="several processes: found by JAX (SLURM, TPU pods), or the address of process 0",
    )
    add("--num_processes", type=int, help="with HOST:PORT: how many")
    add("--process_id", type=int, help="with HOST:PORT: which one this is")
    options, changes = parser.parse_with_changes(argv)
    one_of_several = (options.num_processes, options.process_id)
    if options.coordinator in (None, "auto"):
        if one_of_several != (None, None):
            parser.error("--num_processes and --process_id need --coordinator=HOST:PORT")
    elif None in one_of_several:
        parser.error("--coordinator=HOST:PORT needs --num_processes and --process_id")
    return options, changes


def default_workdir(config: str, overrides: dict[str, str]) -> pathlib.Path:
    """runs/<experiment>[-<variant>][-<digest of the overrides>]: the same command resumes."""
    return pathlib.Path("runs") / plan.folder_name(config, overrides, of_one_run=True)


def run(argv: Sequence[str]) -> int:
    """Trains as `argv` (without the program's name) says; returns the exit code."""
    options, overrides = parse(argv)
    config = configs.load(options.config)
    changes = configs.from_text(config, overrides)
    configs.override(config, changes)
    configs.check(config)
    runtime.tune_cpu()
    runtime.tune_gpu()
    import jax  # after tune_cpu: its backend reads the flags once

    from marginface import train
    from marginface.runs import folder as run_folder

    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    if options.coordinator == "auto":
        jax.distributed.initialize()
    elif options.coordinator:
        jax.distributed.initialize(options.coordinator, options.num_processes, options.process_id)
    runtime.start()
    workdir = options.workdir or default_workdir(options.config, overrides)
    file, variant = configs.parts(options.config)
    origin = {
        "experiment": file.stem,
        "variant": variant,
        "overrides": changes,
        "command": shlex.join(["python", "-m", "marginface.main", *argv]),
    }

    def stopped(code: int, message: str) -> None:
        if jax.process_index() == 0:
            run_folder.record_stop(workdir, configs.to_json(config), code, message)

    before = signal.getsignal(signal.SIGTERM)
    if jax.process_count() == 1:
        # Before the loop listens and after it nothing is lost by leaving: the same command goes on.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(RUN_AGAIN))
    try:
        with runtime.one_line_errors():
            finished = train.train(
                config, workdir, origin=origin, allow_changed_data=options.allow_changed_data
            )
    except train.DivergedError as error:
        stopped(DIVERGED, str(error))
        _leave(str(error), DIVERGED)
    except (ValueError, OSError) as error:
        # JAX reports a peer that died as a ValueError, but no input is to be mended: a crash.
        if jax.process_count() > 1 and re.match(_PEER_LOST, str(error)):
            raise RuntimeError(f"another process was lost: {error}") from error
        stopped(INPUT_ERROR, str(error))
        raise
    finally:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    if not finished:
        stopped(RUN_AGAIN, "stopped by SIGTERM after saving: the same command continues")
    return DONE if finished else RUN_AGAIN


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command: `run` of `argv`, or of the process's arguments.

    An error that its user can mend is one line.
    """
    runtime.collect_rarely()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as a hangup is under nohup
            signal.signal(number, lambda *_: os._exit(RUN_AGAIN))  # nothing to save yet
    try:
        sys.exit(run(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        _leave("stopped; the same command continues", RUN_AGAIN)
    except (ValueError, OSError) as error:
        if os.environ.get("MARGINFACE_TRACEBACK"):
            raise
        message = str(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            message += ": free some space, then run the same command again"
        _leave(message, INPUT_ERROR)


def _leave(message: str, code: int) -> NoReturn:
    print(f"marginface: {' '.join(message.split())}", file=sys.stderr, flush=True)
    # A background save or a peer that waits must not hold the process, nor print after this line.
    os._exit(code)


if __name__ == "__main__":
    runtime.restart_with_huge_pages()
    main()
