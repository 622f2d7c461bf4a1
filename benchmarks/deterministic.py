"""What --deterministic costs: the workloads W1 to W4 with it over without it.

    python -m benchmarks.deterministic [--model DIR | --shape 0.6b] [--reps 7] [--json]

Two engines, both loaded for the whole run, take turns (see `benchmarks.alternate`, which probes
the memory's bandwidth around every repetition and lets one count where both probes agree). Prints
its table, and for each workload the median of the deterministic engine's figure over the default
one's, pair by pair: 1.00 costs nothing, below 1 is slower. A shape is a model of random weights.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import signal
import sys
import tempfile
from typing import Any

from benchmarks.alternate import Alternation, parse
from benchmarks.comparison import FIGURES, Comparison
from benchmarks.random_model import SHAPES, write_random_model

DEFAULT, DETERMINISTIC = "default", "deterministic"


def alternation_arguments(options: argparse.Namespace, model: str, out: str) -> list[str]:
    """The command line of `benchmarks.alternate` that measures both."""
    extra = "".join(f",{setting}" for setting in options.set)
    return [
        f"--model={model}",
        f"--xllm={DEFAULT}=engine{extra}",
        f"--xllm={DETERMINISTIC}=engine,worker.deterministic=true{extra}",
        f"--workloads={options.workloads}",
        f"--reps={options.reps}",
        f"--threads={options.threads}",
        f"--tolerance={options.tolerance}",
        f"--out={out}",
        f"--logs={pathlib.Path(out).parent}",
    ]


def summary(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """By workload: of the state of the memory with most pairs, how many they were and the median
    ratio of each figure (above 1: better with determinism). A workload without pairs is absent."""
    best: dict[str, dict[str, Any]] = {}
    for workload, state in sorted(comparison.groups):
        row: dict[str, Any] = {}
        for key, _, _, more in FIGURES:
            ratio = comparison.ratio(workload, state, DETERMINISTIC, key, more)
            if ratio is not None:
                row |= {key: ratio.middle, "pairs": ratio.count}
        if row and row["pairs"] > best.get(workload, {"pairs": 0})["pairs"]:
            best[workload] = row
    return best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.6b")
    parser.add_argument("--workloads", default="W1,W2,W3,W4")
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the drivers
    with tempfile.TemporaryDirectory(prefix="xllm-deterministic-") as name:
        directory = pathlib.Path(name)
        model = options.model or str(
            write_random_model(SHAPES[options.shape], directory / options.shape)
        )
        out_path = str(directory / "rows.jsonl")
        alternate = parse(alternation_arguments(options, model, out_path))
        with open(out_path, "a", encoding="utf-8") as out:
            alternation = Alternation(alternate, out)
            try:
                alternation.start()
                alternation.run()
            finally:
                alternation.close()
    comparison = alternation.comparison()
    found = summary(comparison)
    if options.json:
        print(json.dumps({"rows": alternation.rows, "ratios": found}))
        return
    print(comparison.table())
    print(f"\n| workload | pairs | {' | '.join(heading for _, heading, _, _ in FIGURES)} |")
    print("|---" * (2 + len(FIGURES)) + "|")
    for workload, row in found.items():
        cells = " | ".join(f"{row[key]:.2f}" for key, _, _, _ in FIGURES)
        print(f"| {workload} | {row['pairs']} | {cells} |")


if __name__ == "__main__":
    main()
