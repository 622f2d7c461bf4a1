"""The graphs that were captured, by key, within a bound; a capture that fails is not tried again.

Invariants: a body that is handed over under a key reads and writes the same tensors each time,
and may be run again over what it wrote, for a capture runs it for real before it records; what a
graph leaves for others is in tensors that were there before its capture.
"""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

import structlog

from xllm.worker.graphs.budget import CaptureBudget
from xllm.worker.platform.graphs import CapturedGraph, GraphDevice

log = structlog.get_logger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class GraphStatistics:
    """How many graphs there are, and what became of the calls: replays, captures, captures that
    failed (their keys run eagerly from then on), graphs given up for others, and calls that would
    have captured had there been time for it."""

    num_graphs: int
    num_replays: int
    num_captures: int
    num_failed: int
    num_evicted: int
    num_deferred: int


class GraphCache:
    """Runs bodies as graphs of one device. A key's work may be several bodies, its parts. Used by
    one thread."""

    def __init__(
        self,
        device: GraphDevice,
        max_keys: int,
        capture_at: int = 2,
        dropped: Callable[[Hashable], None] = lambda key: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_keys`: kept at once, the one not used for longest goes first, with all its parts,
        and `dropped` is told. `capture_at`: the sight of a key at which it is captured: shapes that
        come once do not pay for one. `clock`: in seconds."""
        assert max_keys > 0
        self._device = device
        self._max_keys = max_keys
        self._capture_at = capture_at
        self._dropped = dropped
        self._clock = clock
        self._budget: CaptureBudget | None = None
        self._graphs: OrderedDict[Hashable, dict[int, CapturedGraph]] = OrderedDict()
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._failed: set[tuple[Hashable, int]] = set()
        self._num_replays = 0
        self._num_captures = 0
        self._num_failed = 0
        self._num_evicted = 0
        self._num_deferred = 0

    def bound_captures(self, share: float) -> None:
        """From now on keys are captured in this share of the time at most. The parts of a key that
        was begun are captured all the same."""
        self._budget = CaptureBudget(share)

    def is_open(self, key: Hashable) -> bool:
        """Whether `run` would replay or capture for this sight of a key. Counts the sight."""
        if key in self._graphs:
            return True
        if self.has_failed(key):
            return False
        self._seen[key] = self._seen.pop(key, 0) + 1
        if len(self._seen) > 8 * self._max_keys:
            self._seen.popitem(last=False)
        if self._seen[key] < self._capture_at:
            return False
        if self._budget is not None and not self._budget.allows(self._clock()):
            self._num_deferred += 1
            return False
        return True

    def is_held(self, key: Hashable) -> bool:
        """Whether there are graphs of a key."""
        return key in self._graphs

    def has_failed(self, key: Hashable) -> bool:
        """Whether a key cannot be captured."""
        return (key, 0) in self._failed

    def run(self, key: Hashable, body: Callable[[], None], part: int = 0) -> bool:
        """Do what `body` does, as the graph of a part of a key; where there is none, by the capture
        of one. False: the capture failed, now or before, and `body` is still to be run."""
        graph = self._graphs.get(key, {}).get(part)
        if graph is None:
            return self._capture(key, body, part)
        self._graphs.move_to_end(key)
        graph.replay()
        self._num_replays += 1
        return True

    def close(self) -> None:
        """Give all graphs up, with their memory."""
        for parts in self._graphs.values():
            for graph in parts.values():
                graph.close()
        self._graphs.clear()
        self._device.close()

    def statistics(self) -> GraphStatistics:
        """A snapshot."""
        return GraphStatistics(
            sum(len(parts) for parts in self._graphs.values()),
            self._num_replays,
            self._num_captures,
            self._num_failed,
            self._num_evicted,
            self._num_deferred,
        )

    def _capture(self, key: Hashable, body: Callable[[], None], part: int) -> bool:
        if (key, part) in self._failed:
            return False
        began_s = self._clock()
        if key not in self._graphs:
            self._make_room()
        try:
            graph = self._device.capture(body)
        except Exception as error:  # whatever the body's kernels raise, too: it is run eagerly then
            self._failed.add((key, part))
            self._num_failed += 1
            log.warning("graph_capture_failed", key=str(key), part=part, reason=str(error))
            return False
        finally:
            if self._budget is not None:
                now_s = self._clock()
                self._budget.spend(now_s, now_s - began_s)
        self._seen.pop(key, None)
        self._graphs.setdefault(key, {})[part] = graph
        self._num_captures += 1
        return True

    def _make_room(self) -> None:
        while len(self._graphs) >= self._max_keys:
            oldest, parts = self._graphs.popitem(last=False)
            for graph in parts.values():
                graph.close()
                self._num_evicted += 1
            self._dropped(oldest)
