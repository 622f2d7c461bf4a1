"""Which cores the engine's threads get, on machines that are made up, and that they do."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.config.cpu_list import check_affinity, format_cpus, parse_cpus
from xllm.config.master import MasterSettings
from xllm.config.settings import Settings
from xllm.config.worker import WorkerSettings
from xllm.errors import ConfigError
from xllm.worker.collectives.making import place_engine
from xllm.worker.platform.placement import (
    Cpu,
    choose_cpus,
    listed_cpus,
    place_threads,
    read_topology,
)


def machine(num_nodes: int, cores: int, threads: int) -> list[Cpu]:
    """`cores` a node; numbered as Linux does: all first threads, then all second ones."""
    total = num_nodes * cores
    return [
        Cpu(thread * total + core, (core // cores, core % cores), core // cores)
        for thread in range(threads)
        for core in range(total)
    ]


def write_system(root: Path, cpus: list[Cpu]) -> Path:
    """What the kernel would say of them under /sys/devices/system."""
    for cpu in cpus:
        topology = root / f"cpu/cpu{cpu.number}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{cpu.core[0]}\n")
        (topology / "core_id").write_text(f"{cpu.core[1]}\n")
    for node in {cpu.node for cpu in cpus}:
        path = root / f"node/node{node}"
        path.mkdir(parents=True)
        own = format_cpus([cpu.number for cpu in cpus if cpu.node == node])
        (path / "cpulist").write_text(f"{own}\n")
    empty = root / "node/node7"  # memory without CPUs
    empty.mkdir(parents=True)
    (empty / "cpulist").write_text("\n")
    return root


def test_a_machine_is_read_as_far_as_it_may_be_used(tmp_path: Path) -> None:
    cpus = machine(2, 4, 2)
    system = write_system(tmp_path, cpus)
    assert read_topology(system, range(16)) == cpus
    assert read_topology(system, {13, 2}) == [Cpu(2, (0, 2), 0), Cpu(13, (1, 1), 1)]
    assert read_topology(tmp_path / "nothing", {3, 1}) == [Cpu(1, (-1, 1)), Cpu(3, (-1, 3))]


@pytest.mark.parametrize(
    ("cpus", "num_threads", "num_ranks", "chosen"),
    [
        (machine(1, 2, 1), 2, 1, [()]),  # nothing would be left
        (machine(1, 8, 1), 4, 1, [(4, 5, 6, 7)]),
        (machine(1, 4, 2), 3, 1, [(1, 2, 3)]),  # whole cores
        (machine(1, 4, 2), 6, 1, [(0, 1, 2, 3, 6, 7)]),  # and second threads where they must be
        (machine(2, 4, 2), 4, 1, [(0, 1, 2, 3)]),  # one node
        (machine(2, 4, 1), 4, 2, [(), ()]),
        (machine(2, 4, 1), 3, 2, [(1, 2, 3), (5, 6, 7)]),  # a node each
        (machine(2, 4, 1), 6, 1, [(0, 1, 2, 3, 6, 7)]),  # more than a node has
    ],
)
def test_who_gets_what(cpus, num_threads, num_ranks, chosen) -> None:
    found = [choose_cpus(cpus, num_threads, rank, num_ranks) for rank in range(num_ranks)]
    assert found == chosen


@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 2), st.integers(1, 9), st.integers(1, 3),
    st.data(),
)  # fmt: skip
def test_any_machine(nodes, cores, threads, num_threads, num_ranks, data) -> None:
    cpus = data.draw(st.lists(st.sampled_from(machine(nodes, cores, threads)), unique=True))
    found = [choose_cpus(cpus, num_threads, rank, num_ranks) for rank in range(num_ranks)]
    total = num_threads * num_ranks
    if total >= len(cpus):
        assert found == [()] * num_ranks
        return
    used = [number for own in found for number in own]
    assert len(set(used)) == len(used) == total < len(cpus)
    known = {cpu.number: cpu for cpu in cpus}
    assert set(used) <= set(known)
    if nodes == 1:  # with several, a rank rather shares a core than leaves its node
        num_cores = len({cpu.core for cpu in cpus})
        assert len({known[number].core for number in used}) == min(total, num_cores)


def test_named_cpus_are_shared_among_ranks() -> None:
    assert listed_cpus("0-3,8,9", range(16), 2, 1, 3) == (2, 3)
    assert listed_cpus("0-3,8,9", range(16), 0, 1, 2) == (3, 8, 9)
    with pytest.raises(ConfigError, match=r"CPU 8-9 is not among those .*: 0-7"):
        listed_cpus("0-3,8,9", range(8), 2)
    with pytest.raises(ConfigError, match="6 CPUs for 2 workers of 4 threads"):
        listed_cpus("0-3,8,9", range(16), 4, 0, 2)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "neither a CPU's number"),
        ("all", "neither a CPU's number"),
        ("1-", "neither a CPU's number"),
        ("-1", "neither a CPU's number"),
        ("3-1", "does not go up"),
        ("0-99999", "beyond CPU 4095"),
        ("0-3,2", "CPU 2 is there twice"),
    ],
)
def test_what_is_no_list_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as failure:
        check_affinity(text)
    assert failure.value.param == "worker.cpu_affinity"


@given(st.sets(st.integers(0, 4095), min_size=1, max_size=20))
def test_lists_are_read_as_they_are_written(numbers: set[int]) -> None:
    assert set(parse_cpus(format_cpus(numbers))) == numbers


def placed(setting: str, num_threads: int, system: Path) -> tuple[int, set[int], set[int]]:
    """Threads to have, and where the thread that was placed and one that it started may run."""
    seen: list = []

    def look() -> None:
        seen.append(os.sched_getaffinity(0))

    def engine() -> None:
        seen.append(place_threads(setting, num_threads, system=system))
        look()
        child = threading.Thread(target=look)
        child.start()
        child.join()

    thread = threading.Thread(target=engine)
    thread.start()
    thread.join()
    return tuple(seen)  # type: ignore[return-value]


def test_a_thread_and_what_it_starts_keep_to_their_place(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    last = max(allowed)
    assert placed("none", 1, tmp_path) == (1, allowed, allowed)
    assert placed(str(last), 0, tmp_path) == (1, {last}, {last})
    # Every core computes: none would be left.
    assert placed("auto", len(allowed), tmp_path) == (len(allowed), allowed, allowed)
    assert placed("auto", 0, tmp_path) == (0, allowed, allowed)
    if len(allowed) > 1:
        assert placed("auto", 1, tmp_path) == (1, {last}, {last})
    assert os.sched_getaffinity(0) == allowed


def test_the_settings_of_a_rank_decide() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    worker = WorkerSettings(cpu_affinity=str(allowed[0]), num_threads=1)
    assert place_engine(Settings(worker=worker), "cuda") == 1
    two = Settings(worker=worker, master=MasterSettings(num_workers=2))
    with pytest.raises(ConfigError, match="1 CPUs for 2 workers of 1 threads"):
        place_engine(two, "cpu")
