"""All scenarios: what each does, on which cluster, and what it promises."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable

from xllm.cli.chaos import other_clock, registry_process, wall_clock
from xllm.cli.chaos.scenarios import (
    clients,
    clocks,
    daemons,
    departures,
    disks,
    etcds,
    hangs,
    instances,
    leaders,
    network,
    newcomers,
    orderly,
    registries,
    routers,
    whole,
)
from xllm.cli.chaos.stage import Stage
from xllm.cli.chaos.verdict import Limits


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One fault. `cluster`: plain; proxied (a fault proxy before each instance); poisoned (tokens
    that harm the toy engine); registry (one of its own, a proxy before it for each process); etcd
    (the same, an etcd always); clocked (clocks of the time of day that step); cramped (a small disk
    for its logs); doomed (does not outlive its fault). Several are joined by +. `why_not`: what
    this machine lacks for it."""

    name: str
    title: str
    act: Callable[[Stage], Awaitable[None]]
    limits: Limits
    cluster: str = "plain"
    why_not: Callable[[], str] = str


_KILLED = Limits(gap_p50_ms=300, gap_max_ms=1000, detect_ms=1000, recover_ms=10_000)
_SILENT = Limits(gap_max_ms=2000, detect_ms=1000, recover_ms=5000)
_CROWDED = Limits(gap_max_ms=2000)
_ASKED = Limits(gap_max_ms=1000, recover_ms=40_000)
_POISONED = Limits(recover_ms=30_000)

_UNFELT = Limits(gap_max_ms=1000, recover_ms=40_000)
_JOINED = Limits(gap_max_ms=1000, recover_ms=60_000)
_TAKEOVER_MS = (leaders.LEASE_S + 1.5) * 1000
_LED = dataclasses.replace(_KILLED, detect_ms=_TAKEOVER_MS, recover_ms=30_000)
_LED_FROZEN = Limits(
    gap_p50_ms=1500,
    gap_max_ms=2000,
    http_gap_max_ms=15_000,
    detect_ms=_TAKEOVER_MS,
    recover_ms=30_000,
)

