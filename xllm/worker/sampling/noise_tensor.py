"""The noise of `noise` for many draws and tokens at once.

Invariant: the bits equal those of the plain Python definition, always; the floating-point noise
may differ from it by rounding, which is why `draw` settles near ties by the definition.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from xllm.worker.sampling.noise import (
    CHAIN_STARTS,
    MASK32,
    MULTIPLIERS,
    SHIFTS,
    UNIFORM_MAX,
    UNIFORM_OFFSET,
    UNIFORM_SCALE,
    WORD_STEP,
)

DrawKey = tuple[int, int, int]
"""(seed, choice, position) of one draw."""


def _signed(value: int) -> int:
    """A 32-bit pattern as torch's int32 has it."""
    return value - (1 << 32) if value >= 1 << 31 else value


_SIGNED_MULTIPLIERS = tuple(_signed(m) for m in MULTIPLIERS)


def draw_keys_tensor(draws: Sequence[DrawKey], device: torch.device) -> torch.Tensor:
    """int32 [2, draws]: `noise.draw_keys` of each draw."""
    words = np.empty((4, len(draws)), dtype=np.uint32)
    for column, (seed, choice, position) in enumerate(draws):
        words[:, column] = (
            seed & MASK32,
            seed >> 32 & MASK32,
            choice & MASK32,
            position & MASK32,
        )
    state = np.empty((2, len(draws)), dtype=np.uint32)
    state[0], state[1] = CHAIN_STARTS
    for word in words:
        state ^= word
        state += np.uint32(WORD_STEP)
        for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=False):
            state ^= state >> np.uint32(shift)
            state *= np.uint32(multiplier)
        state ^= state >> np.uint32(SHIFTS[3])
    return torch.from_numpy(state.view(np.int32)).to(device)


def token_bits_tensor(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """int32 in [0, 2**31): `noise.token_bits` for `keys` [2, draws] and `token_ids` int32
    [tokens] or [draws, tokens]; the result is [draws, tokens].

    torch's int32 products wrap, and its right shift copies the sign: masks make it logical."""
    x = keys[0, :, None] + token_ids
    scratch = torch.empty_like(x)
    _fold(x, scratch, SHIFTS[0])
    x.mul_(_SIGNED_MULTIPLIERS[0]).bitwise_xor_(keys[1, :, None])
    _fold(x, scratch, SHIFTS[1])
    x.mul_(_SIGNED_MULTIPLIERS[1])
    _fold(x, scratch, SHIFTS[2])
    x.mul_(_SIGNED_MULTIPLIERS[2])
    _fold(x, scratch, SHIFTS[3])
    return x.bitwise_right_shift_(1).bitwise_and_(0x7FFFFFFF)


def exponential_log(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """log E of each token's exponential variable, which is minus its Gumbel noise. The uniform
    number is float32 in any case; its logarithms are taken in `dtype`."""
    noise = bits.to(torch.float32)
    noise.mul_(-UNIFORM_SCALE).sub_(UNIFORM_OFFSET).clamp_(min=-UNIFORM_MAX)
    return noise.to(dtype).log1p_().neg_().log_()


def _fold(x: torch.Tensor, scratch: torch.Tensor, shift: int) -> None:
    """x ^= x >> shift, logical, in place."""
    torch.bitwise_right_shift(x, shift, out=scratch)
    scratch.bitwise_and_((1 << (32 - shift)) - 1)
    x.bitwise_xor_(scratch)
