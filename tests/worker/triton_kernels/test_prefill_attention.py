"""Prefills of packed sequences against fp32 attention in torch: prefixes, chunks, windows, caps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.triton_interpreter import DEVICE
from tests.worker.triton_kernels.attention_case import LAYER, attention_of, fill, strides_of
from xllm.errors import InvariantError
from xllm.worker.triton_kernels.prefill_attention import prefill_attention
from xllm.worker.triton_kernels.tiling import row_tiles, tile_tokens


def queries(case, counts, heads, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(counts), heads, case.strides.head_dim)
    return torch.randn(shape, generator=generator).to(case.strides.dtype).to(DEVICE)


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def starts_of(counts):
    return [sum(counts[:i]) for i in range(len(counts) + 1)]


def attended(case, q, counts, *, tables=False, room=0, scale=None, **options):
    strides = case.strides
    value_dim = strides.value_dim or strides.head_dim
    out = torch.full((*q.shape[:-1], value_dim), 777.0, dtype=q.dtype, device=DEVICE)
    tiles = row_tiles(counts, case.lengths, tile_tokens(strides, q.shape[1]))
    prefill_attention(
        q,
        out,
        ints(starts_of(counts)),
        ints(tiles + [(-1, 0)] * room).view(-1, 2),
        case.tables if tables else case.addresses,
        case.lengths_tensor(),
        LAYER,
        strides,
        scale=scale or strides.head_dim**-0.5,
        **options,
    )
    return out.cpu()


def expected(case, q, counts, *, scale=None, window=0, softcap=0.0):
    starts = starts_of(counts)
    rows = [
        attention_of(
            q[starts[i] : starts[i + 1]].cpu(), case.keys[i], case.values[i],
            torch.arange(count) + case.lengths[i] - count,
            scale or case.strides.head_dim**-0.5, window, softcap,
        )
        for i, count in enumerate(counts)
    ]  # fmt: skip
    return torch.cat(rows)


def compare(found, wanted):
    near = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[found.dtype]
    torch.testing.assert_close(found.float(), wanted, atol=near, rtol=near)


@pytest.mark.parametrize(
    ("kv_heads", "group", "dim", "block", "options"),
    [
        (2, 4, 64, 16, {}),
        (2, 1, 128, 128, {"scale": 0.2}),
        (1, 2, 64, 64, {"window": 21}),
        (1, 8, 128, 16, {"softcap": 7.0}),
        (1, 7, 64, 128, {"window": 30, "softcap": 20.0}),
        (1, 2, 80, 64, {"window": 1}),
        (1, 40, 16, 16, {}),  # more heads than a tile has rows
    ],
)
@pytest.mark.parametrize("tables", [False, True])
def test_it_is_the_attention(kv_heads, group, dim, block, options, tables):
    """A whole prompt, a chunk behind a prefix, a decode, an empty sequence, a block's last."""
    counts, lengths = [19, 9, 1, 0, 4], [19, 40, 37, 5, block]
    case = fill(strides_of(kv_heads, dim, block), lengths)
    q = queries(case, counts, kv_heads * group)
    found = attended(case, q, counts, tables=tables, room=2, **options)
    compare(found, expected(case, q, counts, **options))


@pytest.mark.parametrize("window", [0, 90])
def test_tiles_that_are_seen_whole_are_not_masked(window):
    """16 bits take long tiles: 300 tokens are some of each kind."""
    counts, lengths = [140, 70], [300, 70]
    case = fill(strides_of(1, 64, 16, torch.float16), lengths)
    q = queries(case, counts, 2)
    found = attended(case, q, counts, window=window)
    compare(found, expected(case, q, counts, window=window))


def test_nothing_before_the_window_is_read():
    """Pages there may be gone: here they hold NaN."""
    case = fill(strides_of(1, 64, 16), [120], lowest=71)
    q = queries(case, [20], 2)
    compare(attended(case, q, [20], window=30), expected(case, q, [20], window=30))


def test_keys_may_hold_the_values():
    """The compressed cache of MLA: keys of 32 + 16 numbers, values the first 32 of them."""
    case = fill(strides_of(1, 48, 16, value_dim=32, in_keys=True), [40, 3])
    q = queries(case, [33, 3], 8)
    compare(attended(case, q, [33, 3]), expected(case, q, [33, 3]))


@pytest.mark.parametrize("window", [0, 25])
def test_the_bits_of_a_row_do_not_depend_on_chunks_or_the_batch(window):
    """One prompt at once, and the same in chunks beside another, whose rows come first."""
    case = fill(strides_of(1, 64, 64), [75])
    q = queries(case, [75], 4)
    whole = attended(case, q, [75], window=window)
    compare(whole, expected(case, q, [75], window=window))
    other = fill(case.strides, [20], seed=9)
    for first, last in ((0, 23), (23, 24), (24, 75)):
        both = type(case)(
            case.strides, [20, last], [], [], torch.cat((other.addresses, case.addresses)), None,
            [*case.memory, *other.memory],
        )  # fmt: skip
        counts = [5, last - first]
        rows = torch.cat((queries(other, [5], 4), q[first:last]))
        found = attended(both, rows, counts, window=window)
        assert torch.equal(found[5:], whole[first:last]), (first, last)


@given(st.data())
@settings(max_examples=10)
def test_any_shape(data):
    """Whatever is combined with whatever."""
    draw = data.draw
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 2), (1, 4), (1, 7)]))
    strides = strides_of(
        kv_heads,
        draw(st.sampled_from([16, 24, 64, 80])),
        draw(st.sampled_from([16, 64, 128])),
        draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
    )
    counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=3))
    lengths = [count + draw(st.sampled_from([0, 1, 16, 77])) for count in counts]
    case = fill(strides, lengths, seed=draw(st.integers(0, 99)))
    q = queries(case, counts, kv_heads * group)
    options = {
        "window": draw(st.sampled_from([0, 1, 30, 200])),
        "softcap": draw(st.sampled_from([0.0, 5.0])),
        "scale": draw(st.sampled_from([0.05, 0.3])),
    }
    found = attended(
        case, q, counts, tables=draw(st.booleans()), room=draw(st.integers(0, 2)), **options
    )
    compare(found, expected(case, q, counts, **options))


def test_rows_of_no_sequence_stay():
    """Rows behind the last sequence fill a graph's bucket."""
    case = fill(strides_of(1, 16, 16), [6])
    q = queries(case, [9], 1)
    out = torch.full_like(q, math.pi)
    prefill_attention(
        q, out, ints([0, 6]), ints([[0, 0], [-1, 0]]), case.addresses, case.lengths_tensor(),
        LAYER, case.strides, scale=0.25,
    )  # fmt: skip
    compare(out.cpu()[:6], expected(case, q[:6], [6], scale=0.25))
    assert (out.cpu()[6:] == torch.full((3, 1, 16), math.pi)).all()


def test_no_tiles_are_no_work():
    case = fill(strides_of(1, 16, 16), [3])
    assert (attended(case, queries(case, [0], 1), [0]) == 777.0).all()


def test_tensors_that_are_not_contiguous_are_refused():
    case = fill(strides_of(1, 16, 16), [5])
    with pytest.raises(InvariantError, match="q is not contiguous"):
        attended(case, queries(case, [5], 4)[:, ::2], [5])
