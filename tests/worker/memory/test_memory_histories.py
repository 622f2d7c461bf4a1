"""Random histories of two models over one pool, with the accounting carried out on real memory.

Pages are written and read through the slots' addresses alone. A sequence's text is a list of
letters, a page each; a page's content is the digest of the text up to it, so that every page that
is lost, given twice, mapped at the wrong place or not mapped at all reads wrongly.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.worker.memory.back_ends import KINDS, PAGE, BackEnd, CpuBackEnd, read, write
from xllm.kvcache.owners import OwnedMemory, SharedMemory
from xllm.kvcache.pages import PageState
from xllm.worker.memory.mapper import PageMapper
from xllm.worker.memory.slots import SlotSpace

NUM_PAGES, NUM_SLOTS, PAGES_PER_SLOT = 18, 4, 9
NAMES = ("one", "two")
TEXTS = st.text("ab", min_size=1, max_size=8)


def content(model: str, text: str) -> bytes:
    return hashlib.sha256(f"{model} {text}".encode()).digest()


class Living:
    """A sequence that holds pages."""

    def __init__(self, model: str, text: str, slot: int, blocks: list[int]) -> None:
        self.model = model
        self.text = text
        self.slot = slot
        self.blocks = blocks
        self.is_private = False


class Histories(RuleBasedStateMachine):
    kind: type[BackEnd] = CpuBackEnd

    @initialize(max_mappings=st.sampled_from([PAGES_PER_SLOT + 2, 18, 100]))
    def begin(self, max_mappings: int) -> None:
        self.shared = SharedMemory(NUM_PAGES, 2)
        self.back_end = self.kind(NUM_PAGES)
        self.spaces: dict[str, SlotSpace] = {}
        self.mappers: dict[str, PageMapper] = {}
        for name in NAMES:
            self.shared.add(
                name,
                num_slots=NUM_SLOTS,
                pages_per_slot=PAGES_PER_SLOT,
                max_mappings=max_mappings,
            )
            self.spaces[name] = SlotSpace(
                self.back_end.open(),
                num_slots=NUM_SLOTS,
                pages_per_slot=PAGES_PER_SLOT,
                page_bytes=PAGE,
                num_pages=NUM_PAGES,
            )
            self.mappers[name] = PageMapper(self.spaces[name])
        self.living: list[Living] = []
        self.num_steps = 0

    @rule(name=st.sampled_from(NAMES), text=TEXTS)
    def start(self, name: str, text: str) -> None:
        owned = self.shared.models[name]
        if not owned.is_awake or not owned.slots.has_room(len(text)):
            return
        hashes = [content(name, text[: i + 1]) for i in range(len(text))]
        found = owned.cache.match(hashes).block_ids
        owned.cache.acquire(found)
        num_new = len(text) - len(found)
        choice = owned.slots.choose(found, len(text), owned.cache.pool.is_free)
        fresh = owned.cache.allocate(num_new, choice.wanted, found[-1] if found else -1)
        if fresh is None:
            event("no pages to start")
            owned.cache.release(found)
            return
        assert owned.slots.assign(choice.slot, found + fresh)
        seq = Living(name, text, choice.slot, found + fresh)
        self.living.append(seq)
        self._write(seq, len(found))

    @rule(data=st.data(), letter=st.sampled_from("ab"))
    def grow(self, data: st.DataObject, letter: str) -> None:
        seq = self._some(data)
        if seq is None or len(seq.text) == PAGES_PER_SLOT:
            return
        owned = self.shared.models[seq.model]
        wanted = owned.slots.wanted_next(seq.slot)
        fresh = self.shared.models[seq.model].cache.allocate(1, (wanted,), seq.blocks[-1])
        if fresh is None:
            event("no page to grow")
            return
        if not owned.slots.extend(seq.slot, fresh):
            event("no mapping to grow")
            owned.cache.release(fresh)
            return
        seq.blocks += fresh
        seq.text += letter
        self._write(seq, len(seq.blocks) - 1)

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        seq = self._some(data)
        if seq is None:
            return
        owned = self.shared.models[seq.model]
        if not owned.slots.has_room(len(seq.blocks)):
            return
        choice = owned.slots.choose(seq.blocks, len(seq.blocks), owned.cache.pool.is_free)
        assert owned.slots.assign(choice.slot, seq.blocks)
        owned.cache.acquire(seq.blocks)
        child = Living(seq.model, seq.text, choice.slot, list(seq.blocks))
        child.is_private = seq.is_private
        self.living.append(child)

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        seq = self._some(data)
        if seq is None:
            return
        self.living.remove(seq)
        owned = self.shared.models[seq.model]
        owned.slots.release(seq.slot)
        hashes = [content(seq.model, seq.text[: i + 1]) for i in range(len(seq.text))]
        owned.cache.seal_and_release(seq.blocks, hashes)

    @rule(data=st.data())
    def doubt(self, data: st.DataObject) -> None:
        seq = self._some(data)
        if seq is not None:
            self.shared.models[seq.model].slots.distrust(seq.slot)

    @rule(name=st.sampled_from(NAMES))
    def sleep(self, name: str) -> None:
        if any(seq.model == name for seq in self.living):
            return
        self.shared.sleep(name)
        owned = self.shared.models[name]
        assert owned.slots.statistics().num_mappings == 0

    @rule(name=st.sampled_from(NAMES))
    def wake(self, name: str) -> None:
        self.shared.wake(name)

    @invariant()
    def all_is_as_it_should_be(self) -> None:
        if not hasattr(self, "shared"):
            return
        self.shared.check()
        states = [PageState.FREE] * NUM_PAGES
        for name in NAMES:
            owned = self.shared.models[name]
            mine = [seq for seq in self.living if seq.model == name]
            owned.slots.check([(seq.slot, seq.blocks) for seq in mine])
            owned.cache.check([block for seq in mine for block in seq.blocks])
            self._carry_out(name, owned)
            for seq in mine:
                self._read(seq)
            if self.kind is CpuBackEnd:
                assert self._mappings(name) <= owned.slots.statistics().num_mappings + 1
            states = owned.slots.states(NUM_PAGES, owned.cache.pool.is_free)
            held = {block for seq in mine for block in seq.blocks}
            assert {p for p, state in enumerate(states) if state is PageState.MAPPED} == held

    def teardown(self) -> None:
        if not hasattr(self, "shared"):
            return
        for seq in tuple(self.living):
            owned = self.shared.models[seq.model]
            owned.slots.release(seq.slot)
            owned.cache.release(seq.blocks)
        for name in NAMES:
            self.shared.sleep(name)
            self.mappers[name].close()
            self.spaces[name].close()
        self.shared.check()
        self.back_end.close()
        assert self.shared.pages.num_free == NUM_PAGES

    def _some(self, data: st.DataObject) -> Living | None:
        return data.draw(st.sampled_from(self.living)) if self.living else None

    def _carry_out(self, name: str, owned: OwnedMemory) -> None:
        mapper = self.mappers[name]
        self.num_steps += 1
        mapper.begin_step(self.num_steps, owned.slots.drain(), {})
        for seq in self.living:
            if seq.model == name:
                mapper.wait(seq.slot, len(seq.blocks))
                assert mapper.failure(seq.slot, len(seq.blocks)) == ""

    def _write(self, seq: Living, first: int) -> None:
        """Write the pages from `first` on and cache them while they are the only ones."""
        owned = self.shared.models[seq.model]
        self._carry_out(seq.model, owned)
        base = self.spaces[seq.model].address(seq.slot)
        hashes = [content(seq.model, seq.text[: i + 1]) for i in range(len(seq.text))]
        for index in range(first, len(seq.blocks)):
            write(base + index * PAGE, hashes[index])
            parent = hashes[index - 1] if index else b""
            if not seq.is_private:
                block = seq.blocks[index]
                seq.is_private = not owned.cache.seal(block, hashes[index], parent)

    def _read(self, seq: Living) -> None:
        base = self.spaces[seq.model].address(seq.slot)
        for index in range(len(seq.text)):
            want = content(seq.model, seq.text[: index + 1])
            assert read(base + index * PAGE, 32) == want

    def _mappings(self, name: str) -> int:
        """Mappings of the kernel under a model's slots."""
        space = self.spaces[name]
        low = space.address(0)
        high = low + NUM_SLOTS * PAGES_PER_SLOT * PAGE
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sum(low <= int(line.split("-")[0], 16) < high for line in lines)


@pytest.mark.parametrize("kind", KINDS)
def test_any_history(kind: type[BackEnd]) -> None:
    class Run(Histories):
        pass

    Run.kind = kind
    run_state_machine_as_test(
        Run,
        settings=settings(
            max_examples=40 if kind is CpuBackEnd else 20, stateful_step_count=50, deadline=None
        ),
    )
