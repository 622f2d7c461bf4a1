"""Paged attention against attention written out, over random batches (property-based)."""

from __future__ import annotations

from array import array

import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from xllm.worker.attention import plan
from xllm.worker.attention.paged import AttentionWorkspace, PagedAttention
from xllm.worker.attention.plan import Span, plan_window, write_slots
from xllm.worker.memory.layout import KvLayout
from xllm.worker.memory.pool import KvPool, PoolMemory

CPU = torch.device("cpu")
NUM_BLOCKS = 64
HEADS, KV_HEADS, DIM = 6, 2, 8


def no_tick() -> None:
    """Nobody watches."""


def span(start: int, num_rows: int, blocks: list[int]) -> Span:
    return Span(start, num_rows, array("q", blocks))


def expected_row(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: int,
    window: int,
    scale: float | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """One row [heads, dim] over keys and values [tokens, kv_heads, dim], in float64."""
    low = max(position + 1 - window, 0) if window else 0
    seen_keys = keys[low : position + 1].double().repeat_interleave(HEADS // KV_HEADS, 1)
    seen_values = values[low : position + 1].double().repeat_interleave(HEADS // KV_HEADS, 1)
    scores = torch.einsum("hd,thd->ht", q.double(), seen_keys) * (scale or DIM**-0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("ht,thd->hd", scores.softmax(-1), seen_values)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int, int, int]:
    """(start, rows) of each sequence, block size, window, seed."""
    block_size = draw(st.sampled_from([1, 2, 8, 16]))
    room = NUM_BLOCKS * block_size // 6 - block_size
    spans = []
    for _ in range(draw(st.integers(1, 6))):
        # A prompt's first chunk (often), or what follows one.
        start = draw(st.one_of(st.just(0), st.integers(0, max(room - 1, 0))))
        rows = draw(st.one_of(st.just(1), st.integers(1, room - start or 1)))
        spans.append((start, rows))
    window = draw(st.one_of(st.just(0), st.integers(1, 40)))
    return spans, block_size, window, draw(st.integers(0, 1000))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(batches(), st.sampled_from([None, 0.5]), st.sampled_from([0.0, 1.5]))
def test_any_batch(
    batch: tuple[list[tuple[int, int]], int, int, int], scale: float | None, softcap: float
) -> None:
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
        spans.append(span(start, rows, blocks))
        keys, values = torch.randn(2, start + rows, KV_HEADS, DIM).unbind()
        histories.append((keys, values))
        for block in blocks:
            pool.keys(0)[block] = 0
            pool.values(0)[block] = 0
        if start:
            slots = torch.tensor(write_slots([span(0, start, blocks)], block_size))
            pool.write(0, slots, keys[:start], values[:start])
    fresh_keys = torch.cat([k[s.start :] for s, (k, _) in zip(spans, histories, strict=True)])
    fresh_values = torch.cat([v[s.start :] for s, (_, v) in zip(spans, histories, strict=True)])
    q = torch.randn(len(fresh_keys), HEADS, DIM)
    plan = plan_window(spans, window, block_size, torch.float32, CPU)
    slots = torch.tensor(write_slots(spans, block_size))
    event(f"{len(plan.fresh)} fresh groups")
    workspace = AttentionWorkspace(pool, torch.float32, CPU)
    attention = PagedAttention(pool, workspace, slots, {window: plan}, (window,), no_tick)
    got = attention.attend(0, q, fresh_keys, fresh_values, scale, softcap)
    row = 0
    for one, (keys, values) in zip(spans, histories, strict=True):
        assert torch.equal(pool.keys(0)[list(one.block_ids)].flatten(0, 1)[: one.end], keys)
        for position in range(one.start, one.end):
            want = expected_row(q[row], keys, values, position, window, scale, softcap)
            assert (got[row].double() - want.flatten()).abs().max() < 1e-5
            row += 1


def test_workspace_is_kept() -> None:
    layout = KvLayout(8, 4, 1, KV_HEADS, DIM, 4)
    pool = KvPool(layout, PoolMemory(torch.zeros(layout.total_bytes // 4)))
    workspace = AttentionWorkspace(pool, torch.float32, CPU)
    keys, values = workspace.take(6)
    assert keys.shape == values.shape == (6, 4 * KV_HEADS * DIM)
    assert workspace.take(3)[0].data_ptr() == keys.data_ptr()


def test_every_form_of_work_is_planned() -> None:
    """What `test_any_batch` draws reaches all forms; here they are named."""
    spans = [
        span(0, 5, [0]),
        span(9, 1, [1, 2]),
        span(0, 7, [3]),
        span(4, 3, [4]),
        span(30, 1, [5, 6, 7, 8]),
        span(0, 300, list(range(9, 47))),
    ]
    full = plan_window(spans, 0, 8, torch.float32, CPU)
    assert [(group.batch, group.width) for group in full.fresh] == [(2, 7)]
    assert [(part.first_row, part.num_rows, part.seen is None) for part in full.prefills] == [
        (13, 3, False),
        (17, 300, True),
    ]
    assert [group.width for group in full.decodes] == [2, 4]
    # A window that is shorter than a prompt takes it out of the group; decodes see its blocks.
    windowed = plan_window(spans, 6, 8, torch.float32, CPU)
    assert windowed.fresh == ()
    assert [part.seen is None for part in windowed.prefills] == [False, False, False, True]
    assert [(group.batch, group.width) for group in windowed.decodes] == [(1, 1), (1, 2)]


def test_fresh_prompts_of_one_batch() -> None:
    """Prompts of like length, padded to the longest, against the same prompts alone."""
    torch.manual_seed(3)
    layout = KvLayout(16, 4, 1, KV_HEADS, DIM, 4)
    pool = KvPool(layout, PoolMemory(torch.zeros(layout.total_bytes // 4)))
    spans = [span(0, 5, [0, 1]), span(0, 8, [2, 3]), span(0, 6, [5, 4])]
    q = torch.randn(19, HEADS, DIM)
    k, v = torch.randn(2, 19, KV_HEADS, DIM).unbind()

    def attend(chosen: list[Span], rows: slice) -> torch.Tensor:
        plan = plan_window(chosen, 0, 4, torch.float32, CPU)
        slots = torch.tensor(write_slots(chosen, 4))
        workspace = AttentionWorkspace(pool, torch.float32, CPU)
        attention = PagedAttention(pool, workspace, slots, {0: plan}, (0,), no_tick)
        assert len(plan.fresh) == (len(chosen) > 1)
        return attention.attend(0, q[rows], k[rows], v[rows])

    together = attend(spans, slice(0, 19))
    alone = [
        attend([one], slice(first, first + one.num_rows))
        for one, first in zip(spans, (0, 5, 13), strict=True)
    ]
    assert (together - torch.cat(alone)).abs().max() < 1e-6
    # What is no number in one of them stays in it, padding or not.
    k[0], v[0] = float("nan"), float("inf")
    spoilt = attend(spans, slice(0, 19))
    assert not spoilt[:5].isfinite().any()
    assert torch.equal(spoilt[5:], together[5:])


def test_a_long_fresh_prompt_in_parts(monkeypatch) -> None:
    """Its first rows see each other alone, the rest see them in the pool."""
    torch.manual_seed(4)
    layout = KvLayout(16, 8, 1, KV_HEADS, DIM, 4)
    pool = KvPool(layout, PoolMemory(torch.zeros(layout.total_bytes // 4)))
    spans = [span(0, 100, list(range(13)))]
    slots = torch.tensor(write_slots(spans, 8))
    q = torch.randn(100, HEADS, DIM)
    k, v = torch.randn(2, 100, KV_HEADS, DIM).unbind()
    found = []
    for size in (1000, 32):
        monkeypatch.setattr(plan, "_MAX_FRESH_ROWS", 10)
        monkeypatch.setattr(plan, "_MAX_FRESH_PART_ROWS", size)
        planned = plan_window(spans, 0, 8, torch.float32, CPU)
        assert [part.num_rows for part in planned.prefills] == ([100] if size > 100 else [32, 68])
        workspace = AttentionWorkspace(pool, torch.float32, CPU)
        attention = PagedAttention(pool, workspace, slots, {0: planned}, (0,), no_tick)
        found.append(attention.attend(0, q, k, v))
    assert (found[0] - found[1]).abs().max() < 1e-6
