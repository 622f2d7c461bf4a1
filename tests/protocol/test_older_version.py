"""Processes of before: what they do not know is passed over or refused, and ends no connection.

What docs/operations.md says of upgrading, by classes of messages as they were before.
"""

from __future__ import annotations

import functools
import operator
import typing

import msgspec
import pytest

from tests.protocol.socket_pairs import run, until
from xllm.protocol.bus import InstanceHeartbeat, RouterPresence
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.instance import (
    AdmitRequest,
    CancelRequest,
    FrameRefused,
    HeldTokens,
    InstanceReply,
    InstanceRequest,
    QueryTokens,
    RequestEnded,
    TokenBatch,
)
from xllm.protocol.message import ArrayMessage, ArrayPart, MapPart
from xllm.protocol.records import DaemonRecord, InstanceRecord, RouterRecord
from xllm.protocol.registry.holder import Holder, NameClaim, NameState, own_process
from xllm.protocol.registry_wire import Entry
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.pubsub import PublisherSocket, SubscriberSocket
from xllm.protocol.transport.router import RouterSocket


def before(cls, field, types=None):
    """The class as it was before that field, which is its last one, and others of these types."""
    fields = msgspec.structs.fields(cls)
    assert fields[-1].name == field
    [base] = [one for one in (ArrayMessage, ArrayPart, MapPart) if issubclass(cls, one)]
    made = []
    for one in fields[:-1]:
        kind = (types or {}).get(one.name, one.type)
        required = one.default is one.default_factory is msgspec.NODEFAULT
        made.append((one.name, kind) if required else (one.name, kind, one.default))
    return msgspec.defstruct(cls.__name__, made, bases=(base,), frozen=True)


def without(union, *classes):
    """The union without those."""
    kept = [one for one in typing.get_args(union) if one not in classes]
    assert len(kept) == len(typing.get_args(union)) - len(classes)
    return functools.reduce(operator.or_, kept)


def says(message):
    """What a message says, but for the field that it may have more."""
    return {name: getattr(message, name) for name in type(message).__struct_fields__}


ADMIT = AdmitRequest("r", 2, "m", (1, 2), SamplingParams(), tenant="t", alone=True)
ENDED = RequestEnded("r", 2, "worker_lost", "it ended", blameless=True, shared=True)
COMMON = {"name": "n", "incarnation": "1", "bus_endpoint": "b", "process": own_process()}
RECORDS = (
    InstanceRecord(
        endpoint="e", model="m", model_path="", max_model_len=8, vocab_size=9, block_size=4,
        num_blocks=2, **COMMON,
    ),
    DaemonRecord(endpoint="e", node="here", **COMMON),
    RouterRecord(zmq_endpoint="z", **COMMON),
)  # fmt: skip


@pytest.mark.parametrize(
    ("message", "field", "default"),
    [(ADMIT, "alone", False), *((record, "process", "") for record in RECORDS)],
    ids=lambda value: type(value).__name__,
)
def test_older_processes_pass_over_a_field_and_newer_ones_do_without_it(message, field, default):
    old = before(type(message), field)
    understood = msgspec.msgpack.decode(encode(message), type=old)
    assert says(understood) == {k: v for k, v in says(message).items() if k != field}
    back = Decoder(type(message)).decode(encode(understood))
    assert back == msgspec.structs.replace(message, **{field: default})


def test_older_routers_pass_over_whether_a_request_had_company():
    old_ended = before(RequestEnded, "shared")
    fields = [
        (one.name, tuple[old_ended, ...] if one.name == "ended" else one.type, ())
        for one in msgspec.structs.fields(TokenBatch)
    ]
    old_batch = msgspec.defstruct("TokenBatch", fields, bases=(ArrayMessage,), frozen=True)
    understood = msgspec.msgpack.decode(encode(TokenBatch(ended=(ENDED,))), type=old_batch)
    [ended] = understood.ended
    assert says(ended) == {k: v for k, v in says(ENDED).items() if k != "shared"}
    back = Decoder(TokenBatch).decode(encode(understood))
    assert back.ended == (msgspec.structs.replace(ENDED, shared=False),)


def test_an_older_instance_refuses_a_question_and_keeps_the_connection():
    async def main():
        transport = Transport()
        heard, answers, gone = [], [], []
        old = RouterSocket(
            transport,
            "tcp://127.0.0.1:0",
            Decoder(without(InstanceRequest, QueryTokens)),
            lambda identity, message, frames: heard.append(message),
            on_gone=gone.append,
            bad_reply=lambda text: FrameRefused(text),
        )
        new = DealerSocket(
            transport,
            old.endpoint,
            Decoder(InstanceReply),
            lambda message, frames: answers.append(message),
            on_gone=lambda: gone.append(b""),
        )
        for message in (ADMIT, QueryTokens(1, "r"), CancelRequest("r", 2)):
            new.send(message)
        await until(lambda: len(heard) == 2 and answers)
        assert [type(one) for one in heard] == [AdmitRequest, CancelRequest]
        assert [type(one) for one in answers] == [FrameRefused]
        assert transport.num_bad == 1
        assert new.connected
        assert not gone
        for thing in (new, old, transport):
            thing.close()

    run(main())


def test_an_older_router_passes_over_an_answer_and_keeps_the_connection():
    async def main():
        transport = Transport()
        heard, gone = [], []
        new = RouterSocket(
            transport,
            "tcp://127.0.0.1:0",
            Decoder(InstanceRequest),
            lambda identity, message, frames: [
                new.send(identity, one) for one in (HeldTokens(1, ((5,),)), TokenBatch())
            ],
        )
        old = DealerSocket(
            transport,
            new.endpoint,
            Decoder(without(InstanceReply, HeldTokens)),
            lambda message, frames: heard.append(message),
            on_gone=lambda: gone.append(1),
        )
        old.send(ADMIT)
        await until(lambda: heard)
        assert heard == [TokenBatch()]
        assert transport.num_bad == 1
        assert old.connected
        assert not gone
        for thing in (old, new, transport):
            thing.close()

    run(main())


def test_an_older_listener_passes_over_a_word_on_a_bus():
    async def main():
        transport = Transport()
        heard = []
        bus = PublisherSocket(transport, "tcp://127.0.0.1:0")
        listener = SubscriberSocket(
            transport,
            bus.endpoint,
            Decoder(InstanceHeartbeat),
            lambda topic, message: heard.append(message),
        )

        def said(number):
            bus.publish(b"x", RouterPresence("r", "1", number))
            bus.publish(b"x", InstanceHeartbeat("i", "1", number, "ready"))
            return len(heard) >= 3

        await until(lambda: said(len(heard) + 1))
        assert transport.num_bad >= 2
        for thing in (listener, bus, transport):
            thing.close()

    run(main())


def test_the_name_of_an_older_process_is_waited_for_and_that_of_a_newer_one_is_not():
    """An older one says not which process it is: that it has ended shows by its lease alone."""
    for record in RECORDS:
        for known, state in ((record, NameState.FREE), (None, NameState.HELD)):
            written = record if known else msgspec.structs.replace(record, process="")
            entry = Entry("/xllm/c/instances/n", encode(written), 3, 4, 7)
            claim = NameClaim("2", 5.0, lambda process: process == own_process())
            assert claim.judge(entry, 0, 1.0, 1.0) is state
    assert Decoder(Holder).decode(encode(RECORDS[0])) == Holder("1", own_process())
