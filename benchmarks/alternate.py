"""Run xLLM and its peers in turn (A B A B ...) over the workloads; JSON lines and a table.

    python -m benchmarks.alternate --model DIR --xllm engine --xllm zmq --peers peers.json
        --out OUT.jsonl [--workloads W1,W2,W3,W4] [--reps 7] [--tolerance 0.05]
        [--xllm "NAME=VIA,SECTION.FIELD=VALUE,..."] [--bare] [--logs DIR]
    python -m benchmarks.alternate --table OUT.jsonl ... [--baseline NAME]

The read bandwidth is probed just before and after each repetition, since machines change it
within minutes: a repetition counts where both agree, and peers are compared within one state of
it. Every peer gets its turn in each repetition until `--reps` of all of them count in one state,
at most three times as many. All stay loaded and idle while another runs. `--bare` measures, once
a repetition, the matrix products of a step alone (see `benchmarks.bare`). peers.json: a list of
{"name", "cmd": [...], "env": {...}, "only": ["W1", ...], "start_s": 300}.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import sys
import time
from typing import Any, TextIO

from benchmarks.comparison import Comparison, Row, bandwidth, bare_table
from benchmarks.peer_process import Peer, PeerError
from xllm.worker.read_probe import ReadProbe

BARE = "bare"
MOST_TIMES = 3


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="model directory of --xllm and --bare")
    parser.add_argument("--xllm", action="append", default=[], metavar="[NAME=]VIA[,S.F=V...]")
    parser.add_argument("--peers", default="", help="file that names other drivers")
    parser.add_argument("--workloads", default="W1,W2,W3,W4")
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--baseline", default="", help="what ratios are of; default: the first")
    parser.add_argument("--bare", action="store_true")
    parser.add_argument("--out", default="")
    parser.add_argument("--logs", default=".")
    parser.add_argument("--table", nargs="*", help="run nothing: the table of these files")
    options = parser.parse_args(arguments)
    if options.table is None:
        if not options.out:
            parser.error("--out is needed")
        if (options.xllm or options.bare) and not options.model:
            parser.error("--xllm and --bare need --model")
        if not (options.xllm or options.peers):
            parser.error("--xllm or --peers is needed")
    return options


def specs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What to start, our own first."""
    root = str(pathlib.Path(__file__).resolve().parents[1])
    shared = ["--model", os.path.abspath(options.model), "--threads", str(options.threads)]
    found = [_own_spec(text, root, shared) for text in options.xllm]
    if options.peers:
        found += json.loads(pathlib.Path(options.peers).read_text(encoding="utf-8"))
    names = [spec["name"] for spec in found]
    if len(set(names)) != len(names):
        raise SystemExit(f"names must differ: {names}")
    return found


def _own_spec(text: str, root: str, shared: list[str]) -> dict[str, Any]:
    head, *settings = text.split(",")
    name, equals, via = head.partition("=")
    if not equals:
        name, via = f"xllm-{head}", head
    command = [sys.executable, "-m", "benchmarks.peer_driver", *shared]
    command += ["--via", via, "--name", name]
    for setting in settings:
        command += ["--set", setting]
    return {"name": name, "cmd": command, "cwd": root}


def bare_spec(options: argparse.Namespace) -> dict[str, Any]:
    """The process that measures bare products."""
    root = str(pathlib.Path(__file__).resolve().parents[1])
    command = [sys.executable, "-m", "benchmarks.bare", "--model", os.path.abspath(options.model)]
    command += ["--threads", str(options.threads)]
    # OpenMP reads this when torch loads it: threads that wait beside the peers must not spin.
    return {"name": BARE, "cmd": command, "cwd": root, "env": {"OMP_WAIT_POLICY": "PASSIVE"}}


