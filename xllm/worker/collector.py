"""Waits for launched steps and answers for them, in their order, while the engine launches the
next one.

The engine's thread would learn of a step's end only by waiting for it, and could not launch what
comes meanwhile: so another thread waits. Invariant: every step that was put is answered exactly
once, in the order of `put`; nothing else of the executor is touched here.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from xllm.worker.executor import LaunchedStep, StepOutput

StepObserver = Callable[[StepOutput, int], None]
"""Told a step's output and for how long the device had nothing to do before it (ns)."""
FailureObserver = Callable[[Exception], None]
"""Told why a step has no output."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    launched: LaunchedStep | Exception
    began_ns: int
    done: StepObserver
    failed: FailureObserver


class StepCollector:
    """Collects what one engine launches; its thread starts with the first step that must be waited
    for. `put` and `drain` are the engine's thread's; `num_under_way` is anyone's."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Step | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._settled = threading.Condition()
        self._num_put = 0
        self._num_settled = 0
        self._ended_ns = 0

    @property
    def num_under_way(self) -> int:
        """Steps that were put and are not answered."""
        return self._num_put - self._num_settled

    def rest(self) -> None:
        """The time until the next step is nobody's idleness: the engine does something else."""
        self._ended_ns = 0

    def put(
        self,
        launched: LaunchedStep | Exception,
        began_ns: int,
        done: StepObserver,
        failed: FailureObserver,
    ) -> None:
        """Answer for a step whose launch began at `began_ns` (perf_counter), behind those before
        it, by one of two observers; an exception is why it could not be launched. They are called
        on either thread, never on both at once."""
        step = _Step(launched, began_ns, done, failed)
        is_known = isinstance(launched, Exception) or launched.is_done
        self._num_put += 1
        if is_known and self.num_under_way == 1:
            self._settle(step)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="step-collector", daemon=True)
            self._thread.start()
        self._queue.put(step)

    def drain(self) -> None:
        """Return when all that was put is answered."""
        with self._settled:
            self._settled.wait_for(lambda: self.num_under_way == 0)

    def close(self) -> None:
        """Drain, and end the thread."""
        self.drain()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (step := self._queue.get()) is not None:
            self._settle(step)

    def _settle(self, step: _Step) -> None:
        try:
            output = self._output(step)
        except Exception as error:
            self._ended_ns = time.perf_counter_ns()
            step.failed(error)
        else:
            idle_ns = max(step.began_ns - self._ended_ns, 0) if self._ended_ns else 0
            self._ended_ns = time.perf_counter_ns()
            step.done(output, idle_ns)
        finally:
            with self._settled:
                self._num_settled += 1
                self._settled.notify_all()

    def _output(self, step: _Step) -> StepOutput:
        if isinstance(step.launched, Exception):
            raise step.launched
        return step.launched.wait()
