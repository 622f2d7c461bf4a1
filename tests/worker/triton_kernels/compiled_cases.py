"""Launches of every kernel at the shapes of real models, for the compiler alone: no memory is
touched."""

from __future__ import annotations

import torch

from xllm.worker.sampling.device_sampler import DeviceSampler
from xllm.worker.triton_kernels.activation import silu_mul
from xllm.worker.triton_kernels.decode_attention import decode_attention
from xllm.worker.triton_kernels.norm import add_rms_norm, rms_norm
from xllm.worker.triton_kernels.prefill_attention import prefill_attention
from xllm.worker.triton_kernels.rope_write import rope_write
from xllm.worker.triton_kernels.strides import KvStrides


def strides(kv_heads, head_dim, block_size, dtype, value_dim=0, in_keys=False, layers=4):
    key_numbers = kv_heads * block_size * head_dim
    value_numbers = 0 if in_keys else kv_heads * block_size * (value_dim or head_dim)
    layer = key_numbers + value_numbers
    return KvStrides(
        block_size, layers * layer, layer, key_numbers, block_size * head_dim, kv_heads, head_dim,
        dtype, value_dim, in_keys,
    )  # fmt: skip


def decode(kv, heads, *, seqs=64, m=1, tables=False, window=0, softcap=0.0, length=4096, split=0):
    q = torch.empty((seqs, m, heads, kv.head_dim), dtype=kv.dtype)
    out = torch.empty((seqs, m, heads, kv.value_dim or kv.head_dim), dtype=kv.dtype)
    shape = (seqs, 64) if tables else (seqs,)
    decode_attention(
        q, out, torch.empty(shape, dtype=torch.int64), torch.empty(seqs, dtype=torch.int32), 1, kv,
        scale=0.1, max_length=length, scratch=torch.empty(seqs * m * heads * 32 * 513),
        window=window, softcap=softcap, split_tokens=split,
    )  # fmt: skip


def prefill(kv, heads, *, tables=False, window=0, softcap=0.0):
    q = torch.empty((256, heads, kv.head_dim), dtype=kv.dtype)
    out = torch.empty((256, heads, kv.value_dim or kv.head_dim), dtype=kv.dtype)
    ints = torch.empty(16, dtype=torch.int32)
    addresses = torch.empty((16, 64) if tables else (16,), dtype=torch.int64)
    prefill_attention(
        q, out, ints, torch.empty((16, 2), dtype=torch.int32), addresses, ints, 1, kv,
        scale=0.1, window=window, softcap=softcap,
    )  # fmt: skip


def write(kv, heads, norm):
    rows, dim = 64, kv.head_dim
    weight = torch.empty(dim, dtype=kv.dtype) if norm else None
    rope_write(
        torch.empty((rows, (heads + 2 * kv.num_kv_heads) * dim), dtype=kv.dtype),
        torch.empty((rows, heads, dim), dtype=kv.dtype),
        torch.empty((rows, dim // 2)), torch.empty((rows, dim // 2)),
        torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int32), 1, kv,
        query_weight=weight, key_weight=weight, eps=1e-6,
    )  # fmt: skip


def draw(dtype):
    sampler = DeviceSampler(151_936, torch.device("cpu"), 64)
    logits = torch.empty((64, 151_936), dtype=dtype)
    tokens, flags = torch.empty(64, dtype=torch.int64), torch.empty(64, dtype=torch.uint8)
    sampler.draw(logits, sampler.prepare([], 64).numbers, tokens, flags)


def rows_of(columns):
    return torch.empty((64, columns), dtype=BF16)


BF16 = torch.bfloat16
QWEN3 = strides(8, 128, 128, BF16)
SMALL_BLOCKS = strides(8, 128, 16, BF16)

CASES = {
    "decode": lambda: decode(QWEN3, 32),
    "decode split": lambda: decode(QWEN3, 32, seqs=1, length=32768),
    "decode tables": lambda: decode(SMALL_BLOCKS, 32, tables=True),
    "decode window": lambda: decode(SMALL_BLOCKS, 32, m=4, window=512, softcap=30.0),
    "decode 64": lambda: decode(strides(8, 64, 128, torch.float16), 64),
    "decode 80": lambda: decode(strides(32, 80, 64, BF16), 32),
    "decode 256": lambda: decode(strides(4, 256, 64, BF16), 8),
    "decode mla": lambda: decode(strides(1, 576, 64, BF16, 512, True), 128),
    "decode fp32": lambda: decode(strides(8, 128, 16, torch.float32), 16, seqs=1),
    "prefill": lambda: prefill(QWEN3, 32),
    "prefill tables": lambda: prefill(SMALL_BLOCKS, 32, tables=True),
    "prefill window": lambda: prefill(SMALL_BLOCKS, 32, window=512, softcap=30.0),
    "prefill 64": lambda: prefill(strides(8, 64, 128, torch.float16), 64),
    "prefill 80": lambda: prefill(strides(32, 80, 64, BF16), 32),
    "prefill 256": lambda: prefill(strides(4, 256, 64, BF16), 8),
    "prefill mla": lambda: prefill(strides(1, 576, 64, BF16, 512, True), 128),
    "prefill fp32": lambda: prefill(strides(8, 128, 16, torch.float32), 16),
    "write": lambda: write(QWEN3, 32, True),
    "write plain": lambda: write(strides(8, 64, 16, BF16), 32, False),
    "norm": lambda: add_rms_norm(rows_of(4096), rows_of(4096), rows_of(4096)[0], 1e-6),
    "norm alone": lambda: rms_norm(rows_of(2560), rows_of(2560)[0], 1e-6),
    "silu": lambda: silu_mul(rows_of(2 * 12288)),
    "draw": lambda: draw(BF16),
    "draw fp32": lambda: draw(torch.float32),
}
