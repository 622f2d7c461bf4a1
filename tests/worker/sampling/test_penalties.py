"""Penalties, bias and filters against transformers' logits processors."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from xllm.protocol.sampling import SamplingParams
from xllm.worker.sampling.candidates import find_candidates
from xllm.worker.sampling.counts import TokenCounts
from xllm.worker.sampling.edits import apply_edits
from xllm.worker.sampling.rows import SampleRow

VOCAB = 300
SEEDS = range(8)


def history(rng: random.Random) -> tuple[list[int], list[int]]:
    return rng.choices(range(VOCAB), k=20), rng.choices(range(40), k=rng.randrange(1, 60))


def logits_of(seed: int) -> torch.Tensor:
    return torch.randn((1, VOCAB), generator=torch.Generator().manual_seed(seed)) * 3


def edited(logits: torch.Tensor, row: SampleRow) -> torch.Tensor:
    """The row's edited logits, from the middle of a batch of rows with other edits."""
    params = SamplingParams(
        repetition_penalty=1.9, frequency_penalty=1, logit_bias={3: 5.0}, min_tokens=9
    )
    noise = SampleRow(params, 0, 3, [1, 2], [3, 3], (4,))
    batch = torch.cat([logits_of(90), logits, logits_of(91)])
    apply_edits(batch, [noise, row, noise])
    return batch[1:2]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty(seed: int, penalty: float) -> None:
    prompt, output = history(random.Random(seed))
    row = SampleRow(SamplingParams(repetition_penalty=penalty), 0, 0, prompt, output)
    oracle = RepetitionPenaltyLogitsProcessor(penalty)
    expected = oracle(torch.tensor([prompt + output]), logits_of(seed))
    torch.testing.assert_close(edited(logits_of(seed), row), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_counts_that_are_kept_equal_counts_made_anew(seed: int) -> None:
    prompt, output = history(random.Random(seed))
    counts = TokenCounts(prompt, output[:3])
    for token in output[3:]:
        counts.add(token)
    assert sorted(counts.seen_ids) == sorted({*prompt, *output})
    found = dict(zip(counts.output_ids, counts.output_counts, strict=True))
    assert found == Counter(output)
    params = SamplingParams(repetition_penalty=1.3, presence_penalty=0.8, frequency_penalty=0.1)
    kept = SampleRow(params, 0, 0, prompt, output, counts=counts)
    anew = SampleRow(params, 0, 0, prompt, output)
    assert torch.equal(edited(logits_of(seed), kept), edited(logits_of(seed), anew))


@pytest.mark.parametrize("seed", SEEDS)
def test_presence_and_frequency_penalties(seed: int) -> None:
    # transformers has none of the two: their definition, with a count by hand.
    prompt, output = history(random.Random(seed))
    params = SamplingParams(presence_penalty=0.8, frequency_penalty=-0.3)
    found = edited(logits_of(seed), SampleRow(params, 0, 0, prompt, output))
    expected = logits_of(seed)
    for token in range(VOCAB):
        if count := output.count(token):
            expected[0, token] -= 0.8 - 0.3 * count
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_logit_bias(seed: int) -> None:
    bias = {token: random.Random(token).uniform(-9, 9) for token in (0, 5, VOCAB - 1)}
    row = SampleRow(SamplingParams(logit_bias=bias), 0, 0, [], [])
    oracle = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    expected = oracle(torch.tensor([[1, 2]]), logits_of(seed))
    torch.testing.assert_close(edited(logits_of(seed), row), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_output", [0, 3, 4, 5])
def test_min_tokens(num_output: int) -> None:
    prompt, output = [1, 2, 3], [7] * num_output
    row = SampleRow(SamplingParams(min_tokens=4), 0, 0, prompt, output, (5, 9))
    oracle = MinNewTokensLengthLogitsProcessor(len(prompt), 4, [5, 9], device="cpu")
    expected = oracle(torch.tensor([prompt + output]), logits_of(1))
    torch.testing.assert_close(edited(logits_of(1), row), expected)


def test_repetition_comes_before_what_is_added() -> None:
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, logit_bias={0: 10.0})
    logits = torch.tensor([[4.0, -4.0, 1.0]])
    apply_edits(logits, [SampleRow(params, 0, 0, [1], [0])])
    assert logits.tolist() == [[4 / 2 - 1 + 10, -4 * 2, 1.0]]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("window", [64, VOCAB])
@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 12},
        {"top_p": 0.7},
        {"min_p": 0.08},
        {"temperature": 0.5, "top_k": 40, "top_p": 0.9},
        {"temperature": 1.8, "top_k": 50, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=str,
)
def test_filters_keep_what_transformers_keeps(seed: int, window: int, params: dict) -> None:
    sampling = SamplingParams(**params)
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits_of(seed))
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    expected = set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())
    logits = logits_of(seed)
    found = find_candidates(logits, logits.amax(dim=1), [sampling], window)
    assert found.clear.all()
    assert set(found.ids[0][found.keep[0]].tolist()) == expected
