"""The client library: xLLM over ZeroMQ, for programs with and without a loop of their own."""

from __future__ import annotations

from xllm.client.asynchronous import AsyncClient, TokenStream
from xllm.client.results import Choice, Completion, StreamDelta, Timing
from xllm.client.synchronous import Client, SyncStream
from xllm.protocol.client import HealthReport, ModelInfo, ProcessStatus, Usage
from xllm.protocol.sampling import TokenLogprobs

__all__ = [
    "AsyncClient",
    "Choice",
    "Client",
    "Completion",
    "HealthReport",
    "ModelInfo",
    "ProcessStatus",
    "StreamDelta",
    "SyncStream",
    "Timing",
    "TokenLogprobs",
    "TokenStream",
    "Usage",
]
