"""Instances, policies and what they are asked, for tests of routing."""

from __future__ import annotations

import dataclasses

from xllm.config.routing import RoutingSettings
from xllm.protocol.bus import InstanceHeartbeat, InstanceLoad
from xllm.protocol.records import InstanceRecord
from xllm.router.policies.make import make_policy
from xllm.router.policies.question import RouteFigures, RouteQuestion
from xllm.router.process_views import InstanceView
from xllm.router.traffic import Traffic
from xllm.router.view import ClusterView

BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Held:
    """What an index says of one instance."""

    device: int = 0
    dram: int = 0
    ssd: int = 0


def record(name: str, **more) -> InstanceRecord:
    facts = {"max_model_len": 4096, "vocab_size": 320, "block_size": BLOCK, "num_blocks": 1000}
    addresses = {"incarnation": "1", "endpoint": "", "bus_endpoint": "", "model_path": ""}
    return InstanceRecord(name=name, model="m", **{**facts, **addresses, **more})


def instance(name: str, inflight: int = 0, max_num_seqs: int = 0, **load: int) -> InstanceView:
    load = {"num_blocks": 1000, "num_free_blocks": 1000, **load}
    one = InstanceView(record(name, max_num_seqs=max_num_seqs), connected=True, state="ready")
    one.load = InstanceLoad(**load)
    one.num_inflight = inflight
    return one


def policy(name: str, figures: RouteFigures | None = None, **settings):
    return make_policy(name, RoutingSettings(**settings), figures or RouteFigures())


def chosen(one, candidates, ask: RouteQuestion | None = None) -> str:
    [(role, name)] = one.choose(candidates, ask or RouteQuestion(100, BLOCK))
    assert role == "both"
    return name


def ready_view(*names: str) -> tuple[ClusterView, Traffic]:
    view = ClusterView(0.2)
    for name in names:
        view.registered(record(name), 0.0)
        view.connected(name)
        view.heartbeat(InstanceHeartbeat(name, "1", 1, "ready"), 0.0)
    return view, Traffic(view)
