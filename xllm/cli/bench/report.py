"""The figures of a measurement: tables on standard output, JSON in a file."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from xllm.cli.bench.measures import Distribution, RequestRecord, Summary
from xllm.errors import ConfigError

PLAIN_WIDTH = 100
"""Columns where there is no terminal."""

LATENCIES = (
    ("TTFT ms", "ttft_s"),
    ("TPOT ms", "tpot_s"),
    ("ITL ms", "itl_s"),
    ("E2E ms", "e2e_s"),
)
_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "high")


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: the first column is text, the others are numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    Console(width=width, markup=False, highlight=False).print(table)


def show_summary(summary: Summary) -> None:
    """Counts and rates, percentiles of the latencies, and what failed."""
    rows = [
        ("requests completed / failed", f"{summary.num_completed:,} / {summary.num_failed:,}"),
        ("duration s", f"{summary.duration_s:,.2f}"),
        ("requests/s", f"{summary.requests_s:,.2f}"),
        ("prompt tokens", f"{summary.num_prompt_tokens:,}"),
        ("output tokens", f"{summary.num_output_tokens:,}"),
        ("output tokens/s", f"{summary.output_tokens_s:,.1f}"),
        ("all tokens/s", f"{summary.total_tokens_s:,.1f}"),
        ("most requests at once", f"{summary.peak_concurrency:,}"),
        ("sent after its time, p99 ms", milliseconds(summary.late_s.p99)),
    ]
    if summary.goodput_s is not None and summary.met_share is not None:
        share = f"{summary.goodput_s:,.2f} ({100 * summary.met_share:.1f}%)"
        rows.append(("goodput, requests/s within the objectives", share))
    show_table("load", ("figure", "value"), rows)
    show_distributions("latency", [(name, getattr(summary, key)) for name, key in LATENCIES])
    for kind, count in summary.errors.items():
        sys.stdout.write(f"{count} x {kind}; the first: {summary.first_errors[kind]}\n")


def show_distributions(title: str, rows: Sequence[tuple[str, Distribution]]) -> None:
    """Percentiles in milliseconds, a row each."""
    show_table(
        title,
        ("", *("max" if name == "high" else name for name in _COLUMNS)),
        [
            (name, *(milliseconds(getattr(distribution, column)) for column in _COLUMNS))
            for name, distribution in rows
        ],
    )


def milliseconds(seconds: float) -> str:
    """Or a dash for no value."""
    return "-" if math.isnan(seconds) else f"{1e3 * seconds:,.2f}"


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """The content as JSON; NaN becomes null. ConfigError where the file cannot be written."""
    try:
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", param="json") from error


def record_fields(record: RequestRecord) -> dict[str, Any]:
    """A request's record for the JSON file."""
    return dataclasses.asdict(record)
