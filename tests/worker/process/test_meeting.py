"""A worker that meets other ranks: what it tells and hears by way of the master, and when."""

from __future__ import annotations

from tests.worker.process.test_worker_actor import first_plan, run, running, settings_for
from xllm.errors import EngineError
from xllm.protocol.step import (
    LoadModel,
    RankNotice,
    StepItem,
    StepPlan,
    StepResult,
    WorkerFailed,
    WorkerReady,
)
from xllm.worker.job_runner import JobRunner
from xllm.worker.rank_board import RankBoard
from xllm.worker.toy.executor import ToyExecutor, make_toy_executor


class Asker(ToyExecutor):
    """Says "here" and waits for the other rank's word."""

    def __init__(self) -> None:
        super().__init__(step_s=0.001)
        self.heard: list[bytes] = []

    def join(self, board: RankBoard) -> None:
        board.put("here", board.group.encode())
        self.heard.append(board.get("there", 30.0))


def meeting(run_dir, asker: Asker):
    return running(run_dir, step_ms=1.0, make=lambda settings: asker)


def test_a_worker_is_ready_once_it_has_met_the_others(run_dir) -> None:
    asker = Asker()

    async def scenario() -> None:
        async with meeting(run_dir, asker) as (master, _, _):
            await master.wait_for(WorkerReady)
            master.send(LoadModel(group="one"))
            notice = await master.wait_for(RankNotice)
            assert notice == RankNotice(0, "one", "here", b"one")
            master.send(RankNotice(1, "zero", "there", b"of another meeting"))
            master.send(RankNotice(1, "one", "there", b"hello"))
            ready = await master.wait_for(WorkerReady, 2)
            assert ready.group == "one"
            assert asker.heard == [b"hello"]
            master.send(first_plan())
            assert len((await master.wait_for(StepResult)).tokens[0]) == 1

    run(scenario())


def test_a_meeting_gives_way_to_the_next_one(run_dir) -> None:
    asker = Asker()

    async def scenario() -> None:
        async with meeting(run_dir, asker) as (master, _, _):
            await master.wait_for(WorkerReady)
            for group in ("one", "two", "three"):
                master.send(LoadModel(group=group))
            await master.until(
                lambda: any(notice.group == "three" for notice in master.of(RankNotice))
            )
            master.send(RankNotice(1, "three", "there", b"hello"))
            await master.until(lambda: master.of(WorkerReady)[-1].group == "three")
            assert asker.heard == [b"hello"]
            assert master.of(WorkerFailed) == []

    run(scenario())


def test_a_worker_that_waits_for_others_can_be_stopped(run_dir) -> None:
    async def scenario() -> None:
        async with meeting(run_dir, Asker()) as (master, actor, life):
            await master.wait_for(WorkerReady)
            master.send(LoadModel(group="one"))
            await master.wait_for(RankNotice)
            actor.request_stop()
            assert await life == 0

    run(scenario())


def test_a_meeting_that_fails_is_a_failed_load() -> None:
    class Lonely(ToyExecutor):
        def join(self, board: RankBoard) -> None:
            raise EngineError("nobody came")

    answers = []
    runner = JobRunner(Lonely, 0, meeting_s=0.01)
    runner.run(RankBoard("one"), answers.append)
    failed = answers[-1][0]
    assert isinstance(failed, WorkerFailed)
    assert (failed.step, failed.message) == (-1, "nobody came")


def test_meeting_forgets_all_sequences() -> None:
    answers = []
    runner = JobRunner(lambda: make_toy_executor(settings_for("")), 0)
    runner.run(LoadModel(), answers.append)
    runner.run(first_plan(), answers.append)
    runner.run(RankBoard("one"), answers.append)
    assert answers[-1][0].group == "one"
    runner.run(StepPlan(1, (StepItem(0, 1, 3, 1),)), answers.append)
    assert "not known" in answers[-1][0].failed[0][1]
