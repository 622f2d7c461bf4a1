"""The seam between a worker process and what computes: the Executor protocol.

It knows plans and results only: no sockets, no threads, no torch. One thread at a time calls an
executor; `counter` and `arrive` alone are for one other thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from xllm.protocol.step import StepPlan, StepResult, WorkerReady
from xllm.worker.rank_board import RankBoard

LoadObserver = Callable[[int, int], None]
"""Told (loaded bytes, total bytes) while weights are read; cheap, may be called often."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepOutput:
    """What one plan gave: the result, and the frames that travel behind it (logprobs, then
    expert counts; see StepResult)."""

    result: StepResult
    frames: tuple[bytes, ...] = ()


class Executor(Protocol):
    """Loads a model (or several, see `hosting`) once, then runs plans in the order they come."""

    @property
    def counter(self) -> int:
        """Grows with each bounded piece of work done (a layer, a part of its attention, a slice
        of the head or of draws): the engine is frozen when it is busy and this stands. One
        thread beside the engine's may read it."""

    def load(self, progress: LoadObserver) -> WorkerReady:
        """Read the weights, allocate the KV memory, say what is known now. Called again, it
        forgets all sequences and keeps what is loaded. Raises an XllmError where it cannot be
        done; the executor is of no use then."""

    def sleep(self, model: str, drop_weights: bool) -> None:
        """Forget a model's sequences and unmap what they had; with `drop_weights` give its
        weights back, too. Memory for KV goes back to the machine once all models sleep. Raises
        EngineError for a model that is not here; sleeping twice is sleeping."""

    def wake(self, model: str, progress: LoadObserver) -> None:
        """Take plans of a model again, reading its weights if they were dropped. Raises an
        XllmError where it cannot be done: the model then sleeps on."""

    def join(self, board: RankBoard) -> None:
        """Meet the other ranks of the instance by way of a board, and leave where they met before.
        Called behind a load where there is more than one rank; returns when all are there.
        Raises EngineError where they do not come."""

    def arrive(self, plan: StepPlan) -> None:
        """A plan is here that will be executed behind those that came before it. The executor may
        begin what does not disturb these. Another thread than the engine's calls it, before that
        one can see the plan; who executes each plan as it comes need not. Cheap; never raises."""

    def execute(self, plan: StepPlan) -> StepOutput:
        """Run one plan. An item that cannot run is reported in `result.failed`; an exception
        means that no item of the plan has a token, while sequences of other plans are unharmed."""

    def close(self) -> None:
        """Release device memory and files. Called once, last."""


class LaunchedStep(Protocol):
    """A step that was begun on a device which computes behind the host's back."""

    @property
    def is_done(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> StepOutput:
        """Its output, once it is done. Called once, in the order of launches, by one thread that
        need not be the engine's. Raises what the step failed with."""


@dataclasses.dataclass(frozen=True, slots=True)
class DoneStep:
    """A LaunchedStep that left nothing to wait for."""

    output: StepOutput
    is_done: bool = True

    def wait(self) -> StepOutput:
        """See LaunchedStep."""
        return self.output


@runtime_checkable
class LaunchingExecutor(Executor, Protocol):
    """An executor whose device goes on with the next step while the host learns of the last one."""

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Begin a plan behind those that were launched before it, whose outputs may not be known
        yet. What keeps it from being begun is raised here; see `execute` for the rest. Other
        methods than `counter`, `arrive` and this one are called while no step is under way."""


class HostedExecutor(Executor, Protocol):
    """An executor of one model that shares its memory with others."""

    def read(self, progress: LoadObserver) -> None:
        """Read the weights, unless they are here, and say how much memory pages will take: done
        for all models before `load` of any."""
