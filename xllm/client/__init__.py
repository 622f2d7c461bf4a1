"""The client library: xLLM over ZeroMQ, for programs with and without a loop of their own."""

from __future__ import annotations

from xllm.client.asynchronous import AsyncClient
from xllm.client.results import Choice, Completion, Embeddings, StreamDelta, Timing
from xllm.client.stream import TokenStream
from xllm.client.synchronous import Client, SyncStream
from xllm.protocol.generation import Usage
from xllm.protocol.questions import HealthReport, ModelInfo, ProcessStatus
from xllm.protocol.sampling import TokenLogprobs

__all__ = [
    "AsyncClient",
    "Choice",
    "Client",
    "Completion",
    "Embeddings",
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
