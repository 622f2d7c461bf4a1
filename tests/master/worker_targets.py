"""First functions of worker processes in tests: the toy engine with faults."""

import ctypes
import time

from tests.fixtures.child_process import run_child
from xllm.config.load import decode_settings
from xllm.config.settings import Settings
from xllm.errors import InvariantError
from xllm.protocol.actor.logs import configure_logs
from xllm.protocol.step import StepPlan
from xllm.worker.actor import WorkerActor, worker_name
from xllm.worker.executor import StepOutput
from xllm.worker.rank_board import RankBoard
from xllm.worker.toy.executor import ToyExecutor, make_toy_models
from xllm.worker.toy.faults import ToyFaults

MEETING_S = 30.0
HANG_TOKEN = 990
FAIL_TOKEN = 991
HOLD_TOKEN = 992
CRASH_TOKEN = 993


def run_toy_worker(settings: bytes) -> None:
    """A toy worker that hangs, or fails a step, at certain tokens."""
    decoded = decode_settings(settings)
    configure_logs(process=worker_name(decoded), level="warning")
    faults = ToyFaults(hang=HANG_TOKEN, fail_step=FAIL_TOKEN)
    run_child(lambda: WorkerActor(decoded, lambda s: make_toy_models(s, faults)))


def run_crashing_worker(settings: bytes) -> None:
    """A toy worker that ends at a certain token, which may be one that it draws."""
    decoded = decode_settings(settings)
    configure_logs(process=worker_name(decoded), level="warning")
    faults = ToyFaults(crash=CRASH_TOKEN)
    run_child(lambda: WorkerActor(decoded, lambda s: make_toy_models(s, faults)))


class TalkingExecutor(ToyExecutor):
    """A toy whose ranks, of two, say their number to each other when they meet; the second waits
    for an answer."""

    def __init__(self, rank: int) -> None:
        super().__init__(block_size=4, num_blocks=64, rank=rank)
        self._my_rank = rank

    def join(self, board: RankBoard) -> None:
        mine, other = self._my_rank, 1 - self._my_rank
        board.put(f"number-{mine}", bytes([mine]))
        if board.get(f"number-{other}", MEETING_S) != bytes([other]):
            raise InvariantError("a rank has another one's number")
        if mine == 0:
            board.put("answer", b"you are late")
        else:
            board.get("answer", MEETING_S)


def run_talking_worker(settings: bytes) -> None:
    """A toy worker whose ranks talk before they meet."""
    decoded = decode_settings(settings)
    configure_logs(process=worker_name(decoded), level="warning")
    run_child(lambda: WorkerActor(decoded, lambda s: TalkingExecutor(s.worker.rank)))


class HoldingExecutor(ToyExecutor):
    """A toy that keeps the interpreter's lock in a call into C at a certain prompt token, so that
    no thread of its process runs Python."""

    def execute(self, plan: StepPlan) -> StepOutput:
        """Run one plan."""
        if any(HOLD_TOKEN in new.prompt_ids for new in plan.new):
            ctypes.PyDLL(None).usleep(60_000_000)
        return super().execute(plan)


def run_holding_worker(settings: bytes) -> None:
    """A toy worker with such a token, and steps on a thread of their own."""
    decoded = decode_settings(settings)
    configure_logs(process=worker_name(decoded), level="warning")

    def make(settings: Settings) -> HoldingExecutor:
        return HoldingExecutor(num_blocks=64, block_size=settings.worker.host_block_size)

    run_child(lambda: WorkerActor(decoded, make))


class ComputingExecutor(ToyExecutor):
    """A toy whose steps take time of the CPU; its counter moves with each piece."""

    PIECES, PIECE_S = 4, 0.01

    def execute(self, plan: StepPlan) -> StepOutput:
        """Run one plan."""
        for _ in range(self.PIECES):
            end = time.thread_time() + self.PIECE_S
            while time.thread_time() < end:
                time.sleep(0)  # another thread of this process may speak
            self.counter += 1
        return super().execute(plan)


def run_computing_worker(settings: bytes) -> None:
    """A worker whose steps are 40 ms of its engine thread on a CPU."""
    decoded = decode_settings(settings)
    configure_logs(process=worker_name(decoded), level="warning")

    def make(settings: Settings) -> ComputingExecutor:
        size = settings.worker.host_block_size
        return ComputingExecutor(num_blocks=64, block_size=size)

    run_child(lambda: WorkerActor(decoded, make))


def run_nothing(settings: bytes) -> None:
    """A worker whose configuration is wrong."""
    raise SystemExit(64)


def run_toy_master(settings: bytes) -> None:
    """A master with toy workers."""
    from xllm.master.process import main

    main(settings, run_toy_worker)
