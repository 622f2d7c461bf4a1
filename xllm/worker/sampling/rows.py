"""What goes into the sampler and what comes out: the types, no decision.

A row is one line of logits and all that the draw from it depends on; nothing is remembered
between calls, so there is no slot state that could leak from one sequence into the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from xllm.protocol.sampling import SamplingParams
from xllm.worker.sampling.counts import TokenCounts


@dataclasses.dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of logits to draw from.

    `position` is that of the token to draw, absolute in prompt + output (the number of tokens
    before it). `num_samples` 1 draws for `choice`; n > 1 draws for choices 0 to n - 1 from the
    same row. `stop_ids` are masked while fewer than `sampling.min_tokens` tokens are out.
    `prompt_ids` and `output_ids` are read during the call only and only where a penalty or
    min_tokens asks for them: hand over the live lists, no copies. `counts`, where a penalty is
    set, are those of the two, kept by the caller; without them they are counted in the call.
    """

    sampling: SamplingParams
    choice: int
    position: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    stop_ids: Sequence[int] = ()
    num_samples: int = 1
    counts: TokenCounts | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class LogprobTable:
    """Log-probabilities of some tokens and their best alternatives, on the CPU.

    ids: int32 [rows, 1 + num_top], the token itself first, then the best in falling order;
    logprobs: float32 [rows, 1 + num_top], raw log-softmax of the model's logits;
    ranks: int32 [rows], 1 for the most probable token; equals are ranked by
    rising id.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor

    @property
    def num_rows(self) -> int:
        """Tokens described."""
        return self.ids.shape[0]

    @property
    def num_top(self) -> int:
        """Alternatives a token."""
        return self.ids.shape[1] - 1


@dataclasses.dataclass(frozen=True, slots=True)
class SampleResult:
    """What one call of the sampler gave, one entry a SampleRow, in order.

    `tokens[i]` has the row's `num_samples` tokens; it is empty where row i is in `failed`
    (row index, reason: logits that are not numbers). `logprobs[i]` is None unless
    `sampling.logprobs` asks for them.
    """

    tokens: list[tuple[int, ...]]
    logprobs: list[LogprobTable | None]
    failed: list[tuple[int, str]]
