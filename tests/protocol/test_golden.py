"""The bytes of every message of every conversation, pinned.

A change that moves a field, renames one of a map or changes a tag breaks peers of another
version: it fails here. A field that is appended needs `scripts/update-docs`, which adds entries
and never takes one away.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from scripts.docs.examples import CONVERSATIONS, members, plain
from scripts.docs.golden import current_entries, read_golden
from xllm.errors import BadMessageError
from xllm.protocol import bus, cache, client, instance, launch, records, registry_wire, step
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.message import ArrayMessage, ArrayPart, MapMessage, MapPart

MODULES = (bus, cache, client, instance, launch, records, registry_wire, step)
SHAPES = (ArrayMessage, ArrayPart, MapMessage, MapPart)


def holds(stored: Any, decoded: Any) -> bool:
    """Whether `decoded` has all that is `stored`: it may have more fields, never other values."""
    if isinstance(stored, dict) and isinstance(decoded, dict):
        return all(name in decoded and holds(stored[name], decoded[name]) for name in stored)
    if isinstance(stored, list) and isinstance(decoded, list):
        return len(stored) == len(decoded) and all(map(holds, stored, decoded))
    return type(stored) is type(decoded) and bool(stored == decoded)


def test_golden_bytes_decode_to_their_fields() -> None:
    entries = read_golden()
    assert len(entries) >= 128
    for entry in entries:
        decoder: Decoder[msgspec.Struct] = Decoder(CONVERSATIONS[entry["conversation"]])
        message = decoder.decode(bytes.fromhex(entry["hex"]))
        assert type(message).__name__ == entry["message"]
        assert holds(entry["fields"], plain(message)), entry["message"]
        assert decoder.decode(encode(message)) == message


def test_the_classes_still_give_the_golden_bytes() -> None:
    known = {(entry["conversation"], entry["message"], entry["hex"]) for entry in read_golden()}
    for entry in current_entries():
        key = (entry["conversation"], entry["message"], entry["hex"])
        assert key in known, f"{entry['message']} ({entry['shape']}): see scripts/update-docs"


def test_no_message_class_is_left_out() -> None:
    inside = {cls for union in CONVERSATIONS.values() for cls in members(union)}
    for module in MODULES:
        for name, value in vars(module).items():
            if not isinstance(value, type) or not issubclass(value, ArrayMessage | MapMessage):
                continue
            if value.__module__ == module.__name__ and value not in SHAPES:
                assert value in inside, f"{module.__name__}.{name} is in no conversation"


def test_fields_after_the_first_defaults_all_have_defaults() -> None:
    """What is appended must be optional: arrays are read by place."""
    for union in CONVERSATIONS.values():
        for cls in members(union):
            if not issubclass(cls, ArrayMessage):
                continue
            needed = [field.required for field in msgspec.structs.fields(cls)]
            assert needed == sorted(needed, reverse=True), cls.__name__


@pytest.mark.parametrize("conversation", sorted(CONVERSATIONS))
def test_a_truncated_message_is_refused(conversation: str) -> None:
    decoder: Decoder[msgspec.Struct] = Decoder(CONVERSATIONS[conversation])
    tried = 0
    for entry in read_golden():
        if entry["conversation"] != conversation:
            continue
        data = bytes.fromhex(entry["hex"])
        for length in range(len(data)):
            with pytest.raises(BadMessageError):
                decoder.decode(data[:length])
            tried += 1
    assert tried > 0


def test_a_message_of_another_conversation_is_refused() -> None:
    tried = 0
    for entry in read_golden():
        for other, union in CONVERSATIONS.items():
            if other.startswith("records") or entry["conversation"].startswith("records"):
                continue
            tags = {cls.__name__ for cls in members(union)}
            if entry["message"] in tags:
                continue
            with pytest.raises(BadMessageError):
                Decoder(union).decode(bytes.fromhex(entry["hex"]))
            tried += 1
    assert tried > 1000


def test_unions_are_closed_and_tagged_without_doubles() -> None:
    for name, union in CONVERSATIONS.items():
        classes = members(union)
        tags = [cls.__struct_config__.tag for cls in classes]
        assert len(set(tags)) == len(tags), name
