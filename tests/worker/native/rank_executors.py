"""Native ranks of this process as one executor: what a master makes of several workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.worker.collectives.rank_threads import on_all, wired_boards
from tests.worker.native.plan_driver import PlanDriver, native_settings
from xllm.config.master import MasterSettings
from xllm.config.settings import Settings
from xllm.master.ranks import RankResults, merge_ready
from xllm.protocol.step import StepPlan, WorkerReady
from xllm.worker.execution.native import NativeExecutor
from xllm.worker.executor import StepOutput


def rank_settings(settings: Settings, size: int, rank: int) -> Settings:
    """Those of one worker for one of several ranks."""
    return dataclasses.replace(
        settings,
        master=MasterSettings(num_workers=size),
        worker=dataclasses.replace(settings.worker, rank=rank),
    )


class RankExecutors:
    """Each rank on a thread of its own; they meet at a load. Results are merged as the master
    merges them: it is an error where ranks disagree."""

    def __init__(self, settings: Settings, size: int) -> None:
        self.size = size
        self.ranks = [NativeExecutor(rank_settings(settings, size, rank)) for rank in range(size)]
        self.num_meetings = 0

    def load(self, progress: Callable[[int, int], None]) -> WorkerReady:
        self.num_meetings += 1
        boards = wired_boards(self.size, f"meeting-{self.num_meetings}")

        def begin(rank: int) -> WorkerReady:
            ready = self.ranks[rank].load(progress)
            self.ranks[rank].join(boards[rank])
            return ready

        return merge_ready(on_all(self.size, begin))

    def execute(self, plan: StepPlan) -> StepOutput:
        outputs = on_all(self.size, lambda rank: self.ranks[rank].execute(plan))
        results = RankResults(self.size)
        merged = None
        for rank, output in enumerate(outputs):
            merged = results.add(rank, output.result, list(output.frames))
            assert output.frames == outputs[0].frames
        assert merged is not None
        return StepOutput(merged[0], tuple(merged[1]))

    def check(self) -> None:
        for rank in self.ranks:
            rank.check()

    def close(self) -> None:
        on_all(self.size, lambda rank: self.ranks[rank].close())


def rank_driver(directory: Path, size: int = 2, **asked: Any) -> PlanDriver:
    """A driver of several ranks. `asked`: see native_settings."""
    settings = native_settings(directory, **asked)
    return PlanDriver(directory, executor=RankExecutors(settings, size))
