"""How far a start is, and what a service's processes are."""

from __future__ import annotations

import os

import pytest

from xllm.cli.launch_plan import announcement, keep_ports, plan_children, share_cores
from xllm.cli.startup import ServiceAddresses, Startup
from xllm.config.load import decode_settings, load
from xllm.errors import ConfigError
from xllm.protocol.launch import ProcessFailed, ProcessReady, ProcessStarted, ProcessStopping


def test_ready_when_all_are():
    startup = Startup(["a", "r"])
    assert "started (pid 5), cpu" in startup.handle(ProcessStarted("master", "a", 5, "cpu"))
    startup.handle(ProcessReady("master", "a", 5))
    startup.handle(ProcessReady("worker", "a/worker-0", 6))
    assert not startup.all_ready
    addresses = (("http", "http://127.0.0.1:1"), ("zmq", "tcp://127.0.0.1:2"), ("bus", "ipc://x"))
    startup.handle(ProcessReady("router", "r", 7, addresses))
    assert startup.all_ready
    assert startup.addresses == ServiceAddresses("http://127.0.0.1:1", "tcp://127.0.0.1:2")
    startup.ended("a")
    assert not startup.all_ready


@pytest.mark.parametrize(
    ("kind", "word"),
    [("router", "listens"), ("kvcache", "listens"), ("worker", "loaded"), ("master", "ready")],
)
def test_only_an_instance_is_called_ready(kind, word):
    line = Startup(["p"]).handle(ProcessReady(kind, "p", 5, (), "demo"))
    assert line.split() == [kind, "p:", word, "(pid", "5),", "demo"]


def test_the_reason_of_an_end_is_its_own_or_its_childs():
    startup = Startup(["a"])
    startup.handle(ProcessFailed("worker", "a/worker-0", "dependency_error", "no such device"))
    assert startup.ended("a") == "no such device"
    assert startup.ended("a") == ""


def test_draining_is_told_where_something_is_open():
    startup = Startup([])
    assert startup.handle(ProcessStopping("router", "r", 0)) == ""
    assert "3 open" in startup.handle(ProcessStopping("router", "r", 3))


def test_a_plan_names_each_process_once():
    settings = load({"serve.instances": 3, "model.name": "m"}, None, {})
    planned = plan_children(settings, "/run/x")
    assert [child.name for child in planned] == [
        "instance-0", "instance-1", "instance-2", "router-0", "kvcache-0",
    ]  # fmt: skip
    for child in planned:
        own = decode_settings(child.spec.args[0])
        assert own.cluster.registry == "ipc:///run/x/registry"
        assert own.cluster.launcher == "ipc:///run/x/launch"
        assert getattr(own, child.kind).name == child.name
        assert own.model.name == "m"


def test_in_a_registry_of_others_names_are_this_runs_own():
    flags = {"cluster.registry": "etcd://h:1", "serve.instances": 2}
    planned = plan_children(load(flags, None, {}), "/run/xllm/run-abcdef012345")
    names = ["instance-012345-0", "instance-012345-1", "router-012345-0", "kvcache-012345-0"]
    assert [child.name for child in planned] == names
    for child in planned:
        assert decode_settings(child.spec.args[0]).cluster.registry == "etcd://h:1"
    flags |= {"master.name": "m", "router.name": "r", "kvcache.name": "k"}
    planned = plan_children(load(flags, None, {}), "/run/xllm/run-abcdef012345")
    assert [child.name for child in planned] == ["m-0", "m-1", "r", "k"]


def test_a_service_without_a_daemon():
    settings = load({"serve.kvcache": False}, None, {})
    assert [child.kind for child in plan_children(settings, "/r")] == ["master", "router"]


