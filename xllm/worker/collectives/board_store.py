"""The board of the ranks as the store that torch.distributed's groups exchange addresses by."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from torch.distributed import Store  # type: ignore[attr-defined]  # its stubs lack it

from xllm.worker.rank_board import RankBoard


class BoardStore(Store):
    """As much of a store as a group needs to connect: keys are set once and waited for. `prefix`
    is put before them on the board."""

    def __init__(self, board: RankBoard, timeout_s: float, prefix: str = "") -> None:
        super().__init__()
        self._board = board
        self._timeout_s = timeout_s
        self._prefix = prefix

    def set(self, key: str, value: bytes | str) -> None:
        """Tell all ranks."""
        self._board.put(
            self._prefix + key, value.encode() if isinstance(value, str) else bytes(value)
        )

    def get(self, key: str) -> bytes:
        """The value, once it is there."""
        return self._board.get(self._prefix + key, self._timeout_s)

    def wait(self, keys: Sequence[str], timeout: datetime.timedelta | None = None) -> None:
        """Until all keys are there."""
        for key in keys:
            self.get(key)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there now."""
        return all(self._board.has(self._prefix + key) for key in keys)
