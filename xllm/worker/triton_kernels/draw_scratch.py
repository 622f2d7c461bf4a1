"""The memory that the kernels of a draw hand numbers to each other in."""

from __future__ import annotations

import torch

RUNGS = 8
DEPTHS = (1.0, 2.5, 4.5, 7.0, 10.0, 16.0, 32.0, float("inf"))
"""The ladder of `narrowing`: how far below a row's largest logit its rungs are, in tempered
logits, or, where top-k counts, in logits. From one rung to the next a model's rows have some five
times as many tokens."""


class DrawScratch:
    """Scratch memory for at most `rows` rows of `vocab_size` logits, looked at in chunks of `chunk`
    (a power of two), with lists of `room` candidates for rows with filters.

    Of each chunk: `maxima` float32 [rows, chunks], its winner's logit in `winners` float32 and id
    in `winner_ids` int32; at each rung `counts` int32 and `masses` float32 [rows, chunks, RUNGS].
    Of each row: `tops` float32 (the largest logit; NaN: not finite), `thresholds` float32 [rows,
    RUNGS], `totals` float64 (its mass), and its list: `lengths` int32 (-1: none), `values` float32
    and `ids` int32 [rows, room]. `depths`: DEPTHS."""

    def __init__(
        self, rows: int, vocab_size: int, chunk: int, room: int, device: torch.device
    ) -> None:
        def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.rows = rows
        self.vocab_size = vocab_size
        self.chunk = chunk
        self.chunks = -(-vocab_size // chunk)
        self.room = min(room, vocab_size)
        self.maxima = empty(torch.float32, rows, self.chunks)
        self.winners = empty(torch.float32, rows, self.chunks)
        self.winner_ids = empty(torch.int32, rows, self.chunks)
        self.tops = empty(torch.float32, rows)
        self.depths = torch.tensor(DEPTHS, dtype=torch.float32, device=device)
        self.thresholds = empty(torch.float32, rows, RUNGS)
        self.counts = empty(torch.int32, rows, self.chunks, RUNGS)
        self.masses = empty(torch.float32, rows, self.chunks, RUNGS)
        self.totals = empty(torch.float64, rows)
        self.lengths = empty(torch.int32, rows)
        self.values = empty(torch.float32, rows, self.room)
        self.ids = empty(torch.int32, rows, self.room)
