"""DeviceOps by our kernels in Triton."""

from __future__ import annotations

import torch

from xllm.worker.execution.device.ops import HeadNorms, SequenceRows
from xllm.worker.loader.config import ModelConfig
from xllm.worker.memory.device_layout import DeviceLayout
from xllm.worker.triton_kernels.activation import silu_mul
from xllm.worker.triton_kernels.decode_attention import decode_attention, decode_cut
from xllm.worker.triton_kernels.norm import add_rms_norm, rms_norm
from xllm.worker.triton_kernels.prefill_attention import prefill_attention
from xllm.worker.triton_kernels.rope_write import rope_write
from xllm.worker.triton_kernels.strides import strides_of
from xllm.worker.triton_kernels.tiling import row_tiles, tile_tokens


class TritonOps:
    """The kernels of a model of one configuration over blocks of a layout, for sequences of up to
    `max_length` tokens."""

    def __init__(
        self, config: ModelConfig, layout: DeviceLayout, dtype: torch.dtype, max_length: int
    ) -> None:
        self._strides = strides_of(layout, dtype)
        self._max_length = max_length
        self._windows = config.layer_windows
        self._scale = config.head_dim**-0.5
        self._tile_tokens = tile_tokens(self._strides, config.num_heads)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See DeviceOps."""
        return add_rms_norm(x, residual, weight, eps)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See DeviceOps."""
        return rms_norm(x, weight, eps)

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See DeviceOps."""
        return silu_mul(gate_up)

    def place(
        self,
        layer: int,
        qkv: torch.Tensor,
        norms: HeadNorms | None,
        angles: tuple[torch.Tensor, torch.Tensor],
        row_addresses: torch.Tensor,
        positions: torch.Tensor,
        q_out: torch.Tensor,
    ) -> None:
        """See DeviceOps."""
        rope_write(
            qkv,
            q_out,
            *angles,
            row_addresses,
            positions,
            layer,
            self._strides,
            query_weight=None if norms is None else norms.q,
            key_weight=None if norms is None else norms.k,
            eps=0.0 if norms is None else norms.eps,
        )

    def attend_decodes(
        self,
        layer: int,
        q: torch.Tensor,
        sequences: SequenceRows,
        rows_each: int,
        out: torch.Tensor,
    ) -> None:
        """See DeviceOps."""
        shape = (-1, rows_each, *q.shape[1:])
        # Cut as for the longest sequence, whatever lengths these have: one graph serves all.
        queries, strides, most = q.view(shape), self._strides, self._max_length
        cut = decode_cut(queries, strides, max_length=most)
        numbers = cut.scratch_numbers(q.shape[0] * q.shape[1], strides.value_numbers_of_token)
        decode_attention(
            queries,
            out.view(shape),
            sequences.addresses,
            sequences.lengths,
            layer,
            strides,
            scale=self._scale,
            max_length=most,
            scratch=torch.empty(numbers, dtype=torch.float32, device=q.device),
            window=self._windows[layer],
        )

    def attend_prompts(
        self,
        layer: int,
        q: torch.Tensor,
        sequences: SequenceRows,
        row_starts: torch.Tensor,
        row_tiles: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """See DeviceOps."""
        prefill_attention(
            q,
            out,
            row_starts,
            row_tiles,
            sequences.addresses,
            sequences.lengths,
            layer,
            self._strides,
            scale=self._scale,
            window=self._windows[layer],
        )

    def tile_rows(self, counts: list[int], lengths: list[int]) -> list[tuple[int, int]]:
        """See DeviceOps."""
        return row_tiles(counts, lengths, self._tile_tokens)
