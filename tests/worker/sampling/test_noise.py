"""The noise: golden vectors that every implementation meets, and its quality."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.worker.sampling.noise import (
    MASK32,
    UNIFORM_MAX,
    draw_keys,
    gumbel,
    mix32,
    token_bits,
    uniform,
)
from xllm.worker.sampling.noise_tensor import (
    draw_keys_tensor,
    exponential_log,
    token_bits_tensor,
)

CPU = torch.device("cpu")

# (seed, choice, position, token id): key words, bits, uniform number (exact), Gumbel noise.
GOLDEN = [
    (
        (0, 0, 0, 0),
        (3917794793, 981239704),
        1667521536,
        "0x1.8d91700000000p-1",
        -0.4043610801874413,
    ),
    ((1, 0, 0, 0), (2859723572, 660609204), 88344488, "0x1.5101ea0000000p-5", 3.1698773861230127),
    (
        (0, 1, 0, 0),
        (3921320111, 2864307788),
        1316207780,
        "0x1.39cef20000000p-1",
        0.052251347697521704,
    ),
    ((0, 0, 1, 0), (2707963754, 1564501560), 878101834, "0x1.a2b62a0000000p-2", 0.6428976414156652),
    ((0, 0, 0, 1), (3917794793, 981239704), 1880129703, "0x1.c042020000000p-1", -0.73403884127564),
    (
        (18446744073709551615, 7, 131071, 151935),
        (1761385447, 4183483150),
        580533428,
        "0x1.14d1e60000000p-2",
        1.1546571499655813,
    ),
    (
        (81985529216486895, 3, 2048, 42),
        (2437714756, 2274154035),
        820332824,
        "0x1.872a480000000p-2",
        0.731342761372788,
    ),
    (
        (9223372036854775808, 0, 1, 2147483647),
        (1701324560, 681436095),
        1255641509,
        "0x1.2b5e460000000p-1",
        0.12924020699824468,
    ),
    (
        (42, 0, 5, 1000),
        (1903786468, 746588708),
        1962912743,
        "0x1.d3feb00000000p-1",
        -0.8977268752935618,
    ),
    (
        (42, 1, 5, 1000),
        (3011814815, 1689031217),
        1101544031,
        "0x1.06a0ea0000000p-1",
        0.3293639427822161,
    ),
]


@pytest.mark.parametrize(("where", "keys", "bits", "number", "noise"), GOLDEN)
def test_golden_vectors_in_plain_python(where, keys, bits, number, noise) -> None:
    *draw, token = where
    assert draw_keys(*draw) == keys
    assert token_bits(keys, token) == bits
    assert uniform(bits).hex() == number
    assert gumbel(bits) == pytest.approx(noise, abs=1e-9)


@pytest.mark.parametrize(("where", "keys", "bits", "number", "noise"), GOLDEN)
def test_golden_vectors_in_torch(where, keys, bits, number, noise) -> None:
    *draw, token = where
    found = draw_keys_tensor([tuple(draw)], CPU)
    assert tuple(word & MASK32 for word in found[:, 0].tolist()) == keys
    assert token_bits_tensor(found, torch.tensor([token], dtype=torch.int32)).item() == bits
    log_e = exponential_log(torch.tensor([bits], dtype=torch.int32), torch.float32)
    assert -log_e.item() == pytest.approx(noise, abs=2e-6)


@given(
    draws=st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
        min_size=1,
        max_size=4,
    ),
    tokens=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5),
)
@settings(max_examples=100, deadline=None)
def test_torch_equals_plain_python(draws, tokens) -> None:
    bits = token_bits_tensor(draw_keys_tensor(draws, CPU), torch.tensor(tokens, dtype=torch.int32))
    expected = [[token_bits(draw_keys(*draw), token) for token in tokens] for draw in draws]
    assert bits.tolist() == expected


@pytest.mark.parametrize("bits", [0, 1, 2**30, 2**31 - 2, 2**31 - 1])
def test_the_interval_is_open_at_both_ends(bits) -> None:
    assert 0.0 < uniform(bits) <= UNIFORM_MAX < 1.0
    assert torch.tensor(uniform(bits), dtype=torch.float32).item() == uniform(bits)
    assert math.isfinite(gumbel(bits))
    for dtype in (torch.float32, torch.float64):
        noise = exponential_log(torch.tensor([bits], dtype=torch.int32), dtype)
        assert torch.isfinite(noise).all()
        assert -noise.item() == pytest.approx(gumbel(bits), abs=1e-5)


def test_the_mixer_is_a_permutation() -> None:
    # Each step can be undone, so distinct inputs stay distinct.
    inputs = [*range(5000), *(random.Random(1).getrandbits(32) for _ in range(5000))]
    assert len({mix32(x) for x in inputs}) == len(set(inputs))


def bits_of(seed, choice, position, token) -> int:
    return token_bits(draw_keys(seed, choice, position), token)


@pytest.mark.parametrize(("field", "width"), [(0, 64), (1, 8), (2, 20), (3, 18)])
def test_each_input_bit_flips_each_output_bit_half_the_time(field: int, width: int) -> None:
    rng = random.Random(field)
    trials = 400
    for bit in range(width):
        flips = [0] * 31
        for _ in range(trials):
            where = [
                rng.getrandbits(64),
                rng.randrange(8),
                rng.randrange(9999),
                rng.randrange(9999),
            ]
            one = bits_of(*where)
            where[field] ^= 1 << bit
            changed = one ^ bits_of(*where)
            for k in range(31):
                flips[k] += changed >> k & 1
        # 31 x 110 binomials of 400: six standard deviations are 60.
        assert max(abs(count - trials / 2) for count in flips) < 60, (bit, flips)


@pytest.mark.parametrize("axis", ["tokens", "positions", "choices", "seeds"])
def test_neighbours_are_uniform_and_uncorrelated(axis: str) -> None:
    count = 1 << 16
    ids = torch.arange(count, dtype=torch.int32)
    if axis == "tokens":
        bits = token_bits_tensor(draw_keys_tensor([(3, 0, 7)], CPU), ids)[0]
    else:
        vary = {"positions": (3, 0, None), "choices": (3, None, 7), "seeds": (None, 0, 7)}[axis]
        draws = [tuple(k if part is None else part for part in vary) for k in range(count)]
        bits = token_bits_tensor(draw_keys_tensor(draws, CPU), ids[:1] + 11)[:, 0]
    for shift in (23, 8, 0):
        counts = torch.bincount((bits >> shift) & 255, minlength=256).double()
        chi_square = ((counts - count / 256) ** 2 / (count / 256)).sum().item()
        assert 160 < chi_square < 370  # 255 degrees of freedom, five standard deviations
    numbers = bits.double() / 2**31
    pairs = torch.stack([numbers[:-1], numbers[1:]])
    assert abs(torch.corrcoef(pairs)[0, 1].item()) < 5 / math.sqrt(count)


def test_draws_of_one_request_do_not_repeat_each_other() -> None:
    # Related keys must not give one draw's noise shifted or permuted by a small distance.
    ids = torch.arange(4096, dtype=torch.int32)
    draws = [(5, choice, position) for choice in range(4) for position in range(16)]
    bits = token_bits_tensor(draw_keys_tensor(draws, CPU), ids)
    assert len(set(bits.flatten().tolist())) > 0.999 * bits.numel()
