"""xLLM: an LLM serving system of actors over ZeroMQ.

The words of this project, one thing each:

Request    what a client asked; it has n choices.
Sequence   one token stream in an engine: one choice of a request in one admission.
Step       one forward pass. StepPlan: what it must do. StepResult: what it gave.
Block      a fixed number of tokens of KV: the unit of hashing, caching and transfer.
Page       a unit of physical memory. Slot: a contiguous virtual range for one sequence's KV.
Instance   one master and its workers: one copy of a model.
Role       what an instance is used for at present: prefill, decode, both, encode.
Tier       where KV lies: device, DRAM, SSD.
Attempt    the number of a request's current try; it only grows.
Choice     the index of one of a request's n answers.
Content hash   a block's chained SHA-256, the same on every instance.
Incarnation    a random id that a process takes at start.
Epoch      the fencing number of a leadership.
Event      what happened. Instruction: what an actor must do. Plan: decided, not yet done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xllm.client.asynchronous import AsyncClient
    from xllm.client.synchronous import Client

__all__ = ["AsyncClient", "Client", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The client library, imported when it is first asked for."""
    if name in ("AsyncClient", "Client"):
        import xllm.client

        return getattr(xllm.client, name)
    raise AttributeError(f"module 'xllm' has no attribute {name!r}")
