"""One memory of pages for several models: how large a page is, how many there are, and the memfd.

A page is as large as the largest block that any of the models asked for. A model whose blocks are
smaller puts more tokens into one (twice as many, as often as they fit), so that less than half of
a page is wasted, if the model's blocks are no larger than MAX_BLOCK_TOKENS. Each model lays its
own blocks over the same bytes. Invariant: page p is block p of every model.
"""

from __future__ import annotations

import dataclasses
import os

import torch

from xllm.errors import ConfigError
from xllm.worker.memory.block_layout import BlockLayout
from xllm.worker.memory.cpu_memory import CpuKvMemory, open_memory
from xllm.worker.memory.layout import count_blocks

MAX_BLOCK_TOKENS = 256
"""Tokens of a block at most: prefixes are shared by whole blocks."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Need:
    """Of a model: its smallest block, and tokens of all sequences that may ever run at once."""

    block: BlockLayout
    max_num_seqs: int
    max_model_len: int


class SharedPages:
    """Told by each of `num_models` models what it needs, then memory for all of them."""

    def __init__(self, num_models: int) -> None:
        self.num_models = num_models
        self._needs: list[_Need] = []
        self._page_bytes = 0
        self._num_pages = 0
        self._fd = -1

    def ask(self, block: BlockLayout, max_num_seqs: int, max_model_len: int) -> None:
        """A model's blocks (`block` is one of them), and how many tokens it may come to need."""
        assert self._fd < 0
        self._needs.append(_Need(block, max_num_seqs, max_model_len))

    def memory(
        self, block: BlockLayout, dtype: torch.dtype, asked_bytes: int, budget_bytes: int
    ) -> CpuKvMemory:
        """The memory as a model with such blocks sees it; made with the first call. `asked_bytes`
        and `budget_bytes`: see count_blocks. ConfigError or OSError where there is not enough."""
        if self._fd < 0:
            self._open(asked_bytes, budget_bytes)
        layout = dataclasses.replace(fit_block(block, self._page_bytes), num_blocks=self._num_pages)
        return CpuKvMemory(layout, dtype, fd=self._fd, is_shared=True)

    def give_back(self) -> None:
        """Give all memory back to the machine; pages read as zeros. For when nobody uses any."""
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
            os.ftruncate(self._fd, self._page_bytes * self._num_pages)

    def _open(self, asked_bytes: int, budget_bytes: int) -> None:
        assert len(self._needs) == self.num_models
        page_bytes = max(need.block.block_bytes for need in self._needs)
        wanted = 0
        for need in self._needs:
            size = fit_block(need.block, page_bytes).block_size
            wanted += need.max_num_seqs * (-(-need.max_model_len // size) + 1)
        num_pages = count_blocks(asked_bytes, budget_bytes, page_bytes, wanted)
        if num_pages < 2 * self.num_models:
            raise ConfigError(
                f"worker.kv_cache_bytes: {num_pages} pages of {page_bytes} bytes are too few for "
                f"{self.num_models} models",
                param="worker.kv_cache_bytes",
            )
        self._fd = open_memory(page_bytes * num_pages)
        self._page_bytes, self._num_pages = page_bytes, num_pages

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def fit_block(block: BlockLayout, page_bytes: int) -> BlockLayout:
    """A model's block with as many tokens as fit a page, in powers of two; it fills the page."""
    while block.block_size < MAX_BLOCK_TOKENS:
        larger = dataclasses.replace(block, block_size=2 * block.block_size)
        if larger.block_bytes > page_bytes:
            break
        block = larger
    return dataclasses.replace(block, page_bytes=page_bytes)
