"""The ranks and threads that the settings ask for."""

from __future__ import annotations

from collections.abc import Callable

from xllm.config.cpu_list import is_list
from xllm.config.settings import Settings
from xllm.errors import ConfigError
from xllm.worker.collectives.gloo import GlooRanks
from xllm.worker.collectives.placed import PlacedRanks
from xllm.worker.platform.cpu import num_cores
from xllm.worker.platform.placement import place_threads


def make_ranks(settings: Settings, tick: Callable[[], None]) -> PlacedRanks | None:
    """This rank's end of the others; None where it is alone. They have not met yet."""
    size, worker = settings.master.num_workers, settings.worker
    if size == 1:
        return None
    if worker.rank >= size:
        raise ConfigError(
            f"worker.rank {worker.rank} of master.num_workers {size}", param="worker.rank"
        )
    timeout_s = worker.collective_timeout_s
    hosts = GlooRanks(worker.rank, size, worker.collective_host, timeout_s, tick)
    return PlacedRanks(hosts, timeout_s)


def num_threads_each(settings: Settings) -> int:
    """`worker.num_threads`; where it is open and a master starts several ranks, which share its
    host, an even part of the cores. 0: the platform chooses."""
    asked, size = settings.worker.num_threads, settings.master.num_workers
    if asked or size == 1 or not settings.master.spawn_workers:
        return asked
    return max(num_cores() // size, 1)


def place_engine(settings: Settings, platform: str) -> int:
    """Give the calling thread, which will compute, its place among the cores; ranks that a master
    starts share its host. How many threads it shall have. ConfigError where that cannot be."""
    worker = settings.worker
    # Where CPUs are named and threads are not, there is a thread for each.
    num_threads = worker.num_threads if is_list(worker.cpu_affinity) else num_threads_each(settings)
    if platform != "cpu":
        return num_threads
    if not settings.master.spawn_workers:
        return place_threads(worker.cpu_affinity, num_threads)
    size = settings.master.num_workers
    return place_threads(worker.cpu_affinity, num_threads, worker.rank, size)
