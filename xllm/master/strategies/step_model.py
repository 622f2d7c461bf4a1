"""How long a step will take, learnt from those that ran.

time = constant + tokens computed + context read + sequences + pairs attended, each times a
coefficient >= 0. Pairs are what a prefill attends to: its chunk times the prefix before it, and
half the chunk's square. Coefficients come from recursive least squares in information form, of
relative errors, bounded below by coordinate descent (Franc, Hlavac, Navara 2005). Steps with and
without prefills are forgotten apart, so that a long run of decodes does not wash out what
prefills cost. Pure. Invariant: no prediction is negative, and none is made before there is data.
"""

from __future__ import annotations

import dataclasses
import math

from xllm.protocol.step import ItemKind, StepPlan

MIN_STEPS = 8
"""Steps seen before anything is predicted, and how many of them with a prefill: next."""
MIN_PREFILLS = 2
FORGETTING = 0.98
"""What a step's weight shrinks to with each later one of its kind: some fifty count."""
MAX_SURPRISE = 8.0
"""A step that took longer than so many times its prediction counts as that long: the process may
have been stopped. A machine that did become slower is followed within a few steps."""
_SWEEPS = 4
_SHORTEST_S = 1e-5
_SCALES = (1.0, 256.0, 8192.0, 64.0, 1048576.0)
_NUM = len(_SCALES)


@dataclasses.dataclass(slots=True)
class StepShape:
    """What a step computes. `context`: cached and new positions read, counted once a sequence;
    `pairs`: (query, key) pairs of prefills."""

    tokens: int = 0
    context: int = 0
    sequences: int = 0
    pairs: float = 0.0

    @classmethod
    def of(cls, plan: StepPlan) -> StepShape:
        """The shape of a plan. Looks at every item."""
        shape = cls()
        tokens = context = 0
        prefill = ItemKind.PREFILL
        for item in plan.items:
            num = item.num_tokens
            tokens += num
            context += item.start + num
            if item.kind == prefill:
                shape.pairs += num * (item.start + num / 2)
        shape.tokens, shape.context, shape.sequences = tokens, context, len(plan.items)
        return shape

    def add_decodes(self, count: int, context: int) -> None:
        """`count` sequences compute a token each; they read `context` positions together."""
        self.tokens += count
        self.context += context
        self.sequences += count

    def add_prefill(self, start: int, num: int) -> None:
        """A sequence computes `num` tokens after its first `start`."""
        self.tokens += num
        self.context += start + num
        self.sequences += 1
        self.pairs += num * (start + num / 2)

    def vector(self) -> tuple[float, ...]:
        """The features, scaled to similar sizes."""
        raw = (1.0, self.tokens, self.context, self.sequences, self.pairs)
        return tuple(value / scale for value, scale in zip(raw, _SCALES, strict=True))


class _Information:
    """Weighted sums of products of features, and of features and times."""

    __slots__ = ("count", "matrix", "vector")

    def __init__(self) -> None:
        self.count = 0
        self.matrix = [[0.0] * _NUM for _ in range(_NUM)]
        self.vector = [0.0] * _NUM

    def add(self, features: tuple[float, ...], seconds: float) -> None:
        self.count += 1
        weight = 1.0 / (seconds * seconds)
        for i, row in enumerate(self.matrix):
            scaled = weight * features[i]
            for j in range(_NUM):
                row[j] = FORGETTING * row[j] + scaled * features[j]
            self.vector[i] = FORGETTING * self.vector[i] + scaled * seconds


class StepTimeModel:
    """The coefficients, and what follows from them. Seconds."""

    __slots__ = ("_decodes", "_prefills", "_weights")

    def __init__(self) -> None:
        self._decodes = _Information()
        self._prefills = _Information()
        self._weights = [0.0] * _NUM

    @property
    def is_ready(self) -> bool:
        """Whether enough was seen to predict from."""
        num_prefills = self._prefills.count
        return num_prefills >= MIN_PREFILLS and num_prefills + self._decodes.count >= MIN_STEPS

    def add(self, shape: StepShape, seconds: float) -> None:
        """A step of this shape took so long. Steps without a time are ignored."""
        if not (seconds > 0.0 and math.isfinite(seconds)):
            return
        features = shape.vector()
        if self.is_ready:
            seconds = min(seconds, MAX_SURPRISE * max(self._sum(features), _SHORTEST_S))
        information = self._prefills if shape.pairs else self._decodes
        information.add(features, max(seconds, _SHORTEST_S))
        self._fit()

    def predict(self, shape: StepShape) -> float | None:
        """What a step of this shape takes; None before there is data."""
        return self._sum(shape.vector()) if self.is_ready else None

    def prefill_s(self, start: int, num: int) -> float | None:
        """What `num` tokens after `start` add to a step."""
        if not self.is_ready:
            return None
        shape = StepShape()
        shape.add_prefill(start, num)
        return self._sum(shape.vector()) - self._weights[0]

    def decode_s(self, context: int) -> float | None:
        """What one decode with so much context adds to a step."""
        if not self.is_ready:
            return None
        return self._sum(StepShape(1, context, 1).vector()) - self._weights[0]

    def largest_chunk(self, seconds: float, start: int, remaining: int) -> int:
        """The most tokens, at most `remaining`, that add at most `seconds` to a step, for a
        sequence with `start` computed. All of them where there is no data."""
        if not self.is_ready:
            return remaining
        _, token, read, sequence, pair = (
            weight / scale for weight, scale in zip(self._weights, _SCALES, strict=True)
        )
        left = seconds - sequence - read * start
        if left <= 0.0:
            return 0
        slope = token + read + pair * start
        divisor = slope + math.sqrt(slope * slope + 2.0 * pair * left)
        if divisor * remaining <= 2.0 * left:
            return remaining
        return min(remaining, int(2.0 * left / divisor))

    def _sum(self, features: tuple[float, ...]) -> float:
        return sum(map(float.__mul__, self._weights, features))

    def _fit(self) -> None:
        """A few rounds of coordinate descent from where the last step left off."""
        first, second = self._decodes, self._prefills
        weights = self._weights
        target = [a + b for a, b in zip(first.vector, second.vector, strict=True)]
        matrix = [
            [a + b for a, b in zip(one, other, strict=True)]
            for one, other in zip(first.matrix, second.matrix, strict=True)
        ]
        for _ in range(_SWEEPS):
            for i, row in enumerate(matrix):
                if row[i] <= 0.0:
                    continue
                rest = sum(map(float.__mul__, row, weights)) - row[i] * weights[i]
                weights[i] = max(0.0, (target[i] - rest) / row[i])
