"""The device's sampler against the host's: same logits, same tokens; and that it never waits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.sampling.device_case import (
    INF,
    VOCAB,
    drawn,
    expected,
    row_of,
    seeded,
    some_logits,
)
from tests.worker.triton_interpreter import DEVICE
from xllm.errors import InvariantError
from xllm.protocol.sampling import SamplingParams
from xllm.worker.sampling.device_sampler import DeviceSampler
from xllm.worker.sampling.draw import MARGIN
from xllm.worker.sampling.noise import draw_keys, gumbel, token_bits
from xllm.worker.sampling.rows import SampleRow
from xllm.worker.triton_kernels.draw_rows import FLAG_NOT_FINITE

CPU = torch.device("cpu")


@pytest.mark.parametrize("vocab", [1, 7, 513, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tokens_are_those_of_the_sampler(vocab: int, dtype: torch.dtype) -> None:
    rows = [*seeded(1, temperature=0.0), *seeded(1), *seeded(1, temperature=0.3)]
    logits = some_logits(len(rows), vocab).to(dtype)
    assert drawn(logits, rows, chunk=2048 if vocab > 2048 else 256) == expected(logits, rows)


def test_a_large_vocabulary() -> None:
    rows = [*seeded(1, temperature=0.0), *seeded(1)]
    logits = some_logits(len(rows), 151_936)
    assert drawn(logits, rows, chunk=16384) == expected(logits, rows)


LOGITS = st.lists(
    st.one_of(st.integers(-24, 24).map(lambda quarter: quarter / 4), st.just(-INF)),
    min_size=VOCAB,
    max_size=VOCAB,
)
PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-40, 1e-6, 0.25, 1.0, 2.0]),
        "seed": st.integers(0, 2**64 - 1),
    }
)
ROWS = st.builds(
    lambda params, choice, position: row_of(position, choice, **params),
    PARAMS,
    st.integers(0, 5),
    st.integers(1, 100_000),
)


@given(work=st.lists(st.tuples(ROWS, LOGITS), min_size=1, max_size=3))
@settings(max_examples=15)
def test_any_rows_together_draw_what_the_sampler_draws(work) -> None:
    rows = [row for row, _ in work]
    logits = torch.tensor([numbers for _, numbers in work])
    assert drawn(logits, rows, size=4) == expected(logits, rows)


def test_ties_go_to_the_lower_id_across_chunks() -> None:
    logits = torch.zeros((3, VOCAB))
    logits[0, [90, 70, 40]] = 3.0
    logits[1] = -1.5
    logits[2, :50] = -INF
    rows = [row_of(temperature=0.0)] * 3
    assert drawn(logits, rows) == ([40, 0, 50], [0, 0, 0])


def near_ties(noise: list[float]) -> torch.Tensor:
    """Logits that make every score 1 but for differences far below float32's."""
    return torch.tensor(noise, dtype=torch.float64).neg().add(1.0).float()


def test_near_ties_are_settled_in_double_precision() -> None:
    rows = seeded(2)
    logits = torch.empty((2, VOCAB))
    for index, row in enumerate(rows):
        keys = draw_keys(row.sampling.seed, row.choice, row.position)
        logits[index] = near_ties([gumbel(token_bits(keys, token)) for token in range(VOCAB)])
    found = drawn(logits, rows)
    assert found == expected(logits, rows)
    for index, row in enumerate(rows):
        keys = draw_keys(row.sampling.seed, row.choice, row.position)
        scores = [
            logit + gumbel(token_bits(keys, token))
            for token, logit in enumerate(logits[index].tolist())
        ]
        assert max(scores) - min(scores) < MARGIN
        assert found[0][index] == scores.index(max(scores))


@pytest.mark.parametrize(("seed", "tokens"), [(33, (198, 2111)), (1165, (1503, 1919))])
@pytest.mark.parametrize("params", [{}, {"top_p": 0.9, "temperature": 0.5}], ids=str)
def test_equals_in_logit_and_noise_go_to_the_lower_id(seed, tokens, params) -> None:
    """Pairs that have the same 31 bits, in different chunks and in one."""
    keys = draw_keys(seed, 0, 5)
    assert len({token_bits(keys, token) for token in tokens}) == 1
    logits = torch.full((1, 3000), -INF)
    logits[0, list(tokens)] = 0.5
    rows = [row_of(seed=seed, **params)]
    for chunk in (2048, 4096):
        assert drawn(logits, rows, chunk=chunk) == ([tokens[0]], [0]) == expected(logits, rows)


