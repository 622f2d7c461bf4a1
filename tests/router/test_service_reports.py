"""What the service says of itself and its cluster: health, status and figures."""

from __future__ import annotations

import asyncio
import time

from tests.router.fake_cluster import FakeCluster, in_loop
from xllm.protocol.bus import DaemonHeartbeat, InstanceLoad, RouterPresence, WorkerState


@in_loop
async def test_health_says_what_the_data_path_says():
    cluster = FakeCluster()
    report = await cluster.service.health(True)
    assert (report.live, report.ready) == (True, False)
    model = cluster.service.served.first.name
    assert report.degraded == (f"no instance of {model} is ready",)
    cluster.join("a")
    reports = await asyncio.gather(*(cluster.service.health(True) for _ in range(5)))
    assert all(one.ready and not one.degraded for one in reports)
    assert len(cluster.links.sent) == 1
    cluster.links.answer_probes = False
    started = time.monotonic()
    report = await cluster.service.health(True)
    assert 0.9 < time.monotonic() - started < 3
    assert not report.ready
    assert report.degraded
    assert (await cluster.service.health(False)).ready
    cluster.close()


@in_loop
async def test_status_shows_the_workers_of_an_instance():
    cluster = FakeCluster("a", "b")
    workers = (WorkerState("a/worker-0", "ready", 30, "cpu"), WorkerState("a/worker-1", "loading"))
    cluster.beat("a", workers=workers)
    shown = [one for one in cluster.service.status().processes if one.kind != "router"]
    assert [(one.name, one.kind, one.state) for one in shown] == [
        ("a", "instance", "ready"),
        ("a/worker-0", "worker", "ready"),
        ("a/worker-1", "worker", "loading"),
        ("b", "instance", "ready"),  # it says nothing of its workers
    ]
    assert shown[1].heartbeat_age_ms - shown[0].heartbeat_age_ms == 30
    cluster.clock.now += 60.0
    cluster.tick()
    states = [one.state for one in cluster.service.status().processes if one.kind == "worker"]
    assert states == ["unknown", "unknown"]
    cluster.close()


@in_loop
async def test_status_and_metrics_show_all_processes():
    cluster = FakeCluster("a")
    text = b'# HELP steps_total S.\n# TYPE steps_total counter\nsteps_total{role="worker"} 3\n'
    cluster.beat("a", load=InstanceLoad(num_running=2), metrics=text)
    cluster.service.heard(DaemonHeartbeat("d", "1", 1))
    other = b'xllm_router_requests_total{code="ok"} 7.0\nxllm_router_load{instance="a"} 4.0\n'
    cluster.service.heard(RouterPresence("r2", "1", 1, metrics=other))
    cluster.service.heard(RouterPresence("r2", "1", 2, (("a", 2), ("b", 3))))
    known = {one.name: one for one in cluster.service.status().processes}
    kinds = {name: one.kind for name, one in known.items()}
    assert kinds == {"router": "router", "r2": "router", "a": "instance", "d": "daemon"}
    assert known["r2"].num_running == 5
    assert known["d"].num_blocks == 0  # it holds nothing that says how large a block is
    cluster.service.heard(
        DaemonHeartbeat("d", "1", 2, dram_blocks=3, dram_bytes=300, dram_capacity_bytes=1000)
    )
    daemon = cluster.service.status().processes[-1]
    assert (daemon.num_blocks, daemon.num_free_blocks) == (10, 7)
    request_id, _ = cluster.ask(max_tokens=1)
    cluster.say(request_id, 0, "a", "length")
    cluster.end(request_id)
    page = cluster.service.metrics_text().decode()
    assert 'steps_total{role="worker",instance="a"} 3' in page
    own, others = ('role="router",instance="%s",router="%s"' % (2 * (n,)) for n in ("router", "r2"))
    assert f'xllm_router_requests_total{{code="ok",{own}}} 1.0' in page
    assert f'xllm_router_ttft_seconds_bucket{{le="+Inf",{own}}} 1.0' in page
    assert f'xllm_router_requests_total{{code="ok",{others}}} 7.0' in page
    assert 'xllm_router_load{instance="a",role="router",router="r2"} 4.0' in page
    cluster.close()


@in_loop
async def test_a_router_that_fell_silent_is_suspect():
    cluster = FakeCluster("a")
    cluster.service.heard(RouterPresence("r2", "1", 1))
    silence_s = cluster.service.view.silence_s

    async def said():
        cluster.beat("a")
        states = [one.state for one in cluster.service.status().processes if one.name == "r2"]
        return states, (await cluster.service.health(False)).degraded

    cluster.clock.now += silence_s * 0.9
    assert await said() == (["ready"], ())
    cluster.clock.now += silence_s * 0.2
    assert await said() == (["suspect"], ("router r2 is suspect",))
    cluster.service.heard(RouterPresence("r2", "1", 2))
    assert await said() == (["ready"], ())
    cluster.close()
