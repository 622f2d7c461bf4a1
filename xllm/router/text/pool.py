"""Long texts go through the tokenizer in threads, a few at a time for each tenant.

The tokenizers library releases the interpreter's lock while it encodes, and what is read and handed
over by one call is kept short, so the loop stays free. A tenant that sends many long texts waits
for its own; others pass. Used from the loop's thread only.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_Job = tuple[Callable[[], Any], "asyncio.Future[Any]"]


class TextPool:
    """Threads for encoding. `per_tenant` jobs of one tenant run at a time."""

    def __init__(self, num_threads: int = 4, per_tenant: int = 2) -> None:
        self._executor = concurrent.futures.ThreadPoolExecutor(num_threads, "text")
        self._per_tenant = per_tenant
        self._running: dict[str, int] = {}
        self._waiting: dict[str, deque[_Job]] = {}

    def run(self, tenant: str, job: Callable[[], T]) -> asyncio.Future[T]:
        """The future of a job's result. Cancelling it forgets a job that has not begun."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if self._running.get(tenant, 0) < self._per_tenant:
            self._begin(tenant, job, future)
        else:
            self._waiting.setdefault(tenant, deque()).append((job, future))
        return future

    @property
    def num_waiting(self) -> int:
        """Jobs that have not begun."""
        return sum(map(len, self._waiting.values()))

    def close(self) -> None:
        """Begin nothing more; what runs is left to end."""
        for jobs in self._waiting.values():
            for _, future in jobs:
                future.cancel()
        self._waiting.clear()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _begin(self, tenant: str, job: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        self._running[tenant] = self._running.get(tenant, 0) + 1
        loop = asyncio.get_running_loop()
        run = loop.run_in_executor(self._executor, job)
        run.add_done_callback(lambda done: self._done(tenant, done, future))

    def _done(self, tenant: str, done: asyncio.Future[Any], future: asyncio.Future[Any]) -> None:
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        self._next(tenant)
        if done.cancelled():
            future.cancel()
            return
        error = done.exception()  # also marks it as seen
        if future.cancelled():
            return
        if error is None:
            future.set_result(done.result())
        else:
            future.set_exception(error)

    def _next(self, tenant: str) -> None:
        jobs = self._waiting.get(tenant)
        while jobs:
            job, future = jobs.popleft()
            if not future.cancelled():
                self._begin(tenant, job, future)
                break
        if jobs is not None and not jobs:
            self._waiting.pop(tenant, None)
