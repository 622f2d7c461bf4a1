"""What a request's state tells the service to do.

Messages to the client (TokenDelta, RequestFinished, RequestFailed) are their own instruction:
deliver them to the sink, in order; the latter two are the last.
"""

from __future__ import annotations

import enum

import msgspec

from xllm.protocol.generation import RequestFailed, RequestFinished, TokenDelta
from xllm.protocol.instance import AdmitRequest, CancelRequest


class SendTo(msgspec.Struct, frozen=True, gc=False):
    """Send a message to an instance; if it cannot be reached, the words are dropped."""

    instance: str
    message: AdmitRequest | CancelRequest


class Wish(enum.Enum):
    """What the service must do for a request at its own time."""

    FLUSH = enum.auto()
    """Call `flush` when the request's hold time has passed from now."""
    PLACE = enum.auto()
    """Choose an instance and call `place`, or `unplaceable` where there is none."""


Instruction = SendTo | Wish | TokenDelta | RequestFinished | RequestFailed
