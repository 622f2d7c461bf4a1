"""One worker of several threads against several ranks of one thread each, with and without overlap.

    python -m benchmarks.tensor_parallel [--shape 50m | --model DIR] [--ranks 2] [--json]

Each arm's ranks are processes of their own that stay, and the arms take turns, so that all of them
see the machine's better and worse times. A repetition computes prompts of 512 tokens, alone and
two in one step, and decodes with 1, 16 and 64 sequences; figures are medians of a step's
milliseconds. `exchange` is what one sum of 16 rows takes alone, `logits` and `best` what it takes
to make the whole vocabulary's logits, or the best token, of 16 rows' parts, in microseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import pathlib
import statistics
import tempfile
import threading
import time
from multiprocessing.connection import Connection, wait
from typing import Any

import msgspec
import torch

from benchmarks.random_model import SHAPES, write_random_model
from xllm.config.load import decode_settings, encode_settings
from xllm.config.master import MasterSettings
from xllm.config.scheduling import SchedulerSettings
from xllm.config.served_model import ModelSettings
from xllm.config.settings import Settings
from xllm.config.worker import WorkerSettings
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import ItemKind, NewSequence, RankNotice, StepItem, StepPlan
from xllm.worker.collectives.gloo import GlooRanks
from xllm.worker.execution.native import NativeExecutor
from xllm.worker.rank_board import RankBoard

START_S = 300.0
PROMPT = 512
DECODES = (1, 16, 64)
CONTEXT = 64
STEPS = 8
BLOCK_SIZE = 16
SUM_ROWS = 16
NUM_SUMS = 50
_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


@dataclasses.dataclass(frozen=True)
class Arm:
    """How many ranks, threads each, and the rows of a micro-batch (0: none)."""

    name: str
    num_ranks: int
    num_threads: int
    micro_batch_rows: int = 0


class RankWorkload:
    """The steps of a repetition, the same on every rank."""

    def __init__(self, executor: NativeExecutor, vocab_size: int) -> None:
        self._executor = executor
        self._vocab_size = vocab_size
        self._num_steps = 0
        self._num_seqs = 0

    def run(self) -> dict[str, float]:
        """Milliseconds of a step by what it does."""
        found = {}
        for count in (1, 2):
            found[f"prefill {count} x {PROMPT}"] = self._prefill(self._news(count, PROMPT))
        for count in DECODES:
            news = self._news(count, CONTEXT)
            self._prefill(news, keep=True)
            times = [self._decode(news, CONTEXT + step) for step in range(STEPS)]
            self._end(news)
            found[f"decode {count}"] = statistics.median(times)
        return found

    def _news(self, count: int, length: int) -> list[NewSequence]:
        per_seq = -(-(length + STEPS + 1) // BLOCK_SIZE)
        news = []
        for number in range(count):
            self._num_seqs += 1
            blocks = tuple(range(number * per_seq, (number + 1) * per_seq))
            prompt = tuple((7 * at + self._num_seqs) % self._vocab_size for at in range(length))
            news.append(NewSequence(self._num_seqs, prompt, (), _GREEDY, 0, blocks))
        return news

    def _prefill(self, news: list[NewSequence], keep: bool = False) -> float:
        items = tuple(StepItem(new.seq, ItemKind.PREFILL, 0, len(new.prompt_ids)) for new in news)
        took = self._step(StepPlan(self._next(), items, tuple(news)))
        if not keep:
            self._end(news)
        return took

    def _decode(self, news: list[NewSequence], start: int) -> float:
        items = tuple(StepItem(new.seq, ItemKind.DECODE, start, 1) for new in news)
        return self._step(StepPlan(self._next(), items))

    def _end(self, news: list[NewSequence]) -> None:
        self._step(StepPlan(self._next(), (), (), tuple(new.seq for new in news)))

    def _next(self) -> int:
        self._num_steps += 1
        return self._num_steps

    def _step(self, plan: StepPlan) -> float:
        began = time.perf_counter()
        result = self._executor.execute(plan).result
        assert not result.failed
        return 1e3 * (time.perf_counter() - began)


def run_rank(connection: Connection, settings: bytes) -> None:
    """A rank's process: meets the others by notices over its connection, then runs a repetition
    for each `run` and sends its figures."""
    decoded = decode_settings(settings)
    executor = NativeExecutor(decoded)
    ready = executor.load(lambda done, total: None)
    asked: list[bytes] = []
    heard = threading.Condition()
    board = RankBoard("bench")

    def listen() -> None:
        decoder = Decoder[RankNotice](RankNotice)
        while True:
            try:
                data = connection.recv_bytes()
            except EOFError:
                data = b"end"  # whoever started this is gone
            if data not in (b"run", b"end"):
                notice = decoder.decode(data)
                board.hear(notice.key, notice.value)
                continue
            with heard:
                asked.append(data)
                heard.notify()
            if data == b"end":
                return

    threading.Thread(target=listen, daemon=True).start()
    rank = decoded.worker.rank
    if decoded.master.num_workers > 1:
        board.open(
            lambda key, value: connection.send_bytes(encode(RankNotice(rank, "", key, value)))
        )
        executor.join(board)
    connection.send_bytes(b"ready")
    workload = RankWorkload(executor, ready.vocab_size)
    hidden = json.loads(pathlib.Path(decoded.model.path, "config.json").read_text())["hidden_size"]
    while True:
        with heard:
            heard.wait_for(lambda: asked)
            if asked.pop(0) == b"end":
                break
        figures = workload.run()
        if executor._ranks is not None:
            figures["exchange"] = measure_sums(executor._ranks, hidden)
            figures |= measure_heads(executor, ready.vocab_size)
        connection.send_bytes(msgspec.json.encode(figures))
    executor.close()


def measure_sums(ranks: GlooRanks, hidden: int) -> float:
    """Microseconds of the sum of SUM_ROWS rows alone."""
    part = torch.ones((SUM_ROWS, hidden))
    times = []
    for _ in range(NUM_SUMS):
        began = time.perf_counter()
        ranks.begin_sum(part).wait()
        times.append(1e6 * (time.perf_counter() - began))
    return statistics.median(times)


def measure_heads(executor: NativeExecutor, vocab_size: int) -> dict[str, float]:
    """Microseconds that ranks take to make one of their logits, and to find the best of them."""
    drawer = executor._loaded().drawer
    head = drawer._head
    part = torch.zeros((SUM_ROWS, -(-vocab_size // executor._settings.master.num_workers)))
    times: dict[str, list[float]] = {"logits": [], "best": []}
    for _ in range(NUM_SUMS):
        for name in times:
            began = time.perf_counter()
            if name == "logits":
                head.whole(part)
            else:
                head.best(part, drawer._best)
            times[name].append(1e6 * (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in times.items()}


class ArmProcesses:
    """The ranks of an arm, ready."""

    def __init__(self, arm: Arm, options: argparse.Namespace) -> None:
        self.arm = arm
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(arm.num_ranks):
            mine, theirs = context.Pipe()
            settings = encode_settings(arm_settings(arm, rank, options))
            process = context.Process(target=run_rank, args=(theirs, settings), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(mine)
            self._processes.append(process)
        self._introduce()

    def repetition(self) -> dict[str, float]:
        """Rank 0's figures of one repetition."""
        for connection in self._connections:
            connection.send_bytes(b"run")
        answers = [connection.recv_bytes() for connection in self._connections]
        figures: dict[str, float] = msgspec.json.decode(answers[0])
        return figures

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            with contextlib.suppress(OSError):  # it ended on its own
                connection.send_bytes(b"end")
        for process in self._processes:
            process.join(START_S)
        for connection in self._connections:
            connection.close()

    def _introduce(self) -> None:
        """Pass on what ranks tell each other until all are ready."""
        num_ready = 0
        while num_ready < len(self._connections):
            for found in wait(self._connections, START_S):
                assert isinstance(found, Connection)
                data = found.recv_bytes()
                if data == b"ready":
                    num_ready += 1
                    continue
                for other in self._connections:
                    if other is not found:
                        other.send_bytes(data)


