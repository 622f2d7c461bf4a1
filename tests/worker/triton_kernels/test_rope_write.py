"""Rotation and the writing of keys and values against the layers, into memory full of NaN."""

import math

import pytest
import torch

from tests.worker.triton_interpreter import DEVICE
from tests.worker.triton_kernels.attention_case import LAYER, strides_of, token_views
from xllm.errors import InvariantError
from xllm.worker.layers.norm import RmsNorm
from xllm.worker.layers.rotary import Rotary
from xllm.worker.loader.config import RopeConfig
from xllm.worker.triton_kernels.rope_write import rope_write

EPS = 1e-6
POSITIONS = [0, 17, 3, 40, 2]
SEQUENCE = [0, 1, 0, 1, -1]
"""Of each row; -1: padding."""


class Step:
    """Five rows of two sequences and of padding, and what the layers make of them."""

    def __init__(self, strides, heads, dtype, norm, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.strides, self.heads = strides, heads
        dim, kv_heads = strides.head_dim, strides.num_kv_heads
        total = heads + 2 * kv_heads
        self.qkv = torch.randn(5, total * dim, generator=generator).to(dtype).to(DEVICE)
        weights = torch.randn(2, dim, generator=generator).to(dtype).to(DEVICE)
        self.norm = {"query_weight": weights[0], "key_weight": weights[1], "eps": EPS}
        self.norm = self.norm if norm else {}
        rotary = Rotary(RopeConfig(theta=10_000.0), dim, DEVICE)
        positions = torch.tensor(POSITIONS, device=DEVICE)
        self.cosines, self.sines = rotary.angles(positions)
        self.positions = positions.int()
        parts = self.qkv.view(5, total, dim).split([heads, kv_heads, kv_heads], dim=1)
        q, k, self.values = parts
        if norm:
            q, k = RmsNorm(weights[0], EPS)(q), RmsNorm(weights[1], EPS)(k)
        tables = rotary.tables(positions, torch.float32)
        self.queries, self.keys = (tables.rotate(x.float()).to(dtype) for x in (q, k))
        self.slots = [
            torch.full((4, strides.block_numbers), math.nan, dtype=dtype, device=DEVICE)
            for _ in range(2)
        ]

    def addresses(self, of_blocks):
        """Of each row's sequence; with block tables, counted back from its position's block."""
        found = []
        for sequence, position in zip(SEQUENCE, POSITIONS, strict=True):
            if sequence < 0:
                found.append(0)
                continue
            block = position // self.strides.block_size
            address = self.slots[sequence][block if of_blocks else 0].data_ptr()
            before = block * self.strides.block_numbers * self.strides.item_bytes
            found.append(address - before if of_blocks else address)
        return torch.tensor(found, dtype=torch.int64, device=DEVICE)

    def write(self, of_blocks=False):
        q = torch.full_like(self.queries, math.nan).contiguous()
        rope_write(
            self.qkv, q, self.cosines, self.sines, self.addresses(of_blocks), self.positions,
            LAYER, self.strides, **self.norm,
        )  # fmt: skip
        return q


def compare(found, wanted):
    near = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[wanted.dtype]
    torch.testing.assert_close(found, wanted, atol=near, rtol=near)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block", "dtype"),
    [
        (4, 2, 64, 16, torch.float32),
        (7, 1, 128, 64, torch.bfloat16),
        (2, 2, 80, 128, torch.float16),
        (16, 8, 16, 16, torch.float32),
    ],
)
@pytest.mark.parametrize("norm", [False, True])
def test_heads_go_where_they_belong(heads, kv_heads, dim, block, dtype, norm):
    step = Step(strides_of(kv_heads, dim, block, dtype), heads, dtype, norm)
    compare(step.write(), step.queries)
    written = 0
    for row, (sequence, position) in enumerate(zip(SEQUENCE, POSITIONS, strict=True)):
        if sequence < 0:
            continue
        keys, values = token_views(step.strides, step.slots[sequence], position)
        compare(keys, step.keys[row])
        assert torch.equal(values, step.values[row])
        written += keys.numel() + values.numel()
    assert sum(int((~slot.isnan()).sum()) for slot in step.slots) == written


def test_a_blocks_address_counted_back_serves_as_a_slots():
    step = Step(strides_of(2, 64, 16), 4, torch.float32, True)
    step.write(of_blocks=True)
    keys, _ = token_views(step.strides, step.slots[1], 40)
    compare(keys, step.keys[3])


def test_shapes_that_do_not_fit_are_refused():
    step = Step(strides_of(2, 64, 16), 4, torch.float32, False)
    step.qkv = step.qkv[:, :-64].contiguous()
    with pytest.raises(InvariantError, match=r"448\) numbers for 8 heads of 64"):
        step.write()


def test_values_in_keys_are_written_by_their_model():
    step = Step(strides_of(2, 64, 16), 4, torch.float32, False)
    step.strides = strides_of(2, 64, 16, value_dim=32, in_keys=True)
    with pytest.raises(InvariantError, match="of different sizes"):
        step.write()