class Alternation:
    """The peers that started, the probe, and the rows so far."""

    def __init__(self, options: argparse.Namespace, out: TextIO) -> None:
        self.options = options
        self.rows: list[Row] = []
        self.bare_rows: list[Row] = []
        self.peers: list[Peer] = []
        self.bare: Peer | None = None
        self._out = out
        self._probe = ReadProbe(options.threads)

    def start(self) -> None:
        """Start everything, one after the other, and warm it up; what fails is left out."""
        logs = pathlib.Path(self.options.logs)
        logs.mkdir(parents=True, exist_ok=True)
        for spec in specs(self.options):
            try:
                self.peers.append(Peer(spec, logs))
            except (PeerError, OSError) as error:
                print(f"SKIPPED {spec['name']}: {error}", flush=True)
                continue
            print(f"ready {spec['name']} {self.peers[-1].meta}", flush=True)
        if not self.peers:
            raise SystemExit("no peer started")
        if self.options.bare:
            self.bare = Peer(bare_spec(self.options), logs)
            print(f"ready {BARE} {self.bare.meta}", flush=True)
        for peer in self.peers:
            peer.run("warm", 0)
            peer.run("W1", 1000)

    def run(self) -> None:
        """All workloads, until enough repetitions count."""
        for workload in self.options.workloads.split(","):
            peers = [p for p in self.peers if p.only is None or workload in p.only]
            for rep in range(MOST_TIMES * self.options.reps):
                if self.bare is not None:
                    self._one(self.bare, workload, rep)
                for peer in peers:
                    self._one(peer, workload, rep)
                names = [peer.name for peer in peers]
                if self.comparison().enough(workload, names, self.options.reps):
                    break

    def comparison(self) -> Comparison:
        """Of what was measured so far."""
        baseline = self.options.baseline or self.peers[0].name
        return Comparison(self.rows, self.options.tolerance, baseline)

    def close(self) -> None:
        """End every driver."""
        for peer in [*self.peers, *([self.bare] if self.bare else [])]:
            peer.stop()
        self._probe.close()

    def _one(self, peer: Peer, workload: str, rep: int) -> None:
        before = self._probe.measure()
        row = peer.run(workload, rep)
        after = self._probe.measure()
        row |= {"peer": peer.name, "gbs_before": before / 1e9, "gbs_after": after / 1e9}
        row |= {"load1": os.getloadavg()[0], "at": time.time()}
        (self.bare_rows if peer is self.bare else self.rows).append(row)
        self._out.write(json.dumps(row) + "\n")
        self._out.flush()
        print(f"{workload} {rep} {peer.name} {bandwidth(row):.1f} GB/s {_shown(row)}", flush=True)


def _shown(row: Row) -> str:
    if "error" in row:
        return str(row["error"])
    if "products_s" in row:
        return " ".join(f"{n}: {1e3 * s:.2f} ms" for n, s in row["products_s"].items())
    return (
        f"{row['tok_s']:.1f} tok/s ttft {1e3 * row['ttft_mean_s']:.0f} ms "
        f"tpot {1e3 * row['tpot_mean_s']:.1f} ms"
    )


def show(rows: list[Row], options: argparse.Namespace) -> None:
    """The tables of these rows."""
    measured = [row for row in rows if row["peer"] != BARE]
    baseline = options.baseline or (measured[0]["peer"] if measured else "")
    print(Comparison(measured, options.tolerance, baseline).table())
    bare = [row for row in rows if row["peer"] == BARE and "error" not in row]
    if bare:
        print()
        print(bare_table(bare, bare[0]["weight_bytes"]))


def main() -> None:
    """Run, or show what ran."""
    options = parse()
    if options.table is not None:
        texts = [pathlib.Path(name).read_text(encoding="utf-8") for name in options.table]
        show([json.loads(line) for text in texts for line in text.splitlines()], options)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the drivers
    with open(options.out, "a", encoding="utf-8") as out:
        alternation = Alternation(options, out)
        try:
            alternation.start()
            alternation.run()
        finally:
            alternation.close()
    show([*alternation.rows, *alternation.bare_rows], options)


if __name__ == "__main__":
    main()
