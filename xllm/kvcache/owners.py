"""Several models over one pool of pages: who may take from whom, sleep and wake.

Each model has its blocks, its prefix cache and its slots; the pages are everybody's. A model that
finds none free evicts what it has cached itself, then what others have cached, the sleepiest
first: never what a sequence holds. Pure. Invariant: every page is free or one model's; a model
that sleeps has none, and nothing of it is mapped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from xllm.errors import InvariantError
from xllm.kvcache.blocks import BlockPool
from xllm.kvcache.pages import PagePool
from xllm.kvcache.prefix import PrefixCache
from xllm.kvcache.slots import SlotTable


@dataclasses.dataclass(slots=True)
class OwnedMemory:
    """What a model has of the pool. `used`: when it last took pages, as a count."""

    cache: PrefixCache
    slots: SlotTable
    is_awake: bool = True
    used: int = 0


class SharedMemory:
    """A pool of pages and the models over it, by name."""

    def __init__(self, num_pages: int) -> None:
        self.pages = PagePool(num_pages)
        self.models: dict[str, OwnedMemory] = {}
        self._clock = 0

    def add(
        self, model: str, *, num_slots: int, pages_per_slot: int, max_mappings: int
    ) -> OwnedMemory:
        """A model that is awake and has no pages. Its name must be new. Mutates."""
        assert model not in self.models
        pool = BlockPool(self.pages.num_pages, self.pages, owner=len(self.models))
        owned = OwnedMemory(PrefixCache(pool), SlotTable(num_slots, pages_per_slot, max_mappings))
        self.models[model] = owned
        return owned

    def num_available(self) -> int:
        """Pages that any model that is awake could get."""
        kept = sum(owned.cache.pool.num_kept for owned in self.models.values())
        return self.pages.num_free + kept

    def allocate(
        self, model: str, count: int, wanted: Sequence[int] = (), after: int = -1
    ) -> list[int] | None:
        """Blocks for a model that is awake; see PrefixCache.allocate. Mutates."""
        owned = self.models[model]
        if not owned.is_awake:
            raise InvariantError(f"{model} sleeps and takes no pages")
        if count > self.num_available():
            return None
        self._clock += 1
        owned.used = self._clock
        missing = count - self.pages.num_free - owned.cache.pool.num_kept
        for other in sorted(self.models.values(), key=lambda one: one.used):
            if missing <= 0:
                break
            if other is not owned:
                num_evicted = min(missing, other.cache.pool.num_kept)
                other.cache.evict(num_evicted)
                missing -= num_evicted
        return owned.cache.allocate(count, wanted, after)

    def sleep(self, model: str) -> None:
        """Give back all pages of a model of which no sequence holds any; unmap its slots. The
        worker is told by `slots.drain`. Mutates. Sleeping again changes nothing."""
        owned = self.models[model]
        num_held = owned.cache.pool.statistics().num_held
        if num_held:
            raise InvariantError(f"{model} cannot sleep: {num_held} of its pages are held")
        owned.cache.evict(owned.cache.pool.num_kept)
        owned.slots.drop_all()
        owned.is_awake = False

    def wake(self, model: str) -> None:
        """A model may take pages again. Mutates."""
        self.models[model].is_awake = True

    def check(self) -> None:
        """Raise InvariantError where a page has no owner or two, or a sleeper has pages."""
        num_owned = 0
        for name, owned in self.models.items():
            owned.cache.check()
            owned.slots.check()
            held = owned.cache.pool.statistics()
            num_owned += held.num_held + held.num_kept
            mapped = owned.slots.statistics().num_mappings
            if not owned.is_awake and (held.num_held or held.num_kept or mapped):
                raise InvariantError(f"{name} sleeps on {held} and {mapped} mappings")
        if num_owned + self.pages.num_free != self.pages.num_pages:
            raise InvariantError(
                f"{num_owned} pages owned and {self.pages.num_free} free of {self.pages.num_pages}"
            )
