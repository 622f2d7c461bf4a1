"""The noise of draws inside kernels: the functions of `sampling.noise`, on a device.

Bits equal the definition's, always. Gumbel noise comes twice: in fp32 for whole vocabularies, and
in fp64 for the few tokens that are near the best.
"""

from __future__ import annotations

import triton
import triton.language as tl

from xllm.worker.sampling.noise import (
    CHAIN_STARTS,
    MULTIPLIERS,
    SHIFTS,
    UNIFORM_MAX,
    UNIFORM_OFFSET,
    UNIFORM_SCALE,
    WORD_STEP,
)

_M0 = tl.constexpr(MULTIPLIERS[0])
_M1 = tl.constexpr(MULTIPLIERS[1])
_M2 = tl.constexpr(MULTIPLIERS[2])
_S0 = tl.constexpr(SHIFTS[0])
_S1 = tl.constexpr(SHIFTS[1])
_S2 = tl.constexpr(SHIFTS[2])
_S3 = tl.constexpr(SHIFTS[3])
_START0 = tl.constexpr(CHAIN_STARTS[0])
_START1 = tl.constexpr(CHAIN_STARTS[1])
_STEP = tl.constexpr(WORD_STEP)
_SCALE = tl.constexpr(UNIFORM_SCALE)
_OFFSET = tl.constexpr(UNIFORM_OFFSET)
_MAX = tl.constexpr(UNIFORM_MAX)
_SERIES_BELOW = tl.constexpr(1 / 16)


@triton.jit
def _times(x, factor):
    """x * factor modulo 2**32: it is meant to overflow."""
    return tl.mul(x, factor, sanitize_overflow=False)


@triton.jit
def _plus(x, number):
    """x + number modulo 2**32."""
    return tl.add(x, number, sanitize_overflow=False)


@triton.jit
def _add_word(state, word):
    """A chain of key words with one more word."""
    x = _plus(state ^ word, _STEP)
    x ^= x >> _S0
    x = _times(x, _M0)
    x ^= x >> _S1
    x = _times(x, _M1)
    x ^= x >> _S2
    x = _times(x, _M2)
    return x ^ (x >> _S3)


@triton.jit
def _chain(start, low, high, choice, position):
    state = _add_word(start, low)
    state = _add_word(state, high)
    state = _add_word(state, choice)
    return _add_word(state, position)


@triton.jit
def keys_of(seed, place):
    """`noise.draw_keys`: two uint32, from the bits of the seed (int64) and from `place` (int64),
    the choice's 32 bits above the position's."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    choice, position = (place >> 32).to(tl.uint32), place.to(tl.uint32)
    none = low ^ low
    key0 = _chain(none ^ _START0, low, high, choice, position)
    key1 = _chain(none ^ _START1, low, high, choice, position)
    return key0, key1


@triton.jit
def bits_of(key0, key1, tokens):
    """`noise.token_bits` of int32 `tokens` (of any shape): uint32 below 2**31."""
    x = _plus(tokens.to(tl.uint32), key0)
    x ^= x >> _S0
    x = _times(x, _M0)
    x ^= key1
    x ^= x >> _S1
    x = _times(x, _M1)
    x ^= x >> _S2
    x = _times(x, _M2)
    return (x ^ (x >> _S3)) >> 1


@triton.jit
def uniform_of(bits):
    """`noise.uniform`: fp32. The product is exact, so that it does not matter whether it and the
    sum are one operation."""
    return tl.minimum(bits.to(tl.float32) * _SCALE + _OFFSET, _MAX)


@triton.jit
def gumbel_of(bits):
    """fp32 Gumbel noise.

    A GPU's fast logarithm is good to an absolute 2**-22 around 1, where the exponential variable
    -log(1 - v) of a winning token lies near 0: there a series is taken instead. So the error is
    below 1e-5 everywhere."""
    v = uniform_of(bits)
    series = v * (1.0 + v * (0.5 + v * (1 / 3 + v * (0.25 + v * (0.2 + v * (1 / 6))))))
    return -tl.log(tl.where(v < _SERIES_BELOW, series, -tl.log(1.0 - v)))


@triton.jit
def exact_gumbel_of(bits):
    """fp64 Gumbel noise. 1 - v is exact: v is a float32 and a multiple of 2**-32."""
    return -tl.log(-tl.log(1.0 - uniform_of(bits).to(tl.float64)))
