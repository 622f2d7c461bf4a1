"""The sampler by its definition, in plain Python and double precision: slow and obvious."""

from __future__ import annotations

import math
from collections import Counter

from xllm.worker.sampling.noise import draw_keys, gumbel, token_bits
from xllm.worker.sampling.rows import SampleRow


def edited(logits: list[float], row: SampleRow) -> list[float]:
    """Penalties, bias, mask."""
    params = row.sampling
    out = list(logits)
    for token in {*row.prompt_ids, *row.output_ids}:
        value, penalty = out[token], params.repetition_penalty
        out[token] = value / penalty if value > 0 else value * penalty
    for token, count in Counter(row.output_ids).items():
        out[token] -= params.presence_penalty + params.frequency_penalty * count
    for token, bias in params.logit_bias.items():
        out[token] += bias
    if len(row.output_ids) < params.min_tokens:
        for token in row.stop_ids:
            out[token] = -math.inf
    return out


def kept_tokens(logits: list[float], row: SampleRow) -> list[int]:
    """What the filters leave, best first."""
    params = row.sampling
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    best = logits[order[0]]
    if params.top_k:
        order = order[: params.top_k]
    weight = {token: math.exp((logits[token] - best) / params.temperature) for token in order}
    mass = math.fsum(weight.values())
    kept, before = [], 0.0
    for token in order:
        if kept and params.top_p < 1 and before >= params.top_p * mass:
            break
        kept.append(token)
        before += weight[token]
    if params.min_p:
        kept = [token for token in kept if weight[token] >= params.min_p]
    return kept


def probabilities(logits: list[float], row: SampleRow) -> dict[int, float]:
    """The exact distribution that the row's draws follow."""
    logits = edited(logits, row)
    kept = kept_tokens(logits, row)
    weight = [math.exp((logits[t] - logits[kept[0]]) / row.sampling.temperature) for t in kept]
    return {token: w / math.fsum(weight) for token, w in zip(kept, weight, strict=True)}


def draw(logits: list[float], row: SampleRow) -> tuple[int, ...]:
    """The row's tokens."""
    params = row.sampling
    logits = edited(logits, row)
    if params.temperature == 0:
        best = min(range(len(logits)), key=lambda token: (-logits[token], token))
        return (best,) * row.num_samples
    kept = kept_tokens(logits, row)
    choices = [row.choice] if row.num_samples == 1 else range(row.num_samples)
    tokens = []
    for choice in choices:
        keys = draw_keys(params.seed or 0, choice, row.position)
        top = logits[kept[0]]
        tokens.append(
            min(
                (-((logits[t] - top) / params.temperature + gumbel(token_bits(keys, t))), t)
                for t in kept
            )[1]
        )
    return tuple(tokens)
