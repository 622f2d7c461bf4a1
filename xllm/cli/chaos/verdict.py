"""What a run is measured against, and how it is told. Pure.

A criterion that has no value was not looked at (nobody was interrupted, say) and does not fail;
that the faults happened and that there was load is proven elsewhere.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence

from xllm.cli.supervision import MAX_CRASHES, WINDOW_S


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a scenario promises. None: nothing. Times in milliseconds."""

    gap_p50_ms: float | None = None
    """Median pause of the streams over ZeroMQ that went on elsewhere."""
    gap_max_ms: float | None = None
    """Longest pause of any stream that was open, without the time of drawing again what it had."""
    http_gap_max_ms: float | None = None
    """The same for those over HTTP, where it differs."""
    detect_ms: float | None = None
    """Longest time from the fault to the first process that noticed it."""
    recover_ms: float | None = None
    """Longest time until all processes were back and known to all routers."""
    may_fail: bool = False
    """Requests may end with an error, each with exactly one."""


@dataclasses.dataclass
class Injection:
    """One fault: what was done to whom, that it happened, and what it cost. Times: monotonic
    seconds; spans: seconds, -1 where there is none."""

    scenario: str
    victim: str
    at: float
    num_streaming: int
    proofs: list[str] = dataclasses.field(default_factory=list)
    detect_s: float = -1.0
    recover_s: float = -1.0
    settled_at: float = 0.0
    ended: str = ""
    """The launcher's process that it ended."""
    gaps_s: list[float] = dataclasses.field(default_factory=list)
    """Of the streams over ZeroMQ that went on elsewhere."""
    http_gaps_s: list[float] = dataclasses.field(default_factory=list)
    """Of those over HTTP that were posted again, drawing again and all."""
    longest_s: float = 0.0
    """The longest pause of any stream over ZeroMQ that was open at the fault."""
    http_longest_s: float = 0.0
    """Of any over HTTP, without the time of drawing again what it had."""
    failures: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: dict[str, float] = dataclasses.field(default_factory=dict)
    broken: list[str] = dataclasses.field(default_factory=list)
    """What did not come out as it should have, beyond tokens and times."""


def calm_in(injections: Iterable[Injection], now: float) -> float:
    """Seconds until one end more of any process would not be one too many for the launcher (see
    supervision), which leaves such a one out for a while: faults would find no streams there."""
    ends: dict[str, list[float]] = {}
    for one in injections:
        if one.ended and now - one.at < WINDOW_S:
            ends.setdefault(one.ended, []).append(one.at)
    most = MAX_CRASHES - 1
    return max(
        (times[-most] + WINDOW_S - now for times in ends.values() if len(times) >= most),
        default=0.0,
    )


@dataclasses.dataclass(frozen=True)
class Criterion:
    """One bound and what was measured."""

    name: str
    limit: float
    value: float | None

    @property
    def passed(self) -> bool:
        """Whether the bound holds."""
        return self.value is None or self.value <= self.limit


def is_time(criterion: str) -> bool:
    """Whether a criterion of this name bounds a time, which `slack` multiplies."""
    return criterion.endswith("_ms")


def summary_ms(spans_s: Iterable[float]) -> dict[str, float]:
    """Median and worst in milliseconds; empty where there is nothing."""
    known = [span * 1000 for span in spans_s if span >= 0]
    if not known:
        return {}
    return {"p50": round(statistics.median(known), 1), "max": round(max(known), 1)}


def judge(limits: Limits, injections: Sequence[Injection], slack: float) -> list[Criterion]:
    """The criteria of a scenario; `slack` multiplies the bounds of times."""
    gaps = [gap for one in injections for gap in one.gaps_s]
    longest = [one.longest_s for one in injections]
    http_longest = [one.http_longest_s for one in injections]
    http_limit = limits.gap_max_ms if limits.http_gap_max_ms is None else limits.http_gap_max_ms
    found = []

    def bound(name: str, limit: float | None, values: list[float], key: str) -> None:
        if limit is not None:
            found.append(Criterion(name, limit * slack, summary_ms(values).get(key)))

    bound("gap_p50_ms", limits.gap_p50_ms, gaps, "p50")
    bound("gap_max_ms", limits.gap_max_ms, longest, "max")
    bound("http_gap_max_ms", http_limit, http_longest, "max")
    bound("detect_ms", limits.detect_ms, [one.detect_s for one in injections], "max")
    bound("recover_ms", limits.recover_ms, [one.recover_s for one in injections], "max")
    if not limits.may_fail:
        num_failed = sum(sum(one.failures.values()) for one in injections)
        found.append(Criterion("failed", 0, num_failed))
    found.append(Criterion("broken", 0, sum(len(one.broken) for one in injections)))
    return found


def section(
    title: str, limits: Limits, injections: Sequence[Injection], slack: float
) -> dict[str, object]:
    """One scenario as JSON."""
    criteria = judge(limits, injections, slack)
    failures: dict[str, int] = {}
    for one in injections:
        for code, count in one.failures.items():
            failures[code] = failures.get(code, 0) + count
    notes = {name: value for one in injections for name, value in one.notes.items()}
    return {
        "title": title,
        "faults": len(injections),
        "interrupted": sum(len(one.gaps_s) + len(one.http_gaps_s) for one in injections),
        "streaming_min": min((one.num_streaming for one in injections), default=0),
        "gap_ms": summary_ms(gap for one in injections for gap in one.gaps_s),
        "http_gap_ms": summary_ms(gap for one in injections for gap in one.http_gaps_s),
        "longest_ms": summary_ms(one.longest_s for one in injections),
        "http_longest_ms": summary_ms(one.http_longest_s for one in injections),
        "detect_ms": summary_ms(one.detect_s for one in injections),
        "recover_ms": summary_ms(one.recover_s for one in injections),
        "failed": failures,
        "notes": notes,
        "proofs": [proof for one in injections for proof in one.proofs][:20],
        "broken": [text for one in injections for text in one.broken][:20],
        "criteria": [
            {"name": one.name, "limit": one.limit, "value": one.value, "passed": one.passed}
            for one in criteria
        ],
        "passed": all(one.passed for one in criteria),
    }
