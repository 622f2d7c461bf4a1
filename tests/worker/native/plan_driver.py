"""A small stand-in for the master: turns prompts into step plans and runs them on an executor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xllm.config.scheduling import SchedulerSettings
from xllm.config.served_model import ModelSettings
from xllm.config.settings import Settings
from xllm.config.worker import WorkerSettings
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import ItemKind, NewSequence, StepItem, StepPlan
from xllm.worker.execution.native import NativeExecutor
from xllm.worker.executor import Executor, StepOutput
from xllm.worker.kernels.compiled import load

KERNELS = ("compiled", "torch") if load().compiled else ("torch",)
"""Who can compute here: tests run under each."""

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, seed=0)


def native_settings(
    directory: Path, quantization: str = "none", dtype: str = "auto", **worker: object
) -> Settings:
    """Settings of a small engine on one CPU thread."""
    fields: dict = {"device": "cpu", "num_threads": 1, "kv_cache_bytes": 8 << 20, **worker}
    return Settings(
        model=ModelSettings(path=str(directory), quantization=quantization, dtype=dtype),
        scheduler=SchedulerSettings(max_num_seqs=32),
        worker=WorkerSettings(**fields),
    )


@dataclasses.dataclass
class Job:
    """A sequence being driven."""

    seq: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    num_tokens: int
    blocks: list[int]
    computed: int = 0
    output: list[int] = dataclasses.field(default_factory=list)
    known: bool = False
    """The worker has been told of it."""

    @property
    def done(self) -> bool:
        return len(self.output) >= self.num_tokens


@dataclasses.dataclass
class Scores:
    """The logprob frames of a step, unpacked."""

    ids: np.ndarray
    logprobs: np.ndarray
    ranks: np.ndarray


class PlanDriver:
    """Drives one executor; sequences and blocks are numbered on, blocks come back at `release`."""

    def __init__(
        self,
        directory: Path,
        quantization: str = "none",
        *,
        executor: Executor | None = None,
        **worker: Any,
    ) -> None:
        """`executor`: one that is not loaded; None: a native one."""
        self.executor = executor or NativeExecutor(
            native_settings(directory, quantization, **worker)
        )
        self.ready = self.executor.load(lambda loaded, total: None)
        self.free = list(range(self.ready.num_blocks))
        self.next_seq = 0
        self.next_step = 0
        self.ended: list[int] = []

    def job(
        self,
        prompt: Sequence[int],
        num_tokens: int = 1,
        sampling: SamplingParams = GREEDY,
        cached: Sequence[int] = (),
    ) -> Job:
        """A sequence with all the blocks it will need; `cached` blocks hold its first tokens."""
        size = self.ready.block_size
        needed = -(-(len(prompt) + num_tokens) // size) - len(cached)
        blocks = [*cached, *(self.free.pop() for _ in range(needed))]
        self.next_seq += 1
        return Job(self.next_seq, tuple(prompt), sampling, num_tokens, blocks, len(cached) * size)

    def release(self, jobs: Sequence[Job], shared: Sequence[int] = ()) -> None:
        """Forget sequences; their blocks are free but for the shared ones."""
        for job in jobs:
            self.ended.append(job.seq)
            self.free.extend(block for block in job.blocks if block not in shared)

    def news(self, jobs: Sequence[Job]) -> tuple[NewSequence, ...]:
        """Those of the jobs that the worker does not know yet."""
        found = [job for job in jobs if not job.known]
        for job in found:
            job.known = True
        return tuple(
            NewSequence(job.seq, job.prompt, (), job.sampling, 0, tuple(job.blocks))
            for job in found
        )

    def run(self, items: Sequence[StepItem], new: Sequence[NewSequence] = (), **plan) -> StepOutput:
        """Execute one plan."""
        self.next_step += 1
        ended, self.ended = (*self.ended, *plan.pop("ended", ())), []
        return self.executor.execute(
            StepPlan(self.next_step, tuple(items), tuple(new), ended, **plan)
        )

    def item(self, job: Job, chunk: int) -> StepItem:
        """The next item of a job: a decode, or at most `chunk` tokens of its prompt."""
        length = len(job.prompt) + len(job.output)
        count = min(length - job.computed, chunk)
        last = job.computed + count == length
        kind = ItemKind.DECODE if job.output else ItemKind.PREFILL
        scored = not job.output and job.sampling.prompt_logprobs is not None
        return StepItem(job.seq, kind, job.computed, count, (), int(last), scored)

    def step(self, jobs: Sequence[Job], chunk: int = 1 << 20) -> StepOutput:
        """One step of all jobs that are not done."""
        jobs = [job for job in jobs if not job.done]
        items = [self.item(job, chunk) for job in jobs]
        output = self.run(items, self.news(jobs))
        assert output.result.failed == ()
        for job, item, tokens in zip(jobs, items, output.result.tokens, strict=True):
            job.computed += item.num_tokens
            assert len(tokens) == item.num_samples
            job.output.extend(tokens)
        return output

    def generate(self, jobs: Sequence[Job], chunk: int = 1 << 20, stagger: int = 0) -> None:
        """Run jobs to their ends, all at once or `stagger` more at each step."""
        running = list(jobs) if not stagger else []
        waiting = list(jobs) if stagger else []
        while waiting or any(not job.done for job in running):
            running.extend(waiting[:stagger])
            del waiting[:stagger]
            self.step(running, chunk)
        self.executor.check()


def scores(output: StepOutput) -> Scores:
    """Unpack a step's logprob frames, which come first."""
    width = output.result.num_top + 1
    ids, logprobs, ranks = output.frames[:3]
    return Scores(
        np.frombuffer(ids, "<i4").reshape(-1, width),
        np.frombuffer(logprobs, "<f4").reshape(-1, width),
        np.frombuffer(ranks, "<i4"),
    )


def random_prompts(num: int, low: int, high: int, seed: int = 7) -> list[list[int]]:
    """Prompts of random ids (no special ones of the fixtures' tokenizers) and lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high + 1, (num,), generator=generator).tolist()
    return [torch.randint(3, 500, (n,), generator=generator).tolist() for n in lengths]
