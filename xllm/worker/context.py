"""How long a sequence may grow here: what the model takes, and no more than KV memory holds.

A request that names no limit runs to the end of the context, so the context must fit.
"""

from __future__ import annotations

import structlog

_log = structlog.get_logger("worker")


def fit_context(model_len: int, num_blocks: int, block_size: int) -> int:
    """Tokens of prompt and output, together, that a sequence of a model (or setting) of
    `model_len` may have over so many blocks of KV. Warns where memory is the tighter bound."""
    held = num_blocks * block_size
    if held >= model_len:
        return model_len
    _log.warning(
        "context_cut_to_kv_memory",
        model_len=model_len,
        max_model_len=held,
        num_blocks=num_blocks,
        block_size=block_size,
        hint="more KV memory or a smaller model.max_model_len",
    )
    return held
