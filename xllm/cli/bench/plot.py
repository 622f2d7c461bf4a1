"""Plots of a load: distributions of latencies, tokens and open requests over time.

matplotlib is an extra, imported when a plot was asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xllm.cli.bench.measures import RequestRecord
from xllm.errors import ConfigError, DependencyError

SUFFIXES = (".png", ".svg", ".pdf")
_BINS = 60


def check_plot(path: str) -> None:
    """Before anything is measured: DependencyError without matplotlib, ConfigError for a file
    that is no picture."""
    if Path(path).suffix not in SUFFIXES:
        raise ConfigError(f"--plot {path}: one of {', '.join(SUFFIXES)} is drawn", param="plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise DependencyError(
            'a plot needs matplotlib, which is an extra: pip install ".[plot]" in '
            "the directory of xLLM",
            param="plot",
        )


def write_plot(path: str, title: str, records: Sequence[RequestRecord]) -> None:
    """Draw the records into a file. ConfigError where it cannot be written."""
    from matplotlib.figure import Figure

    good = [record for record in records if not record.error]
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 2)
    _shares(axes[0, 0], "TTFT", [t for r in good if (t := r.ttft_s) is not None])
    _shares(axes[0, 1], "TPOT", [t for r in good if (t := r.tpot_s) is not None])
    _token_rate(axes[1, 0], good)
    _open_requests(axes[1, 1], records)
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", param="plot") from error


def _shares(axis: Any, name: str, values: list[float]) -> None:
    ordered = sorted(values)
    shares = [(number + 1) / len(ordered) for number in range(len(ordered))]
    axis.step([1e3 * value for value in ordered], shares, where="post")
    axis.set(xlabel=f"{name}, ms", ylabel="share of requests", ylim=(0, 1.02))
    axis.grid(alpha=0.3)


def _token_rate(axis: Any, records: Sequence[RequestRecord]) -> None:
    """A word may carry several tokens: a request's tokens are spread evenly over its words."""
    span = max((record.ended_s for record in records), default=0.0) or 1.0
    width = span / _BINS
    bins = [0.0] * _BINS
    for record in records:
        for at in record.token_s:
            weight = record.num_output / len(record.token_s)
            bins[min(int(at / width), _BINS - 1)] += weight / width
    axis.step([width * number for number in range(_BINS)], bins, where="post")
    axis.set(xlabel="s", ylabel="output tokens/s", ylim=(0, None))
    axis.grid(alpha=0.3)


def _open_requests(axis: Any, records: Sequence[RequestRecord]) -> None:
    changes = [(record.sent_s, 1) for record in records]
    changes += [(record.ended_s, -1) for record in records]
    changes.sort()
    counts, now = [], 0
    for _, change in changes:
        now += change
        counts.append(now)
    axis.step([at for at, _ in changes], counts, where="post")
    axis.set(xlabel="s", ylabel="open requests", ylim=(0, None))
    axis.grid(alpha=0.3)
