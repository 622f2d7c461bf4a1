"""How many processes `xllm serve` starts."""

from __future__ import annotations

import dataclasses

from xllm.config.field import setting


@dataclasses.dataclass(frozen=True)
class ServeSettings:
    """`xllm serve`: everything on one machine."""

    instances: int = setting(1, "Model instances to start.", low=1, high=64)
    routers: int = setting(
        1,
        "Router processes to start: all listen on the HTTP port, each on a ZeroMQ port of its own "
        "(zmq_port and those behind it).",
        low=1,
        high=64,
    )
    kvcache: bool = setting(True, "Start a KV cache daemon.")
