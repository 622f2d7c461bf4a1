"""Which router a request came from, and so where its tokens go.

Pure. Routers are known by their connection. Invariant: an open request has one owner, the
connection that sent its highest attempt.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from xllm.master.outcome import StepOutcome
from xllm.protocol.instance import PooledVector, PromptScores, RequestEnded, TokenBatch, TokenItem

Part = TypeVar("Part", TokenItem, RequestEnded, PromptScores, PooledVector)


class RequestRoutes:
    """Owners of open requests."""

    def __init__(self) -> None:
        self._owners: dict[str, tuple[bytes, int]] = {}
        self._owned: dict[bytes, set[str]] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def add(self, request_id: str, attempt: int, router: bytes) -> None:
        """A router's request runs here; an older attempt's owner is forgotten."""
        old = self._owners.get(request_id)
        if old is not None and old[0] != router:
            self._disown(old[0], request_id)
        self._owners[request_id] = (router, attempt)
        owned = self._owned.get(router)
        if owned is None:
            owned = self._owned[router] = set()
        owned.add(request_id)

    def remove(self, request_id: str) -> None:
        """A request ended. Unknown ones are ignored."""
        owner = self._owners.pop(request_id, None)
        if owner is not None:
            self._disown(owner[0], request_id)

    def attempt(self, request_id: str) -> int:
        """The attempt that runs here; -1: none."""
        owner = self._owners.get(request_id)
        return owner[1] if owner is not None else -1

    def owner(self, request_id: str) -> bytes:
        """The connection that has its highest attempt; b"" if the request is not open."""
        found = self._owners.get(request_id)
        return found[0] if found is not None else b""

    @property
    def routers(self) -> tuple[bytes, ...]:
        """Connections that have open requests."""
        return tuple(self._owned)

    def owned_by(self, router: bytes) -> list[tuple[str, int]]:
        """Requests of a connection, with their attempts."""
        return [(name, self._owners[name][1]) for name in self._owned.get(router, ())]

    def split(self, outcome: StepOutcome) -> list[tuple[bytes, TokenBatch]]:
        """One batch a router; requests that ended are forgotten."""
        if len(self._owned) == 1:
            # One router has everything open: no look at the items.
            router = next(iter(self._owned))
            batch = TokenBatch(
                tuple(outcome.items),
                tuple(outcome.ended),
                tuple(outcome.prompt_scores),
                tuple(outcome.vectors),
            )
            batches = [(router, batch)]
        else:
            batches = self._split_by_owner(outcome)
        for ended in outcome.ended:
            if self.attempt(ended.request_id) <= ended.attempt:
                self.remove(ended.request_id)
        return batches

    def _split_by_owner(self, outcome: StepOutcome) -> list[tuple[bytes, TokenBatch]]:
        items = self._group(outcome.items)
        ended = self._group(outcome.ended)
        scores = self._group(outcome.prompt_scores)
        vectors = self._group(outcome.vectors)
        routers = dict.fromkeys([*items, *scores, *vectors, *ended])
        return [
            (
                router,
                TokenBatch(
                    tuple(items.get(router, ())),
                    tuple(ended.get(router, ())),
                    tuple(scores.get(router, ())),
                    tuple(vectors.get(router, ())),
                ),
            )
            for router in routers
        ]

    def _group(self, parts: Iterable[Part]) -> dict[bytes, list[Part]]:
        grouped: dict[bytes, list[Part]] = {}
        for part in parts:
            owner = self._owners.get(part.request_id)
            if owner is not None:
                grouped.setdefault(owner[0], []).append(part)
        return grouped

    def _disown(self, router: bytes, request_id: str) -> None:
        owned = self._owned[router]
        owned.discard(request_id)
        if not owned:
            del self._owned[router]
