"""Each fault once, in clusters of real processes under load: every token is compared, and each
fault proves that it happened and that there were streams to feel it. Times are looked at with much
slack: this machine does other things, too."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys

import pytest

from xllm.cli.chaos.command import choose
from xllm.cli.chaos.options import ChaosOptions
from xllm.cli.chaos.scenarios.table import SCENARIOS, Scenario
from xllm.cli.chaos.session import ChaosSession
from xllm.cli.chaos.verdict import Limits
from xllm.errors import ConfigError

pytestmark = [pytest.mark.process, pytest.mark.timeout(300)]  # eight faults, on any machine

OPTIONS = ChaosOptions(tokens=60, seconds=0, slack=20)


def run(scenarios, options=OPTIONS):
    session = ChaosSession(options, scenarios, lambda line: print(line, file=sys.stderr))
    return asyncio.run(session.run()).as_json()


def check(found, names):
    """Nothing wrong with any token, and each fault was real."""
    counts = {name: found[name] for name in ("lost", "duplicated", "reordered", "foreign")}
    assert counts == dict.fromkeys(counts, 0)
    assert (found["unended"], found["after_end"], found["leftovers"]) == (0, 0, [])
    assert found["invalid"] == []
    assert found["streaming_min"] >= OPTIONS.streams
    for name in names:
        one = found["scenarios"][name]
        assert one["faults"] == 1, name
        assert one["proofs"], name
        assert one["passed"], (name, one)
    assert found["passed"], found


def test_faults_one_after_the_other():
    """All on one cluster with proxies, which do nothing until told; the last one ends it."""
    names = ["F01", "F03-kill", "F04", "F05", "F05-worker", "F18", "F20-cut", "F26"]
    found = run([dataclasses.replace(SCENARIOS[name], cluster="proxied") for name in names])
    check(found, names)
    assert found["interrupted"] >= OPTIONS.streams
    for name in ("F01", "F03-kill", "F04", "F05", "F18"):
        assert found["scenarios"][name]["interrupted"] > 0, name
    for name in ("F01", "F03-kill", "F04", "F05", "F05-worker", "F18"):
        assert found["scenarios"][name]["detect_ms"]["max"] > 0, name


def test_a_router_a_prompt_that_hangs_engines_and_the_registry_with_an_instance():
    """With a registry of its own, which dies and comes back."""
    names = ["F07", "F05-engine", "F14"]
    kinds = "registry+poisoned"
    chosen = [dataclasses.replace(SCENARIOS[name], cluster=kinds) for name in names]
    found = run([*chosen, dataclasses.replace(nothing(), cluster=kinds)])
    assert found["invalid"] == ["F00: somebody is gone did not come within 0.1 s"]
    assert not found["valid"]
    assert not found["passed"]
    check({**found, "invalid": [], "passed": True}, names)
    assert found["scenarios"]["F07"]["interrupted"] > 0
    # Nobody failed: the limits say so. Those that shared its steps went on twice.
    assert found["failed"] == 0
    assert found["scenarios"]["F05-engine"]["interrupted"] > 0
    assert found["scenarios"]["F05-engine"]["notes"]["workers_lost"] >= 2


@pytest.mark.etcd
def test_what_stands_around_a_cluster():
    """An etcd that forgets and has no room, a disk without room, clocks that step, a router whose
    clients die with it, and newcomers; all on one cluster."""
    names = ["F08", "F15", "F16", "F17", "F23-logs", "F29-step", "F29-apart", "F30"]
    kinds = "etcd+clocked+cramped"
    found = run([dataclasses.replace(SCENARIOS[name], cluster=kinds) for name in names])
    left_out = {text.partition(":")[0] for text in found["left_out"]}
    assert left_out <= {"F29-apart"}  # which needs a time namespace
    check(found, [name for name in names if name not in left_out])
    assert found["scenarios"]["F17"]["interrupted"] > 0
    assert found["scenarios"]["F16"]["interrupted"] == 0


def test_what_this_machine_lacks_is_left_out_and_said():
    one = dataclasses.replace(nothing(), why_not=lambda: "no such machine")
    found = run([one])
    assert found["left_out"] == ["F00: no such machine"]
    assert (found["valid"], found["passed"]) == (False, False)
    assert found["invalid"] == ["nothing of this can be done here"]


def nothing():
    """A fault that does not happen: it proves nothing."""

    async def act(stage):
        await stage.wait_load()
        injection = stage.strike("F00", "nobody", lambda: None)
        await stage.prove(injection, "somebody is gone", lambda: False, 0.1)

    return Scenario("F00", "nothing", act, Limits(), "registry")


def test_names_of_faults():
    assert [one.name for one in choose("f03")] == ["F03-kill", "F03-segv", "F03-exit"]
    assert len(choose("all")) == len(SCENARIOS)
    with pytest.raises(ConfigError, match="no fault is called 'F99'"):
        choose("F01,F99")


def test_the_list_costs_nothing():
    command = [sys.executable, "-m", "xllm", "chaos", "--list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(SCENARIOS)


def test_the_report_is_json():
    assert json.loads(json.dumps(run([])))["requests"] == 0
