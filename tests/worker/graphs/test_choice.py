"""Which mode a step runs in, and that padding stays bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.worker.graphs.buckets import batch_buckets, row_buckets
from xllm.worker.graphs.choice import (
    EAGER,
    DrawKind,
    GraphChooser,
    GraphKey,
    GraphLimits,
    GraphMode,
    LaunchShape,
)

LIMITS = GraphLimits(max_batch=64, max_rows=512, max_rows_each=4)
shapes = st.builds(
    LaunchShape,
    st.integers(1, 2000),
    st.integers(1, 300),
    st.integers(0, 6),
    st.sampled_from(DrawKind),
)


@given(st.integers(1, 5000), st.integers(1, 5000))
@pytest.mark.parametrize("make", [batch_buckets, row_buckets])
def test_a_bucket_is_the_least_that_holds_a_size(make, most, size):
    buckets = make(most)
    assert list(buckets.sizes) == sorted(set(buckets.sizes))
    assert buckets.sizes[-1] == most
    found = buckets.of(size)
    if size > most:
        assert found == 0
    else:
        assert found >= size
        assert not [b for b in buckets.sizes if size <= b < found]


@pytest.mark.parametrize("size", [0, -3])
def test_nothing_has_no_bucket(size):
    assert batch_buckets(64).of(size) == 0


@given(st.integers(16, 4096))
def test_rows_are_padded_by_an_eighth_at_most(size):
    assert row_buckets(4096).of(size) - size <= max(8, size // 8)


@pytest.mark.parametrize("make", [batch_buckets, row_buckets])
def test_a_bound_of_zero_has_no_buckets(make):
    assert make(0).sizes == ()


@given(shapes)
def test_the_last_choice_is_always_eager_and_the_modes_fall(shape):
    keys = GraphChooser(LIMITS).choose(shape)
    assert keys[-1] == EAGER
    order = [GraphMode.FULL, GraphMode.PARTIAL, GraphMode.EAGER]
    modes = [order.index(key.mode) for key in keys]
    assert modes == sorted(modes)
    assert len(set(keys)) == len(keys)
    # The same graph without a draw stands behind the one with it.
    draws = [key.draws for key in keys if key.mode == GraphMode.FULL]
    assert draws in ([], [DrawKind.NONE], [shape.draws, DrawKind.NONE])
    assert not [key for key in keys if key.mode != GraphMode.FULL and key.draws != DrawKind.NONE]


@given(shapes)
def test_a_key_holds_its_shape(shape):
    for key in GraphChooser(LIMITS).choose(shape):
        if key.mode == GraphMode.FULL:
            assert shape.rows_each == key.rows_each <= LIMITS.max_rows_each
            assert shape.num_sequences <= key.num_sequences <= LIMITS.max_batch
        elif key.mode == GraphMode.PARTIAL:
            assert shape.num_rows <= key.num_rows <= LIMITS.max_rows


def test_decodes_alike_are_a_full_graph_and_mixed_steps_a_partial_one():
    chooser = GraphChooser(LIMITS)
    decode = chooser.choose(LaunchShape(5, 5, 1))
    assert decode[0] == GraphKey(GraphMode.FULL, 8, 1)
    verify = chooser.choose(LaunchShape(15, 5, 3))
    assert verify[0] == GraphKey(GraphMode.FULL, 24, 3)
    assert verify[0].num_sequences == 8
    mixed = chooser.choose(LaunchShape(100, 3, 0))
    assert [key.mode for key in mixed] == [GraphMode.PARTIAL, GraphMode.EAGER]
    assert chooser.choose(LaunchShape(5000, 3, 0)) == (EAGER,)


@pytest.mark.parametrize(
    ("limits", "modes"),
    [
        (GraphLimits(max_batch=0), [GraphMode.PARTIAL, GraphMode.EAGER]),
        (GraphLimits(max_rows=0), [GraphMode.FULL, GraphMode.EAGER]),
        (GraphLimits(max_batch=0, max_rows=0), [GraphMode.EAGER]),
    ],
)
def test_a_mode_can_be_off(limits, modes):
    keys = GraphChooser(limits).choose(LaunchShape(4, 4, 1))
    assert [key.mode for key in keys] == modes


def test_warm_keys_are_what_decodes_choose():
    chooser = GraphChooser(LIMITS)
    keys = chooser.warm_keys()
    assert [key.num_rows for key in keys] == sorted((k.num_rows for k in keys), reverse=True)
    assert len(keys) == len(set(keys)) == 11 + 7  # 1, 2, 4, 8 to 64 in steps of 8; 1 to 64
    for batch in range(1, LIMITS.max_batch + 1):
        assert chooser.choose(LaunchShape(batch, batch, 1, DrawKind.PLAIN))[0] in keys
    for batch in (1, 2, 4, 8, 16, 32, 64):
        assert chooser.choose(LaunchShape(batch, batch, 1, DrawKind.FILTERED))[0] in keys
    assert GraphChooser(GraphLimits(max_batch=0)).warm_keys() == ()
