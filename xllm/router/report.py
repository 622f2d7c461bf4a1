"""The view as clients see it: processes, and what is amiss. Pure."""

from __future__ import annotations

from collections.abc import Callable

from xllm.protocol.questions import ProcessStatus
from xllm.router.exposition import merge_texts
from xllm.router.lost_instances import LostInstance
from xllm.router.process_views import DaemonView, InstanceView, RouterView
from xllm.router.view import ClusterView


def process_list(
    view: ClusterView,
    own: tuple[str, str, bool, int, int],
    now: float,
    breaker: Callable[[str], str],
) -> tuple[ProcessStatus, ...]:
    """This router (`own`: name, incarnation, whether it drains, its requests that wait for room and
    others), the other routers, then instances, each before its workers, those that are lost, and
    daemons, by name.
    `breaker`: the state of an instance's circuit breaker."""
    name, incarnation, draining, num_waiting, num_running = own
    found = [
        ProcessStatus(
            name=name,
            kind="router",
            incarnation=incarnation,
            state="draining" if draining else "ready",
            num_waiting=num_waiting,
            num_running=num_running,
            role=_router_role(view, name),
            epoch=_epoch(view, name),
        )
    ]
    found += [
        ProcessStatus(
            name=router_name,
            kind="router",
            incarnation=router.presence.incarnation,
            state="suspect" if _is_silent(view, router, now) else "ready",
            num_running=sum(count for _, count in router.presence.inflight),
            role=_router_role(view, router_name),
            epoch=_epoch(view, router_name),
            heartbeat_age_ms=int((now - router.heard_at) * 1000),
        )
        for router_name, router in sorted(view.routers.items())
    ]
    for one in sorted(view, key=lambda one: one.name):
        found += [_instance(one, now, breaker(one.name)), *_workers(one, now)]
    found += [_lost(one, now) for one in view.lost]
    found += [_daemon(name, daemon, now) for name, daemon in sorted(view.daemons.items())]
    return tuple(found)


def degraded_parts(
    view: ClusterView, registry_silent: bool, draining: bool, now: float
) -> tuple[str, ...]:
    """What is not as it should be, in words."""
    parts = []
    if registry_silent:
        parts.append("the registry does not answer")
    if draining:
        parts.append("this router drains")
    parts += [
        f"instance {one.name} is {_state(one)}"
        for one in sorted(view, key=lambda one: one.name)
        if not one.usable
    ]
    parts += [
        f"instance {one.name} is not registered" for one in view if one.usable and one.leaving
    ]
    parts += [f"instance {one.name} is lost" for one in view.lost]
    routers = sorted(view.routers.items())
    parts += [f"router {name} is suspect" for name, one in routers if _is_silent(view, one, now)]
    return tuple(parts)


def _is_silent(view: ClusterView, router: RouterView, now: float) -> bool:
    """Clients that share its port are connected to it, whether it answers or not."""
    return now - router.heard_at > view.silence_s


def merged_metrics(view: ClusterView, name: str, own: bytes) -> bytes:
    """The router's text with what other routers, instances and daemons last said of themselves."""
    texts = [(_router_labels(name), own)]
    others = sorted(view.routers.items())
    texts += [(_router_labels(other), seen.presence.metrics) for other, seen in others]
    texts += [({"role": "master", "instance": one.name}, one.metrics) for one in view]
    texts += [
        ({"role": "kvcache", "instance": daemon}, seen.heartbeat.metrics)
        for daemon, seen in view.daemons.items()
    ]
    return merge_texts(texts)


def _router_labels(name: str) -> dict[str, str]:
    """What a router says of instances has their names as `instance`."""
    return {"role": "router", "instance": name, "router": name}


def _router_role(view: ClusterView, name: str) -> str:
    return "leader" if view.standing.leader == name else ""


def _epoch(view: ClusterView, name: str) -> int:
    return view.standing.epoch if view.standing.leader == name else 0


def _daemon(name: str, daemon: DaemonView, now: float) -> ProcessStatus:
    """Its room in blocks of the size of those that it holds; empty it says nothing of them."""
    word = daemon.heartbeat
    num_blocks = 0
    if word.dram_blocks and word.dram_bytes:
        num_blocks = word.dram_capacity_bytes * word.dram_blocks // word.dram_bytes
    return ProcessStatus(
        name=name,
        kind="daemon",
        incarnation=word.incarnation,
        num_blocks=num_blocks,
        num_free_blocks=max(0, num_blocks - word.dram_blocks),
        heartbeat_age_ms=int((now - daemon.heard_at) * 1000),
    )


def _instance(one: InstanceView, now: float, breaker: str) -> ProcessStatus:
    load = one.load
    return ProcessStatus(
        name=one.name,
        kind="instance",
        incarnation=one.record.incarnation,
        role=one.role,
        model=one.record.model,
        state=_state(one),
        num_waiting=load.num_waiting,
        num_running=load.num_running,
        num_free_blocks=load.num_free_blocks,
        num_blocks=load.num_blocks or one.record.num_blocks,
        heartbeat_age_ms=int((now - one.heard_at) * 1000),
        breaker="" if breaker == "closed" else breaker,
    )


def _lost(one: LostInstance, now: float) -> ProcessStatus:
    return ProcessStatus(
        name=one.name,
        kind="instance",
        incarnation=one.incarnation,
        role=one.role,
        model=one.model,
        state="lost",
        heartbeat_age_ms=int((now - one.heard_at) * 1000),
    )


def _workers(one: InstanceView, now: float) -> list[ProcessStatus]:
    """As the instance last said, if it still speaks."""
    age_ms = int((now - one.heard_at) * 1000)
    return [
        ProcessStatus(
            name=worker.name,
            kind="worker",
            model=one.record.model,
            state="unknown" if one.silent else worker.state,
            heartbeat_age_ms=age_ms + worker.silent_ms,
        )
        for worker in one.workers
    ]


def _state(one: InstanceView) -> str:
    if one.suspect:
        return "suspect"
    return one.state if one.connected else "disconnected"
