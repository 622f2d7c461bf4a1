"""A router's service over fakes with limits, and what its requests and figures say."""

from __future__ import annotations

from tests.router.fake_cluster import FakeCluster, ListSink
from xllm.config.admission import AdmissionSettings
from xllm.protocol.bus import InstanceLoad
from xllm.protocol.generation import SubmitRequest
from xllm.protocol.sampling import SamplingParams
from xllm.router.front import Tenant

BUSY = InstanceLoad(num_running=4, num_waiting=8)
IDLE = InstanceLoad(num_running=1)


def cluster_with(*names: str, **settings) -> FakeCluster:
    return FakeCluster(*names, admission=AdmissionSettings(**settings))


def ask(cluster: FakeCluster, tenant: str = "t", **more) -> tuple[str, ListSink]:
    sink = ListSink()
    request = SubmitRequest(id=1, prompt="hello", sampling=SamplingParams(max_tokens=5), **more)
    return cluster.service.submit(request, Tenant(tenant), sink), sink


def sent_to(cluster: FakeCluster) -> list[str]:
    admits = {word.request_id for word in cluster.links.admits()}
    return [name for name, word in cluster.links.sent if word.request_id in admits]


def metrics(cluster: FakeCluster) -> str:
    return cluster.service.metrics_text().decode()


def close(cluster: FakeCluster) -> None:
    cluster.service.admission.check()
    cluster.close()
