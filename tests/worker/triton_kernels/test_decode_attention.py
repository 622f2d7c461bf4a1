"""Decodes against fp32 attention in torch: groups, sizes, windows, caps, splits, padding."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.triton_interpreter import DEVICE
from tests.worker.triton_kernels.attention_case import LAYER, attention_of, fill, strides_of
from xllm.errors import InvariantError
from xllm.worker.triton_kernels.decode_attention import decode_attention, decode_cut

SCRATCH = 1 << 16


def queries(case, m, heads, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(case.lengths), m, heads, case.strides.head_dim)
    return torch.randn(shape, generator=generator).to(case.strides.dtype).to(DEVICE)


def attended(case, q, *, tables=False, max_length=None, scale=None, **options):
    strides = case.strides
    value_dim = strides.value_dim or strides.head_dim
    out = torch.full((*q.shape[:-1], value_dim), math.nan, dtype=q.dtype, device=DEVICE)
    decode_attention(
        q,
        out,
        case.tables if tables else case.addresses,
        case.lengths_tensor(),
        LAYER,
        strides,
        scale=scale or strides.head_dim**-0.5,
        max_length=max_length or max(case.lengths),
        scratch=torch.full((SCRATCH,), math.nan, device=DEVICE),
        **options,
    )
    return out.cpu()


def expected(case, q, *, scale=None, window=0, softcap=0.0):
    m = q.shape[1]
    rows = [
        attention_of(
            q[i].cpu(), case.keys[i], case.values[i], torch.arange(m) + length - m,
            scale or case.strides.head_dim**-0.5, window, softcap,
        )
        for i, length in enumerate(case.lengths)
    ]  # fmt: skip
    return torch.stack(rows)


def compare(found, wanted):
    near = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[found.dtype]
    torch.testing.assert_close(found.float(), wanted, atol=near, rtol=near)


@pytest.mark.parametrize(
    ("kv_heads", "group", "dim", "block", "m", "options"),
    [
        (2, 4, 64, 16, 1, {}),
        (2, 1, 128, 128, 1, {"scale": 0.2}),
        (1, 2, 64, 64, 3, {"window": 21}),
        (1, 8, 128, 16, 4, {"softcap": 7.0}),
        (1, 7, 64, 128, 2, {"window": 100, "softcap": 20.0}),
        (2, 2, 80, 64, 1, {"window": 1}),
        (1, 40, 16, 16, 2, {}),  # more rows than a tile holds
        (1, 3, 256, 16, 1, {}),
    ],
)
@pytest.mark.parametrize("tables", [False, True])
def test_it_is_the_attention(kv_heads, group, dim, block, m, options, tables):
    """Slots and block tables; sequences of one token, of none, of parts of blocks and of whole."""
    lengths = [1, 0, m + 1, block, 2 * block + 3]
    case = fill(strides_of(kv_heads, dim, block), lengths)
    q = queries(case, m, kv_heads * group)
    compare(attended(case, q, tables=tables, **options), expected(case, q, **options))


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("split_tokens", [0, 128])
def test_long_sequences_are_split(block, split_tokens):
    """One tile a split, and empty splits behind the ends of the shorter ones."""
    case = fill(strides_of(1, 64, block, torch.float16), [600, 17, 0, 130])
    q = queries(case, 1, 4)
    cut = decode_cut(q, case.strides, max_length=1000, split_tokens=split_tokens)
    assert cut.splits == (8 if split_tokens else 4)
    for window in (0, 100):
        found = attended(case, q, max_length=1000, window=window, split_tokens=split_tokens)
        compare(found, expected(case, q, window=window))


def test_nothing_before_the_window_is_read():
    """Pages there may be gone: here they hold NaN."""
    lengths = [200, 150]
    case = fill(strides_of(1, 64, 16), lengths, lowest=101)
    q = queries(case, 2, 2)
    for split_tokens in (0, 128):
        found = attended(case, q, window=48, max_length=300, split_tokens=split_tokens)
        compare(found[1:], expected(case, q, window=48)[1:])


def test_keys_may_hold_the_values():
    """The compressed cache of MLA: keys of 32 + 16 numbers, values the first 32 of them."""
    case = fill(strides_of(1, 48, 16, value_dim=32, in_keys=True), [40, 3])
    q = queries(case, 2, 8)
    compare(attended(case, q), expected(case, q))


def test_values_may_be_shorter_than_keys():
    case = fill(strides_of(2, 48, 64, value_dim=32), [70, 3])
    q = queries(case, 1, 4)
    compare(attended(case, q), expected(case, q))


@pytest.mark.parametrize("m", [1, 3])
def test_with_splits_of_one_size_the_bits_of_a_row_do_not_depend_on_the_batch(m):
    """Nor on the longest length that the host allows for, as in another graph."""
    lengths = [330, 64, 190, 5]
    case = fill(strides_of(1, 64, 64), lengths)
    q = queries(case, m, 4)
    whole = attended(case, q, max_length=400, split_tokens=64)
    compare(whole, expected(case, q))
    for index, length in enumerate(lengths):
        alone = type(case)(
            case.strides, [length], [], [], case.addresses[index : index + 1], None, case.memory
        )
        for max_length in (length, 1000):
            found = attended(alone, q[index : index + 1], max_length=max_length, split_tokens=64)
            assert torch.equal(found[0], whole[index]), (index, max_length)


@given(st.data())
@settings(max_examples=12)
def test_any_shape(data):
    """Whatever is combined with whatever."""
    draw = data.draw
    kv_heads, group, m = draw(st.sampled_from([(1, 1, 1), (2, 1, 2), (1, 4, 4), (1, 7, 1)]))
    strides = strides_of(
        kv_heads,
        draw(st.sampled_from([16, 24, 64, 80])),
        draw(st.sampled_from([16, 64, 128])),
        draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        spare=draw(st.sampled_from([0, 8, 64])),
    )
    lengths = draw(st.lists(st.integers(0, 150), min_size=1, max_size=3))
    case = fill(strides, lengths, seed=draw(st.integers(0, 99)))
    q = queries(case, m, kv_heads * group)
    options = {
        "window": draw(st.sampled_from([0, 1, 30, 200])),
        "softcap": draw(st.sampled_from([0.0, 5.0])),
        "scale": draw(st.sampled_from([0.05, 0.3])),
    }
    found = attended(
        case,
        q,
        tables=draw(st.booleans()),
        max_length=max(lengths, default=0) + draw(st.sampled_from([1, 700])),
        split_tokens=draw(st.sampled_from([0, 128])),
        **options,
    )
    compare(found, expected(case, q, **options))


def test_rows_and_tokens_in_any_order_of_heads():
    """A head reads its own keys: heads swapped in memory are heads swapped in the result."""
    case = fill(strides_of(4, 16, 16), [20])
    q = queries(case, 1, 8)
    found = attended(case, q)
    for head in range(8):
        one = attention_of(
            q[0].cpu()[:, head : head + 1], case.keys[0][head // 2 : head // 2 + 1],
            case.values[0][head // 2 : head // 2 + 1], torch.tensor([19]), 0.25,
        )  # fmt: skip
        compare(found[0, :, head], one[:, 0])


def test_no_sequences_are_no_work():
    case = fill(strides_of(1, 16, 16), [])
    assert attended(case, queries(case, 1, 1), max_length=16).shape == (0, 1, 1, 16)


def test_too_little_scratch_is_refused():
    case = fill(strides_of(1, 64, 16), [random.Random(1).randrange(300, 400)])
    q = queries(case, 1, 1)
    with pytest.raises(InvariantError, match="scratch of 65536 numbers where"):
        attended(case, q, max_length=1 << 20, split_tokens=64)


def test_tensors_that_are_not_contiguous_are_refused():
    case = fill(strides_of(1, 64, 16), [5, 5])
    with pytest.raises(InvariantError, match="q is not contiguous"):
        attended(case, queries(case, 1, 4)[:, :, ::2])


def test_one_grid_serves_every_length():
    """Programs made for 8,192 tokens: a short sequence is cut as if they were made for it."""
    lengths = [300, 1, 0, 520]
    case = fill(strides_of(1, 64, 16), lengths)
    q = queries(case, 1, 2)
    cut = decode_cut(q, case.strides, max_length=8192)
    assert cut.splits > decode_cut(q, case.strides, max_length=520).splits > 1
    wanted = expected(case, q)
    for window in (0, 280):
        wanted = expected(case, q, window=window)
        compare(attended(case, q, max_length=8192, window=window), wanted)
        # Less than they have: fewer programs, each with more to do.
        compare(attended(case, q, max_length=290, window=window), wanted)
    alone = attended(case, q, max_length=520)
    assert torch.equal(attended(case, q, max_length=768), alone)
