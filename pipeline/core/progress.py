"""Shows the progress of a long step on stderr: a bar on a terminal, elsewhere a line every few seconds."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY_SECONDS = 10.0


class Steps:
    """Counts steps: `with Steps("knowledge", total) as steps: ... steps.advance("loss 1.23")`. Silent unless `show`."""

    def __init__(self, name: str, total: int, done: int = 0, show: bool = True) -> None:
        self.name, self.total, self.done, self.show = name, total, done, show
        self.first, self.start, self.printed = done, time.monotonic(), time.monotonic()
        self.note = ""
        self._bar: Progress | None = None

    def __enter__(self) -> "Steps":
        if self.show and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description:<12}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=self.total, completed=self.done, note="")
        return self

    def advance(self, note: str = "", by: int = 1) -> None:
        """Counts `by` steps and shows `note`."""
        self.done, self.note = self.done + by, note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=note)
        elif time.monotonic() - self.printed >= EVERY_SECONDS:
            self._line()

    def _line(self) -> None:
        self.printed = time.monotonic()
        if self.show and self._bar is None:
            rate = (self.done - self.first) / max(self.printed - self.start, 1e-9)
            print(
                f"{self.name}: {self.done}/{self.total}, {rate:.1f}/s{', ' + self.note if self.note else ''}", file=sys.stderr, flush=True
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.done > self.first and not isinstance(error, Exception):  # an error prints its own line
            self._line()