def arm_settings(arm: Arm, rank: int, options: argparse.Namespace) -> Settings:
    """Settings of one rank."""
    return Settings(
        model=ModelSettings(path=options.model, max_model_len=1024),
        master=MasterSettings(num_workers=arm.num_ranks),
        scheduler=SchedulerSettings(max_num_seqs=max(DECODES)),
        worker=WorkerSettings(
            device="cpu",
            rank=rank,
            num_threads=arm.num_threads,
            kv_memory="paged",
            kv_cache_bytes=options.kv_mib << 20,
            micro_batch_rows=arm.micro_batch_rows,
        ),
    )


def arms_of(options: argparse.Namespace) -> list[Arm]:
    """One worker that has all threads, ranks of one, and ranks that overlap."""
    ranks = options.ranks
    return [
        Arm(f"1 worker x {ranks} threads", 1, ranks),
        Arm(f"{ranks} ranks x 1 thread", ranks, 1),
        Arm(f"{ranks} ranks, overlap", ranks, 1, options.micro_batch_rows),
    ]


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians by arm."""
    arms: list[ArmProcesses] = []
    try:
        arms.extend(ArmProcesses(arm, options) for arm in arms_of(options))
        for one in arms:
            one.repetition()  # to warm up
        found: dict[str, list[dict[str, float]]] = {one.arm.name: [] for one in arms}
        for _ in range(options.repetitions):
            for one in arms:
                found[one.arm.name].append(one.repetition())
    finally:
        for one in arms:
            one.close()
    return {
        name: {key: statistics.median(figures[key] for figures in runs) for key in runs[0]}
        for name, runs in found.items()
    }


def print_report(report: dict[str, dict[str, float]]) -> None:
    """A line a phase, a column an arm."""
    print(f"{'ms a step':<18}" + "".join(f"{name:>24}" for name in report))
    for phase in max(report.values(), key=len):
        cells = (figures.get(phase) for figures in report.values())
        shown = ("-" if cell is None else f"{cell:.2f}" for cell in cells)
        print(f"{phase:<18}" + "".join(f"{cell:>24}" for cell in shown))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="50m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--micro-batch-rows", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--kv-mib", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as directory:
        if not options.model:
            path = pathlib.Path(directory, options.shape)
            options.model = str(write_random_model(SHAPES[options.shape], path))
        report: dict[str, Any] = measure(options)
    if options.json:
        print(json.dumps(report))
    else:
        print_report(report)


if __name__ == "__main__":
    main()
