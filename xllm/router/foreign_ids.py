"""The refusal of token ids of which one is none of the model's: it says which, and what it is.

Pure. To be asked once a quicker look has found that there is one: this looks at each of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from xllm.errors import InvalidRequestError
from xllm.protocol.wrong_value import shown


def foreign_id(param: str, ids: Iterable[int], vocab_size: int) -> InvalidRequestError:
    """The error for the first of `ids` outside 0 to vocab_size - 1, with its index in the field
    `param`. One of them must be."""
    index, one = next((index, one) for index, one in enumerate(ids) if not 0 <= one < vocab_size)
    place = f"{param}[{index}]"
    return InvalidRequestError(
        f"{place} must be an id from 0 to {vocab_size - 1}, not {shown(one)}", param=place
    )
