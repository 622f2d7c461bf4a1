"""The ids of a stream's events: where a client is, signed, so that any router can go on from there.

An id names the answer, its seed, a digest of the body that asked for it and, for each choice, how
many tokens were said, a hash of them and how far its events went. It holds no secret and no text.
Its signature covers the tenant, too: an id is worth something to who got it, and for the body that
it was given for. Pure, save the cluster's key, which is given. Size: about 80 characters, and 16
for each choice.
"""

from __future__ import annotations

import binascii
import dataclasses
import hashlib
import hmac
import struct
from array import array
from collections.abc import Sequence
from enum import IntEnum

from xllm.errors import InvalidRequestError, PermissionDeniedError
from xllm.router.front import Tenant

PARAM = "last-event-id"
VERSION = 1
MAX_ID_CHARS = 16 << 10
HASH_BYTES = 8
"""Of a choice's tokens: enough against chance; against forgery stands the signature."""
BODY_BYTES = 12
SIGNATURE_BYTES = 16
_HEAD = struct.Struct(f"<B16sIQ{BODY_BYTES}sB")
_LABEL = b"xllm event id v1"
_STAGE_BITS = 2
_PLACE_BYTES = 4


class EventStage(IntEnum):
    """How far the events of a choice went at a number of tokens; in this order."""

    NOTHING = 0
    SAID = 1
    """It has begun; the text of its tokens is said."""
    LAST_TEXT = 2
    """And the text that was held back, for no more will come."""
    ENDED = 3
    """And how it ended."""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """How far one choice was said."""

    num_tokens: int = 0
    stage: EventStage = EventStage.NOTHING
    digest: bytes = b""
    """Of its tokens; empty where there are none."""

    @property
    def order(self) -> tuple[int, int]:
        """Places of a choice in their order."""
        return self.num_tokens, self.stage

    def encode(self) -> bytes:
        """Its bytes in an id."""
        return encode_place(self.num_tokens, self.stage, self.digest)


def encode_place(num_tokens: int, stage: int, digest: bytes) -> bytes:
    """A place as four bytes, count and stage, and the digest where there is one."""
    return (num_tokens << _STAGE_BITS | stage).to_bytes(_PLACE_BYTES, "little") + digest


@dataclasses.dataclass(frozen=True, slots=True)
class Stream:
    """What stays the same in all ids of a stream."""

    request_id: str
    """32 hexadecimal digits."""
    created: int
    seed: int
    """Of the first prompt, where the body has none."""
    body: bytes
    """`body_digest` of what was posted."""


@dataclasses.dataclass(frozen=True, slots=True)
class LastEvent:
    """What an id says."""

    stream: Stream
    places: tuple[Place, ...]
    has_usage: bool
    """Whether the usage was said."""


def body_digest(body: bytes) -> bytes:
    """Stands for a body in an id."""
    return hashlib.sha256(body).digest()[:BODY_BYTES]


def token_digest(tokens: hashlib._Hash) -> bytes:
    """Stands for the tokens of a choice."""
    return tokens.digest()[:HASH_BYTES]


