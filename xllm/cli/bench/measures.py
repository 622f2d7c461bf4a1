"""What a load showed: percentiles of latencies, rates, goodput. Pure; times are seconds.

TTFT: from the request being sent to its first token. TPOT: time for each token after the first.
ITL: the gaps between words from the server that carried tokens. E2E: to the end of the answer.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence


@dataclasses.dataclass(slots=True)
class RequestRecord:
    """One request as the generator saw it; clocks are seconds since the load's start."""

    index: int
    due_s: float
    sent_s: float = 0.0
    token_s: list[float] = dataclasses.field(default_factory=list)
    """When words with tokens came."""
    ended_s: float = 0.0
    num_prompt: int = 0
    num_output: int = 0
    error: str = ""

    @property
    def ttft_s(self) -> float | None:
        """None without a token."""
        return self.token_s[0] - self.sent_s if self.token_s else None

    @property
    def tpot_s(self) -> float | None:
        """None for fewer than two tokens."""
        if not self.token_s or self.num_output < 2:
            return None
        return (self.ended_s - self.token_s[0]) / (self.num_output - 1)

    @property
    def e2e_s(self) -> float:
        """To the end of the answer."""
        return self.ended_s - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Between the words that carried tokens."""
        return [b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False)]


@dataclasses.dataclass(frozen=True, slots=True)
class Objectives:
    """What a request must keep to count as goodput; None: anything goes."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    @property
    def any(self) -> bool:
        """Whether there is an objective at all."""
        return any(bound is not None for bound in dataclasses.astuple(self))

    def met(self, record: RequestRecord) -> bool:
        """Whether a request ended well and within all bounds."""
        if record.error:
            return False
        pairs = (
            (record.ttft_s, self.ttft_s),
            (record.tpot_s, self.tpot_s),
            (record.e2e_s, self.e2e_s),
        )
        return all(bound is None or value is None or value <= bound for value, bound in pairs)


@dataclasses.dataclass(frozen=True, slots=True)
class Distribution:
    """Mean, percentiles and maximum of some values; NaN of none."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution:
        """Of any number of values."""
        if not values:
            return cls(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, 0)
        ordered = sorted(values)
        return cls(
            mean=math.fsum(ordered) / len(ordered),
            p50=percentile(ordered, 50),
            p90=percentile(ordered, 90),
            p95=percentile(ordered, 95),
            p99=percentile(ordered, 99),
            high=ordered[-1],
            count=len(ordered),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """A whole load. `goodput_s`: requests a second that met the objectives, None without any."""

    num_requests: int
    num_completed: int
    num_failed: int
    duration_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    requests_s: float
    output_tokens_s: float
    total_tokens_s: float
    peak_concurrency: int
    goodput_s: float | None
    met_share: float | None
    late_s: Distribution
    """How long after its time each request was sent: waiting for --max-concurrency, or for us."""
    ttft_s: Distribution
    tpot_s: Distribution
    itl_s: Distribution
    e2e_s: Distribution
    errors: dict[str, int]
    first_errors: dict[str, str]


def percentile(ordered: Sequence[float], point: float) -> float:
    """The `point`th percentile of sorted values, linear between neighbours."""
    place = (len(ordered) - 1) * point / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(records: Sequence[RequestRecord], objectives: Objectives) -> Summary:
    """The figures of all requests; latencies are those of the ones that ended well."""
    good = [record for record in records if not record.error]
    span = 0.0
    if records:
        began = min(record.sent_s for record in records)
        span = max(record.ended_s for record in records) - began

    def per_second(count: float) -> float:
        return count / span if span > 0 else 0.0

    prompt = sum(record.num_prompt for record in good)
    output = sum(record.num_output for record in good)
    num_met = sum(objectives.met(record) for record in good)
    kinds = Counter(error_kind(record.error) for record in records if record.error)
    firsts: dict[str, str] = {}
    for record in records:
        if record.error:
            firsts.setdefault(error_kind(record.error), record.error)
    return Summary(
        num_requests=len(records),
        num_completed=len(good),
        num_failed=len(records) - len(good),
        duration_s=span,
        num_prompt_tokens=prompt,
        num_output_tokens=output,
        requests_s=per_second(len(good)),
        output_tokens_s=per_second(output),
        total_tokens_s=per_second(prompt + output),
        peak_concurrency=peak_concurrency(records),
        goodput_s=per_second(num_met) if objectives.any else None,
        met_share=num_met / len(records) if objectives.any and records else None,
        late_s=Distribution.of([record.sent_s - record.due_s for record in records]),
        ttft_s=Distribution.of([t for r in good if (t := r.ttft_s) is not None]),
        tpot_s=Distribution.of([t for r in good if (t := r.tpot_s) is not None]),
        itl_s=Distribution.of([gap for record in good for gap in record.gaps_s]),
        e2e_s=Distribution.of([record.e2e_s for record in good]),
        errors=dict(kinds.most_common()),
        first_errors=firsts,
    )


def error_kind(text: str) -> str:
    """What errors are counted by: the words before the colon."""
    return text.partition(":")[0]


def peak_concurrency(records: Sequence[RequestRecord]) -> int:
    """Requests that were open at once, at most. One that ends as another is sent is over."""
    changes = [(record.sent_s, 1) for record in records]
    changes += [(record.ended_s, -1) for record in records]
    most = now = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most
