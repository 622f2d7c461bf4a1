"""Example values for every message class, made from its annotations.

`minimal` sets what has no default, `full` sets every field to something else than its default.
The values follow from types and field names alone, so that the same classes always give the
same bytes: `golden` keeps them, and docs/protocol.md shows those of the client conversation.
"""

from __future__ import annotations

import enum
import types
import typing
from typing import Any

import msgspec

from xllm.protocol import (
    bus,
    cache,
    client,
    generation,
    instance,
    launch,
    records,
    registry_wire,
    sampling,
    step,
)

CONVERSATIONS: dict[str, Any] = {
    "client.ClientMessage": client.ClientMessage,
    "client.RouterMessage": client.RouterMessage,
    "instance.InstanceRequest": instance.InstanceRequest,
    "instance.InstanceReply": instance.InstanceReply,
    "step.MasterMessage": step.MasterMessage,
    "step.WorkerMessage": step.WorkerMessage,
    "bus.BusMessage": bus.BusMessage,
    "cache.CacheRequest": cache.CacheRequest,
    "cache.CacheReply": cache.CacheReply,
    "launch.LaunchMessage": launch.LaunchMessage,
    "registry.RegistryRequest": registry_wire.RegistryRequest,
    "registry.RegistryReply": registry_wire.RegistryReply,
    "records.InstanceRecord": records.InstanceRecord,
    "records.DaemonRecord": records.DaemonRecord,
    "records.RouterRecord": records.RouterRecord,
}
"""Every closed union that some process decodes."""

_TEXTS = {
    "model": "demo",
    "role": "user",
    "content": "Hi",
    "prompt": "Hi",
    "request_id": "0123456789abcdef0123456789abcdef",
    "finish_reason": "stop",
    "code": "overloaded",
    "message": "too many open requests",
    "param": "model",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
}
_NUMBERS = {"id": 1, "choice": 1, "attempt": 2, "max_tokens": 16, "seed": 7, "n": 2}


def members(union: Any) -> tuple[type[msgspec.Struct], ...]:
    """The classes of a union, or the one class itself."""
    if isinstance(union, types.UnionType):
        return typing.get_args(union)
    return (union,)


def example(cls: type[msgspec.Struct], *, full: bool) -> msgspec.Struct:
    """One instance of a message class."""
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in msgspec.structs.fields(cls):
        if field.required or full:
            # A message of its own kind within it has no more of them.
            depth = full and hints[field.name] != tuple[cls, ...]
            value = _value(hints[field.name], field.name, depth)
            if not field.required and value == _default(field):
                value = _other(value)
            values[field.name] = value
    return cls(**values)


def _default(field: Any) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return value + "2"


def _value(hint: Any, name: str, full: bool) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        return _value(parts[0], name, full)
    if origin is tuple:
        parts = typing.get_args(hint)
        if len(parts) == 2 and parts[1] is Ellipsis:
            return (_value(parts[0], name, full),)
        return tuple(_value(part, name, full) for part in parts)
    if origin is dict:
        key, value = typing.get_args(hint)
        return {_value(key, "key", full): _value(value, "value", full)}
    return _plain_value(hint, name, full)


def _plain_value(hint: Any, name: str, full: bool) -> Any:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return example(hint, full=full)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return next(iter(hint))
    if hint is bool:
        return True
    if hint is int:
        return _NUMBERS.get(name, 3)
    if hint is float:
        return 0.5
    if hint is bytes:
        return name.encode()
    if hint in (str, Any):
        return _TEXTS.get(name, name)
    raise TypeError(f"no example value for {name}: {hint}")


def curated() -> list[tuple[str, msgspec.Struct]]:
    """A conversation as it happens: (conversation, message) pairs, beside the made-up ones."""
    greedy = sampling.SamplingParams(max_tokens=64, temperature=0.0)
    question = generation.ChatMessage(role="user", content="What is xLLM?")
    request_id = _TEXTS["request_id"]
    return [
        (
            "client.ClientMessage",
            generation.SubmitRequest(id=1, messages=(question,), sampling=greedy),
        ),
        ("client.ClientMessage", generation.AbortRequest(id=1)),
        (
            "client.RouterMessage",
            generation.TokenDelta(id=1, token_ids=(291, 310), text="xLLM is"),
        ),
        (
            "client.RouterMessage",
            generation.TokenDelta(
                id=1, first_index=2, token_ids=(12, 1535), text=".", finish_reason="stop"
            ),
        ),
        (
            "client.RouterMessage",
            generation.RequestFinished(
                id=1,
                request_id=request_id,
                choices=(generation.ChoiceResult(index=0, finish_reason="stop", stop_reason=1535),),
                usage=generation.Usage(prompt_tokens=14, completion_tokens=4),
                seed=7,
            ),
        ),
        (
            "client.RouterMessage",
            generation.RequestFailed(
                id=2, code="model_not_found", message="no model 'x' here", param="model"
            ),
        ),
    ]


def plain(value: Any) -> Any:
    """A message as JSON values, fields by name whatever its shape on the wire."""
    if isinstance(value, msgspec.Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value