@pytest.mark.parametrize(
    ("instances", "ranks", "chosen"), [(1, 1, 0), (2, 1, 0), (2, 2, 0), (1000, 1, 0), (2, 1, 3)]
)
def test_cores_are_shared(instances, ranks, chosen):
    flags = {"serve.instances": min(instances, 64), "worker.num_threads": chosen}
    flags["master.num_workers"] = ranks
    settings = load(flags, None, {})
    threads = share_cores(settings).num_threads
    if chosen or instances == 1:
        assert threads == chosen
    else:
        assert threads == max(1, len(os.sched_getaffinity(0)) // settings.serve.instances // ranks)


def test_cpus_that_are_named_are_shared_out():
    flags = {"serve.instances": 2, "worker.cpu_affinity": "4-7,0"}
    plan = plan_children(load(flags, None, {}), "/r")
    masters = [child.settings.worker for child in plan if child.kind == "master"]
    assert [(worker.cpu_affinity, worker.num_threads) for worker in masters] == [
        ("4-5", 0),
        ("6-7", 0),
    ]
    with pytest.raises(ConfigError, match="would give 2 instances the same cores"):
        plan_children(load({**flags, "worker.cpu_affinity": "auto"}, None, {}), "/r")
    with pytest.raises(ConfigError, match="1 CPUs for 2 instances"):
        plan_children(load({**flags, "worker.cpu_affinity": "3"}, None, {}), "/r")


def test_the_announcement_can_be_pasted():
    lines = announcement(["m"], ServiceAddresses("http://h:1", "tcp://h:2"), 1.25)
    text = "\n".join(lines)
    assert "ready in 1.2 s: m" in text
    assert "tcp://h:2" in text
    assert "curl http://h:1/v1/chat/completions" in text
    assert '-d \'{"model": "m"' in text


def test_a_router_keeps_the_ports_it_was_given():
    settings = load({"router.port": 0, "router.zmq_port": 7}, None, {})
    router = next(c for c in plan_children(settings, "/r") if c.kind == "router")
    kept = keep_ports(router, ServiceAddresses("http://127.0.0.1:1234", "tcp://127.0.0.1:7"))
    own = decode_settings(kept.spec.args[0])
    assert (own.router.port, own.router.zmq_port) == (1234, 7)
    assert keep_ports(router, ServiceAddresses()) == router


def test_routers_share_a_port_and_have_ports_of_their_own():
    flags = {"serve.routers": 3, "router.port": 80, "router.zmq_port": 90}
    routers = [c for c in plan_children(load(flags, None, {}), "/r") if c.kind == "router"]
    assert [one.name for one in routers] == ["router-0", "router-1", "router-2"]
    own = [decode_settings(one.spec.args[0]).router for one in routers]
    assert [(one.name, one.port, one.zmq_port) for one in own] == [
        ("router-0", 80, 90), ("router-1", 80, 91), ("router-2", 80, 92),
    ]  # fmt: skip
    assert all(one.share_port for one in own)
    alone = [c for c in plan_children(load({}, None, {}), "/r") if c.kind == "router"]
    assert [one.settings.router.share_port for one in alone] == [False]
    with pytest.raises(ConfigError, match="need ports up to 65536"):
        plan_children(load({"serve.routers": 2, "router.zmq_port": 65535}, None, {}), "/r")


def test_each_router_is_told_of_and_keeps_its_own_ports():
    startup = Startup(["r-0", "r-1"])
    for number in (1, 0):
        addresses = (("http", "http://h:1"), ("zmq", f"tcp://h:{number + 2}"))
        startup.handle(ProcessReady("router", f"r-{number}", 7, addresses))
    assert startup.addresses == ServiceAddresses("http://h:1", "tcp://h:2", ("tcp://h:3",))
    assert startup.addresses_of("r-1").zmq == "tcp://h:3"
    assert startup.addresses_of("r-2") == ServiceAddresses()
    lines = announcement(["m"], startup.addresses, 1.0)
    assert [line.split()[1] for line in lines if "ZeroMQ" in line] == ["tcp://h:2", "tcp://h:3"]
