"""An instance that starts while its registry takes no writes is found once it takes them again."""

from __future__ import annotations

import asyncio

import pytest

from xllm.config.cluster import ClusterSettings
from xllm.config.settings import Settings
from xllm.errors import (
    BrokenError,
    ConfigError,
    FencedError,
    OverloadedError,
    PermissionDeniedError,
)
from xllm.master import registration
from xllm.master.registration import InstanceRegistration
from xllm.protocol.records import InstanceRecord
from xllm.protocol.registry.local import LocalRegistry

KEY = "/xllm/default/instances/a"
RECORD = InstanceRecord(
    name="a",
    incarnation="1",
    endpoint="ipc:///a",
    bus_endpoint="ipc:///b",
    model="m",
    model_path="",
    max_model_len=64,
    vocab_size=8,
    block_size=16,
    num_blocks=4,
)


class FullRegistry(LocalRegistry):
    """Refuses as many grants as there are `errors`."""

    def __init__(self, errors):
        super().__init__()
        self.errors = list(errors)

    async def grant(self, ttl_s):
        if self.errors:
            raise self.errors.pop()
        return await super().grant(ttl_s)


@pytest.mark.parametrize(
    "error",
    [
        BrokenError("silent"),
        FencedError("the lease is gone"),
        OverloadedError("database space exceeded"),
        PermissionDeniedError("not yours"),
        ConfigError("invalid password"),
    ],
)
def test_whatever_refuses_the_first_write_it_is_tried_again(monkeypatch, error):
    monkeypatch.setattr(registration, "_AGAIN_S", 0.01)

    replaced = []

    async def main():
        registry = FullRegistry([error] * 3)
        monkeypatch.setattr(registration, "open_registry", lambda *args, **more: registry)
        settings = Settings(cluster=ClusterSettings(registry="inproc://none"))
        own = InstanceRegistration(settings, "a", "1", None, replaced.append)
        await own.publish(RECORD)
        assert not registry.errors
        assert (await registry.get(KEY)) is not None
        await own.withdraw()
        assert registry.store.statistics().num_keys == 0
        assert replaced == []

    asyncio.run(asyncio.wait_for(main(), 20))
