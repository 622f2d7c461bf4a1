"""What the toy engine remembers of one sequence: tokens, block table, what its draws depend on.

It knows nothing of pages' contents. Invariant: `tokens` is prompt + output so far; the first
`prompt_len` of them are the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from xllm.errors import EngineError
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import NewSequence
from xllm.worker.toy.stream import cheap_key, effective_seed


class ToySequence:
    """One sequence, from the plan that names it as new to the one that ends it."""

    __slots__ = ("admitted", "broken", "cheap_key", "choice", "pooling", "prompt_len", "sampling",
                 "seed", "slot", "table", "tokens", "total")  # fmt: skip

    def __init__(
        self, tokens: list[int], prompt_len: int, table: list[int], sampling: SamplingParams,
        choice: int, slot: int = -1, pooling: str = "",
    ) -> None:  # fmt: skip
        self.tokens = tokens
        self.prompt_len = prompt_len
        self.table = table
        self.sampling = sampling
        self.choice = choice
        self.slot = slot  # -1: its block table alone says where its pages are
        self.seed = effective_seed(sampling)
        self.cheap_key: int | None = None
        self.admitted = False  # its first item ran: a cached prefix was read back
        self.broken = False  # a page of its prefix did not read back right
        self.pooling = pooling
        self.total = 0  # of the entries that were written here, for pooling by the mean

    @classmethod
    def learn(cls, new: NewSequence, known: Mapping[int, ToySequence]) -> Self:
        """The sequence that a plan introduces; a fork takes its parent's prompt."""
        if new.adapter:
            raise EngineError(f"sequence {new.seq}: adapters are not supported")
        if new.parent < 0:
            prompt = list(new.prompt_ids)
        else:
            parent = known.get(new.parent)
            if parent is None:
                raise EngineError(f"sequence {new.seq} forks unknown sequence {new.parent}")
            prompt = parent.tokens[: parent.prompt_len]
        tokens, table = [*prompt, *new.output_ids], list(new.block_ids)
        sampling, choice, slot = new.sampling, new.choice, new.slot
        return cls(tokens, len(prompt), table, sampling, choice, slot, new.pooling)

    def key(self, choice: int) -> int:
        """The key of a choice's stream in the mode without memory."""
        if choice != self.choice:
            return cheap_key(self.tokens[: self.prompt_len], self.sampling, choice)
        if self.cheap_key is None:
            self.cheap_key = cheap_key(self.tokens[: self.prompt_len], self.sampling, choice)
        return self.cheap_key
