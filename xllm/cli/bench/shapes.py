"""What the requests of a load look like: lengths, shared parts, recorded times.

Pure but for reading a trace's file. Lengths are in tokens. Kinds: `random` (uniform around a
mean), `chat` (log-normal, spread like conversations with an assistant), or a recorded trace: CSV
with TIMESTAMP, ContextTokens, GeneratedTokens (as Azure published), or JSON lines with timestamp
(ms), input_length, output_length and hash_ids (as Mooncake published).
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xllm.errors import ConfigError

TRACE_BLOCK = 512
"""Tokens that one of a trace's hash_ids stands for."""

CHAT_INPUT = (90.0, 1.2)
CHAT_OUTPUT = (170.0, 0.9)
"""Median and sigma of the logarithm, of `chat` lengths."""
CHAT_MOST = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class RequestShape:
    """One request: its lengths, what its prompt shares with others', and when it was recorded.

    `shared`: (name, tokens) of pieces at the prompt's begin; equal names are equal tokens."""

    num_prompt: int
    num_output: int
    shared: tuple[tuple[str, int], ...] = ()
    at_s: float | None = None


def random_shapes(
    count: int,
    num_prompt: int,
    num_output: int,
    spread: float,
    num_shared: int,
    source: random.Random,
) -> list[RequestShape]:
    """Lengths uniform within `spread` (0 to 1) of the mean; the first `num_shared` tokens of the
    prompts are the same."""
    if not 0 <= spread <= 1:
        raise ConfigError(f"spread must be from 0 to 1, not {spread:g}", param="spread")

    def draw(mean: int) -> int:
        low, high = math.ceil(mean * (1 - spread)), math.floor(mean * (1 + spread))
        return max(1, source.randint(low, max(low, high)))

    shared = (("prefix", num_shared),) if num_shared else ()
    return [
        RequestShape(num_shared + draw(num_prompt), draw(num_output), shared) for _ in range(count)
    ]


def chat_shapes(count: int, source: random.Random) -> list[RequestShape]:
    """Lengths as conversations have them: most are short, some are long. Synthetic."""

    def draw(median: float, sigma: float) -> int:
        return min(max(round(source.lognormvariate(math.log(median), sigma)), 4), CHAT_MOST)

    return [RequestShape(draw(*CHAT_INPUT), draw(*CHAT_OUTPUT)) for _ in range(count)]


def clip(
    shapes: list[RequestShape], most_prompt: int | None, most_output: int | None
) -> list[RequestShape]:
    """No prompt and no output longer than these."""
    return [
        dataclasses.replace(
            shape,
            num_prompt=min(shape.num_prompt, most_prompt or shape.num_prompt),
            num_output=min(shape.num_output, most_output or shape.num_output),
        )
        for shape in shapes
    ]


def read_trace(path: Path, count: int | None = None) -> list[RequestShape]:
    """The requests of a recorded trace, in order of time, the first `count` of them. ConfigError
    names the line that is no request."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}", param="trace") from error
    rows = _json_rows(path, text) if text.lstrip().startswith("{") else _csv_rows(path, text)
    shapes = sorted(rows, key=lambda shape: shape.at_s or 0.0)
    if not shapes:
        raise ConfigError(f"the trace {path} has no requests", param="trace")
    return shapes[:count]


def _json_rows(path: Path, text: str) -> Iterator[RequestShape]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            blocks = [str(block) for block in row.get("hash_ids", ())]
            yield RequestShape(
                _length(row["input_length"]),
                _length(row["output_length"]),
                _blocks(blocks, int(row["input_length"])),
                float(row["timestamp"]) / 1000,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _bad_line(path, number, error) from error


def _blocks(names: list[str], num_prompt: int) -> tuple[tuple[str, int], ...]:
    """The last block may be cut by the prompt's end."""
    sizes = [min(TRACE_BLOCK, num_prompt - i * TRACE_BLOCK) for i in range(len(names))]
    return tuple((name, size) for name, size in zip(names, sizes, strict=True) if size > 0)


def _csv_rows(path: Path, text: str) -> Iterator[RequestShape]:
    for number, row in enumerate(csv.DictReader(text.splitlines()), 2):
        try:
            yield RequestShape(
                _length(row["ContextTokens"]),
                _length(row["GeneratedTokens"]),
                (),
                _seconds(row["TIMESTAMP"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise _bad_line(path, number, error) from error


def _length(value: Any) -> int:
    number = int(value)
    if number < 0:
        raise ValueError(f"a length of {number}")
    return max(number, 1)


def _seconds(text: str) -> float:
    """Of a date as `2023-11-16 18:17:03.9799600`, or of a plain number of seconds."""
    if text.replace(".", "", 1).isdigit():
        return float(text)
    whole, _, fraction = text.partition(".")
    at = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC).timestamp()
    return at + (float(f"0.{fraction}") if fraction else 0.0)


def _bad_line(path: Path, number: int, error: Exception) -> ConfigError:
    what = f"no {error}" if isinstance(error, KeyError) else str(error)
    return ConfigError(f"{path}, line {number} is no request of a trace: {what}", param="trace")
