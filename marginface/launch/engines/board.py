"""What a person sees while a sweep lasts: how many are done, which run, which failed, how long."""

import os
import shutil
import sys
import time
from collections.abc import Sequence

from marginface.launch.units import Unit
from marginface.runs import folder as run_folder

_SHOWN = 6  # units of a kind


class Board:
    """A live table on a terminal; elsewhere one line for each event.

    Args:
        units: all that will run.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self._total, self._begun = len(units), time.monotonic()
        self._root = os.path.commonpath([unit.folder.parent.absolute() for unit in units])
        self._running: dict[str, Unit] = {}
        self._done = 0
        self._failed: list[str] = []
        self._lines, self._shown = 0, 0.0
        self._live = sys.stdout.isatty()

    def started(self, unit: Unit) -> None:
        """The unit runs now."""
        self._running[self._title(unit)] = unit

    def ended(self, unit: Unit, *, again: bool = False) -> None:
        """The unit's process has ended; `again`: it will be started once more."""
        title = self._title(unit)
        self._running.pop(title, None)
        kind, why, step = run_folder.state(unit.folder)
        if kind == "done":
            self._done += 1
        elif not again:
            self._failed.append(f"{title}: {kind}{f', {why}' if why else ''}")
        what = f"{kind}, will be continued" if again else kind
        self._say(f"{title}: {what}{f', {why}' if why else ''} (step {step})")

    def show(self) -> None:
        """Draws the table again, once a second at most, on a terminal only."""
        if not self._live or time.monotonic() - self._shown < 1.0:
            return
        self._shown = time.monotonic()
        self._erase()
        lines = [self.line()]
        for title, unit in list(self._running.items())[:_SHOWN]:
            lines.append(f"  running  {title}  step {run_folder.state(unit.folder).step}")
        if len(self._running) > _SHOWN:
            lines.append(f"  and {len(self._running) - _SHOWN} more")
        lines += [f"  failed   {failure}" for failure in self._failed[-_SHOWN:]]
        width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be erased
        print("\n".join(line[:width] for line in lines), flush=True)
        self._lines = len(lines)

    def line(self) -> str:
        """ "done 3 · running 1 · failed 0 · waiting 8 · about 6 min left"."""
        ended = self._done + len(self._failed)
        waiting = self._total - ended - len(self._running)
        text = f"done {self._done} · running {len(self._running)}"
        text += f" · failed {len(self._failed)} · waiting {waiting}"
        if ended and ended < self._total:
            left = (time.monotonic() - self._begun) / ended * (self._total - ended)
            text += (
                f" · about {left / 60:.0f} min left" if left > 90 else f" · about {left:.0f} s left"
            )
        return text

    def close(self) -> None:
        """Ends with the last count."""
        self._erase()
        print(self.line(), flush=True)

    def _say(self, text: str) -> None:
        self._erase()
        print(text if self._live else f"{text}  [{self.line()}]", flush=True)

    def _erase(self) -> None:
        if self._lines:
            print(f"\033[{self._lines}A\033[J", end="")
            self._lines = 0

    def _title(self, unit: Unit) -> str:
        return os.path.relpath(unit.folder.absolute(), self._root)
