"""A run's figures: summed over its clusters, as JSON and as a table. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from xllm.cli.chaos.comparing import EQUAL, Differences
from xllm.cli.chaos.ledger import Ledger
from xllm.cli.chaos.options import MAX_SLACK, ChaosOptions
from xllm.cli.chaos.scenarios.table import Scenario
from xllm.cli.chaos.verdict import Injection, is_time, section, summary_ms


class ChaosReport:
    """What is known of a run so far."""

    def __init__(self, options: ChaosOptions, scenarios: Sequence[Scenario]) -> None:
        self._options = options
        self._scenarios = scenarios
        self.injections: list[Injection] = []
        self.invalid: list[str] = []
        """Why the run proves nothing."""
        self.left_out: list[str] = []
        """Faults that this machine does not allow, and why."""
        self.leftovers: list[str] = []
        self.differing: list[str] = []
        self.unended = 0
        self.num_requests = 0
        self.num_interrupted = 0
        self.num_after_end = 0
        self.differences: Differences = EQUAL
        self.failures: Counter[str] = Counter()

    def add_ledger(self, ledger: Ledger) -> None:
        """The requests of one cluster."""
        self.num_requests += ledger.num_requests
        self.num_interrupted += ledger.num_interrupted
        self.num_after_end += ledger.num_after_end
        self.differences += ledger.differences
        self.failures += ledger.failures
        self.differing += ledger.differing

    @property
    def tokens_right(self) -> bool:
        """Whether every stream was what it should have been, and ended once."""
        return not (self.differences or self.unended or self.num_after_end)

    @property
    def passed(self) -> bool:
        """Whether everything that was promised was kept."""
        sections = self.sections()
        return (
            self.tokens_right
            and not self.leftovers
            and not self._stray_failures()
            and all(one["passed"] for one in sections.values())
        )

    def sections(self) -> dict[str, dict[str, object]]:
        """The scenarios by name."""
        found = {}
        for one in self._scenarios:
            own = [inj for inj in self.injections if inj.scenario == one.name]
            found[one.name] = section(one.title, one.limits, own, self._options.slack)
        return found

    def as_json(self) -> dict[str, object]:
        """The one object of `--json`."""
        options, differences = self._options, self.differences
        return {
            "engine": options.engine,
            "instances": options.instances,
            "routers": options.routers,
            "streams": options.streams,
            "seed": options.seed,
            "slack": options.slack,
            "requests": self.num_requests,
            "faults": len(self.injections),
            "interrupted": self.num_interrupted,
            "lost": differences.lost,
            "duplicated": differences.duplicated,
            "reordered": differences.reordered,
            "foreign": differences.foreign,
            "differing": self.differing[:20],
            "unended": self.unended,
            "after_end": self.num_after_end,
            "failed": self.failures.total(),
            "failed_by_code": dict(self.failures),
            "failed_without_fault": self._stray_failures(),
            "streaming_min": min((one.num_streaming for one in self.injections), default=0),
            "gap_ms": summary_ms(gap for one in self.injections for gap in one.gaps_s),
            "http_gap_ms": summary_ms(gap for one in self.injections for gap in one.http_gaps_s),
            "longest_ms": summary_ms(one.longest_s for one in self.injections),
            "http_longest_ms": summary_ms(one.http_longest_s for one in self.injections),
            "detect_ms": summary_ms(one.detect_s for one in self.injections),
            "left_out": self.left_out,
            "leftovers": self.leftovers,
            "scenarios": self.sections(),
            "valid": not self.invalid,
            "invalid": self.invalid,
            "passed": self.passed and not self.invalid,
        }

    def _stray_failures(self) -> int:
        """Failed requests that no fault was near."""
        near = sum(sum(one.failures.values()) for one in self.injections)
        return max(0, self.failures.total() - near)


_COLUMNS = (
    "fault", "times", "moved", "gap p50", "gap max", "longest", "http", "detect", "whole", "failed",
)  # fmt: skip


def table(report: dict[str, object]) -> list[str]:
    """The report as lines for people; times in milliseconds."""
    sections = report["scenarios"]
    assert isinstance(sections, dict)
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for name, one in sections.items():
        if not one["faults"]:
            continue
        gap, longest, http, detect, whole = (
            one[key]
            for key in ("gap_ms", "longest_ms", "http_longest_ms", "detect_ms", "recover_ms")
        )
        cells = (
            name, one["faults"], one["interrupted"], gap.get("p50", "-"), gap.get("max", "-"),
            longest.get("max", "-"), http.get("max", "-"), detect.get("max", "-"),
            whole.get("max", "-"), sum(one["failed"].values()),
        )  # fmt: skip
        rows.append(tuple(str(cell) for cell in cells))
    widths = [max(len(row[at]) for row in rows) for at in range(len(_COLUMNS))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    too_late = False
    for name, one in sections.items():
        missed = [c for c in one["criteria"] if not c["passed"]]
        lines += [
            f"{name}: {c['name']} is {c['value']:g}, not at most {c['limit']:g}" for c in missed
        ]
        too_late |= any(is_time(c["name"]) for c in missed)
        lines += [f"{name}: {text}" for text in one["broken"]]
    slack = report["slack"]
    assert isinstance(slack, float)
    if too_late and slack < MAX_SLACK:
        lines.append(
            f"bounds of time are for a machine that does nothing else; on a slow or busy one: "
            f"--slack {min(MAX_SLACK, 3 * slack):g}"
        )
    counts = ("requests", "faults", "interrupted", "lost", "duplicated", "reordered", "foreign",
              "failed")  # fmt: skip
    lines.append(", ".join(f"{name} {report[name]}" for name in counts))
    if report["failed_without_fault"]:
        lines.append(f"{report['failed_without_fault']} of the failures were near no fault")
    if report["failed"]:
        lines.append(f"failures by code: {report['failed_by_code']}")
    for name in ("differing", "left_out", "leftovers", "invalid"):
        found = report[name]
        assert isinstance(found, list)
        lines += [f"{name}: {text}" for text in found]
    return lines
