"""What `xllm serve` shows: lines, and a bar for each process that loads weights.

On a terminal the bars are rich's and the lines go above them; elsewhere a bar is a line now and
then. rich is imported with the first bar.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

from xllm.protocol.actor.logs import LogStream

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_STEPS = 4
"""Lines for a whole bar where there is no terminal."""


class LaunchScreen:
    """Shows a start on standard output. A reader that went away, or a full disk, ends nothing:
    the children are started and watched all the same."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._file = stream or sys.stdout
        self._stream = LogStream(self._file)
        self._bars: dict[str, TaskID] = {}
        self._shown: dict[str, int] = {}
        self._progress: Progress | None = None

    def line(self, text: str) -> None:
        """One line."""
        try:
            if self._progress is not None:
                self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
                return
        except OSError:
            return  # nobody reads: the service serves on
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def complain(self, text: str) -> None:
        """One line of a failure, on standard error."""
        stream = LogStream(sys.stderr)
        stream.write(f"xllm: {' '.join(text.split())}\n")
        stream.flush()

    def bar(self, name: str, done: int, total: int, unit: str) -> None:
        """How far `name` is; the bar goes with its last step."""
        if total <= 0:
            return
        if self._stream.isatty():
            self._move_bar(name, done, total)
        elif (step := done * _STEPS // total) != self._shown.get(name, 0):
            self._shown[name] = step
            self.line(f"         {name}: {100 * done // total}% of {_amount(total, unit)} loaded")

    def close_bars(self) -> None:
        """Remove the bars, if there are any."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._bars.clear()

    def _move_bar(self, name: str, done: int, total: int) -> None:
        if self._progress is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

            self._progress = Progress(
                TextColumn("         {task.description}"),
                BarColumn(),
                DownloadColumn(),
                console=Console(file=self._file),
                transient=True,
            )
            self._progress.start()
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._bars[name], completed=done, total=total)


def _amount(total: int, unit: str) -> str:
    if unit != "bytes":
        return f"{total} {unit}"
    return f"{total / (1 << 20):.1f} MiB"
