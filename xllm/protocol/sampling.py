"""How the tokens of a request are drawn: said by clients, resolved by routers, done by workers."""

from __future__ import annotations

from xllm.protocol.message import MapPart


class SamplingParams(MapPart, frozen=True):
    """Sampling settings of one request; the defaults draw from the model's own distribution.

    Applied in this order: penalties, bias, temperature, top-k, top-p, min-p. Bounds are checked
    by the router before anything is allocated (docs/protocol.md lists them).
    """

    max_tokens: int | None = None
    """New tokens at most; None: what the context leaves."""
    min_tokens: int = 0
    """No stop id, stop string or end of text before this many new tokens."""
    temperature: float = 1.0
    """0 is greedy; the logits are divided by it otherwise."""
    top_k: int = 0
    """Keep the k best candidates; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of best candidates whose probability reaches p."""
    min_p: float = 0.0
    """Keep candidates at least this fraction as probable as the best one."""
    repetition_penalty: float = 1.0
    """Divide (positive) or multiply (negative) logits of tokens in prompt or output."""
    presence_penalty: float = 0.0
    """Subtract once for each token already in the output."""
    frequency_penalty: float = 0.0
    """Subtract for each occurrence in the output."""
    logit_bias: dict[int, float] = {}
    """Added to the logits of these token ids."""
    seed: int | None = None
    """0 to 2**64 - 1; the router draws one where the client gives none."""
    n: int = 1
    """Choices: independent answers to the same prompt."""
    stop: tuple[str, ...] = ()
    """Output ends before the first of these strings."""
    stop_token_ids: tuple[int, ...] = ()
    """Output ends at the first of these ids, which is not shown."""
    ignore_eos: bool = False
    """The model's own end-of-text ids do not end the output."""
    logprobs: int | None = None
    """Alternatives to report a token (0: only the drawn one); None: no logprobs. Raw
    log-softmax of the model's logits, before penalties, bias and temperature."""
    prompt_logprobs: int | None = None
    """The same for each prompt token after the first. Bypasses the prefix cache."""
    skip_special_tokens: bool = True
    """Special tokens do not appear in the text."""
    include_stop_str_in_output: bool = False
    """The stop string that ended the output is part of the text."""


class TokenLogprobs(MapPart, frozen=True):
    """One token's log-probability, its rank (1: the best) and its best alternatives."""

    token_id: int
    logprob: float
    rank: int = 0
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
