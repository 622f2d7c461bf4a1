"""From a plan's items to the rows of a forward pass; items that cannot run are set aside.

Pure but for the sequence table that it reads and extends with the items' new blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from xllm.errors import EngineError
from xllm.protocol.step import ItemKind, StepItem
from xllm.worker.attention.plan import Span
from xllm.worker.execution.sequences import SequenceState, SequenceTable
from xllm.worker.item_options import check_options
from xllm.worker.memory.mapper import PageMapper
from xllm.worker.verifying import check_verify, drafts_of


@dataclasses.dataclass(frozen=True, slots=True)
class BatchEntry:
    """An item that runs: its place in the plan, its sequence and its rows' place."""

    index: int
    item: StepItem
    state: SequenceState
    first_row: int

    @property
    def last_row(self) -> int:
        """The last one, which has seen all others."""
        return self.first_row + self.item.num_tokens - 1

    @property
    def is_verified(self) -> bool:
        """Whether its rows are drafts behind a last token."""
        return self.item.kind == ItemKind.VERIFY

    @property
    def drafts(self) -> tuple[int, ...]:
        """What it verifies."""
        return drafts_of(self.item)

    @property
    def draw_rows(self) -> range:
        """The rows that tokens are drawn from, if any: all where drafts are verified, else the
        last one."""
        first = self.first_row if self.is_verified else self.last_row
        return range(first, self.last_row + 1)


@dataclasses.dataclass(slots=True)
class StepBatch:
    """The rows of a step: `token_ids`, one a row, and the spans they form.
    `failed`: (index in the plan, reason)."""

    entries: list[BatchEntry] = dataclasses.field(default_factory=list)
    spans: list[Span] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    failed: list[tuple[int, str]] = dataclasses.field(default_factory=list)

    def read_rows(self) -> list[int] | None:
        """The rows whose outputs are read: those that are drawn from, or the last one; None: those
        of prompts that are scored too."""
        if any(entry.item.score_prompt for entry in self.entries):
            return None
        return [row for entry in self.entries for row in entry.draw_rows]

    def refresh_tokens(self) -> None:
        """Read the rows' tokens again, as those that were pending are known now."""
        for entry in self.entries:
            item = entry.item
            given = item.options.token_ids if item.options is not None else ()
            found = given or entry.state.tokens(item.start, item.start + item.num_tokens)
            self.token_ids[entry.first_row : entry.first_row + item.num_tokens] = found

    def drop_refused(self, table: SequenceTable) -> list[tuple[int, str]]:
        """Take out the entries whose sequences have failed since the batch was built; their rows
        stay. (index in the plan, reason) of each."""
        found, kept = [], []
        for entry in self.entries:
            try:
                table.find(entry.item.seq)
            except EngineError as error:
                found.append((entry.index, error.message))
            else:
                kept.append(entry)
        self.entries = kept
        return found

    def single_rows(self) -> list[Span]:
        """The spans cut into spans of one row each, in order."""
        return [
            Span(span.start + offset, 1, span.block_ids, span.address)
            for span in self.spans
            for offset in range(span.num_rows)
        ]


def build_batch(
    items: Sequence[StepItem],
    table: SequenceTable,
    block_size: int,
    max_model_len: int,
    mapper: PageMapper | None = None,
) -> StepBatch:
    """The batch of a plan's items, in their order. A dummy item has no rows. `mapper`: has carried
    out the plan's maps, where there are slots."""
    batch = StepBatch()
    for index, item in enumerate(items):
        if item.kind == ItemKind.DUMMY:
            continue
        try:
            state = table.find(item.seq)
            table.join_blocks(state, item.new_block_ids)
            _check_item(item, state, block_size, max_model_len)
            if item.kind == ItemKind.VERIFY:
                _check_verify(item, state, table.vocab_size)
            if mapper is not None and state.slot >= 0:
                _check_slot(item, state, block_size, mapper)
        except EngineError as error:
            batch.failed.append((index, error.message))
            continue
        end = item.start + item.num_tokens
        given = item.options.token_ids if item.options is not None else ()
        batch.entries.append(BatchEntry(index, item, state, len(batch.token_ids)))
        address = mapper.address(state.slot) if mapper is not None and state.slot >= 0 else 0
        batch.spans.append(Span(item.start, item.num_tokens, state.block_ids, address))
        batch.token_ids.extend(given or state.tokens(item.start, end))
    return batch


def _check_slot(item: StepItem, state: SequenceState, block_size: int, mapper: PageMapper) -> None:
    """Raise EngineError where not all the item's pages are mapped."""
    num_pages = -(-(item.start + item.num_tokens) // block_size)
    reason = mapper.failure(state.slot, num_pages)
    if reason:
        raise EngineError(f"sequence {item.seq}: {reason}")


def _check_item(item: StepItem, state: SequenceState, block_size: int, max_model_len: int) -> None:
    """Raise EngineError for an item that this executor cannot run."""
    name, start, count = f"sequence {item.seq}", item.start, item.num_tokens
    if item.kind not in (ItemKind.PREFILL, ItemKind.DECODE, ItemKind.VERIFY):
        raise EngineError(f"{name}: items of kind {item.kind} are not supported")
    if start < 0 or count < 1 or item.num_samples < 0:
        raise EngineError(f"{name}: {count} tokens from {start}, {item.num_samples} samples")
    if state.is_open:
        raise EngineError(f"{name}: a step that verifies drafts of it is under way")
    end, is_verified = start + count, item.kind == ItemKind.VERIFY
    if end > state.length and not is_verified:
        raise EngineError(f"{name}: tokens to {end} are asked for, {state.length} are known")
    if end > len(state.block_ids) * block_size:
        raise EngineError(f"{name}: {end} tokens do not fit {len(state.block_ids)} blocks")
    if end > max_model_len:
        raise EngineError(f"{name}: {end} tokens, the model takes {max_model_len}")
    if item.num_samples and end != state.length and not is_verified:
        raise EngineError(f"{name}: a draw at {end} of {state.length} known tokens")
    if item.num_samples > 1 and state.choice >= item.num_samples:
        raise EngineError(f"{name}: choice {state.choice} of {item.num_samples} samples")
    check_options(item)


def _check_verify(item: StepItem, state: SequenceState, vocab_size: int) -> None:
    """Raise EngineError where the drafts of an item cannot be verified."""
    if state.pending:
        raise EngineError(f"sequence {item.seq}: its last token is still being drawn")
    last = state.tokens(state.length - 1, state.length)[0]
    check_verify(item, state.length, last, vocab_size)
