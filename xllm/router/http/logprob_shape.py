"""Log-probabilities in OpenAI's two shapes, from the protocol's one.

Pure: knows token ids and the bytes they stand for. The legacy shape keys a position's
alternatives by text, so bytes that are no text are written `bytes:\\xNN`, which no two ids of
different bytes share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from xllm.protocol.sampling import TokenLogprobs

BytesOf = Callable[[int], bytes]
"""The bytes of a token id."""

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def finite(logprob: float) -> float:
    """A log-probability that JSON can carry."""
    return max(logprob, LOWEST) if logprob == logprob else LOWEST


def chat_logprobs(entries: Iterable[TokenLogprobs], bytes_of: BytesOf) -> dict[str, Any]:
    """`logprobs` of a chat choice or chunk."""
    return {"content": [chat_entry(entry, bytes_of) for entry in entries], "refusal": None}


def chat_entry(entry: TokenLogprobs, bytes_of: BytesOf) -> dict[str, Any]:
    """One token with its alternatives."""
    shown = chat_token(entry.token_id, entry.logprob, bytes_of)
    shown["top_logprobs"] = [
        chat_token(token_id, logprob, bytes_of)
        for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
    ]
    return shown


def chat_token(token_id: int, logprob: float, bytes_of: BytesOf) -> dict[str, Any]:
    """A token as text, as bytes and with its logprob."""
    data = bytes_of(token_id)
    text = data.decode("utf-8", "replace")
    return {"token": text, "logprob": finite(logprob), "bytes": list(data)}


def legacy_text(data: bytes) -> str:
    """The text of a token, or its bytes where it is only a part of a character."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def legacy_logprobs(
    entries: Sequence[TokenLogprobs | None],
    bytes_of: BytesOf,
    offset: int,
    first_id: int | None = None,
) -> tuple[dict[str, Any], int]:
    """`logprobs` of a plain completion's choice or chunk that begins at character `offset`,
    and the offset behind it. An entry None (a prompt's first token, `first_id`) has no
    logprob."""
    tokens: list[str] = []
    logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for entry in entries:
        token_id = first_id if entry is None else entry.token_id
        data = b"" if token_id is None else bytes_of(token_id)
        tokens.append(legacy_text(data))
        offsets.append(offset)
        offset += len(data.decode("utf-8", "ignore"))
        if entry is None:
            logprobs.append(None)
            tops.append(None)
            continue
        logprobs.append(finite(entry.logprob))
        top = {
            legacy_text(bytes_of(other)): finite(value)
            for other, value in zip(entry.top_ids, entry.top_logprobs, strict=True)
        }
        top.setdefault(tokens[-1], logprobs[-1] or 0.0)
        tops.append(top)
    shown = {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": offsets,
    }
    return shown, offset