_ALL = (
    Scenario("F01", "an instance's master is killed", instances.kill_master, _KILLED),
    Scenario(
        "F02",
        "all instances are killed at once",
        instances.kill_all,
        Limits(detect_ms=1000, recover_ms=15_000, may_fail=True),
    ),
    Scenario("F03-kill", "a worker is killed", instances.kill_worker, _KILLED),
    Scenario("F03-segv", "a worker crashes (SIGSEGV)", instances.crash_worker, _KILLED),
    Scenario("F03-exit", "a prompt ends workers", hangs.crash_engine, _POISONED, "poisoned"),
    Scenario("F04", "an instance is frozen", instances.freeze_master, _SILENT),
    Scenario(
        "F04-worker",
        "a worker is frozen",
        instances.freeze_worker,
        Limits(gap_max_ms=3000, detect_ms=2000, recover_ms=10_000),
    ),
    Scenario("F05", "a master hangs in a call into C", hangs.hang_master, _SILENT),
    Scenario(
        "F05-worker",
        "a worker hangs in a call into C",
        hangs.hang_worker,
        Limits(gap_max_ms=3000, detect_ms=2000, recover_ms=10_000),
    ),
    Scenario(
        "F05-engine",
        "an engine's step stands still",
        hangs.hang_engine,
        dataclasses.replace(_POISONED, detect_ms=2000),
        "poisoned",
    ),
    Scenario("F06", "a lawful step of 8 s", hangs.slow_step, Limits(recover_ms=20_000), "poisoned"),
    Scenario("F07", "a router is killed", routers.kill_router, _KILLED),
    Scenario(
        "F07-freeze",
        "a router is frozen",
        routers.freeze_router,
        # Its HTTP clients see a connection that stands: they wait until it thaws.
        Limits(gap_p50_ms=1500, gap_max_ms=1500, http_gap_max_ms=5000, recover_ms=10_000),
    ),
    Scenario(
        "F08",
        "a router is killed, and its clients with it",
        departures.desert_router,
        Limits(gap_max_ms=2000, recover_ms=10_000),
    ),
    Scenario("F09", "the leader is killed", leaders.kill_leader, _LED),
    Scenario("F10", "the leader is frozen", leaders.freeze_leader, _LED_FROZEN),
    Scenario(
        "F11",
        "the leader alone loses the registry",
        leaders.cut_leader_off,
        dataclasses.replace(_UNFELT, detect_ms=_TAKEOVER_MS),
        "registry",
    ),
    Scenario("F12", "the registry is killed", registries.restart, _UNFELT, "registry"),
    Scenario("F13", "the registry is frozen", registries.freeze, _UNFELT, "registry"),
    Scenario(
        "F14",
        "an instance dies while there is no registry",
        registries.lose_instance_meanwhile,
        dataclasses.replace(_KILLED, recover_ms=30_000),
        "registry",
    ),
    Scenario(
        "F14-long",
        "no registry for a minute",
        registries.stay_away,
        dataclasses.replace(_UNFELT, recover_ms=90_000),
        "registry",
    ),
    Scenario(
        "F15",
        "history is compacted while routers cannot hear",
        etcds.compact_meanwhile,
        _UNFELT,
        "etcd",
        registry_process.why_no_etcd,
    ),
    Scenario(
        "F16",
        "an instance's lease is revoked",
        etcds.revoke_lease,
        _UNFELT,
        "etcd",
        registry_process.why_no_etcd,
    ),
    Scenario(
        "F17",
        "etcd is full, and an instance dies",
        etcds.fill_up,
        dataclasses.replace(_KILLED, recover_ms=40_000),
        "etcd",
        registry_process.why_no_etcd,
    ),
    Scenario("F18", "routers and an instance are parted", network.part, _SILENT, "proxied"),
    Scenario("F19-down", "an instance is not heard", network.lose_words, _SILENT, "proxied"),
    Scenario(
        "F19-up",
        "an instance does not hear",
        network.lose_requests,
        _SILENT,
        "proxied",
    ),
    Scenario("F19-half", "half-open connections", network.half_open, _SILENT, "proxied"),
    Scenario(
        "F20",
        "delays and resets",
        network.bad_network,
        Limits(gap_max_ms=2000, recover_ms=20_000),
        "proxied",
    ),
    Scenario("F20-cut", "connections are reset", network.cut_connections, _SILENT, "proxied"),
    Scenario("F20-spoil", "a byte is wrong", network.spoil_bytes, _SILENT, "proxied"),
    Scenario("F21-kill", "the KV cache daemon is killed", daemons.kill_daemon, _UNFELT),
    Scenario("F21-freeze", "the KV cache daemon is frozen", daemons.freeze_daemon, _UNFELT),
    Scenario(
        "F23-logs",
        "no room for logs, and an instance dies",
        disks.fill_logs,
        Limits(gap_p50_ms=300, gap_max_ms=1000, recover_ms=10_000),
        "cramped",
    ),
    Scenario("F24-slow", "HTTP clients do not read", clients.slow_readers, _CROWDED),
    Scenario("F24-stall", "ZeroMQ clients do not read", clients.stalled_readers, _CROWDED),
    Scenario("F24-storm", "clients ask and go", departures.disconnect_storm, _CROWDED),
    Scenario("F25-master", "a master is asked to end", orderly.end_master, _ASKED),
    Scenario("F25-router", "a router is asked to end", orderly.end_router, _ASKED),
    Scenario("F25-worker", "a worker is asked to end", orderly.end_worker, _ASKED),
    Scenario("F25-kvcache", "the daemon is asked to end", orderly.end_daemon, _ASKED),
    Scenario(
        "F26",
        "the launcher is killed",
        whole.kill_launcher,
        Limits(may_fail=True),
        "doomed",
    ),
    Scenario(
        "F27", "no descriptors are left", clients.exhaust_descriptors, Limits(gap_max_ms=2000)
    ),
    Scenario("F28", "everything is restarted in turn", orderly.restart_all, _ASKED),
    Scenario(
        "F29-step",
        "clocks of the time of day step",
        clocks.step_wall_clocks,
        _UNFELT,
        "clocked",
        wall_clock.why_not,
    ),
    Scenario(
        "F29-apart",
        "an instance with another monotonic clock joins",
        newcomers.join_other_clock,
        _JOINED,
        "plain",
        other_clock.why_not,
    ),
    Scenario("F30", "instances of other versions join", newcomers.join_other_versions, _JOINED),
)

SCENARIOS: dict[str, Scenario] = {one.name: one for one in _ALL}
"""By name, in the order of their numbers."""
