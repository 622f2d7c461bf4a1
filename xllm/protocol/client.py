"""Client and router: the two closed unions of what they say to each other.

`id` is the client's own number for a request, unique among its open ones on a connection; the
server's `request_id` (128 random bits, hex) is what logs and other processes use. Deadlines
travel as remaining milliseconds. docs/protocol.md specifies these bytes for other languages.
"""

from __future__ import annotations

from xllm.protocol.administration import (
    ModelSleepSet,
    ObjectivesSet,
    RoleSet,
    SetModelSleep,
    SetObjectives,
    SetRole,
)
from xllm.protocol.generation import (
    AbortRequest,
    RequestFailed,
    RequestFinished,
    SubmitRequest,
    TokenDelta,
)
from xllm.protocol.message import MapMessage, learn
from xllm.protocol.questions import (
    DetokenizedText,
    DetokenizeIds,
    HealthReport,
    ListModels,
    ModelList,
    Ping,
    Pong,
    QueryHealth,
    QueryStatus,
    StatusReport,
    TokenizedText,
    TokenizeText,
)


class BadMessage(MapMessage, tag="bad_message", frozen=True):
    """The last frames were no message of this conversation."""

    message: str


ClientMessage = (
    SubmitRequest
    | AbortRequest
    | ListModels
    | QueryHealth
    | QueryStatus
    | TokenizeText
    | DetokenizeIds
    | SetModelSleep
    | Ping
    | SetRole
    | SetObjectives
)

RouterMessage = (
    TokenDelta
    | RequestFinished
    | RequestFailed
    | ModelList
    | HealthReport
    | StatusReport
    | TokenizedText
    | DetokenizedText
    | BadMessage
    | ModelSleepSet
    | Pong
    | RoleSet
    | ObjectivesSet
)

learn(ClientMessage, RouterMessage)
