"""Several models over one pool of pages: who may take from whom, sleep and wake.

Each model has its blocks, its prefix cache and its slots; the pages are everybody's. A model that
finds none free evicts what it has cached itself, then what others have cached, the sleepiest
first: never what a sequence holds. Pure. Invariant: every page is free or one model's; a model
that sleeps has none, and nothing of it is mapped.
"""

from __future__ import annotations

import dataclasses

from xllm.errors import InvariantError
from xllm.kvcache.blocks import BlockPool
from xllm.kvcache.pages import PagePool
from xllm.kvcache.prefix import PrefixCache
from xllm.kvcache.slots import SlotTable


@dataclasses.dataclass(slots=True)
class OwnedMemory:
    """What a model has of the pool. `slots`: None where the worker reads by block tables. `used`:
    when it last took pages, as a count."""

    cache: PrefixCache
    slots: SlotTable | None
    is_awake: bool = True
    used: int = 0


class SharedMemory:
    """A pool of pages and the models over it, by name: `num_models`, which may be 1."""

    def __init__(self, num_pages: int, num_models: int) -> None:
        self.pages = PagePool(num_pages)
        self._is_alone = num_models == 1
        self.models: dict[str, OwnedMemory] = {}
        self.clock = 0
        """Grows with every taking of pages."""

    def add(
        self, model: str, *, num_slots: int, pages_per_slot: int, max_mappings: int
    ) -> OwnedMemory:
        """A model that is awake and has no pages. Its name must be new. Mutates."""
        assert model not in self.models
        pool = BlockPool(self.pages.num_pages, self.pages, owner=len(self.models))
        slots = SlotTable(num_slots, pages_per_slot, max_mappings) if num_slots else None
        others = None if self._is_alone else _Others(self, model)
        owned = OwnedMemory(PrefixCache(pool, others), slots)
        self.models[model] = owned
        return owned

    def sleep(self, model: str) -> None:
        """Give back all pages of a model of which no sequence holds any; unmap its slots. The
        worker is told by `slots.drain`. Mutates. Sleeping again changes nothing."""
        owned = self.models[model]
        num_held = owned.cache.pool.statistics().num_held
        if num_held:
            raise InvariantError(f"{model} cannot sleep: {num_held} of its pages are held")
        owned.cache.evict(owned.cache.pool.num_kept)
        if owned.slots is not None:
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
            held = owned.cache.pool.statistics()
            num_owned += held.num_held + held.num_kept
            mapped = 0
            if owned.slots is not None:
                owned.slots.check()
                mapped = owned.slots.statistics().num_mappings
            if not owned.is_awake and (held.num_held or held.num_kept or mapped):
                raise InvariantError(f"{name} sleeps on {held} and {mapped} mappings")
        if num_owned + self.pages.num_free != self.pages.num_pages:
            raise InvariantError(
                f"{num_owned} pages owned and {self.pages.num_free} free of {self.pages.num_pages}"
            )


class _Others:
    """All models but one, as that one's cache sees them (`prefix.Neighbours`)."""

    def __init__(self, memory: SharedMemory, model: str) -> None:
        self._memory = memory
        self._model = model

    @property
    def num_kept(self) -> int:
        return sum([owned.cache.pool.num_kept for owned in self._caches()])

    def evict(self, count: int) -> None:
        for owned in sorted(self._caches(), key=lambda one: one.used):
            num_evicted = min(count, owned.cache.pool.num_kept)
            owned.cache.evict(num_evicted)
            count -= num_evicted

    def note_use(self) -> None:
        own = self._memory.models[self._model]
        if not own.is_awake:
            raise InvariantError(f"{self._model} sleeps and takes no pages")
        self._memory.clock += 1
        own.used = self._memory.clock

    def _caches(self) -> list[OwnedMemory]:
        models = self._memory.models
        return [owned for name, owned in models.items() if name != self._model]
