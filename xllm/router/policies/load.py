"""How busy an instance is now: its last heartbeat, brought forward by what this router did since.

A heartbeat is up to a period old. What this router sent there meanwhile is not in it, and what
ended meanwhile still is: without that, all requests of a period go to whoever looked idle at its
start. Of other routers there are the counts of their presence. All numbers are of one instance.
"""

from __future__ import annotations

from collections.abc import Iterable

from xllm.router.process_views import InstanceView


def num_requests(one: InstanceView) -> int:
    """Requests there: what routers say that they have there, or what the heartbeat counted and
    this router changed since, whichever is more."""
    load = one.load
    counted = load.num_waiting + load.num_running + one.num_inflight - one.inflight_then
    routed = one.num_inflight + one.num_elsewhere
    return counted if counted > routed else routed


def queued_tokens(one: InstanceView) -> int:
    """Prompt tokens that have to be computed before those of a request that comes now."""
    return one.load.waiting_tokens + one.unseen_tokens


def num_waiting(one: InstanceView) -> int:
    """Requests there that do not run: beyond what it runs at once where some waited at its last
    heartbeat, else beyond what it may run at once (0 where it did not say)."""
    load = one.load
    room = load.num_running if load.num_waiting else one.record.max_num_seqs
    return max(0, num_requests(one) - room) if room or load.num_waiting else 0


def takes_more(one: InstanceView, most_waiting: int) -> bool:
    """Whether it may get one more request: it did not say that its queue is full, and fewer than
    `most_waiting` wait there (0: any number)."""
    if 0 <= one.full_from <= one.num_inflight:
        return False
    # Where fewer are than might wait, who waits need not be counted.
    return not most_waiting or num_requests(one) < most_waiting or num_waiting(one) < most_waiting


def free_blocks(one: InstanceView, block_size: int) -> int:
    """KV blocks that a new request could have; below 0: promised twice."""
    load = one.load
    if not load.num_blocks:
        return one.record.num_blocks  # no heartbeat with figures yet: nothing runs there
    return load.num_free_blocks - -(-one.unseen_tokens // block_size)


def loads_of(candidates: Iterable[InstanceView], block_size: int) -> list[tuple[int, int, int]]:
    """`num_requests`, `queued_tokens` and `free_blocks` of each, in one turn: a router asks this of
    every candidate for every request, and calls would be most of its cost."""
    found = []
    for one in candidates:
        load, num_inflight, unseen = one.load, one.num_inflight, one.unseen_tokens
        counted = load.num_waiting + load.num_running + num_inflight - one.inflight_then
        routed = num_inflight + one.num_elsewhere
        free = load.num_free_blocks if load.num_blocks else one.record.num_blocks
        if unseen and load.num_blocks:
            free -= -(-unseen // block_size)
        queued = load.waiting_tokens + unseen
        found.append((counted if counted > routed else routed, queued, free))
    return found
