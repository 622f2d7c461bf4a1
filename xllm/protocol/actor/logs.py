"""structlog for every process: one event a line, to standard error or a file of its own.

Invariant: logging never raises. What cannot be written is counted and gone.
"""

from __future__ import annotations

import logging
import os
import sys
import typing
from typing import TextIO

import structlog
from structlog.types import Processor

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class LogStream:
    """A stream whose failures stop at it. A full disk, a closed terminal or a reader that left
    must not change what a process does, and a log line stands in the middle of it: this is the
    one place where an error is swallowed, and `num_lost` says how often."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream  # None: standard error was closed before this process began
        self.num_lost = 0

    def write(self, text: str) -> int:
        """Write, or count a loss."""
        try:
            if self._stream is not None:
                return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            pass
        self.num_lost += 1
        return 0

    def flush(self) -> None:
        """Flush, or count a loss."""
        try:
            if self._stream is not None:
                self._stream.flush()
        except (OSError, ValueError):
            self.num_lost += 1

    def isatty(self) -> bool:
        """Whether a person reads along."""
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False


def _open_log(log_dir: str, process: str) -> TextIO:
    path = os.path.join(log_dir, process.replace("/", "_") + ".log")
    try:
        os.makedirs(log_dir, exist_ok=True)
        return open(path, "a", buffering=1, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        # The disk's trouble, perhaps, and over at the next start: no wrong setting for certain.
        place = f"cluster.log_dir: {error.filename}"
        raise OSError(error.errno, error.strerror, place) from error


def configure_logs(
    *, process: str, level: str = "info", log_format: str = "text", log_dir: str = ""
) -> None:
    """Set up structlog once at the start of a process. Events carry the process's name.
    OSError, whose file name begins with the setting, where there can be no file in `log_dir`."""
    stream = LogStream(_open_log(log_dir, process) if log_dir else sys.stderr)
    renderers: list[Processor]
    if log_format == "json":
        renderers = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        # Where rich is installed structlog would print the locals of a traceback: prompts.
        plain = structlog.dev.plain_traceback
        colors = stream.isatty()
        renderers = [
            structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=24, exception_formatter=plain)
        ]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=typing.cast("TextIO", stream)),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(process=process)
