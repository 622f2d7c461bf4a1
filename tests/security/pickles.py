"""Programs for an unpickler, and the messages that carry them."""

from __future__ import annotations

import os
import zlib

import msgpack

from scripts.docs.examples import members
from xllm.protocol.authority import CONVERSATIONS, Subscribe


def pickles(path) -> list[bytes]:
    """Programs for an unpickler that make a file, in protocols 0 and 2."""
    target = os.fspath(path).encode()
    command = b"touch " + target
    return [
        b"cbuiltins\nopen\n(S'" + target + b"'\nS'w'\ntR.",
        b"\x80\x02cos\nsystem\nX" + len(command).to_bytes(4, "little") + command + b"\x85R.",
    ]


def frames_of(poison: bytes) -> list[list[bytes]]:
    """Messages with a pickle first, last, in every place of every message, in every extension."""
    packed = zlib.compress(poison)
    found = [[poison], [b"", poison], [poison, poison], [msgpack.packb(poison)]]
    found += [[packed], [b"", packed], [msgpack.packb(packed)]]
    for _, union in CONVERSATIONS.values():
        for message in members(union):
            if message is Subscribe:
                continue
            name = message.__struct_config__.tag
            fields = message.__struct_fields__
            if message.__struct_config__.array_like:
                for place in range(len(fields)):
                    values = [None] * len(fields)
                    values[place] = poison
                    found.append([msgpack.packb([name, *values]), poison])
            else:
                found += [
                    [msgpack.packb({"type": name, "id": None, field: poison})]
                    for field in message.__struct_encode_fields__
                ]
    length = len(poison).to_bytes(2, "big")
    found += [[b"\xc8" + length + bytes([code]) + poison] for code in range(256)]
    found.append([msgpack.packb(["AdmitRequest", poison])])
    return found
