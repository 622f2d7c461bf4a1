"""Attention by the compiled kernels: the arrays of a step, made once, and a call a layer."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import numpy as np
import torch

from xllm.worker.attention.plan import Span
from xllm.worker.attention.sharing import find_sharing
from xllm.worker.kernels.structures import (
    KV_BF16,
    KV_FP32,
    KV_INT8,
    PHASES,
    CAttentionShape,
    CKvLayout,
    CSequence,
    CSharing,
    CStep,
)
from xllm.worker.kernels.team import Team
from xllm.worker.memory.cpu_memory import CpuKvMemory

_KINDS = {torch.bfloat16: KV_BF16, torch.float32: KV_FP32, torch.int8: KV_INT8}

_SEQUENCE = np.dtype(
    [
        ("first_row", "i4"),
        ("num_rows", "i4"),
        ("start", "i4"),
        ("shares", "i4"),
        ("base", "i8"),
        ("table", "i8"),
    ]
)
assert _SEQUENCE.itemsize == ctypes.sizeof(CSequence)


class StepArrays:
    """What the kernels need to know of a step's spans, which must not change while it is used.
    `phase_ns` int64 [len(PHASES)] or None: nanoseconds a phase of a layer are added to it.
    `share`: read once what several spans have in common, which changes no bit."""

    def __init__(
        self,
        spans: Sequence[Span],
        memory: CpuKvMemory,
        phase_ns: torch.Tensor | None = None,
        share: bool = True,
    ) -> None:
        layout = memory.layout
        self._spans = spans  # their tables are read in place
        self._phase_ns = phase_ns
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None
        sequences = np.zeros(len(spans), dtype=_SEQUENCE)
        counts = np.array([span.num_rows for span in spans], dtype=np.int32)
        sequences["first_row"] = np.cumsum(counts) - counts
        sequences["num_rows"] = counts
        sequences["start"] = [span.start for span in spans]
        # In a slot the blocks lie side by side: no table is read.
        pool = memory.pool_address
        sequences["base"] = [span.address or pool for span in spans]
        sequences["table"] = [
            0 if span.address else span.block_ids.buffer_info()[0] for span in spans
        ]
        self._sequences = sequences
        self.num_rows = int(counts.sum())
        self.step = CStep(
            num_rows=self.num_rows,
            num_sequences=len(spans),
            sequences=sequences.ctypes.data,
            kv=CKvLayout(
                _KINDS[memory.dtype],
                layout.block_size,
                layout.num_kv_heads,
                layout.head_dim,
                layout.block_bytes,
                layout.layer_bytes,
            ),
        )
        if phase_ns is not None:
            assert phase_ns.numel() == len(PHASES)
            self.step.phase_ns = phase_ns.data_ptr()
        if share:
            self._share(spans, layout.block_size)

    def _share(self, spans: Sequence[Span], block_size: int) -> None:
        order, common = find_sharing(spans, block_size)
        if order:
            self._sequences["shares"][order] = 1
            self._sharing = np.array([order, common], dtype=np.int32)
            first, second = (part.ctypes.data for part in self._sharing)
            self.step.sharing = CSharing(first, second, len(order))

    def set_angles(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """The rotation of each row, fp32 [rows, rotary_dim / 2]."""
        self._angles = cos.contiguous(), sin.contiguous()
        self.step.cos, self.step.sin = (part.data_ptr() for part in self._angles)

    def set_scratch(self, address: int, num_bytes: int) -> None:
        """Memory for the next call."""
        self.step.scratch, self.step.scratch_bytes = address, num_bytes


class KernelAttention:
    """The attention of one step by the kernels; see layers.decoder.Attention. `windows`: of each
    layer, 0: none. `variant`: 0 for the best. `share`: see StepArrays."""

    def __init__(
        self,
        team: Team,
        memory: CpuKvMemory,
        spans: Sequence[Span],
        windows: Sequence[int],
        tick: Callable[[], None],
        variant: int = 0,
        share: bool = True,
    ) -> None:
        self._team = team
        self._memory = memory
        self._arrays = StepArrays(spans, memory, share=share)
        self._windows = windows
        self._tick = tick
        self._variant = variant

    def tick(self) -> None:
        """A piece of a layer is done."""
        self._tick()

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> torch.Tensor:
        """See layers.decoder.Attention; the result has the type of q."""
        step, c = self._arrays.step, self._team.compiled.c
        rows, heads, dim = q.shape
        assert rows == self._arrays.num_rows
        shape = CAttentionShape(
            heads, self._windows[layer], dim**-0.5 if scale is None else scale, softcap
        )
        out = torch.empty((rows, heads * dim))
        out.view(rows, heads, dim).copy_(q)
        k, v = k.float().contiguous(), v.float().contiguous()
        wanted = c.xk_attend_scratch(self._team.handle, ctypes.byref(shape), ctypes.byref(step))
        self._arrays.set_scratch(self._team.scratch(wanted), wanted)
        failed = c.xk_attend(
            self._team.handle,
            self._variant,
            ctypes.byref(shape),
            ctypes.byref(step),
            layer * self._memory.layout.layer_bytes,
            out.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
        )
        assert not failed
        self._tick()
        return out.to(q.dtype)
