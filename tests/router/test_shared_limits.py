"""Two routers in one loop keep one limit of a tenant."""

from __future__ import annotations

import dataclasses

from tests.router.fake_instance import MODEL
from tests.router.router_bench import RawClient, until
from xllm.config.admission import AdmissionSettings
from xllm.protocol.generation import AbortRequest, RequestFailed, ResumePoint
from xllm.router.actor import RouterActor

ALL = 3


def open_at_first(routers) -> int:
    """Requests that the second router knows to be open at the first."""
    known = routers[1].service.view.routers.get("r0")
    return sum(one.num_open for one in known.presence.tenants) if known is not None else -1


async def started(b, router) -> RawClient:
    await router.open()
    await until(lambda: router.service.view.usable(MODEL))
    return RawClient(b.transport, router.zmq.endpoint)


def test_what_is_open_at_one_router_counts_at_the_other(in_bench):
    async def body(b):
        await b.instance("a", tokens_at_once=1)
        limited = dataclasses.replace(b.settings, admission=AdmissionSettings(concurrency=ALL))
        routers = [
            RouterActor(
                dataclasses.replace(
                    limited, router=dataclasses.replace(b.settings.router, name=f"r{number}")
                )
            )
            for number in range(2)
        ]
        clients = []
        try:
            clients = [await started(b, one) for one in routers]
            first, second = clients
            for number in range(ALL):
                first.submit(number, 50)
            await until(lambda: open_at_first(routers) == ALL)
            second.submit(1, 50)
            refused = await second.last(1)
            assert isinstance(refused, RequestFailed)
            assert refused.code == "rate_limit_exceeded"
            point = ResumePoint(attempt=1, outputs=((),), seed=7)
            second.submit(2, 50, resume=point)
            await until(lambda: second.ids(2))  # another router lost it, it says
            for number in range(ALL):
                first.socket.send(AbortRequest(id=number))
            await until(lambda: open_at_first(routers) == 0)
            second.submit(3, 50)
            await until(lambda: second.ids(3))
        finally:
            for one in clients:
                one.socket.close()
            for one in routers:
                await one.close()

    in_bench(body)
