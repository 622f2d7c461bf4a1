"""What a device's kernels do for the layers: everything around the products.

One implementation a kernel set. All of it only starts work: nothing waits for the device, and
shapes alone decide what is started, so that it can be captured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch

from xllm.worker.sampling.rows import SampleRow


@dataclasses.dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights [head_dim] that queries and keys are normalised with before they are rotated."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


@dataclasses.dataclass(frozen=True, slots=True)
class SequenceRows:
    """Which sequences some rows belong to: `addresses` int64 and `lengths` int32 [sequences], of
    their keys once the rows are written, their own included."""

    addresses: torch.Tensor
    lengths: torch.Tensor


class DeviceOps(Protocol):
    """The kernels of one model over one KV memory."""

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """residual += x, both [rows, hidden], then residual / rms(residual) * weight."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / rms(x) * weight of x [rows, hidden]."""

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [rows, 2 * inner], the gates first."""

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
        """Normalise and rotate queries and keys of `qkv` [rows, (heads + 2 kv_heads) * head_dim]
        by `angles` (cosines and sines, fp32 [rows, head_dim / 2]); queries go to `q_out`
        [rows, heads, head_dim], keys and values to the sequences' memory. Rows of address 0 write
        neither."""

    def attend_decodes(
        self,
        layer: int,
        q: torch.Tensor,
        sequences: SequenceRows,
        rows_each: int,
        out: torch.Tensor,
    ) -> None:
        """Attention of `rows_each` last rows of each sequence, q [sequences * rows_each, heads,
        head_dim], to `out` of the same shape; of sequences without length it is zero."""

    def attend_prompts(
        self,
        layer: int,
        q: torch.Tensor,
        sequences: SequenceRows,
        row_starts: torch.Tensor,
        row_tiles: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """The same where sequence i has rows row_starts[i] to row_starts[i + 1], its last ones, for
        the sequences that `row_tiles` (sequence, its first row) name; other rows of `out` stay."""

    def tile_rows(self, counts: list[int], lengths: list[int]) -> list[tuple[int, int]]:
        """The row tiles of sequences that compute their last `counts` tokens of `lengths`, counted
        from the first of them."""


class DrawNumbers(Protocol):
    """What a step says of the rows that it draws from."""

    @property
    def numbers(self) -> torch.Tensor:
        """On the host: int64 [rows, ROW_NUMBERS], to be uploaded as it is."""

    @property
    def filtered(self) -> bool:
        """Whether a row has a filter."""


class DeviceDraws(Protocol):
    """Draws tokens without the host; see sampling.device_sampler."""

    def is_for_device(self, row: SampleRow) -> bool:
        """Whether it can draw a row's token."""

    def prepare(self, rows: Sequence[SampleRow]) -> DrawNumbers:
        """The numbers of rows that it can draw."""

    def draw(
        self,
        logits: torch.Tensor,
        device_inputs: torch.Tensor,
        out_tokens: torch.Tensor,
        out_flags: torch.Tensor,
        *,
        filtered: bool,
    ) -> None:
        """Launch the draw of a token for each row of `logits` [rows, vocab]; a flag that is not 0
        says that there is none."""
