"""A word of an instance cut in two: what comes before a border, and what begins there. Pure."""

from __future__ import annotations

import msgspec

from xllm.protocol.instance import TokenItem


def cut_at(item: TokenItem, border: int) -> tuple[TokenItem, TokenItem]:
    """The tokens in front of `border`, an index into the choice's output, and those from it on,
    with which the end goes, if `item` has one. Either may have no tokens."""
    ids, logprobs = item.token_ids, item.logprobs
    num_first = min(max(0, border - item.first_index), len(ids))
    first = msgspec.structs.replace(
        item,
        token_ids=ids[:num_first],
        finish_reason="",
        stop_id=-1,
        logprobs=None if logprobs is None else logprobs[:num_first],
    )
    rest = msgspec.structs.replace(
        item,
        first_index=item.first_index + num_first,
        token_ids=ids[num_first:],
        logprobs=None if logprobs is None else logprobs[num_first:],
    )
    return first, rest
