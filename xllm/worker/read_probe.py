"""How fast this machine reads memory, right now: a buffer past its caches, searched by `memchr`.

The C library's search for a byte that is not there reads every byte and does nothing else; it
runs without the interpreter's lock, so threads read at once. No torch, no compiler.
"""

from __future__ import annotations

import ctypes
import mmap
import statistics
import threading
import time

from xllm.errors import InvariantError

_FILL = 1
_ABSENT = 0
DEFAULT_BYTES = 256 << 20


class ReadProbe:
    """A buffer of `num_bytes` that `num_threads` threads read, a part each. `close` frees it."""

    def __init__(self, num_threads: int, num_bytes: int = DEFAULT_BYTES) -> None:
        self._num_threads = num_threads
        self._part = num_bytes // num_threads
        self._memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._memchr = ctypes.CDLL(None).memchr
        self._memchr.restype = ctypes.c_void_p
        self._memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        first = ctypes.c_char.from_buffer(self._memory)
        self._address = ctypes.addressof(first)
        ctypes.memset(self._address, _FILL, num_bytes)  # every page is there before the clock runs

    def measure(self, passes: int = 5) -> float:
        """Bytes a second: the median of `passes` passes over the whole buffer."""
        return statistics.median(self._pass() for _ in range(passes))

    def close(self) -> None:
        """Free the buffer."""
        self._memory.close()

    def _pass(self) -> float:
        gate = threading.Barrier(self._num_threads + 1)
        threads = [
            threading.Thread(target=self._read, args=(index, gate), daemon=True)
            for index in range(self._num_threads)
        ]
        for thread in threads:
            thread.start()
        gate.wait()
        began = time.perf_counter()
        for thread in threads:
            thread.join()
        return self._part * self._num_threads / (time.perf_counter() - began)

    def _read(self, index: int, gate: threading.Barrier) -> None:
        gate.wait()
        if self._memchr(self._address + index * self._part, _ABSENT, self._part):
            raise InvariantError("the probe's buffer was written to")
