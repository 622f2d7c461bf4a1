"""structlog for every process: one event a line, to standard error or a file of its own."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

import structlog
from structlog.types import Processor

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def configure_logs(
    *, process: str, level: str = "info", log_format: str = "text", log_dir: str = ""
) -> None:
    """Set up structlog once at the start of a process. Events carry the process's name."""
    stream: TextIO = sys.stderr
    if log_dir:
        os.makedirs(log_dir, exist_ok=True)
        path = os.path.join(log_dir, process.replace("/", "_") + ".log")
        stream = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  # for life
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
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(process=process)
