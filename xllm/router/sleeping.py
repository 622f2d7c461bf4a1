"""Asks the instances of a model to sleep or to wake, and waits for all of them.

A shell like `probe`: sends, waits for the answers, at most SLEEP_TIMEOUT_S.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from xllm.errors import DeadlineError, InvalidRequestError, UnavailableError, error_from_code
from xllm.protocol.administration import ModelSleepSet, SetModelSleep
from xllm.protocol.instance import SetSleep, SleepSet
from xllm.router.models import ServedModels
from xllm.router.view import ClusterView

SLEEP_TIMEOUT_S = 900.0
"""For what still runs to end, and for weights to be read."""


class SleepSetter:
    """`send(instance, message)` says whether the instance could be reached."""

    def __init__(
        self, served: ServedModels, view: ClusterView, send: Callable[[str, SetSleep], bool]
    ) -> None:
        self._served = served
        self._view = view
        self._send = send
        self._nonce = 0
        self._waiting: dict[tuple[str, int], asyncio.Future[SleepSet]] = {}
        """By who was asked, and the number of the question."""

    async def set_sleep(self, request: SetModelSleep) -> ModelSleepSet:
        """Have all instances of a model sleep, or wake. Raises the error of the first that could
        not, with its name; the others did as they were told, or will."""
        model = self._served.find(request.model).name
        if request.timeout_ms < 0:
            raise InvalidRequestError("timeout_ms must be at least 0", param="timeout_ms")
        instances = [one.name for one in self._view if one.record.model == model]
        if not instances:
            raise UnavailableError(f"no instance of {model!r} is there", param="model")
        await asyncio.gather(*(self._ask_one(request, name) for name in instances))
        return ModelSleepSet(id=request.id, model=model, asleep=request.asleep)

    def answered(self, name: str, word: SleepSet) -> None:
        """An instance answers. What it was not asked is ignored."""
        future = self._waiting.get((name, word.nonce))
        if future is not None and not future.done():
            future.set_result(word)

    async def _ask_one(self, request: SetModelSleep, name: str) -> None:
        self._nonce += 1
        nonce = self._nonce
        future = self._waiting[name, nonce] = asyncio.get_running_loop().create_future()
        message = SetSleep(nonce, request.asleep, request.timeout_ms, request.drop_weights)
        try:
            if not self._send(name, message):
                raise UnavailableError(f"instance {name} cannot be reached")
            async with asyncio.timeout(SLEEP_TIMEOUT_S):
                word = await future
        except TimeoutError:
            raise DeadlineError(f"instance {name}: no answer in {SLEEP_TIMEOUT_S:.0f} s") from None
        finally:
            del self._waiting[name, nonce]
        if word.code:
            raise error_from_code(word.code, f"instance {name}: {word.message}")
