"""What captured graphs take of a device's memory beside the tensors in them: the driver's own.

Nobody says how much that is; it is measured at the captures of the start. They come largest first
and share one pool, so that the later ones take nothing but the driver's. Pure.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class GraphFootprint:
    """`taken_bytes`: gone by the captures of the start and the tensors that were made for them;
    `each_bytes`: of the driver, for the graphs of one kind of steps; `most`: kinds that are kept.
    All 0: there are none."""

    taken_bytes: int = 0
    each_bytes: int = 0
    most: int = 0

    @property
    def driver_bytes(self) -> int:
        """The driver's, once there are as many as may be. A kind that is captured between its
        attentions has more graphs, and as many kernels in all."""
        return self.each_bytes * self.most

    def missing_bytes(self, planned_bytes: int) -> int:
        """What of the bytes that are planned for graphs is not taken yet."""
        return max(planned_bytes - self.taken_bytes, 0)


NO_GRAPHS = GraphFootprint()


def bytes_each(free_bytes: Sequence[int]) -> int:
    """The driver's memory for one kind of steps, from what was free before the first capture and
    behind each: the mean of the later half, for a driver takes memory in large pieces; 0 where
    nothing was captured."""
    taken = [before - behind for before, behind in itertools.pairwise(free_bytes)]
    later = taken[len(taken) // 2 :]
    return max(-(-sum(later) // len(later)), 0) if later else 0
