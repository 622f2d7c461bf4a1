"""Messages of a later version: longer than ours, and understood as ours."""

from __future__ import annotations

import msgspec
import pytest

from scripts.docs.examples import CONVERSATIONS
from scripts.docs.golden import read_golden
from xllm.cli.chaos.other_version import MORE, LaterEncoder, as_later
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.message import PROTOCOL_VERSION
from xllm.protocol.records import InstanceRecord

RECORD = InstanceRecord(
    name="i", incarnation="1", endpoint="e", bus_endpoint="b", model="m", model_path="",
    max_model_len=1, vocab_size=2, block_size=4, num_blocks=8, protocol=PROTOCOL_VERSION,
)  # fmt: skip


@pytest.mark.parametrize("conversation", sorted(CONVERSATIONS))
def test_every_message_with_more_fields_is_understood(conversation):
    decoder = Decoder(CONVERSATIONS[conversation])
    entries = [one for one in read_golden() if one["conversation"] == conversation]
    assert entries
    for entry in entries:
        message = decoder.decode(bytes.fromhex(entry["hex"]))
        speaks = getattr(message, "protocol", PROTOCOL_VERSION)  # records say it
        later = LaterEncoder(speaks).encode(message)
        assert MORE.encode() in later
        assert len(later) > len(encode(message))
        assert decoder.decode(later) == message, entry["message"]


def test_parts_have_more_fields_too():
    class Part(msgspec.Struct, array_like=True):
        number: int

    class Whole(msgspec.Struct, tag=True):
        parts: tuple[Part, ...]
        by_name: dict[str, Part]

    found = as_later(Whole((Part(1),), {"x": Part(2)}), 1)
    assert found == {
        "type": "Whole",
        "parts": [[1, MORE]],
        "by_name": {"x": [2, MORE]},
        "later": MORE,
    }


@pytest.mark.parametrize("version", [0, 1, 2])
def test_an_instance_says_the_version_that_it_is_told(version):
    found = Decoder(InstanceRecord).decode(LaterEncoder(version).encode(RECORD))
    assert found == msgspec.structs.replace(RECORD, protocol=version)
