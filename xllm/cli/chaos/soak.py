"""`scripts/soak`: what takes too long for the tests. Prints one JSON object.

With `--repeat`, each fault so many times at random moments: medians and worst times. With
`--minutes`, load at 70% of what the instances run at once, a fault a minute, and whether any
process that was not itself hit holds more at the end than it did early on.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time

import click

from xllm.cli.chaos.command import choose
from xllm.cli.chaos.ending import run_to_end
from xllm.cli.chaos.growth import Snapshot, compare_sizes, read_objects
from xllm.cli.chaos.options import ChaosOptions, FiniteRange
from xllm.cli.chaos.processes import size_of
from xllm.cli.chaos.session import ChaosSession
from xllm.cli.chaos.stage import Stage
from xllm.cli.main import run_command
from xllm.errors import DeadlineError

EARLY_S = 600.0
"""When sizes are noted for the first time; in a shorter soak after a third of it."""
FAULT_PERIOD_S = 60.0
REST_S = 30.0
SPARED = ("instance-0", "router-0", "kvcache-0")
"""Never hit themselves: they live from the first minute to the last."""
SEQS = 28
"""Sequences of an instance at once: the load is 40 of 56."""
SOAK_FAULTS = "F01,F03-kill,F04,F05,F07,F24-slow,F24-storm,F25-worker,F25-master"
REPEATED = "F01,F03-kill,F03-segv,F04,F04-worker,F05,F07,F18,F19-down,F19-half,F20-cut"


@click.command()
@click.option(
    "--minutes",
    type=FiniteRange(0, 10_080, min_open=True),
    default=30.0,
    show_default=True,
    help="Of load, for the growth.",
)
@click.option(
    "--repeat",
    type=click.IntRange(0, 100_000),
    default=0,
    help="Repeat faults so often instead, at random moments.",
)
@click.option("--scenario", default="", help="Faults; empty: those that fit.")
@click.option(
    "--tokens",
    type=click.IntRange(20, 4000),
    default=200,
    show_default=True,
    help="New tokens of a request, about.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def soak(minutes: float, repeat: int, scenario: str, tokens: int, seed: int) -> int:
    """Faults for a long time, or many of them."""
    flags = ("--scheduler-max-num-seqs", str(SEQS))
    # With an instance gone the load is more than the other one runs at once: streams queue.
    options = ChaosOptions(tokens=tokens, seed=seed, flags=flags, slack=10.0)
    if repeat:
        options = ChaosOptions(tokens=tokens, seed=seed, seconds=0, repeats=repeat, phase_s=2.0)
        session = ChaosSession(options, choose(scenario or REPEATED), _say)
        found = run_to_end(session.run()).as_json()
    else:
        plain = [one for one in choose(scenario or SOAK_FAULTS) if one.cluster == "plain"]
        session = ChaosSession(options, plain, _say)
        found = run_to_end(_soak(session, minutes * 60))
    click.echo(json.dumps(found))
    return 0 if found["passed"] else 1


async def _soak(session: ChaosSession, seconds: float) -> dict[str, object]:
    async with session.stage() as stage:
        stage.spared = SPARED
        began = time.monotonic()
        early_at = min(EARLY_S, seconds / 3)
        early = None
        faults = itertools.cycle(session.scenarios)
        while (passed_s := time.monotonic() - began) < seconds:
            if early is None and passed_s >= early_at:
                early = await _snapshot(stage)
            due = time.monotonic() + min(FAULT_PERIOD_S, seconds / 6)
            num_before = len(stage.injections)
            await next(faults).act(stage)
            for injection in stage.injections[num_before:]:
                _say(stage.describe(injection))
            await stage.pause(max(0.0, due - time.monotonic()))
        late = await _snapshot(stage)
        session.report.injections += stage.injections
    growth = compare_sizes(early or late, late)
    found = session.report.as_json()
    found["minutes"] = seconds / 60
    found["growth"] = growth
    found["passed"] = bool(found["passed"]) and not growth["too_much"]
    return found


async def _snapshot(stage: Stage) -> dict[str, Snapshot]:
    """Every process while nothing is asked, after it has come to rest."""
    cluster = stage.cluster
    stage.load.rest()
    await cluster.until(lambda: not stage.ledger.open, REST_S, "the end of all requests")
    pids = {one.name: one.pid for one in cluster.processes.values()}
    for name, pid in pids.items():
        (cluster.log_dir / f"{name.replace('/', '_')}.objects.json").unlink(missing_ok=True)
        os.kill(pid, signal.SIGUSR2)
    try:
        await cluster.until(
            lambda: all(read_objects(cluster.log_dir, name) for name in pids), 20.0, "the counts"
        )
    except DeadlineError as error:
        _say(error.message)
    found = {}
    for name, pid in pids.items():
        size = size_of(pid)
        if size is not None:
            found[name] = Snapshot(pid, size, read_objects(cluster.log_dir, name))
            _say(f"{name}: {size.rss_kb} kB, {size.num_fds} descriptors, "
                 f"{size.num_threads} threads")  # fmt: skip
    stage.load.go_on()
    return found


def _say(line: str) -> None:
    click.echo(line, err=True)


if __name__ == "__main__":
    sys.exit(run_command(sys.argv[1:], soak, "soak"))
