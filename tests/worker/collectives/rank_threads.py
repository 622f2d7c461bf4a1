"""Ranks as threads of one process: their boards wired to each other, as a master would."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from xllm.worker.rank_board import RankBoard

T = TypeVar("T")
WAIT_S = 60.0


def wired_boards(size: int, group: str = "g") -> list[RankBoard]:
    """A board for each rank; what one puts, the others hear."""
    boards = [RankBoard(group) for _ in range(size)]
    for mine in boards:
        others = [board for board in boards if board is not mine]

        def tell(key: str, value: bytes, others: list[RankBoard] = others) -> None:
            for board in others:
                board.hear(key, value)

        mine.open(tell)
    return boards


def on_all(size: int, work: Callable[[int], T]) -> list[T]:
    """`work(rank)` on all ranks at once; what they gave, or the first error."""
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(work, rank) for rank in range(size)]
        return [future.result(WAIT_S) for future in futures]
