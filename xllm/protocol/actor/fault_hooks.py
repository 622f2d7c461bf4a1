"""Faults that a process inflicts on itself when a signal asks for them, for `xllm chaos`.

Installed only where `chaos.hooks` is on. SIGUSR1: a call into C that holds the interpreter's lock,
so that no thread of this process runs Python: what a hang in a library looks like from outside,
where ZeroMQ's own thread still answers. SIGUSR2: how many live objects there are of each type.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import signal
from collections import Counter

HANG_S = 3.0
"""How long SIGUSR1 takes."""
_MOST_TYPES = 200


def install_fault_hooks(loop: asyncio.AbstractEventLoop, name: str, directory: str) -> None:
    """Obey SIGUSR1 and SIGUSR2 from now on; counts go to `<name>.objects.json` in `directory`."""
    path = os.path.join(directory, objects_file(name))
    loop.add_signal_handler(signal.SIGUSR1, hang)
    loop.add_signal_handler(signal.SIGUSR2, write_objects, path)


def objects_file(name: str) -> str:
    """The file with the counts of a process, beside its log."""
    return f"{name.replace('/', '_')}.objects.json"


def hang() -> None:
    """Sleep in C with the interpreter's lock held: PyDLL, unlike CDLL, does not give it up."""
    ctypes.PyDLL(None).usleep(int(HANG_S * 1_000_000))


def write_objects(path: str) -> None:
    """Write {type: count} of what the collector tracks, the most frequent first; a reader never
    sees half of it."""
    gc.collect()
    counts = Counter(type(one).__qualname__ for one in gc.get_objects())
    fresh = f"{path}.{os.getpid()}"
    with open(fresh, "w", encoding="utf-8") as file:
        json.dump({"total": counts.total(), **dict(counts.most_common(_MOST_TYPES))}, file)
    os.replace(fresh, path)
