"""Reads the bodies of plain completions, most of which is often one long list of token ids.

Such a list is taken out of the body and read by itself, without an object for each id; the JSON
decoder sees the rest, with a mark in the list's place. Invariant: a body gives what the decoder of
any body gives for it, or the same error.
"""

from __future__ import annotations

import base64
import os
import re

import msgspec

from xllm.protocol.native.token_ids import NativeTokenIds
from xllm.router.http.schema import CompletionBody, IdsBody, PackedBody, decode_body

_IDS_FOLLOW = re.compile(rb'"prompt"\s*:\s*\[(?=\s*\d)')


class CompletionDecoder:
    """Of bodies of POST /v1/completions."""

    def __init__(self, native: NativeTokenIds | None) -> None:
        """`native`: what reads lists of ids, where there is one."""
        self._any = msgspec.json.Decoder(CompletionBody)
        self._ids = msgspec.json.Decoder(IdsBody)
        self._packed = msgspec.json.Decoder(PackedBody)
        self._native = native
        # No client can know it, so that what comes back as it is what was put there.
        self._mark = os.urandom(18)
        self._marked = b'"' + base64.b64encode(self._mark) + b'"'

    def decode(self, data: bytes) -> CompletionBody:
        """See decode_body. Most prompts that begin with an id are nothing but ids."""
        found = _IDS_FOLLOW.search(data)
        if found is not None:
            try:
                packed = None if self._native is None else self._take_out(data, found.end())
                return self._ids.decode(data) if packed is None else packed
            except (msgspec.MsgspecError, ValueError, RecursionError):
                pass  # several prompts, or no body at all: the other decoder says
        return decode_body(self._any, data)

    def _take_out(self, data: bytes, start: int) -> PackedBody | None:
        """The body whose list of ids begins there; None where that is another list, or is not the
        prompt."""
        assert self._native is not None
        end = data.find(b"]", start)
        packed = None if end < 0 else self._native.read_ids(data[start:end])
        if packed is None:
            return None
        body = self._packed.decode(data[: start - 1] + self._marked + data[end + 1 :])
        if body.prompt != self._mark:  # it stands in another field, or a later prompt holds
            return None
        return msgspec.structs.replace(body, prompt=packed)
