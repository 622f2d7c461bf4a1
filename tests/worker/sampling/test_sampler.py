"""The sampler against its definition, the exact distribution, and itself in other batches."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.sampling import reference
from tests.worker.torch_watch import TorchWatch
from xllm.errors import InvariantError
from xllm.protocol.sampling import SamplingParams
from xllm.worker.sampling import candidates, draw, sampler
from xllm.worker.sampling.greedy import best_tokens
from xllm.worker.sampling.logprobs import SLICE_ELEMENTS
from xllm.worker.sampling.rows import SampleRow
from xllm.worker.sampling.sampler import Sampler

CPU = torch.device("cpu")
VOCAB = 97


def row_of(position: int = 5, choice: int = 0, n: int = 1, **params) -> SampleRow:
    return SampleRow(SamplingParams(**params), choice, position, [1, 2, 3], [4, 4], (0,), n)


def some_logits(rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((rows, vocab), generator=generator) * scale


def tokens_of(logits: torch.Tensor, rows: list[SampleRow]) -> list[tuple[int, ...]]:
    result = Sampler(logits.shape[1], CPU).sample(logits.clone(), rows)
    assert result.failed == []
    return result.tokens


# Logits that are multiples of 1/4: sums and penalties below are exact in float32, ties abound.
LOGITS = st.lists(
    st.integers(-24, 24).map(lambda quarter: quarter / 4), min_size=VOCAB, max_size=VOCAB
)
PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 2, 5, 20, 96, 97, 500]),
        "top_p": st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 2.0]),
        "presence_penalty": st.sampled_from([-1.0, 0.0, 0.75]),
        "frequency_penalty": st.sampled_from([-0.5, 0.0, 1.25]),
        "logit_bias": st.dictionaries(
            st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.5, 3.0]), max_size=4
        ),
        "min_tokens": st.integers(0, 4),
        "seed": st.integers(0, 2**64 - 1),
    },
)
ROWS = st.builds(
    lambda params, choice, position, prompt, output, stop, n: SampleRow(
        SamplingParams(**params), choice, position, prompt, output, stop, n
    ),
    PARAMS,
    st.integers(0, 5),
    st.integers(1, 100_000),
    st.lists(st.integers(0, VOCAB - 1), max_size=8),
    st.lists(st.integers(0, VOCAB - 1), max_size=8),
    st.lists(st.integers(0, VOCAB - 1), max_size=3),
    st.sampled_from([1, 1, 1, 4]),
)


@given(work=st.lists(st.tuples(ROWS, LOGITS), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_it_does_what_the_definition_says(work) -> None:
    rows = [row for row, _ in work]
    found = tokens_of(torch.tensor([logits for _, logits in work]), rows)
    for (row, logits), tokens in zip(work, found, strict=True):
        top_p = row.sampling.top_p
        if tokens != reference.draw(logits, row):
            # Only where the mass before a token equals p to the last digits may they differ.
            near = [
                reference.draw(logits, dataclasses.replace(row, sampling=_nudged(row, factor)))
                for factor in (1 - 1e-6, 1 + 1e-6)
            ]
            assert 0 < top_p < 1
            assert tokens in near


def _nudged(row: SampleRow, factor: float) -> SamplingParams:
    fields = {name: getattr(row.sampling, name) for name in row.sampling.__struct_fields__}
    return SamplingParams(**{**fields, "top_p": row.sampling.top_p * factor})


def mixed_rows(count: int, seed: int) -> list[SampleRow]:
    rng = random.Random(seed)
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 10},
        {"temperature": 1.3, "top_p": 0.9},
        {"min_p": 0.05},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.95, "min_p": 0.01},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logprobs": 2},
    ]
    return [
        row_of(
            rng.randrange(1, 999), rng.randrange(3), rng.choice([1, 3]), seed=rng.getrandbits(64)
        )
        if k % 8 == 7
        else row_of(rng.randrange(1, 999), seed=rng.getrandbits(64), **kinds[k % 8])
        for k in range(count)
    ]


@pytest.mark.parametrize("vocab", [VOCAB, 3001])
def test_a_rows_tokens_are_the_same_in_any_batch(vocab: int) -> None:
    rows = mixed_rows(24, 1)
    logits = some_logits(24, vocab)
    alone = [tokens_of(logits[k : k + 1], [rows[k]])[0] for k in range(24)]
    assert tokens_of(logits, rows) == alone
    for seed in range(4):
        order = random.Random(seed).sample(range(24), k=24 - 5 * seed)
        found = tokens_of(logits[order], [rows[k] for k in order])
        assert found == [alone[k] for k in order]


def test_a_reused_slot_remembers_nothing() -> None:
    sampler = Sampler(VOCAB, CPU)
    rows, logits = mixed_rows(8, 2), some_logits(8)
    first = sampler.sample(logits.clone(), rows).tokens
    for shift in range(1, 8):
        order = [(k + shift) % 8 for k in range(8)]
        found = sampler.sample(logits[order].clone(), [rows[k] for k in order]).tokens
        assert found == [first[k] for k in order]


def test_choices_differ_and_equal_those_drawn_alone() -> None:
    logits = some_logits(1, scale=1.0)
    [tokens] = tokens_of(logits, [row_of(n=16, seed=9)])
    assert len(set(tokens)) > 8
    alone = [tokens_of(logits, [row_of(choice=k, seed=9)])[0][0] for k in range(16)]
    assert list(tokens) == alone


def test_seeds_and_positions_matter() -> None:
    logits = some_logits(16, vocab=1000, scale=1.0)
    base = tokens_of(logits, [row_of(position=k, seed=0) for k in range(16)])
    again = tokens_of(logits, [row_of(position=k, seed=0) for k in range(16)])
    assert again == base
    others = {
        tuple(tokens_of(logits, [row_of(position=k, seed=seed) for k in range(16)]))
        for seed in range(16)
    }
    assert len(others) >= 15
    assert tokens_of(logits, [row_of(position=k + 1, seed=0) for k in range(16)]) != base


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 12},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
        {"presence_penalty": 1.0, "logit_bias": {5: 2.0}},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(params) -> None:
    logits = some_logits(1, vocab=64, seed=3, scale=1.2)
    exact = reference.probabilities(logits[0].tolist(), row_of(**params))
    entropy = -sum(p * math.log2(p) for p in exact.values())
    assert entropy >= 2  # a peaked distribution would prove nothing
    draws, chunk = 20_000, 2_000
    counts = dict.fromkeys(range(64), 0)
    for start in range(0, draws, chunk):
        rows = [row_of(position=k, seed=start, **params) for k in range(chunk)]
        for (token,) in tokens_of(logits.expand(chunk, -1), rows):
            counts[token] += 1
    assert {token for token, count in counts.items() if count} <= set(exact)
    # Cells of at least 5 expected draws; the rest are one cell.
    cells = [(counts[t], p * draws) for t, p in exact.items() if p * draws >= 5]
    rest = (sum(counts.values()) - sum(c for c, _ in cells), draws - sum(e for _, e in cells))
    if rest[1] >= 5:
        cells.append(rest)
    chi_square = sum((count - expected) ** 2 / expected for count, expected in cells)
    freedom = len(cells) - 1
    assert abs(chi_square - freedom) < 4.5 * math.sqrt(2 * freedom)


def test_ties_go_to_the_lower_id() -> None:
    flat = torch.zeros((1, VOCAB))
    assert tokens_of(flat, [row_of(temperature=0)]) == [(0,)]
    flat[0, 40:60] = 1.0
    assert tokens_of(flat, [row_of(temperature=0)]) == [(40,)]
    seen = {tokens_of(flat, [row_of(top_k=3, position=k)])[0][0] for k in range(60)}
    assert seen == {40, 41, 42}
    seen = {tokens_of(flat, [row_of(min_p=1.0, position=k)])[0][0] for k in range(400)}
    assert seen == set(range(40, 60))
    seen = {tokens_of(flat, [row_of(top_p=0.0, position=k)])[0][0] for k in range(20)}
    assert seen == {40}


@pytest.mark.parametrize("vocab", [2, 511, 1024, 1500, 3001])
def test_the_best_token_is_the_first_of_equals(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randint(-3, 4, (40, vocab), generator=generator).float()
    logits[0] = -torch.inf
    logits[1, -1] = 9.0
    logits[2, 0] = logits[2, -1] = 9.0
    logits[3, vocab // 2 :] = 9.0
    top, ids = best_tokens(logits)
    assert torch.equal(top, logits.amax(dim=1))
    assert ids.tolist() == [row.index(max(row)) for row in logits.tolist()]
    logits[:, vocab - 1] = torch.nan
    assert best_tokens(logits)[0].isnan().all()


@pytest.mark.parametrize(("top_p", "size"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.99, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, size) -> None:
    logits = torch.full((1, VOCAB), -200.0)
    logits[0, [9, 30, 31, 80]] = 2.0  # four candidates of a quarter each
    seen = {tokens_of(logits, [row_of(top_p=top_p, position=k)])[0][0] for k in range(80)}
    assert seen == {9, 30, 31, 80} - set([80, 31, 30][: 4 - size])


def test_near_ties_are_settled_by_the_definition(monkeypatch) -> None:
    rows, logits = mixed_rows(24, 5), some_logits(24)
    usual = tokens_of(logits, rows)
    monkeypatch.setattr(draw, "MARGIN", 100.0)  # every candidate is a near tie
    assert tokens_of(logits, rows) == usual


def test_tiny_temperatures_are_greedy() -> None:
    logits = some_logits(8, scale=30.0)
    best = [(token,) for token in logits.argmax(dim=1).tolist()]
    for temperature in (1e-6, 1e-20, 1e-45, 5e-324):
        assert tokens_of(logits, [row_of(temperature=temperature)] * 8) == best
        assert tokens_of(logits, [row_of(temperature=temperature, top_p=0.9)] * 8) == best


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 300},
        {"top_p": 0.97},
        {"min_p": 1e-4},
        {"top_k": 7},
        {"top_p": 0.9999, "min_p": 1e-3, "temperature": 2.0},
        {"top_p": 0.6, "temperature": 0.4},
        {"top_p": 0.999, "top_k": 15_000, "temperature": 3.0},
    ],
    ids=str,
)
def test_the_window_changes_nothing(params, monkeypatch) -> None:
    vocab = 20_000
    logits = some_logits(6, vocab, scale=1.0)
    logits[1] = (logits[1] * 2).round() / 2  # ties across any window
    logits[2] = 0.0
    rows = [row_of(position=k, seed=1, **params) for k in range(6)]
    usual = tokens_of(logits, rows)
    monkeypatch.setattr(candidates, "FIRST_WINDOW", vocab)
    monkeypatch.setattr(candidates, "SECOND_WINDOW", vocab)
    monkeypatch.setattr(sampler, "FLAT_VOCAB", vocab + 1)  # nor does a sort of whole rows
    assert tokens_of(logits, rows) == usual


def test_many_draws_take_no_more_memory_than_few() -> None:
    """128 choices of a flat row, filters and logprobs included: no tensor holds all draws."""
    vocab = 30_000
    logits = torch.linspace(0, 0.1, vocab).repeat(4, 1)
    for params in ({"top_p": 0.99}, {"top_k": 14_000}, {}, {"top_p": 0.99, "logprobs": 2}):
        largest = []
        for n in (1, 128):
            rows = [row_of(n=n, seed=k, **params) for k in range(4)]
            with TorchWatch() as watch:
                result = Sampler(vocab, CPU).sample(logits.clone(), rows)
            assert [len(tokens) for tokens in result.tokens] == [n] * 4
            largest.append(watch.largest)
        # Up to a slice: the score of each logit and the like, in double precision at most.
        assert largest[1] <= max(largest[0], 8 * max(sampler.SLICE_ELEMENTS, SLICE_ELEMENTS))


def test_stop_ids_are_masked_until_min_tokens() -> None:
    logits = torch.zeros((1, VOCAB))
    logits[0, 0] = 50.0
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, min_tokens=2)
        early = SampleRow(params, 0, 3, [1], [2], (0,), 1)
        due = SampleRow(params, 0, 4, [1], [2, 2], (0,), 1)
        assert tokens_of(logits, [early])[0] != (0,)
        assert tokens_of(logits, [due]) == [(0,)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_fail_their_row_alone(bad, temperature) -> None:
    logits = some_logits(4)
    rows = [row_of(temperature=temperature, seed=k, logprobs=1) for k in range(4)]
    alone = tokens_of(logits, rows)
    logits[2, 7] = bad
    result = Sampler(VOCAB, CPU).sample(logits, rows)
    assert [index for index, _ in result.failed] == [2]
    assert result.tokens == [*alone[:2], (), alone[3]]
    assert result.logprobs[2] is None


def test_a_failed_row_does_not_shift_the_others_logprobs() -> None:
    logits = some_logits(3)
    rows = [row_of(n=n, logprobs=k, seed=k) for k, n in enumerate((2, 1, 1))]
    expected = Sampler(VOCAB, CPU).sample(logits.clone(), rows)
    logits[1, 3] = math.nan
    found = Sampler(VOCAB, CPU).sample(logits, rows)
    assert [index for index, _ in found.failed] == [1]
    for index in (0, 2):
        table, other = found.logprobs[index], expected.logprobs[index]
        assert table is not None
        assert other is not None
        assert table.num_top == index
        assert table.ids[:, 0].tolist() == list(found.tokens[index])
        assert torch.equal(table.ids, other.ids)
        assert torch.equal(table.logprobs, other.logprobs)


def test_ids_beyond_the_vocabulary_fail_their_row_alone() -> None:
    logits = some_logits(3)
    rows = [row_of(seed=1), row_of(logit_bias={VOCAB: 1.0}), row_of(seed=3, temperature=0)]
    result = Sampler(VOCAB, CPU).sample(logits.clone(), rows)
    assert [index for index, _ in result.failed] == [1]
    assert "logit_bias: token 97" in result.failed[0][1]
    assert result.tokens[0] == tokens_of(logits[:1], rows[:1])[0]


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(InvariantError, match="sampler"):
        Sampler(VOCAB, CPU).sample(some_logits(2), [row_of()])
    with pytest.raises(InvariantError, match="sampler"):
        Sampler(VOCAB, CPU).sample(some_logits(1).double(), [row_of()])
    assert Sampler(VOCAB, CPU).sample(torch.empty((0, VOCAB)), []).tokens == []
