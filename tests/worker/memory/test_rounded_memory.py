"""KV rounded to 8 bits: what it keeps, that the kernels write what torch writes, and that copies,
clearing and numbers that are not finite reach the scales too."""

from __future__ import annotations

from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.errors import InvariantError
from xllm.worker.attention.plan import Span
from xllm.worker.kernels.attention import KernelAttention
from xllm.worker.kernels.compiled import load
from xllm.worker.kernels.team import Team
from xllm.worker.memory.block_layout import BlockLayout
from xllm.worker.memory.cpu_memory import CpuKvMemory
from xllm.worker.memory.rounded import SCALE_BYTES, round_heads

LIBRARY = load().compiled
VARIANTS = [v.number for v in LIBRARY.variants if v.usable and v.number] if LIBRARY else []
HEADS, DIM, SIZE, LAYERS = 3, 20, 32, 2


def make(num_blocks: int = 6) -> CpuKvMemory:
    layout = BlockLayout(num_blocks, SIZE, LAYERS, HEADS, DIM, 1, SCALE_BYTES)
    return CpuKvMemory(layout, torch.int8)


def numbers(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, rows, HEADS, DIM, generator=generator).unbind()
    return k * 3, v


def read(memory: CpuKvMemory, layer: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a block [size, heads, dim]."""
    room = torch.empty(2, 1, SIZE * HEADS * DIM)
    memory.gather(layer, torch.tensor([block]), room[0], room[1])
    keys, values = room.view(2, SIZE, HEADS, DIM).unbind()
    return keys, values


def test_it_gives_back_what_was_written_nearly() -> None:
    memory = make()
    k, v = numbers(SIZE)
    k[3, 1], v[4, 2] = 0, 1e-35
    memory.write(1, torch.arange(2 * SIZE, 3 * SIZE), k, v)
    keys, values = read(memory, 1, 2)
    for got, want in ((keys, k), (values, v)):
        bound = want.abs().amax(-1, keepdim=True) / 127 * 0.501 + 1e-30
        assert ((got - want).abs() <= bound).all()
    assert not keys[3, 1].any()
    assert not values[4, 2].any()
    assert not read(memory, 0, 2)[0].any()
    assert not read(memory, 1, 3)[0].any()


def test_a_block_takes_little_more_than_half() -> None:
    rounded = BlockLayout(1, 16, 28, 8, 128, 1, SCALE_BYTES)
    plain = BlockLayout(1, 16, 28, 8, 128, 2)
    assert plain.block_bytes / rounded.block_bytes > 1.93


@pytest.mark.skipif(LIBRARY is None, reason=load().reason)
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 40), st.integers(1, 60), st.booleans())
def test_the_kernels_write_the_bits_of_torch(
    variant: int, start: int, count: int, strange: bool
) -> None:
    team = Team(LIBRARY, 2)
    mine, theirs = make(), make()
    k, v = numbers(count, seed=count)
    if strange:
        k[0, 0, 3], v[-1, 2], v[0, 1] = torch.inf, 0, 1e-32
    table = array("q", [4, 0, 5, 2])
    attention = KernelAttention(
        team, mine, [Span(start, count, table)], (0,) * LAYERS, lambda: None, variant
    )
    attention.attend(1, torch.zeros(count, HEADS, DIM), k, v)
    places = [table[p // SIZE] * SIZE + p % SIZE for p in range(start, start + count)]
    theirs.write(1, torch.tensor(places), k, v)
    # But for which NaN it is.
    for got, want in zip(
        [*mine._scales, mine.keys(1), mine.values(1)],
        [*theirs._scales, theirs.keys(1), theirs.values(1)],
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    team.close()


def test_copies_and_clearing_take_the_scales_along() -> None:
    memory = make()
    k, v = numbers(SIZE)
    memory.write(0, torch.arange(SIZE), k, v)
    memory.copy_blocks([(0, 3)])
    memory.clear_slots([5])
    keys, values = read(memory, 0, 3)
    assert torch.equal(keys[5], read(memory, 0, 3)[0][5])
    assert keys[5].any()
    cleared = read(memory, 0, 0)
    assert not cleared[0][5].any()
    assert torch.equal(cleared[0][6:], keys[6:])
    assert torch.equal(cleared[1][6:], values[6:])


def test_what_is_not_finite_shows_and_is_forgotten() -> None:
    memory = make()
    k, v = numbers(4)
    v[2, 1, 7] = torch.nan
    memory.write(1, torch.arange(4), k, v)
    values = read(memory, 1, 0)[1]
    assert values[2, 1].isnan().all()
    assert values[2, 0].isfinite().all()
    with pytest.raises(InvariantError, match="NaN or infinity unnoticed"):
        memory.check()
    memory.may_hold_nan = True
    memory.forget()
    memory.check()
    assert torch.equal(read(memory, 1, 0)[1][3], values[3])
    assert not read(memory, 1, 0)[1][2, 1].any()


def test_scales_are_of_the_largest_of_a_head() -> None:
    x = torch.tensor([[[1.0, -2.0], [0.5, 0.25]]])
    rounded, scales = round_heads(x)
    assert rounded.tolist() == [[[64, -127], [127, 64]]]
    torch.testing.assert_close(scales, torch.tensor([[2 / 127, 0.5 / 127]]))
