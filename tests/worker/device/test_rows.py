"""The numbers of a step: where rows stand, what they are, and that padding is nobody's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.worker.device.batches import FIRST_ADDRESS, SLOT_BYTES, batch_of, table_of
from xllm.errors import InvariantError
from xllm.worker.execution.device.rows import decodes_first, has_addresses, lay_out_rows
from xllm.worker.graphs.choice import DrawKind

parts = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 5), st.booleans()).map(
        lambda x: (x[0], x[0] + x[1], x[2])
    ),
    min_size=1,
    max_size=8,
)


def laid_out(ranges):
    """Sequences 0.. with rows at positions [start, end), all known; some are drafts."""
    table = table_of({seq: end for seq, (_, end, _) in enumerate(ranges)})
    batch = batch_of(
        table,
        [(seq, start, end - start) for seq, (start, end, _) in enumerate(ranges)],
        verified=[seq for seq, (_, _, is_verified) in enumerate(ranges) if is_verified],
    )
    ordered = decodes_first(batch)
    return batch, ordered, lay_out_rows(ordered)


@given(parts)
def test_each_row_knows_its_token_position_and_place(ranges):
    _, ordered, rows = laid_out(ranges)
    row = 0
    for number, (entry, span) in enumerate(zip(ordered.entries, ordered.spans, strict=True)):
        address = FIRST_ADDRESS + entry.item.seq * SLOT_BYTES
        assert entry.first_row == row == rows.row_starts[number]
        assert rows.addresses[number] == address
        assert rows.lengths[number] == span.end
        for position in range(span.start, span.end):
            assert rows.positions[row] == position
            assert rows.row_addresses[row] == address
            assert rows.token_ids[row] == entry.state.tokens(position, position + 1)[0]
            row += 1
    assert row == rows.counts.num_rows == rows.row_starts[-1]
    drawn = []
    for entry in ordered.entries:
        last = entry.first_row + entry.item.num_tokens
        drawn += range(entry.first_row if entry.is_verified else last - 1, last)
    assert rows.read_rows.tolist() == drawn
    assert (rows.sources == -1).all()


@given(parts)
def test_decodes_come_first_and_nothing_is_lost(ranges):
    batch, ordered, rows = laid_out(ranges)
    each = [span.num_rows for span in ordered.spans]
    border = rows.counts.num_decodes
    assert all(n == 1 for n in each[:border])
    assert all(n > 1 for n in each[border:])
    assert sorted(e.index for e in ordered.entries) == [e.index for e in batch.entries]
    assert sorted(ordered.token_ids) == sorted(batch.token_ids)
    # Prompts are no decodes, however many rows they have.
    kinds = [n == 1 or entry.is_verified for n, entry in zip(each, ordered.entries, strict=True)]
    assert kinds == sorted(kinds, reverse=True)
    assert rows.counts.num_attended == sum(kinds)
    runs = [number for number, count in rows.counts.runs for _ in range(count)]
    assert runs == each[: sum(kinds)] == sorted(runs)
    even = len(set(each)) == 1 and all(kinds)
    shape = rows.shape(DrawKind.PLAIN)
    assert shape.rows_each == (each[0] if even else 0)
    assert shape.draws is DrawKind.PLAIN


@given(parts, st.integers(0, 5), st.integers(0, 5))
def test_padding_has_no_place_and_no_length(ranges, more_rows, more):
    _, _, rows = laid_out(ranges)
    counts = rows.counts
    padded = rows.padded(counts.num_rows + more_rows, counts.num_sequences + more)
    assert len(padded.token_ids) == len(padded.positions) == counts.num_rows + more_rows
    assert (padded.row_addresses[counts.num_rows :] == 0).all()
    assert (padded.sources[counts.num_rows :] == -1).all()
    assert (padded.addresses[counts.num_sequences :] == 0).all()
    assert (padded.lengths[counts.num_sequences :] == 0).all()
    assert (np.diff(padded.row_starts)[counts.num_sequences :] == 0).all()
    assert (padded.token_ids[: counts.num_rows] == rows.token_ids).all()


def test_a_shape_is_not_cut():
    _, _, rows = laid_out([(0, 4, False)])
    with pytest.raises(InvariantError):
        rows.padded(3, 1)


def test_a_pending_token_is_found_where_it_is_drawn():
    table = table_of({1: 3, 2: 5})
    table.find(1).expect(40)
    batch = decodes_first(batch_of(table, [(2, 0, 5), (1, 3, 1)]))
    rows = lay_out_rows(batch)
    assert rows.sources.tolist() == [40, -1, -1, -1, -1, -1]
    table.find(1).expect(41)
    both = lay_out_rows(batch_of(table, [(1, 2, 3)]))
    assert both.sources.tolist() == [-1, 40, 41]


def test_a_token_that_nobody_draws_is_a_defect():
    table = table_of({1: 3})
    state = table.find(1)
    state.expect(40)
    state.pending.settle()
    with pytest.raises(InvariantError, match="nobody draws"):
        lay_out_rows(batch_of(table, [(1, 3, 1)]))


def test_rows_without_a_slot_are_seen():
    batch = batch_of(table_of({1: 3}), [(1, 0, 3)])
    assert has_addresses(batch.spans)
    assert not has_addresses([*batch.spans, type(batch.spans[0])(0, 1, batch.spans[0].block_ids)])
