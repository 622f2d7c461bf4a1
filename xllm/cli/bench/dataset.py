"""The options that say which requests a load consists of, and when they come."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from xllm.cli.bench.arrivals import arrival_times, speed_up
from xllm.cli.bench.shapes import RequestShape, chat_shapes, clip, random_shapes, read_trace

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_COUNT = 100


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What was asked for; `shapes` are the same for the same values."""

    dataset: str
    trace: str
    num_requests: int | None
    input_len: int
    output_len: int
    spread: float
    prefix_len: int
    max_input: int | None
    max_output: int | None
    seed: int

    def shapes(self) -> list[RequestShape]:
        """The requests, in order. ConfigError for a trace that cannot be read."""
        source = random.Random(f"{self.seed}/lengths")
        count = self.num_requests or DEFAULT_COUNT
        if self.trace:
            found = read_trace(Path(self.trace), self.num_requests)
        elif self.dataset == "chat":
            found = chat_shapes(count, source)
        else:
            found = random_shapes(
                count, self.input_len, self.output_len, self.spread, self.prefix_len, source
            )
        return clip(found, self.max_input, self.max_output)


@dataclasses.dataclass(frozen=True)
class Arrivals:
    """When requests are sent; rate None: as recorded, or all at once."""

    rate: float | None
    burstiness: float
    speed_up: float

    def times(self, shapes: list[RequestShape], seed: int) -> list[float]:
        """Seconds from the start, a request each."""
        recorded = [shape.at_s for shape in shapes if shape.at_s is not None]
        if self.rate is None and len(recorded) == len(shapes):
            return speed_up(recorded, self.speed_up)
        rate = math.inf if self.rate is None else self.rate
        source = random.Random(f"{seed}/arrivals")
        return arrival_times(len(shapes), rate, self.burstiness, source)


_DATASET_OPTIONS = (
    click.option(
        "--dataset",
        type=click.Choice(["random", "chat"]),
        default="random",
        show_default=True,
        help="Lengths: uniform around a mean, or spread like conversations (synthetic).",
    ),
    click.option("--trace", default="", metavar="FILE", help="Recorded trace, CSV or JSON lines."),
    click.option(
        "--num-requests",
        type=click.IntRange(min=1),
        default=None,
        metavar="N",
        help=f"Requests to send. [default: {DEFAULT_COUNT}, or all of a trace]",
    ),
    click.option(
        "--input-len",
        type=click.IntRange(min=1),
        default=128,
        show_default=True,
        metavar="TOKENS",
        help="Mean prompt of `random`.",
    ),
    click.option(
        "--output-len",
        type=click.IntRange(min=1),
        default=64,
        show_default=True,
        metavar="TOKENS",
        help="Mean output of `random`.",
    ),
    click.option(
        "--spread",
        type=click.FloatRange(0, 1),
        default=0.0,
        show_default=True,
        metavar="SHARE",
        help="`random` lengths are within this share of their mean.",
    ),
    click.option(
        "--prefix-len",
        type=click.IntRange(min=0),
        default=0,
        metavar="TOKENS",
        help="`random`: this many tokens more, the same in all prompts.",
    ),
    click.option(
        "--max-input",
        type=click.IntRange(min=1),
        default=None,
        metavar="TOKENS",
        help="Cut longer prompts to this.",
    ),
    click.option(
        "--max-output",
        type=click.IntRange(min=1),
        default=None,
        metavar="TOKENS",
        help="Cut longer outputs to this.",
    ),
    click.option(
        "--seed", type=click.INT, default=0, show_default=True, help="Of all that is drawn."
    ),
)

_ARRIVAL_OPTIONS = (
    click.option(
        "--rate",
        type=click.FLOAT,
        default=None,
        metavar="PER_S",
        help="Requests a second. [default: as the trace has them; else all at once]",
    ),
    click.option(
        "--burstiness",
        type=click.FLOAT,
        default=1.0,
        show_default=True,
        metavar="SHAPE",
        help="1: Poisson; less: bursts; more: even.",
    ),
    click.option(
        "--speed-up",
        type=click.FLOAT,
        default=1.0,
        show_default=True,
        metavar="FACTOR",
        help="Play a trace's times this many times as fast.",
    ),
)


def dataset_options(function: F) -> F:
    """Decorator: which requests. The command gets a `Dataset`, `dataset`."""
    return _gather(function, _DATASET_OPTIONS, Dataset, "dataset")


def arrival_options(function: F) -> F:
    """Decorator: when they come. The command gets `Arrivals`, `arrivals`."""
    return _gather(function, _ARRIVAL_OPTIONS, Arrivals, "arrivals")


def _gather(function: F, options: tuple[Any, ...], cls: type[Any], name: str) -> F:
    fields = [field.name for field in dataclasses.fields(cls)]

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        given = {field: kwargs.pop(field) for field in fields}
        return function(*args, **{name: cls(**given)}, **kwargs)

    decorated: Any = command
    for option in reversed(options):
        decorated = option(decorated)
    return typing.cast("F", decorated)
