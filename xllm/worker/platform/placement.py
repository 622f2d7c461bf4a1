"""Which cores a worker's threads get: whole cores before their second threads, one NUMA node where
they fit, and never all that there are.

`read_topology` reads what the kernel says of the machine, `place_threads` carries a decision out;
`choose_cpus` and `listed_cpus` decide and are pure. Only the engine's thread is placed: the threads
that it starts, those of the kernels and of torch, inherit its place, and the memory that they
touch first is of their node. All else floats, and finds the cores that are left.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import structlog

from xllm.config.cpu_list import AFFINITY, AUTO, NONE, format_cpus, parse_cpus
from xllm.errors import ConfigError

log = structlog.get_logger("placement")
SYSTEM = Path("/sys/devices/system")


@dataclasses.dataclass(frozen=True, slots=True)
class Cpu:
    """A CPU as the kernel numbers them. `core`: (package, core), equal for the threads of one
    core; `node`: its NUMA node."""

    number: int
    core: tuple[int, int]
    node: int = 0


def read_topology(system: Path, allowed: Iterable[int]) -> list[Cpu]:
    """The CPUs `allowed`, as `system` (/sys/devices/system) describes them. What is not described
    there is a core of its own, on node 0."""
    nodes: dict[int, int] = {}
    for path in sorted(system.glob("node/node[0-9]*/cpulist")):
        text = path.read_text().strip()
        if text:
            node = int(path.parent.name.removeprefix("node"))
            nodes |= dict.fromkeys(parse_cpus(text), node)
    found = []
    for number in sorted(allowed):
        topology = system / f"cpu/cpu{number}/topology"
        try:
            package = int((topology / "physical_package_id").read_text())
            core = (package, int((topology / "core_id").read_text()))
        except (OSError, ValueError):
            core = (-1, number)
        found.append(Cpu(number, core, nodes.get(number, 0)))
    return found


def choose_cpus(
    cpus: Sequence[Cpu], num_threads: int, rank: int = 0, num_ranks: int = 1
) -> tuple[int, ...]:
    """The CPUs of one of `num_ranks` workers of `num_threads` threads each; those of different
    ranks are different. Empty where none would be left for the other processes."""
    total = num_threads * num_ranks
    if total >= len(cpus):
        return ()
    firsts = _first_threads(cpus)
    others = [cpu for cpu in cpus if cpu not in firsts]
    # A core's second thread only where there are not cores enough. The lowest numbers, which
    # interrupts like, are left to the others.
    pool = firsts if total <= len(firsts) else [*firsts, *others]
    left: dict[int, list[Cpu]] = {}
    for cpu in sorted(pool, key=lambda cpu: (cpu not in firsts, -cpu.number)):
        left.setdefault(cpu.node, []).append(cpu)
    own: list[Cpu] = []
    for _ in range(rank + 1):
        own = _take(left, num_threads)
    return tuple(sorted(cpu.number for cpu in own))


def listed_cpus(
    text: str, allowed: Iterable[int], num_threads: int, rank: int = 0, num_ranks: int = 1
) -> tuple[int, ...]:
    """The share of a rank in the CPUs that the setting names. ConfigError where one of them is not
    allowed, or there are fewer than threads (0: as many as CPUs)."""
    known = set(allowed)
    listed = parse_cpus(text)
    foreign = [number for number in listed if number not in known]
    if foreign:
        raise ConfigError(
            f"{AFFINITY}: CPU {format_cpus(foreign)} is not among those that this process may use: "
            f"{format_cpus(known)}",
            param=AFFINITY,
        )
    each = num_threads or len(listed) // num_ranks
    if not each or len(listed) < each * num_ranks:
        raise ConfigError(
            f"{AFFINITY}: {len(listed)} CPUs for {num_ranks} workers of {max(each, 1)} threads",
            param=AFFINITY,
        )
    return listed[rank * each : (rank + 1) * each]


def place_threads(
    setting: str, num_threads: int, rank: int = 0, num_ranks: int = 1, system: Path = SYSTEM
) -> int:
    """Place the calling thread, and with it all that it will start. `num_threads` 0: as many as
    there are CPUs. How many threads the engine shall have (0: the platform chooses)."""
    if setting == NONE:
        return num_threads
    # Of the process: this thread may have its place already, from another model.
    allowed = os.sched_getaffinity(os.getpid())
    if setting != AUTO:
        own = listed_cpus(setting, allowed, num_threads, rank, num_ranks)
    elif num_threads:
        own = choose_cpus(read_topology(system, allowed), num_threads, rank, num_ranks)
    else:
        own = ()
    if not own:
        log.info("threads_not_placed", reason="every core may compute", cpus=format_cpus(allowed))
        return num_threads
    os.sched_setaffinity(0, own)
    left = format_cpus(allowed - set(own))
    log.info("threads_placed", cpus=format_cpus(own), left_to_others=left)
    return num_threads or len(own)


def _first_threads(cpus: Sequence[Cpu]) -> list[Cpu]:
    """The thread of each core that has the lowest number."""
    found: dict[tuple[int, int], Cpu] = {}
    for cpu in sorted(cpus, key=lambda cpu: cpu.number):
        found.setdefault(cpu.core, cpu)
    return list(found.values())


def _take(left: dict[int, list[Cpu]], num: int) -> list[Cpu]:
    """Remove `num` CPUs: of the node that has the most of those where they fit, else of all."""
    fitting = [node for node, cpus in left.items() if len(cpus) >= num]
    if fitting:
        node = max(fitting, key=lambda node: (len(left[node]), -node))
        own, left[node] = left[node][:num], left[node][num:]
        return own
    own = []
    for node in sorted(left, key=lambda node: (-len(left[node]), node)):
        count = num - len(own)
        own += left[node][:count]
        left[node] = left[node][count:]
    return own
