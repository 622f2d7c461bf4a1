"""The kernels of a device in plain torch: slow on any device, quick where Triton is interpreted.

They read and write keys and values by address, as the kernels do, in memory that is the host's.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from tests.worker.device.recorded_graphs import kernel
from tests.worker.platform.host_device import FakeDriver
from xllm.protocol.sampling import SamplingParams
from xllm.worker.sampling.device_sampler import MASK64, DeviceSampler
from xllm.worker.sampling.noise import MASK32
from xllm.worker.sampling.rows import SampleRow
from xllm.worker.sampling.sampler import Sampler
from xllm.worker.triton_kernels.draw_rows import (
    ABSENT,
    FILTERED,
    FLAG_NOT_DRAWN,
    FLAG_NOT_FINITE,
    GREEDY,
)


class ReferenceOps:
    """DeviceOps over a layout."""

    def __init__(self, config, layout, dtype, max_length):
        self._config = config
        self._layout = layout
        self._dtype = dtype
        self._driver = FakeDriver()

    def add_norm(self, x, residual, weight, eps):
        residual += x
        return self.norm(residual, weight, eps)

    def norm(self, x, weight, eps):
        return F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype) * weight

    def gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @kernel
    def place(self, layer, qkv, norms, angles, row_addresses, positions, q_out):
        check_aligned(qkv, row_addresses, positions, q_out)
        config, rows = self._config, qkv.shape[0]
        heads, kv_heads = config.num_heads, config.num_kv_heads
        parts = qkv.view(rows, heads + 2 * kv_heads, config.head_dim)
        q, k, v = parts.split([heads, kv_heads, kv_heads], dim=1)
        if norms is not None:
            q, k = self.norm(q, norms.q, norms.eps), self.norm(k, norms.k, norms.eps)
        cos, sin = (torch.cat([x, x], dim=-1)[:, None] for x in angles)
        q, k = (x * cos + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * sin
                for x in (q, k))  # fmt: skip
        q_out.copy_(q)
        for row, (address, position) in enumerate(
            zip(row_addresses.tolist(), positions.tolist(), strict=True)
        ):
            if address:
                self._token(address, position, layer, False).copy_(k[row])
                self._token(address, position, layer, True).copy_(v[row])

    @kernel
    def attend_decodes(self, layer, q, sequences, rows_each, out):
        check_aligned(q, sequences.addresses, sequences.lengths)
        for number, length in enumerate(sequences.lengths.tolist()):
            rows = slice(number * rows_each, (number + 1) * rows_each)
            address = int(sequences.addresses[number])
            out[rows] = self._attended(layer, q[rows], address, length)

    @kernel
    def attend_prompts(self, layer, q, sequences, row_starts, row_tiles, out):
        check_aligned(q, row_starts, row_tiles, sequences.addresses, sequences.lengths)
        starts = row_starts.tolist()
        for number, first in row_tiles.tolist():
            if number < 0:
                continue
            assert first == 0
            rows = slice(starts[number], starts[number + 1])
            address, length = int(sequences.addresses[number]), int(sequences.lengths[number])
            out[rows] = self._attended(layer, q[rows], address, length)

    def tile_rows(self, counts, lengths):
        return [(number, 0) for number in range(len(counts))]

    def _attended(self, layer, q, address, length):
        if not length:
            return torch.zeros_like(q)
        tokens = range(length)
        keys = torch.stack([self._token(address, token, layer, False) for token in tokens], 1)
        values = torch.stack([self._token(address, token, layer, True) for token in tokens], 1)
        position = torch.arange(length - len(q), length)
        mask = torch.arange(length)[None] <= position[:, None]
        if window := self._config.layer_windows[layer]:
            mask &= torch.arange(length)[None] > position[:, None] - window
        found = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, enable_gqa=True
        )
        return found[0].transpose(0, 1)

    def _token(self, address, token, layer, is_value):
        """[kv_heads, head_dim] of a token; shares the memory."""
        layout = self._layout
        size, item = layout.block_size, layout.item_bytes
        begin = address + token // size * layout.block_bytes
        block = self._driver.tensor(begin, layout.block_bytes).view(self._dtype)
        offset = layer * layout.layer_numbers + is_value * layout.value_numbers
        offset += token % size * layout.head_dim
        assert layout.head_bytes == layout.head_numbers * item
        return block.as_strided(
            (layout.num_kv_heads, layout.head_dim), (layout.head_numbers, 1), offset
        )


def check_aligned(*tensors):
    """Triton compiles a kernel anew for a pointer that is no multiple of 16: none may be, whatever
    the shape of a step."""
    assert not [tensor.shape for tensor in tensors if tensor.numel() and tensor.data_ptr() % 16]


class ReferenceDraws:
    """DeviceDraws by the ordinary sampler, from the numbers that the kernels read."""

    def __init__(self, vocab_size, device, most):
        self._vocab_size = vocab_size
        self._sampler = Sampler(vocab_size, device)
        self._numbers = DeviceSampler(vocab_size, device, most)

    def is_for_device(self, row):
        return self._numbers.is_for_device(row)

    def prepare(self, rows):
        return self._numbers.prepare(rows)

    @kernel
    def draw(self, logits, device_inputs, out_tokens, out_flags, *, filtered):
        check_aligned(logits, device_inputs, out_tokens, out_flags)
        assert logits.shape == (len(out_tokens), self._vocab_size)
        for number, line in enumerate(device_inputs.numpy()):
            mode = line[0]
            if mode == ABSENT:
                continue
            out_tokens[number] = 0
            out_flags[number] = FLAG_NOT_DRAWN if mode == FILTERED and not filtered else 0
            found = self._sampler.sample(logits[number : number + 1].clone(), [row_of(line)])
            if found.failed:
                out_flags[number] = FLAG_NOT_FINITE
            else:
                out_tokens[number] = found.tokens[0][0]


def row_of(line):
    """The row that a line of numbers was made from."""
    mode, seed, place, _, top_k = (int(number) for number in line[:5])
    heat, top_p, log_min_p = (float(line.view(np.float64)[at]) for at in (3, 5, 6))
    sampling = SamplingParams(
        temperature=0.0 if mode == GREEDY else heat,
        top_k=top_k,
        top_p=min(top_p, 1.0),
        min_p=math.exp(log_min_p),
        seed=seed & MASK64,
    )
    return SampleRow(sampling, place >> 32 & MASK32, place & MASK32, (), ())
