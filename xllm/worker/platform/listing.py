"""The devices that this machine has for an engine, kind by kind, and what each lacks."""

from __future__ import annotations

import dataclasses

from xllm.errors import DependencyError, EngineError
from xllm.worker.platform.platform import Platform
from xllm.worker.platform.selection import make_platform

KINDS = ("cpu", "cuda", "npu")
_GIB = 1 << 30
_MAX_DEVICES = 64


@dataclasses.dataclass(frozen=True, slots=True)
class FoundDevice:
    """One device, or that a kind has none (`is_there` False); `text` says the rest."""

    kind: str
    is_there: bool
    text: str


def list_devices() -> list[FoundDevice]:
    """Every device of every kind, at least one entry a kind."""
    return [device for kind in KINDS for device in _of_kind(kind)]


def _of_kind(kind: str) -> list[FoundDevice]:
    found: list[FoundDevice] = []
    seen = set()
    for rank in range(_MAX_DEVICES):
        try:
            platform = make_platform(kind, rank)
            if platform.device in seen:
                break  # ranks begin again with the first device
            seen.add(platform.device)
            found.append(FoundDevice(kind, True, _described(platform)))
        except (DependencyError, RuntimeError) as error:
            # RuntimeError: a driver that does not answer as it should.
            found.append(FoundDevice(kind, False, str(error).splitlines()[0]))
            break
    return found


def _described(platform: Platform) -> str:
    memory = platform.memory()
    free, total = memory.free_bytes / _GIB, memory.total_bytes / _GIB
    parts = [
        platform.describe(),
        f"{free:.1f} of {total:.1f} GiB free",
        f"kernels {platform.kernels}",
        f"collectives {platform.collectives}",
        _virtual_memory(platform),
    ]
    return ", ".join(parts)


def _virtual_memory(platform: Platform) -> str:
    try:
        driver = platform.virtual_driver()
    except (DependencyError, EngineError) as error:
        return f"no virtual memory: {error.message}"
    if driver is None:
        return "virtual memory of the system"
    return f"virtual memory in pages of {driver.granularity >> 10} KiB"
