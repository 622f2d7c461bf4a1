"""Processes that live and do nothing, and one that does a lot and must not be taken for dead."""

from __future__ import annotations

import asyncio
import os
import signal
import time

from xllm.cli.chaos.processes import is_alive
from xllm.cli.chaos.stage import LOST, Stage
from xllm.cli.chaos.verdict import Injection
from xllm.client.results import Completion
from xllm.errors import EngineError
from xllm.protocol.actor.fault_hooks import HANG_S
from xllm.worker.toy.faults import SLOW_S

WORKER_LOST = ("worker_lost", *LOST)
MAX_LOST = 3
"""Workers that a prompt may take: it is in company, it is again, it is alone."""


async def hang_master(stage: Stage) -> None:
    """A master's interpreter is held in a C call: ZeroMQ's thread answers pings all the while."""
    await stage.wait_load()
    victim = stage.pick("master")
    injection = stage.strike("F05", victim.name, lambda: os.kill(victim.pid, signal.SIGUSR1))
    await stage.notice(injection, word=victim.name)
    injection.proofs.append(f"{victim.name}: SIGUSR1, a call of {HANG_S:g} s")
    await stage.pause(max(0.0, HANG_S - injection.detect_s))
    await stage.settle(injection)


async def hang_worker(stage: Stage) -> None:
    """The same with a worker: its progress counter stands, and nothing of it can say so."""
    await stage.wait_load()
    victim = stage.pick("worker")
    injection = stage.strike("F05-worker", victim.name, lambda: os.kill(victim.pid, signal.SIGUSR1))
    await stage.notice(injection, WORKER_LOST)
    injection.proofs.append(f"{victim.name}: SIGUSR1, a call of {HANG_S:g} s")
    await stage.settle(injection)


async def hang_engine(stage: Stage) -> None:
    """An engine's step stands still: its progress counter does not move."""
    await stage.wait_load()
    injection = stage.strike("F05-engine", "an engine", lambda: None)
    poisoned = stage.ask_with(stage.poison["hang"], max_tokens=4)
    await stage.notice(injection, ("worker_lost",), seconds=20.0)
    injection.proofs.append("an engine got the prompt that stops it")
    await _fails(stage, injection, poisoned)
    await stage.settle(injection)


async def slow_step(stage: Stage) -> None:
    """A step of 8 s whose counter moves: nobody may be taken for dead."""
    await stage.wait_load()
    injection = stage.strike("F06", "an engine", lambda: None)
    began = time.monotonic()
    await stage.ask_with(stage.poison["slow"], max_tokens=4)
    took_s = time.monotonic() - began
    await stage.prove(injection, f"a prompt took {took_s:.1f} s", lambda: took_s >= SLOW_S)
    num_deaths = stage.count_events(injection, WORKER_LOST)
    if num_deaths:
        injection.broken.append(f"{num_deaths} times somebody was taken for dead")
    injection.notes["step_s"] = round(took_s, 1)
    await stage.settle(injection)


async def crash_engine(stage: Stage) -> None:
    """A prompt that ends the worker that computes it."""
    await stage.wait_load()
    pids = [one.pid for one in stage.cluster.named("worker")]
    injection = stage.strike("F03-exit", "workers", lambda: None)
    await _fails(stage, injection, stage.ask_with(stage.poison["crash"], max_tokens=4))
    dead = [pid for pid in pids if not is_alive(pid)]
    await stage.prove(injection, f"pids {dead} are gone", lambda: dead)
    await stage.notice(injection, ("worker_lost",))
    await stage.settle(injection)


async def _fails(stage: Stage, injection: Injection, poisoned: asyncio.Task[Completion]) -> None:
    """Until a prompt that ends every worker is given up; it may take MAX_LOST of them. That it
    alone fails is among the limits."""
    try:
        await poisoned
        injection.broken.append("a prompt that ends every worker was answered")
    except EngineError:
        pass  # as it should be
    num_lost = stage.count_events(injection, ("worker_lost",))
    injection.notes["workers_lost"] = num_lost
    if num_lost > MAX_LOST:
        injection.broken.append(f"a prompt took {num_lost} workers")
