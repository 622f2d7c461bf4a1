"""The noise of a draw: a pure function of (seed, choice, position, token id), in plain Python.

This is the definition; `noise_tensor` and every device kernel meet its golden vectors. Only 32-bit
operations: (seed, choice, position) is hashed into two key words once a draw, and those with the
token id into 31 bits, one short chain of multiplications and xor-shifts a token. Nothing is ever
drawn from a stream, so a token's noise is the same in any batch, on any device, after any
migration.

The mixer is the three-multiplication permutation of 32-bit integers that C. Wellons found by search
("Prospecting for Hash Functions", bias 0.02); the second key word enters after its first round.

The uniform number v is a float32 in the open interval (0, 1), and small v are the ones that win:
there it has 31 bits. Gumbel noise is -log(E) with E = -log(1 - v), an exponential variable.
"""

from __future__ import annotations

import math
import struct

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB)
SHIFTS = (17, 11, 15, 14)
CHAIN_STARTS = (0x243F6A88, 0x85A308D3)
"""Where the two key chains begin: the fraction of pi, so that nobody chose them."""
WORD_STEP = 0x9E3779B9
"""Added before each word: zero words must move the state too."""

UNIFORM_SCALE = 2.0**-31
UNIFORM_OFFSET = 2.0**-32
UNIFORM_MAX = 1.0 - 2.0**-24
"""The largest float32 below 1: larger values round to 1.0, where the logarithm ends."""


def mix32(x: int) -> int:
    """A permutation of 32-bit integers in which every input bit moves every output bit."""
    x ^= x >> SHIFTS[0]
    x = x * MULTIPLIERS[0] & MASK32
    x ^= x >> SHIFTS[1]
    x = x * MULTIPLIERS[1] & MASK32
    x ^= x >> SHIFTS[2]
    x = x * MULTIPLIERS[2] & MASK32
    return x ^ (x >> SHIFTS[3])


def draw_keys(seed: int, choice: int, position: int) -> tuple[int, int]:
    """The two 32-bit key words of a draw. `seed` is taken modulo 2**64, the others 2**32."""
    words = (seed & MASK32, seed >> 32 & MASK32, choice & MASK32, position & MASK32)
    keys = []
    for state in CHAIN_STARTS:
        for word in words:
            state = mix32((state ^ word) + WORD_STEP & MASK32)
        keys.append(state)
    return keys[0], keys[1]


def token_bits(keys: tuple[int, int], token_id: int) -> int:
    """31 random bits of one token in one draw."""
    x = (token_id + keys[0]) & MASK32
    x ^= x >> SHIFTS[0]
    x = x * MULTIPLIERS[0] & MASK32
    x ^= keys[1]
    x ^= x >> SHIFTS[1]
    x = x * MULTIPLIERS[1] & MASK32
    x ^= x >> SHIFTS[2]
    x = x * MULTIPLIERS[2] & MASK32
    return (x ^ (x >> SHIFTS[3])) >> 1


def uniform(bits: int) -> float:
    """31 bits as a float32 in the open interval (0, 1): rounded after the conversion, again after
    the sum, and kept from reaching 1."""
    rounded = _float32(bits)
    return min(_float32(rounded * UNIFORM_SCALE + UNIFORM_OFFSET), UNIFORM_MAX)


def gumbel(bits: int) -> float:
    """31 bits as standard Gumbel noise, in double precision."""
    return -math.log(-math.log1p(-uniform(bits)))


def _float32(value: float) -> float:
    """The float32 nearest to `value`."""
    packed: tuple[float] = struct.unpack("<f", struct.pack("<f", value))
    return packed[0]
