"""What a watch told, checked as it comes."""

from __future__ import annotations

import asyncio
import functools

import uvloop


class Told:
    """The entries that the changes add up to. No change may come twice or out of order."""

    def __init__(self):
        self.entries = {}
        self.changes = []
        self.deleted = []
        self.revision = 0

    def __call__(self, changes):
        for change in changes:
            self.changes.append(change)
            if change.entry is None:
                assert change.key in self.entries, f"{change} of what was never told"
                self.deleted.append(change.key)
                del self.entries[change.key]
                continue
            old = self.entries.get(change.key)
            assert old != change.entry, f"{change} was told before"
            self.entries[change.key] = change.entry

    @property
    def values(self):
        """Value by key."""
        return {key: entry.value for key, entry in self.entries.items()}


async def until(condition, what="the condition", seconds=20.0):
    """Wait for it in the loop."""
    try:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"{what}: not within {seconds:g} s") from None


def run(coroutine, seconds=60.0):
    """Run a test under uvloop, as the processes do."""

    async def main():
        async with asyncio.timeout(seconds):
            return await coroutine

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def in_loop(test):
    """The test is a coroutine function: `run` runs it."""

    @functools.wraps(test)
    def wrapped(**fixtures):
        run(test(**fixtures))

    return wrapped
