"""Drawing tokens where the logits are, without the host: launches only, nothing waits.

Draws what `Sampler` draws from the same logits, for rows that ask for nothing but a token: those
that need what the host knows of the sequence (penalties, bias, `min_tokens`) or that want
log-probabilities or several choices go to `Sampler`.

A draw needs the position of its token, not the token before it. The host knows the positions of a
step that follows one still under way, so its numbers go up early, and nothing here changes when
the tokens before are only on the device.

All a step has to say is one array of int64, one upload; scratch memory is made once; grids depend
on the number of rows alone. So a draw can be captured in a CUDA graph for a bucket of rows and
replayed with other numbers, its `filtered` fixed by the graph. Rows of a head that is split over
several ranks are not for this sampler: it sees whole rows.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Sequence

import torch

from xllm.errors import InvariantError
from xllm.worker.sampling.candidates import is_filtered, temperature_of
from xllm.worker.sampling.edits import needs_edit
from xllm.worker.sampling.noise import MASK32
from xllm.worker.sampling.rows import SampleRow
from xllm.worker.triton_kernels.draw import merge_chunks, search_chunks
from xllm.worker.triton_kernels.draw_rows import FILTERED, GREEDY, PLAIN, ROW_NUMBERS
from xllm.worker.triton_kernels.draw_scratch import DrawScratch
from xllm.worker.triton_kernels.filtered_draw import draw_filtered
from xllm.worker.triton_kernels.narrowing import gather_chunks, weigh_chunks

CHUNK = 2048
"""Logits a program looks at. 75 programs for a row of 151,936: one row keeps half of an H100's
multiprocessors busy, two all of them."""
ROOM = 8192
"""Candidates of a filtered row that have room in its list: 64 KiB a row."""

MASK64 = (1 << 64) - 1
_LINE = struct.Struct("=qQQdqddq")
"""A row's numbers: see `draw_rows.ROW_NUMBERS`."""


@dataclasses.dataclass(frozen=True, slots=True)
class DrawInputs:
    """What a step says of its rows: `numbers`, int64 [rows, ROW_NUMBERS] on the host, is to be
    uploaded as it is; `filtered`: whether any row has a filter."""

    numbers: torch.Tensor
    filtered: bool


class DeviceSampler:
    """Draws the tokens of a model with `vocab_size` logits a row on `device`, at most `max_rows`
    at a time."""

    def __init__(
        self,
        vocab_size: int,
        device: torch.device,
        max_rows: int,
        *,
        chunk: int = CHUNK,
        room: int = ROOM,
    ) -> None:
        self._vocab_size = vocab_size
        self._max_rows = max_rows
        self._scratch = DrawScratch(max_rows, vocab_size, chunk, room, device)

    def is_for_device(self, row: SampleRow) -> bool:
        """Whether the row's token can be drawn here. Rows that `Sampler` refuses cannot."""
        params = row.sampling
        return (
            params.logprobs is None
            and row.num_samples == 1
            and not needs_edit(row)
            and all(0 <= token < self._vocab_size for token in row.stop_ids)
        )

    def prepare(self, rows: Sequence[SampleRow], size: int = 0) -> DrawInputs:
        """The numbers of `rows`, for which `is_for_device` holds; up to `size` rows (a bucket's)
        are filled with absent ones, whose tokens and flags stay as they are."""
        if max(len(rows), size) > self._max_rows:
            raise InvariantError(
                f"{max(len(rows), size)} rows for a device sampler of {self._max_rows}"
            )
        numbers = bytearray(_LINE.size * max(len(rows), size))
        filtered = False
        for index, row in enumerate(rows):
            params = row.sampling
            mode, top_k, top_p, log_min_p = PLAIN, 0, math.inf, -math.inf
            if params.temperature == 0:
                mode = GREEDY
            elif is_filtered(params, self._vocab_size):
                mode, filtered = FILTERED, True
                top_k = params.top_k if 0 < params.top_k < self._vocab_size else 0
                top_p = params.top_p if params.top_p < 1.0 else math.inf
                log_min_p = math.log(params.min_p) if params.min_p > 0.0 else -math.inf
            seed = (params.seed or 0) & MASK64
            place = (row.choice & MASK32) << 32 | row.position & MASK32
            heat = temperature_of(params)
            line = (mode, seed, place, heat, top_k, top_p, log_min_p, 0)
            _LINE.pack_into(numbers, index * _LINE.size, *line)
        if not numbers:
            return DrawInputs(torch.empty((0, ROW_NUMBERS), dtype=torch.int64), False)
        packed = torch.frombuffer(numbers, dtype=torch.int64).view(-1, ROW_NUMBERS)
        return DrawInputs(packed, filtered)

    def draw(
        self,
        logits: torch.Tensor,
        device_inputs: torch.Tensor,
        out_tokens: torch.Tensor,
        out_flags: torch.Tensor,
        *,
        filtered: bool = True,
    ) -> None:
        """Launch the draw of a token for each row of `logits` [rows, vocab] (float32, or the
        model's type; rows may be apart, a row's logits not), by the uploaded numbers of
        `prepare`. On the device: `out_tokens` int64 [rows], `out_flags` uint8 [rows].

        A flag of 0 is a drawn token. FLAG_NOT_FINITE is a row with NaN, or whose largest logit is
        infinite: its token is 0, and no other row's changes. `filtered`: as `prepare` said;
        without it rows with filters get FLAG_NOT_DRAWN, and with it a draw of rows that have none
        only takes longer."""
        self._check(logits, device_inputs, out_tokens, out_flags)
        if not logits.shape[0]:
            return
        search_chunks(logits, device_inputs, self._scratch)
        merge_chunks(device_inputs, self._scratch, out_tokens, out_flags, filters=filtered)
        if filtered:
            weigh_chunks(logits, device_inputs, self._scratch)
            gather_chunks(logits, device_inputs, self._scratch)
            draw_filtered(logits, device_inputs, self._scratch, out_tokens)

    def _check(
        self,
        logits: torch.Tensor,
        device_inputs: torch.Tensor,
        out_tokens: torch.Tensor,
        out_flags: torch.Tensor,
    ) -> None:
        """Shapes only: what is on the device is not looked at."""
        rows = logits.shape[0]
        if (
            logits.shape[1:] != (self._vocab_size,)
            or (logits.stride(1) != 1 and self._vocab_size > 1)
            or rows > self._max_rows
        ):
            raise InvariantError(
                f"device sampler: logits {tuple(logits.shape)} with strides {logits.stride()}, for "
                f"{self._max_rows} rows of {self._vocab_size}"
            )
        for name, tensor, shape, dtype in (
            ("inputs", device_inputs, (rows, ROW_NUMBERS), torch.int64),
            ("tokens", out_tokens, (rows,), torch.int64),
            ("flags", out_flags, (rows,), torch.uint8),
        ):
            if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
                raise InvariantError(
                    f"device sampler: {name} {tuple(tensor.shape)} {tensor.dtype}, not {shape} "
                    f"{dtype} in one piece"
                )
