"""The noise inside kernels against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.triton_interpreter import DEVICE
from xllm.worker.sampling.noise import draw_keys, gumbel, token_bits, uniform
from xllm.worker.triton_kernels.noise import (
    bits_of,
    exact_gumbel_of,
    gumbel_of,
    keys_of,
    uniform_of,
)

SEEDS = [0, 1, 42, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
CHOICES = [0, 1, 127, 2**31, 2**32 - 1]
POSITIONS = [0, 1, 2**16, 131071, 2**31 - 1, 2**31, 2**32 - 1]
TOKENS = [0, 1, 63, 64, 32767, 151935, 2**31 - 2, 2**31 - 1]


@triton.jit
def _keys(seeds, places, out, COUNT: tl.constexpr):
    draws = tl.arange(0, COUNT)
    key0, key1 = keys_of(tl.load(seeds + draws), tl.load(places + draws))
    tl.store(out + 2 * draws, key0.to(tl.int64))
    tl.store(out + 2 * draws + 1, key1.to(tl.int64))


@triton.jit
def _noise(seed, place, tokens, bits_out, uniform_out, fast_out, exact_out, COUNT: tl.constexpr):
    columns = tl.arange(0, COUNT)
    key0, key1 = keys_of(tl.load(seed), tl.load(place))
    bits = bits_of(key0, key1, tl.load(tokens + columns))
    tl.store(bits_out + columns, bits.to(tl.int64))
    tl.store(uniform_out + columns, uniform_of(bits))
    tl.store(fast_out + columns, gumbel_of(bits))
    tl.store(exact_out + columns, exact_gumbel_of(bits))


@triton.jit
def _of_bits(bits, fast_out, exact_out, COUNT: tl.constexpr):
    columns = tl.arange(0, COUNT)
    given_bits = tl.load(bits + columns).to(tl.uint32)
    tl.store(fast_out + columns, gumbel_of(given_bits))
    tl.store(exact_out + columns, exact_gumbel_of(given_bits))


def signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def on_device(numbers, dtype=torch.int64) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype, device=DEVICE)


def test_keys_are_those_of_the_definition() -> None:
    draws = [(s, c, p) for s in SEEDS for c in CHOICES for p in POSITIONS]
    draws += draws[: 512 - len(draws)]
    seeds = on_device([signed(seed) for seed, _, _ in draws])
    places = on_device([signed(choice << 32 | position) for _, choice, position in draws])
    out = torch.zeros((len(draws), 2), dtype=torch.int64, device=DEVICE)
    _keys[(1,)](seeds, places, out, COUNT=len(draws))
    assert [tuple(keys) for keys in out.tolist()] == [draw_keys(*draw) for draw in draws]


@given(
    seed=st.one_of(st.sampled_from(SEEDS), st.integers(0, 2**64 - 1)),
    choice=st.sampled_from(CHOICES),
    position=st.one_of(st.sampled_from(POSITIONS), st.integers(0, 2**32 - 1)),
    tokens=st.lists(
        st.one_of(st.sampled_from(TOKENS), st.integers(0, 2**31 - 1)), min_size=8, max_size=8
    ),
)
@settings(max_examples=20)
def test_noise_is_that_of_the_definition(seed, choice, position, tokens) -> None:
    bits = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    uniforms = torch.zeros(8, dtype=torch.float32, device=DEVICE)
    fast = torch.zeros(8, dtype=torch.float32, device=DEVICE)
    exact = torch.zeros(8, dtype=torch.float64, device=DEVICE)
    place = on_device([signed(choice << 32 | position)])
    _noise[(1,)](
        on_device([signed(seed)]), place, on_device(tokens, torch.int32), bits, uniforms, fast,
        exact, COUNT=8,
    )  # fmt: skip
    keys = draw_keys(seed, choice, position)
    expected = [token_bits(keys, token) for token in tokens]
    assert bits.tolist() == expected
    assert uniforms.tolist() == [uniform(number) for number in expected]
    assert exact.tolist() == pytest.approx([gumbel(number) for number in expected], rel=1e-13)
    assert fast.tolist() == pytest.approx([gumbel(n) for n in expected], rel=1e-5, abs=1e-5)


def test_noise_is_right_at_the_ends_and_where_the_series_ends() -> None:
    # v is about bits / 2**31: the smallest win, the largest are the coldest.
    near_series = [2**27 + step for step in (-(2**10), -1, 0, 1, 2**10)]
    numbers = [0, 1, 2, 3, 1000, 2**23, *near_series, 2**30, 2**31 - 129, 2**31 - 128, 2**31 - 1]
    numbers += np.random.default_rng(0).integers(0, 2**31, 256 - len(numbers)).tolist()
    fast = torch.zeros(256, dtype=torch.float32, device=DEVICE)
    exact = torch.zeros(256, dtype=torch.float64, device=DEVICE)
    _of_bits[(1,)](on_device(numbers), fast, exact, COUNT=256)
    expected = [gumbel(number) for number in numbers]
    assert exact.tolist() == pytest.approx(expected, rel=1e-13, abs=1e-15)
    assert fast.tolist() == pytest.approx(expected, rel=1e-6, abs=4e-6)
