"""The bounds of sampling parameters. Pure; each refusal names the field and its bound."""

from __future__ import annotations

from xllm.config.router import RouterSettings
from xllm.errors import ContextLengthError
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.wrong_value import shown
from xllm.router.foreign_ids import foreign_id
from xllm.router.model_facts import ModelFacts, refuse

MAX_SEED = (1 << 64) - 1
MAX_STOP_IDS = 256


def check_sampling(params: SamplingParams, limits: RouterSettings, facts: ModelFacts) -> None:
    """Sampling parameters. The common defaults cost a comparison each."""
    _check_counts(params, limits, facts)
    _check_number("temperature", params.temperature, 0.0, 2.0)
    _check_number("top_p", params.top_p, 0.0, 1.0, open_low=True)
    _check_number("min_p", params.min_p, 0.0, 1.0)
    if params.top_k < -1:
        raise refuse("top_k", "must be -1 or 0 (all), or a number of candidates")
    _check_number("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _check_number("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    _check_number("repetition_penalty", params.repetition_penalty, 0.0, 10.0, open_low=True)
    if params.seed is not None and not 0 <= params.seed <= MAX_SEED:
        raise refuse("seed", "must be from 0 to 2**64 - 1")
    if params.logit_bias:
        _check_bias(params.logit_bias, limits, facts)
    if params.stop:
        _check_stops(params.stop, limits)
    if params.stop_token_ids:
        ids = params.stop_token_ids
        if len(ids) > MAX_STOP_IDS:
            raise refuse("stop_token_ids", f"must be at most {MAX_STOP_IDS} ids")
        if min(ids) < 0 or max(ids) >= facts.vocab_size:
            raise foreign_id("stop_token_ids", ids, facts.vocab_size)


def _check_counts(params: SamplingParams, limits: RouterSettings, facts: ModelFacts) -> None:
    if not 1 <= params.n <= limits.max_choices:
        raise refuse("n", f"must be from 1 to {limits.max_choices}, not {params.n}")
    if params.max_tokens is not None and params.max_tokens < 1:
        raise refuse("max_tokens", f"must be at least 1, not {params.max_tokens}")
    if params.max_tokens is not None and params.max_tokens > facts.max_model_len:
        raise ContextLengthError(
            f"max_tokens is {params.max_tokens}; the context is {facts.max_model_len} tokens",
            param="max_tokens",
        )
    if params.min_tokens:
        bound = facts.max_model_len if params.max_tokens is None else params.max_tokens
        if not 0 <= params.min_tokens <= bound:
            raise refuse(
                "min_tokens", f"must be from 0 to {bound} (max_tokens), not {params.min_tokens}"
            )
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(params, name)
        if count is not None and not 0 <= count <= limits.max_logprobs:
            raise refuse(name, f"must be from 0 to {limits.max_logprobs}, not {count}")


def _check_number(
    param: str, value: float, low: float, high: float, open_low: bool = False
) -> None:
    # The comparison is false for NaN, too.
    if not (low < value if open_low else low <= value) or not value <= high:
        bracket = "more than" if open_low else "at least"
        raise refuse(param, f"must be {bracket} {low:g} and at most {high:g}, not {value}")


def _check_bias(bias: dict[int, float], limits: RouterSettings, facts: ModelFacts) -> None:
    if len(bias) > limits.max_logit_bias:
        raise refuse(
            "logit_bias", f"must have at most {limits.max_logit_bias} entries, not {len(bias)}"
        )
    for one, value in bias.items():
        if not 0 <= one < facts.vocab_size:
            bound = f"must have ids from 0 to {facts.vocab_size - 1} as keys"
            raise refuse("logit_bias", f"{bound}, not {shown(one)}")
        if not abs(value) <= 100:  # nor is NaN
            raise refuse("logit_bias", f"must have values from -100 to 100, not {value} for {one}")


def _check_stops(stops: tuple[str, ...], limits: RouterSettings) -> None:
    if len(stops) > limits.max_stop_strings:
        raise refuse("stop", f"must be at most {limits.max_stop_strings} strings")
    for stop in stops:
        if not 1 <= len(stop) <= limits.max_stop_chars:
            raise refuse("stop", f"must hold strings of 1 to {limits.max_stop_chars} characters")
