"""The instance whose KV memory is the emptiest after it has taken the prompt.

The figure of an instance is the share of its blocks that would be in use:

    (blocks in use + blocks that queued prompt tokens will take + blocks that the prompt will take
     and that are not cached there) / all blocks

It passes 1 where the memory is promised twice, so a queue is never mistaken for room.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm.router.policies.last_chosen import LastChosen
from xllm.router.policies.load import free_blocks, num_requests
from xllm.router.policies.question import RouteFigures, RouteQuestion, Stages
from xllm.router.process_views import InstanceView


class KvLoad:
    """Least share of KV memory; of equals the fewest requests, then the least lately chosen."""

    def __init__(self, figures: RouteFigures) -> None:
        self._figures = figures
        self._chosen = LastChosen()

    def choose(self, candidates: Sequence[InstanceView], ask: RouteQuestion) -> Stages:
        """The one with the most room left."""
        best = candidates[0]
        if len(candidates) > 1:
            best = min(
                candidates,
                key=lambda one: (kv_share(one, ask), num_requests(one), self._chosen[one.name]),
            )
        self._figures.count("kv")
        return self._chosen.take(best.name)


def kv_share(one: InstanceView, ask: RouteQuestion) -> float:
    """The share of its KV memory that would be in use with this prompt."""
    size = ask.block_size
    num_blocks = one.load.num_blocks or one.record.num_blocks
    cached = ask.cached.get(one.name)
    needed = -(-ask.num_prompt_tokens // size) - (cached.device if cached is not None else 0)
    queued = -(-one.load.waiting_tokens // size)
    used = num_blocks - free_blocks(one, size) + queued + max(0, needed)
    return used / max(1, num_blocks)
