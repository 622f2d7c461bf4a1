"""Which options of an item no executor here honours yet: they are refused, never ignored."""

from __future__ import annotations

from xllm.errors import EngineError
from xllm.protocol.step import StepItem


def check_options(item: StepItem) -> None:
    """Raise EngineError, naming it, for the first option of `item` that is not supported, and
    for token ids that are not one a row."""
    options = item.options
    if options is None:
        return
    name = f"sequence {item.seq}"
    unsupported = {
        "placeholders": options.source_step >= 0 or options.source_row >= 0,
        "positions": bool(options.positions),
        "masks": options.mask_row >= 0,
        "adapters": bool(options.adapter),
        "data-parallel ranks": options.dp_rank != 0,
        "holds of KV": options.hold,
    }
    for words, asked in unsupported.items():
        if asked:
            raise EngineError(f"{name}: {words} are not supported")
    if options.token_ids and len(options.token_ids) != item.num_tokens:
        raise EngineError(f"{name}: {len(options.token_ids)} token ids for {item.num_tokens} rows")
