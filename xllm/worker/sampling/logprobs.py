"""Log-probabilities: raw log-softmax of the model's logits, before penalties and temperature.

Ranks and alternatives go by the logits themselves, equals by rising id: distinct logits may share
a rounded log-probability. Work goes in slices of rows, so that a long prompt needs little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from xllm.worker.sampling.candidates import sorted_head
from xllm.worker.sampling.rows import LogprobTable

SLICE_ELEMENTS = 1 << 22


def score_rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    num_top: int,
    rows: Sequence[int] | None = None,
    tick: Callable[[], None] | None = None,
) -> LogprobTable:
    """The table of `targets` (int64 [count]) under rows `rows` (None: all, in order) of `logits`
    [rows, vocab], which stay as they are. Where `num_top` exceeds the vocabulary, the last
    columns are padding (id -1). `tick` is called after each slice of work."""
    step = max(1, SLICE_ELEMENTS // logits.shape[1])
    parts = []
    for start in range(0, len(targets), step):
        of = slice(start, start + step)
        part = logits[of] if rows is None else logits[rows[of]]
        parts.append(_score_slice(part, targets[of], num_top))
        if tick is not None:
            tick()
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return empty_table(num_top)
    return LogprobTable(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.ranks for part in parts]),
    )


def empty_table(num_top: int) -> LogprobTable:
    """A table of no rows."""
    return LogprobTable(
        torch.empty((0, 1 + num_top), dtype=torch.int32),
        torch.empty((0, 1 + num_top), dtype=torch.float32),
        torch.empty(0, dtype=torch.int32),
    )


def pack_logprobs(
    items: Sequence[Sequence[LogprobTable]],
) -> tuple[tuple[int, ...], int, tuple[bytes, ...]]:
    """A StepResult's (logprob_rows, num_top, frames) of the tables of each item, in order (those
    of prompt tokens before those of drawn ones). Without any table: no rows, -1, no frames."""
    tables = [table for item in items for table in item]
    if not tables:
        return (), -1, ()
    num_top = max(table.num_top for table in tables)
    rows = tuple(sum(table.num_rows for table in item) for item in items)
    ids = torch.cat([_widen(table.ids, num_top, -1) for table in tables])
    logprobs = torch.cat([_widen(table.logprobs, num_top, -torch.inf) for table in tables])
    ranks = torch.cat([table.ranks for table in tables])
    frames = tuple(part.contiguous().numpy().tobytes() for part in (ids, logprobs, ranks))
    return rows, num_top, frames


def _score_slice(logits: torch.Tensor, targets: torch.Tensor, num_top: int) -> LogprobTable:
    logits = logits.float()
    column = targets.to(logits.device, torch.int64)[:, None]
    logprobs = torch.log_softmax(logits, dim=1)
    own = logits.gather(1, column)
    above = (logits > own).sum(dim=1)
    all_ids = torch.arange(logits.shape[1], device=logits.device)
    equal_before = ((logits == own) & (all_ids < column)).sum(dim=1)
    ids = torch.cat([column, best_ids(logits, min(num_top, logits.shape[1]))], dim=1)
    return LogprobTable(
        _widen(ids.to(torch.int32), num_top, -1).cpu(),
        _widen(logprobs.gather(1, ids), num_top, -torch.inf).cpu(),
        (1 + above + equal_before).to(torch.int32).cpu(),
    )


def best_ids(logits: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [rows, count]: ids of the largest logits, falling, equals by rising id."""
    vocab_size = logits.shape[1]
    values, ids = sorted_head(logits, min(count + 1, vocab_size))
    ids = ids[:, :count]
    if 0 < count < vocab_size:
        # A tie across the border: topk chose among equals as it pleased.
        for row in (values[:, count - 1] == values[:, count]).nonzero()[:, 0].tolist():
            ids[row] = sorted_head(logits[row : row + 1], vocab_size)[1][0, :count]
    return ids


def _widen(part: torch.Tensor, num_top: int, fill: float) -> torch.Tensor:
    missing = 1 + num_top - part.shape[1]
    if missing <= 0:
        return part
    return torch.nn.functional.pad(part, (0, missing), value=fill)