class EventSigner:
    """Makes and reads ids for one tenant. `key`: what the routers of the cluster share; `before`:
    what they shared earlier, which is read and not made."""

    __slots__ = ("_before", "_key")

    def __init__(self, key: bytes, tenant: Tenant, *before: bytes) -> None:
        name = tenant.name.encode()
        salt = hashlib.sha256(tenant.salt).digest()
        bound = _LABEL + salt + name
        self._key = hmac.digest(key, bound, "sha256")
        self._before = [hmac.digest(one, bound, "sha256") for one in before]

    def head(self, stream: Stream, has_usage: bool) -> bytes:
        """The bytes of an id before those of its choices."""
        request = bytes.fromhex(stream.request_id)
        return _HEAD.pack(VERSION, request, stream.created, stream.seed, stream.body, has_usage)

    def sign(self, payload: bytes) -> bytes:
        """The id that stands for these bytes."""
        return binascii.b2a_base64(payload + _signature(payload, self._key), newline=False)

    def read(self, value: bytes, body: bytes, num_choices: int) -> LastEvent:
        """What an id says; `body`: what was posted with it, of `num_choices` over all prompts.

        InvalidRequestError: it is no id, or one of another body. PermissionDeniedError: it is not
        one that this cluster gave to this tenant."""
        payload = self._open(value)
        version, request, created, seed, digest, has_usage = _HEAD.unpack_from(payload)
        if version != VERSION:
            raise _bad(f"is of version {version}, not {VERSION}")
        if not hmac.compare_digest(digest, body_digest(body)):
            raise _bad("belongs to another body: the same one must be posted again")
        stream = Stream(request.hex(), created, seed, digest)
        places = _read_places(payload[_HEAD.size :])
        if len(places) != num_choices:
            raise _bad(f"has {len(places)} choices, the body asks for {num_choices}")
        return LastEvent(stream, places, bool(has_usage))

    def _open(self, value: bytes) -> bytes:
        if len(value) > MAX_ID_CHARS:
            raise _bad(f"is longer than {MAX_ID_CHARS} characters")
        try:
            data = binascii.a2b_base64(value, strict_mode=True)
        except (binascii.Error, ValueError) as error:
            raise _bad("is no id of an event of this service") from error
        if len(data) < _HEAD.size + SIGNATURE_BYTES:
            raise _bad("is no id of an event of this service")
        payload, signature = data[:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]
        keys = (self._key, *self._before)
        if not any(hmac.compare_digest(signature, _signature(payload, key)) for key in keys):
            raise PermissionDeniedError(
                "Last-Event-ID was not given to you by this cluster", param=PARAM
            )
        return payload


def _signature(payload: bytes, key: bytes) -> bytes:
    # Keyed BLAKE2 (RFC 7693): four times as fast here as an HMAC, and one is made an event.
    return hashlib.blake2s(payload, key=key, digest_size=SIGNATURE_BYTES).digest()


def _read_places(data: bytes) -> tuple[Place, ...]:
    """The choices of an id whose signature holds: what does not parse is of another version."""
    places: list[Place] = []
    at = 0
    while at < len(data):
        value = int.from_bytes(data[at : at + _PLACE_BYTES], "little")
        at += _PLACE_BYTES
        count = value >> _STAGE_BITS
        size = HASH_BYTES if count else 0
        digest = data[at : at + size]
        at += size
        if at > len(data):
            raise _bad("is no id of an event of this service")
        places.append(Place(count, EventStage(value & (1 << _STAGE_BITS) - 1), digest))
    return tuple(places)


def _bad(text: str) -> InvalidRequestError:
    return InvalidRequestError(f"Last-Event-ID {text}", param=PARAM)


def borders_of(places: Sequence[Place]) -> tuple[int, ...]:
    """Behind how many tokens of each choice a delta must end, so that what was said can be told
    from what was not; 0: nothing was said, or all."""
    return tuple([one.num_tokens if one.stage <= EventStage.SAID else 0 for one in places])


def proven(places: Sequence[Place], outputs: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """For each choice its tokens up to where the client is, if `outputs` has them and they are the
    same; else none. A choice whose end was said is drawn again: how it ended is not known."""
    found: list[Sequence[int]] = [()] * len(places)
    for choice, (place, ids) in enumerate(zip(places, outputs, strict=False)):
        count = place.num_tokens
        if count and place.stage <= EventStage.SAID and len(ids) >= count:
            said = ids[:count]
            if _digest_of(said) == place.digest:
                found[choice] = said
    return found


def _digest_of(ids: Sequence[int]) -> bytes:
    """Of ids as somebody else says them: empty where one is no id at all."""
    try:
        packed = array("I", ids)
    except OverflowError:
        return b""
    return token_digest(hashlib.sha256(packed))
