"""The threads that compute together: owner of one C++ team."""

from __future__ import annotations

import ctypes
import weakref

import torch

from xllm.errors import EngineError
from xllm.worker.kernels.compiled import CWeight, Library


class Team:
    """`num_threads` threads, the caller of each kernel among them; one caller at a time. Scratch
    memory grows with use and is shared by all calls. `variant`: that of the products; 0: the best
    at each row count, whose bits may differ from one count to another."""

    def __init__(self, library: Library, num_threads: int, variant: int = 0) -> None:
        """EngineError where the system gives no more threads."""
        if num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, not {num_threads}")
        self.compiled = library
        self.num_threads = num_threads
        self.variant = variant
        self.handle = library.c.xk_team_new(num_threads)
        if not self.handle:
            raise EngineError(f"the system does not give {num_threads - 1} more threads")
        self._end = weakref.finalize(self, library.c.xk_team_free, self.handle)
        # A step may still be running as the process ends: its threads end with it.
        self._end.atexit = False
        self._progress = ctypes.c_int64.from_address(library.c.xk_team_progress(self.handle))
        self._scratch = torch.empty(0, dtype=torch.uint8)

    @property
    def progress(self) -> int:
        """Bounded pieces of work done; grows while a long call runs. Any thread may read it."""
        return self._progress.value if self._end.alive else 0

    def scratch(self, num_bytes: int) -> int:
        """The address of at least `num_bytes`, aligned to 64 bytes, until the next call."""
        if self._scratch.numel() < num_bytes + 64:
            self._scratch = torch.empty(num_bytes + 64, dtype=torch.uint8)
        return -(-self._scratch.data_ptr() // 64) * 64

    def product(self, weight: CWeight, x: torch.Tensor, y: torch.Tensor, epilogue: int) -> None:
        """y [rows, n] = x [rows, k] W^T, both float32 with their last dimension contiguous."""
        c = self.compiled.c
        rows = x.shape[0]
        scratch = self.scratch(c.xk_gemm_scratch_bytes(weight.kind, rows, weight.k))
        c.xk_gemm(
            self.handle,
            ctypes.byref(weight),
            x.data_ptr(),
            x.stride(0),
            rows,
            y.data_ptr(),
            y.stride(0),
            epilogue,
            scratch,
        )

    def read_bandwidth(self, memory: torch.Tensor) -> float:
        """Bytes a second that the team reads from `memory`, measured now."""
        num_bytes = memory.numel() * memory.element_size()
        return float(self.compiled.c.xk_read_bandwidth(self.handle, memory.data_ptr(), num_bytes))

    def product_peak(self, variant: int = 0, seconds: float = 0.1) -> float:
        """Floating-point operations a second that a variant (0: the best) could reach, measured
        now with everything in registers."""
        return float(self.compiled.c.xk_product_peak(self.handle, variant, seconds))

    def close(self) -> None:
        """End the threads; nothing may be called afterwards."""
        self._end()
