"""Any message survives its encoding; any bytes give a message or BadMessageError."""

from __future__ import annotations

import enum
import types
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.docs.examples import CONVERSATIONS, members
from scripts.docs.golden import read_golden
from xllm.errors import BadMessageError
from xllm.protocol.codec import Decoder, encode

INTEGERS = st.integers(-(2**63), 2**64 - 1)
SCALARS = st.none() | st.booleans() | INTEGERS | st.text(max_size=8)
PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    str: st.text(max_size=8),
    int: INTEGERS,
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    bytes: st.binary(max_size=8),
    type(None): st.none(),
    Any: SCALARS | st.lists(SCALARS, max_size=2),
}


Classes = frozenset[type]


def strategy(hint: Any, within: Classes = frozenset()) -> st.SearchStrategy[Any]:
    """Values of an annotation. A message holds no more of those it stands `within`."""
    origin = typing.get_origin(hint)
    parts = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([strategy(part, within) for part in parts])
    if origin is tuple and len(parts) == 2 and parts[1] is Ellipsis:
        if parts[0] in within:
            return st.just(())
        return st.lists(strategy(parts[0], within), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*[strategy(part, within) for part in parts])
    if origin is dict:
        return st.dictionaries(strategy(parts[0], within), strategy(parts[1], within), max_size=2)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from(list(hint))
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return messages_of(hint, within)
    return PLAIN[hint]


def messages_of(
    cls: type[msgspec.Struct], within: Classes = frozenset()
) -> st.SearchStrategy[msgspec.Struct]:
    """Instances of a message class."""
    fields = {
        name: strategy(hint, within | {cls}) for name, hint in typing.get_type_hints(cls).items()
    }
    fields = {name: fields[name] for name in cls.__struct_fields__}
    return st.builds(cls, **fields)


@pytest.mark.parametrize("conversation", sorted(CONVERSATIONS))
def test_round_trip(conversation: str) -> None:
    union = CONVERSATIONS[conversation]
    decoder: Decoder[msgspec.Struct] = Decoder(union)

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.one_of([messages_of(cls) for cls in members(union)]))
    def check(message: msgspec.Struct) -> None:
        assert decoder.decode(encode(message)) == message

    check()


@settings(max_examples=300, deadline=None, database=None)
@given(st.sampled_from(sorted(CONVERSATIONS)), st.binary(max_size=64))
def test_garbage_is_refused_and_nothing_else(conversation: str, data: bytes) -> None:
    message = ""
    try:
        Decoder(CONVERSATIONS[conversation]).decode(data)
    except BadMessageError as error:
        message = error.message
    assert len(message) < 300


@settings(max_examples=300, deadline=None, database=None)
@given(st.sampled_from(read_golden()), st.data())
def test_a_damaged_message_is_a_message_or_refused(entry: dict[str, Any], data: Any) -> None:
    damaged = bytearray.fromhex(entry["hex"])
    place = data.draw(st.integers(0, len(damaged) - 1))
    damaged[place] ^= data.draw(st.integers(1, 255))
    decoder: Decoder[msgspec.Struct] = Decoder(CONVERSATIONS[entry["conversation"]])
    try:
        message = decoder.decode(bytes(damaged))
    except BadMessageError:
        return
    assert decoder.decode(encode(message)) is not None


@pytest.mark.parametrize("depth", [100, 5000])
def test_deep_nesting_is_refused(depth: int) -> None:
    for union in CONVERSATIONS.values():
        with pytest.raises(BadMessageError):
            Decoder(union).decode(b"\x91" * depth + b"\xc0")
