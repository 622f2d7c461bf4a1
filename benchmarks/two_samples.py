"""Whether two samples can be told apart: the guesser's chance, its interval, a permutation test.

The chance is that of the area under the ROC curve (Mann and Whitney's U over the number of pairs):
that of two values, one of each sample, the smaller one is the first's. 0.5 is guessing, 1 is
knowing. No distribution is assumed: the interval is the bootstrap's, the test permutes labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

_DRAWS = 2000
_SEED = 5


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Of a first sample with a second one. `low`, `high`: 95% interval of `chance`; `p`: how often
    labels that were drawn by lot are as far from 0.5."""

    chance: float
    low: float
    high: float
    p: float

    def is_apart(self, level: float = 0.01) -> bool:
        """Whether the samples differ by more than what chance explains at that level."""
        return self.p < level


def compare(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Both samples need at least two values; ties count half."""
    if min(len(first), len(second)) < 2:
        raise ValueError("a sample has at least two values")
    wins = _wins(np.asarray(first, float), np.asarray(second, float))
    num_first, num_second = wins.shape
    random = np.random.default_rng(_SEED)
    # The bootstrap draws values again, each as often as it is counted here.
    of_first = random.multinomial(num_first, np.full(num_first, 1 / num_first), _DRAWS)
    of_second = random.multinomial(num_second, np.full(num_second, 1 / num_second), _DRAWS)
    again = ((of_first @ wins) * of_second).sum(axis=1) / wins.size
    low, high = np.quantile(again, (0.025, 0.975))
    observed = float(wins.mean())
    # Mann and Whitney's U of drawn labels, from the sum of the first sample's ranks.
    both = np.concatenate((first, second)).astype(float)
    ranks = _wins(both, both).sum(axis=0) + 0.5
    drawn = random.permuted(np.tile(ranks, (_DRAWS, 1)), axis=1)[:, :num_first].sum(axis=1)
    by_lot = 1 - (drawn - num_first * (num_first + 1) / 2) / wins.size
    num_as_far = int((np.abs(by_lot - 0.5) >= abs(observed - 0.5) - 1e-9).sum())
    return Comparison(observed, float(low), float(high), (num_as_far + 1) / (_DRAWS + 1))


def _wins(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """For each pair of values, 1 where the one of `a` is the smaller one, 0.5 where they are equal:
    [len(a), len(b)]."""
    wins: np.ndarray = (a[:, None] < b[None, :]) + 0.5 * (a[:, None] == b[None, :])
    return wins
