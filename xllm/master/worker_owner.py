"""What a master hears of its workers: the seam between the group of workers and what is served."""

from __future__ import annotations

from typing import Protocol

from xllm.protocol.step import ModelAwake, StepResult, WorkerFailed, WorkerReady


class WorkerOwner(Protocol):
    """Told by a WorkerGroup, in the loop."""

    def worker_ready(self, ready: WorkerReady) -> None:
        """A worker has loaded and knows no sequence."""

    def worker_lost(self, reason: str, by_itself: bool) -> None:
        """It is gone, and with it all KV and the step in flight. `by_itself`: what it ran may be
        the reason; else somebody ended it."""

    def worker_result(self, result: StepResult, frames: list[bytes]) -> None:
        """A step came back."""

    def worker_failed_step(self, message: WorkerFailed) -> None:
        """A step failed; the worker goes on without its sequences."""

    def model_awake(self, message: ModelAwake) -> None:
        """A model that slept takes plans again, or cannot."""

    def worker_pong(self, nonce: int) -> None:
        """The engine thread answered a ping."""

    def worker_given_up(self, exit_code: int, code: str, reason: str) -> None:
        """No worker will come back."""
