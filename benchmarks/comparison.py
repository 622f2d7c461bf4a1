"""Repetitions in alternation, judged: which count, in which state of the memory, and the ratios.

Pure. A row is what a driver answered, with `peer`, `workload`, `rep`, and the bandwidth probed
just before (`gbs_before`) and after (`gbs_after`). A row counts where both probes agree within a
tolerance; peers are compared within one state of the bandwidth only.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]

FIGURES = (
    ("tok_s", "tok/s", 1.0, True),
    ("ttft_mean_s", "TTFT ms", 1e3, False),
    ("tpot_mean_s", "TPOT ms", 1e3, False),
)
"""Key, heading, factor, whether more is better."""

STATE_GAP = 1.25
"""Bandwidths further apart than this factor are different states."""


class Spread(NamedTuple):
    """Least, middle and greatest of some values, and how many they were."""

    low: float
    middle: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(min(values), statistics.median(values), max(values), len(values))


def bandwidth(row: Row) -> float:
    """The bandwidth of a repetition, GB/s."""
    return math.sqrt(float(row["gbs_before"]) * float(row["gbs_after"]))


def counts(row: Row, tolerance: float) -> bool:
    """Whether a repetition may be used: it gave figures, and the memory was the same before it
    and after."""
    if "error" in row:
        return False
    before, after = float(row["gbs_before"]), float(row["gbs_after"])
    return abs(before - after) <= tolerance * max(before, after)


def state_borders(bandwidths: Iterable[float]) -> list[float]:
    """Where one state ends and the next begins: between neighbours more than STATE_GAP apart."""
    ordered = sorted(bandwidths)
    return [
        math.sqrt(low * high) for low, high in itertools.pairwise(ordered) if high > STATE_GAP * low
    ]


def state_of(row: Row, borders: Sequence[float]) -> int:
    """0 for the slowest state."""
    return sum(bandwidth(row) > border for border in borders)


class Comparison:
    """The rows of a run, sorted by workload, state and peer."""

    def __init__(self, rows: Iterable[Row], tolerance: float, baseline: str) -> None:
        self.rows = list(rows)
        self.baseline = baseline
        self.used = [row for row in self.rows if counts(row, tolerance)]
        self.borders = state_borders(bandwidth(row) for row in self.used)
        self.groups: dict[tuple[str, int], dict[str, list[Row]]] = defaultdict(dict)
        for row in self.used:
            peers = self.groups[row["workload"], state_of(row, self.borders)]
            peers.setdefault(row["peer"], []).append(row)

    def enough(self, workload: str, peers: Iterable[str], reps: int) -> bool:
        """Whether some state holds `reps` repetitions of each of these peers."""
        wanted = set(peers)
        return any(
            all(len(group.get(peer, ())) >= reps for peer in wanted)
            for (name, _), group in self.groups.items()
            if name == workload
        )

    def ratio(self, workload: str, state: int, peer: str, key: str, more: bool) -> Spread | None:
        """How much better `peer` is than the baseline: above 1 is better, whatever the figure.
        Pairs of the same repetition where both count, else nothing."""
        group = self.groups[workload, state]
        base = {row["rep"]: row[key] for row in group.get(self.baseline, ())}
        pairs = [
            row[key] / base[row["rep"]] if more else base[row["rep"]] / row[key]
            for row in group.get(peer, ())
            if row["rep"] in base and row[key] > 0 and base[row["rep"]] > 0
        ]
        return Spread.of(pairs) if pairs else None

    def table(self) -> str:
        """Markdown: a line a workload, state and peer; ratios are of the same repetitions."""
        head = ["workload", "GB/s", "peer", "used"]
        for _, heading, _, _ in FIGURES:
            head += [heading, f"x {self.baseline}"]
        lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for (workload, state), group in sorted(self.groups.items()):
            speeds = Spread.of([bandwidth(row) for rows in group.values() for row in rows])
            for peer, rows in sorted(group.items()):
                cells = [workload, f"{speeds.low:.1f}-{speeds.high:.1f}", peer, str(len(rows))]
                for key, _, factor, more in FIGURES:
                    spread = Spread.of([row[key] * factor for row in rows])
                    cells.append(_spread(spread, 1))
                    ratio = self.ratio(workload, state, peer, key, more)
                    cells.append(_spread(ratio, 2) if ratio else "-")
                lines.append("| " + " | ".join(cells) + " |")
        lines.append(self._left_out())
        return "\n".join(lines)

    def _left_out(self) -> str:
        failed = [row for row in self.rows if "error" in row]
        unsteady = len(self.rows) - len(self.used) - len(failed)
        text = f"\n{len(self.used)} repetitions used, {unsteady} left out (the memory's speed "
        text += f"changed), {len(failed)} failed"
        return text + "".join(
            f"\n  {row['workload']} {row['rep']} {row['peer']}: {row['error']}" for row in failed
        )


def bare_table(rows: Sequence[Row], model_bytes: float) -> str:
    """Markdown of the bare matrix products of a step, by rows, beside the time that reading the
    weights once takes at the bandwidth of the same moment."""
    lines = [
        "| rows | products ms | weights read once, ms | products / bound |",
        "|---|---|---|---|",
    ]
    by_rows: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        bound_s = model_bytes / (bandwidth(row) * 1e9)
        for num_rows, seconds in row["products_s"].items():
            by_rows[int(num_rows)].append((seconds, bound_s))
    for num_rows, pairs in sorted(by_rows.items()):
        spreads = (
            Spread.of([1e3 * seconds for seconds, _ in pairs]),
            Spread.of([1e3 * bound for _, bound in pairs]),
            Spread.of([seconds / bound for seconds, bound in pairs]),
        )
        lines.append(f"| {num_rows} | " + " | ".join(_spread(s, 2) for s in spreads) + " |")
    return "\n".join(lines)


def _spread(spread: Spread, digits: int) -> str:
    low, middle, high, _ = spread
    return f"{low:.{digits}f}/{middle:.{digits}f}/{high:.{digits}f}"
