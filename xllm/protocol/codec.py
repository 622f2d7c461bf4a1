"""Bytes to messages and back, over a closed union of classes for each conversation.

A frame that does not decode raises BadMessageError and nothing else; there is no extension
hook, and no class is ever looked up by a received name outside the union.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from xllm.errors import BadMessageError
from xllm.protocol.wrong_value import explain

T = TypeVar("T")

_ENCODER = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """One message as MessagePack."""
    return _ENCODER.encode(message)


class Decoder(Generic[T]):
    """Decodes the messages of one conversation; `Decoder(A | B)` knows A and B only."""

    def __init__(self, union: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)

    def decode(self, data: bytes | memoryview) -> T:
        """The message, or BadMessageError for anything else."""
        try:
            return self._decoder.decode(data)
        except msgspec.ValidationError as error:
            text, _ = explain(str(error), "the message")
            raise BadMessageError(f"no such message: {text}") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise BadMessageError(f"no such message: {str(error)[:200]}") from error
