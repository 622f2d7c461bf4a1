"""When the requests of a load are sent. Pure: a generator of random numbers is given."""

from __future__ import annotations

import math
import random

from xllm.errors import ConfigError


def arrival_times(count: int, rate: float, burstiness: float, source: random.Random) -> list[float]:
    """Seconds from the start, in order, the first at 0. The gaps are drawn from a gamma
    distribution with mean 1 / `rate` and shape `burstiness`: 1 is a Poisson process, less comes
    in bursts, more comes evenly. An infinite rate sends all at once.

    ConfigError for a rate or burstiness that is not above 0."""
    if not rate > 0:
        raise ConfigError(f"rate must be above 0 requests/s, not {rate:g}", param="rate")
    if not 0 < burstiness < math.inf:
        raise ConfigError(f"burstiness must be above 0, not {burstiness:g}", param="burstiness")
    if math.isinf(rate):
        return [0.0] * count
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += source.gammavariate(burstiness, 1 / (rate * burstiness))
    return times


def speed_up(times: list[float], factor: float) -> list[float]:
    """Recorded times, from the first one on, `factor` times as fast. ConfigError for a factor
    that is not above 0."""
    if not 0 < factor < math.inf:
        raise ConfigError(f"speed-up must be above 0, not {factor:g}", param="speed-up")
    first = times[0] if times else 0.0
    return [(time - first) / factor for time in times]
