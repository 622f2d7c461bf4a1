"""Paged attention against attention written out, over random batches (property-based)."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.worker.attention.paged import AttentionWorkspace, PagedAttention
from xllm.worker.attention.plan import Span, plan_window, write_slots
from xllm.worker.memory.layout import KvLayout
from xllm.worker.memory.pool import KvPool, PoolMemory

CPU = torch.device("cpu")
NUM_BLOCKS = 64
HEADS, KV_HEADS, DIM = 6, 2, 8


def expected_row(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int, window: int
) -> torch.Tensor:
    """One row [heads, dim] over keys and values [tokens, kv_heads, dim], in float64."""
    low = max(position + 1 - window, 0) if window else 0
    seen_keys = keys[low : position + 1].double().repeat_interleave(HEADS // KV_HEADS, 1)
    seen_values = values[low : position + 1].double().repeat_interleave(HEADS // KV_HEADS, 1)
    scores = torch.einsum("hd,thd->ht", q.double(), seen_keys) / DIM**0.5
    return torch.einsum("ht,thd->hd", scores.softmax(-1), seen_values)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int, int, int]:
    """(start, rows) of each sequence, block size, window, seed."""
    block_size = draw(st.sampled_from([1, 2, 8, 16]))
    room = NUM_BLOCKS * block_size // 6 - block_size
    spans = []
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, max(room - 1, 0)))
        rows = draw(st.one_of(st.just(1), st.integers(1, room - start or 1)))
        spans.append((start, rows))
    window = draw(st.one_of(st.just(0), st.integers(1, 40)))
    return spans, block_size, window, draw(st.integers(0, 1000))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(batches())
def test_any_batch(batch: tuple[list[tuple[int, int]], int, int, int]) -> None:
    shapes, block_size, window, seed = batch
    torch.manual_seed(seed)
    layout = KvLayout(NUM_BLOCKS, block_size, 1, KV_HEADS, DIM, 4)
    # What no sequence owns is NaN: nobody may read it.
    memory = torch.full((layout.total_bytes // 4,), float("nan"))
    pool = KvPool(layout, PoolMemory(memory))
    free = torch.randperm(NUM_BLOCKS).tolist()
    spans, histories = [], []
    for start, rows in shapes:
        count = -(-(start + rows) // block_size)
        blocks = [free.pop() for _ in range(count)]
        spans.append(Span(start, rows, blocks))
        keys, values = torch.randn(2, start + rows, KV_HEADS, DIM).unbind()
        histories.append((keys, values))
        for block in blocks:
            pool.keys(0)[block] = 0
            pool.values(0)[block] = 0
        if start:
            slots = torch.tensor(write_slots([Span(0, start, blocks)], block_size))
            pool.write(0, slots, keys[:start], values[:start])
    fresh_keys = torch.cat([k[s.start :] for s, (k, _) in zip(spans, histories, strict=True)])
    fresh_values = torch.cat([v[s.start :] for s, (_, v) in zip(spans, histories, strict=True)])
    q = torch.randn(len(fresh_keys), HEADS, DIM)
    plan = plan_window(spans, window, block_size, torch.float32, CPU)
    slots = torch.tensor(write_slots(spans, block_size))
    workspace = AttentionWorkspace(pool, torch.float32, CPU)
    attention = PagedAttention(pool, workspace, slots, {window: plan}, (window,))
    got = attention.attend(0, q, fresh_keys, fresh_values)
    row = 0
    for span, (keys, values) in zip(spans, histories, strict=True):
        assert torch.equal(pool.keys(0)[span.block_ids].flatten(0, 1)[: span.end], keys)
        for position in range(span.start, span.end):
            want = expected_row(q[row], keys, values, position, window)
            assert (got[row].double() - want.flatten()).abs().max() < 1e-5
            row += 1


def test_workspace_is_kept() -> None:
    layout = KvLayout(8, 4, 1, KV_HEADS, DIM, 4)
    pool = KvPool(layout, PoolMemory(torch.zeros(layout.total_bytes // 4)))
    workspace = AttentionWorkspace(pool, torch.float32, CPU)
    keys, values = workspace.take(6)
    assert keys.shape == values.shape == (6, 4 * KV_HEADS * DIM)
    assert workspace.take(3)[0].data_ptr() == keys.data_ptr()
