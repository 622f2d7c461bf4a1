"""The structures that the C++ kernels take, field by field as cpu/gemm.h, attention.h, rows.h,
experts.h and layer.h have them. Addresses are plain integers: who fills one in keeps the memory
alive.
"""

from __future__ import annotations

import ctypes

from xllm.worker.kernels.compiled import CWeight

I32, I64, F32, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

KV_BF16, KV_FP32, KV_INT8 = 0, 1, 2
ATTENTION_HALF, MLP_HALF, BOTH_HALVES = 1, 2, 3  # layer.h, Halves
PHASES = ("norm", "qkv", "rope", "attention", "out", "gate_up", "down", "head")


class CKvLayout(ctypes.Structure):
    """attention.h, KvLayout."""

    _fields_ = (
        ("kind", I32),
        ("block_size", I32),
        ("num_kv_heads", I32),
        ("head_dim", I32),
        ("block_bytes", I64),
        ("layer_bytes", I64),
    )


class CSequence(ctypes.Structure):
    """attention.h, Sequence."""

    _fields_ = (
        ("first_row", I32),
        ("num_rows", I32),
        ("start", I32),
        ("shares", I32),
        ("base", POINTER),
        ("table", POINTER),
    )


class CSharing(ctypes.Structure):
    """attention.h, Sharing."""

    _fields_ = (("order", POINTER), ("common", POINTER), ("count", I32))


class CAttentionShape(ctypes.Structure):
    """attention.h, AttentionShape."""

    _fields_ = (("num_heads", I32), ("window", I32), ("scale", F32), ("softcap", F32))


class CHeadShape(ctypes.Structure):
    """rows.h, HeadShape."""

    _fields_ = (
        ("num_heads", I32),
        ("num_kv_heads", I32),
        ("head_dim", I32),
        ("rotary_dim", I32),
        ("q_norm", POINTER),
        ("k_norm", POINTER),
        ("eps", F32),
    )


class CExperts(ctypes.Structure):
    """experts.h, Experts."""

    _fields_ = (
        ("router", CWeight),
        ("gate_up", CWeight),
        ("down", CWeight),
        ("slots", POINTER),
        ("counts", POINTER),
        ("num_experts", I32),
        ("num_slots", I32),
        ("top_k", I32),
        ("normalise", I32),
        ("hidden", I32),
        ("inner", I32),
    )


class CLayer(ctypes.Structure):
    """layer.h, Layer."""

    _fields_ = (
        ("qkv", CWeight),
        ("out", CWeight),
        ("gate_up", CWeight),
        ("down", CWeight),
        ("input_norm", POINTER),
        ("output_norm", POINTER),
        ("heads", CHeadShape),
        ("attention", CAttentionShape),
        ("hidden", I32),
        ("intermediate", I32),
        ("kv_offset", I64),
        ("experts", POINTER),
    )


class CStep(ctypes.Structure):
    """layer.h, Step."""

    _fields_ = (
        ("num_rows", I32),
        ("num_sequences", I32),
        ("sequences", POINTER),
        ("cos", POINTER),
        ("sin", POINTER),
        ("kv", CKvLayout),
        ("scratch", POINTER),
        ("scratch_bytes", I64),
        ("phase_ns", POINTER),
        ("sharing", CSharing),
    )


class CHead(ctypes.Structure):
    """layer.h, Head."""

    _fields_ = (("weight", CWeight), ("norm", POINTER), ("eps", F32), ("hidden", I32))
