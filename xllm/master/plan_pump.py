"""Who plans next: the step loops of a worker's models take turns at sending it plans.

A shell around `step_turns`. Invariants: nothing is planned while it is held; while a request has
a step to itself, or is to have the next, no other model plans; what a step gave is routed after the
next plan has left, so that the worker never waits for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from xllm.master.step_loop import StepLoop
from xllm.master.strategies.step_turns import StepTurns
from xllm.protocol.step import StepPlan


class PlanPump:
    """`send_plan(plan)` reaches the worker; `failed` hears of exceptions that nobody else could
    catch. `max_in_flight`: plans of all models under way at a time."""

    def __init__(
        self,
        models: tuple[str, ...],
        max_in_flight: int,
        send_plan: Callable[[StepPlan], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self.loops: dict[str, StepLoop] = {}
        """By model; filled by who makes the loops."""
        self._turns = StepTurns(models, max_in_flight)
        self._send_plan = send_plan
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._num_holds = 0
        self._is_scheduled = False

    def pump(self) -> None:
        """Plan the next steps soon, after what else is there was read."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._pump)

    def done(self, model: str, seconds: float) -> None:
        """The oldest plan of a model came back; 0 seconds: it failed."""
        self._turns.done(model, seconds)

    def forget(self, model: str) -> None:
        """What is under way of a model concerns nobody any more."""
        self._turns.forget(model)

    def hold(self) -> None:
        """Send nothing until released, as often as it was held: the worker would not come to it."""
        self._num_holds += 1

    def release(self) -> None:
        """Undo a hold."""
        assert self._num_holds
        self._num_holds -= 1
        self.pump()

    def _pump(self) -> None:
        self._is_scheduled = False
        try:
            now = time.monotonic()
            loops = self.loops.values()
            for loop in loops:
                loop.expire(now)
            if not self._num_holds:
                while self._turns.has_room and self._plan_next(now):
                    pass
            for loop in loops:
                loop.flush()
        except Exception as error:
            self._failed(error)

    def _plan_next(self, now: float) -> bool:
        """Send the plan of whose turn it is; False: nobody has one."""
        loops = self.loops
        order = self._turns.order()
        if len(order) > 1:
            order.sort(key=lambda model: not loops[model].is_apart)
        for model in order:
            plan = loops[model].plan(now, self._turns.is_clear(model))
            if plan is not None:
                self._turns.sent(model)
                self._send_plan(plan)
                return True
            if loops[model].is_apart:
                return False
        return False
