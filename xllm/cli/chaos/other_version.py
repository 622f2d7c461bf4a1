"""Messages as a later version of this program would write them. Pure.

Each message and each part has a field more than this version knows, behind its last one; a record
says the version of the protocol that it is told to say.
"""

from __future__ import annotations

from typing import Any

import msgspec

from xllm.protocol.records import InstanceRecord

MORE = "of a later version"


def as_later(value: Any, protocol: int) -> Any:
    """The same in plain containers, each Struct with a field more."""
    if isinstance(value, msgspec.Struct):
        fields = {
            name: as_later(getattr(value, attribute), protocol)
            for attribute, name in zip(
                value.__struct_fields__, value.__struct_encode_fields__, strict=True
            )
        }
        if isinstance(value, InstanceRecord):
            fields["protocol"] = protocol
        config = value.__struct_config__
        if config.array_like:
            tag = [] if config.tag is None else [config.tag]
            return [*tag, *fields.values(), MORE]
        tagged = {} if config.tag_field is None else {config.tag_field: config.tag}
        return {**tagged, **fields, "later": MORE}
    if isinstance(value, dict):
        return {key: as_later(one, protocol) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_later(one, protocol) for one in value]
    return value


class LaterEncoder:
    """Writes messages like `msgspec.msgpack.Encoder`, in the words of a later version."""

    def __init__(self, protocol: int) -> None:
        self._protocol = protocol

    def encode(self, message: msgspec.Struct) -> bytes:
        """One message as MessagePack."""
        return msgspec.msgpack.encode(as_later(message, self._protocol))