@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("place", [0, 63, 64, VOCAB - 1])
def test_a_row_that_is_not_finite_is_flagged_and_harms_no_other(bad: float, place: int) -> None:
    rows = [row_of(temperature=0.0), row_of(seed=3), row_of(seed=4), row_of(temperature=0.0)]
    logits = some_logits(4)
    alone = drawn(logits, rows)
    logits[1, place] = bad
    logits[3, place] = bad
    tokens, flags = drawn(logits, rows)
    assert flags == [0, FLAG_NOT_FINITE, 0, FLAG_NOT_FINITE]
    assert tokens == [alone[0][0], 0, alone[0][2], 0]


def test_a_row_of_nothing_is_not_finite() -> None:
    logits = torch.full((2, VOCAB), -INF)
    rows = [row_of(temperature=0.0), row_of(seed=3)]
    assert drawn(logits, rows) == ([0, 0], [FLAG_NOT_FINITE] * 2) == expected(logits, rows)


def test_rows_of_a_wider_table() -> None:
    table = some_logits(3, VOCAB + 31)
    rows = seeded(3)
    logits = table[:, :VOCAB]
    assert not logits.is_contiguous()
    sampler = DeviceSampler(VOCAB, DEVICE, 3, chunk=64)
    tokens = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    flags = torch.zeros(3, dtype=torch.uint8, device=DEVICE)
    inputs = sampler.prepare(rows).numbers.to(DEVICE)
    sampler.draw(table.to(DEVICE)[:, :VOCAB], inputs, tokens, flags)
    assert (tokens.tolist(), flags.tolist()) == expected(logits, rows)


@pytest.mark.parametrize(
    ("row", "fits"),
    [
        (row_of(temperature=0.0), True),
        (row_of(), True),
        (row_of(top_k=5, top_p=0.5, min_p=0.1), True),
        (row_of(min_tokens=2), True),  # two are out
        (row_of(min_tokens=3), False),
        (row_of(logprobs=0), False),
        (row_of(n=2), False),
        (row_of(repetition_penalty=1.1), False),
        (row_of(presence_penalty=0.1), False),
        (row_of(frequency_penalty=0.1), False),
        (row_of(logit_bias={3: 1.0}), False),
        (SampleRow(SamplingParams(), 0, 5, [1], [], (VOCAB,)), False),
    ],
)
def test_which_rows_are_for_the_device(row: SampleRow, fits: bool) -> None:
    assert DeviceSampler(VOCAB, CPU, 1).is_for_device(row) is fits


def test_what_does_not_fit_is_refused() -> None:
    sampler = DeviceSampler(VOCAB, CPU, 2)
    inputs = sampler.prepare([row_of()] * 2).numbers
    tokens, flags = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(InvariantError, match="3 rows"):
        sampler.prepare([row_of()], 3)
    with pytest.raises(InvariantError, match="logits"):
        sampler.draw(torch.zeros((2, VOCAB + 1)), inputs, tokens, flags)
    with pytest.raises(InvariantError, match="logits"):
        sampler.draw(torch.zeros((3, VOCAB)), inputs, tokens, flags)
    with pytest.raises(InvariantError, match="strides"):
        sampler.draw(torch.zeros((VOCAB, 2)).T, inputs, tokens, flags)
    with pytest.raises(InvariantError, match="inputs"):
        sampler.draw(torch.zeros((2, VOCAB)), inputs[:1], tokens, flags)
    with pytest.raises(InvariantError, match="tokens"):
        sampler.draw(torch.zeros((2, VOCAB)), inputs, tokens.int(), flags)
    with pytest.raises(InvariantError, match="flags"):
        sampler.draw(torch.zeros((2, VOCAB)), inputs, tokens, flags.bool())
