"""Where figures go besides metrics.jsonl: wandb and TensorBoard, when asked for.

No run needs them: one that is not installed, cannot start or fails later is one warning, and the
run goes on without it.
"""

import importlib
import pathlib
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from absl import logging

from marginface.runs import folder as run_folder


@runtime_checkable
class Tracker(Protocol):
    """What figures can be written to."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The figures of one step."""

    def flush(self) -> None:
        """Returns once what was written is safe: before a checkpoint refers to it."""

    def close(self) -> None:
        """Ends it."""


class Trackers:
    """Those that work; they never raise.

    Args:
      running: name → tracker.
    """

    def __init__(self, running: Mapping[str, Tracker] | None = None) -> None:
        self._running = dict(running or {})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The figures of one step."""
        self._each(lambda tracker: tracker.write(step, values))

    def flush(self) -> None:
        """Returns once what was written is safe."""
        self._each(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Ends them."""
        self._each(lambda tracker: tracker.close())
        self._running = {}

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._running.items()):
            try:
                action(tracker)
            except Exception as error:
                del self._running[name]
                _warn(name, error, f"{run_folder.METRICS} has all figures")


def start_trackers(
    config: Mapping[str, Any], workdir: pathlib.Path, *, resume_step: int = -1
) -> Trackers:
    """The trackers that `config` asks for and that can be started.

    Args:
      config: of the run; its sections "wandb" and "tensorboard" say which.
      workdir: the run folder: its name and its sweep's are those of the run.
      resume_step: the step that the run continues from, -1 if it begins.
    """
    running: dict[str, Tracker] = {}
    if config["wandb"]["use"]:
        _try("wandb", running, lambda: Wandb(config, workdir))
    if config.get("tensorboard"):  # which a config of an earlier version may lack
        events = workdir / run_folder.TENSORBOARD
        _try("tensorboard", running, lambda: TensorBoard(events, resume_step))
    return Trackers(running)


class Wandb:
    """A wandb run, named after its folder, in the group of its sweep.

    The run's id stands in <workdir>/wandb/id.txt, so that it continues with the run and two runs
    never share one.

    References:
      https://docs.wandb.ai/ref/python/init
    """

    def __init__(self, config: Mapping[str, Any], workdir: pathlib.Path) -> None:
        wandb, settings = importlib.import_module("wandb"), config["wandb"]
        path = workdir / run_folder.WANDB_ID
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or not path.read_text(encoding="ascii"):
            path.write_text(secrets.token_hex(4), encoding="ascii")
        self._run = wandb.init(
            project=settings["project"],
            group=settings.get("group") or _group(workdir),
            name=workdir.name,
            tags=list(settings.get("tags") or ()),
            id=path.read_text(encoding="ascii"),
            resume="allow",
            reinit="create_new",  # runs that train together are several in one process
            dir=str(workdir),
            mode=settings["mode"],
            config=dict(config),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The figures of one step; wandb ignores those of steps that it already has."""
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """Nothing: wandb's own process has it."""

    def close(self) -> None:
        """Ends the run; what is not sent yet is sent."""
        self._run.finish()


class TensorBoard:
    """Event files in a folder. Figures of steps after `resume_step` are dropped, as by Writer.

    They are written here and now: tensorboardX's SummaryWriter hands them to a thread, where an
    error such as a full disk is lost and the next figures wait for ever.
    """

    def __init__(self, folder: pathlib.Path, resume_step: int) -> None:
        self._proto: Any = importlib.import_module("tensorboardX.proto.event_pb2")
        summary: Any = importlib.import_module("tensorboardX.proto.summary_pb2")
        files = importlib.import_module("tensorboardX.event_file_writer")
        self._summary = summary.Summary
        folder.mkdir(parents=True, exist_ok=True)
        # Files are read in the order of their names, which begin with the time in seconds.
        self._file = files.EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        begin = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._add(resume_step + 1, session_log=begin)  # purges this step and all after it

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The figures of one step."""
        pairs = [self._summary.Value(tag=key, simple_value=v) for key, v in values.items()]
        self._add(step, summary=self._summary(value=pairs))

    def flush(self) -> None:
        """Returns once everything is in the file."""
        self._file.flush()

    def close(self) -> None:
        """Ends the file."""
        self._file.close()

    def _add(self, step: int, **content: Any) -> None:
        self._file.write_event(self._proto.Event(step=step, wall_time=time.time(), **content))


def _group(workdir: pathlib.Path) -> str:
    """The sweep's folder; that of a search, which all experiments call "search", with its own."""
    *_, above, folder, _ = ("", "", *workdir.resolve().parts)
    return f"{above}-{folder}" if folder == "search" else folder


def _try(name: str, running: dict[str, Tracker], begin: Callable[[], Tracker]) -> None:
    try:
        running[name] = begin()
    except ImportError:
        logging.warning(
            "%s is not installed: pip install 'marginface[%s]'; going on without", name, name
        )
    except Exception as error:
        hint = "set WANDB_API_KEY or --config.wandb.mode=offline"
        _warn(name, error, hint if name == "wandb" else f"look after {name}'s folder")


def _warn(name: str, error: Exception, hint: str) -> None:
    said = " ".join(str(error).splitlines()[:1]) or type(error).__name__
    logging.warning("%s: %s; %s; going on without", name, said, hint)
