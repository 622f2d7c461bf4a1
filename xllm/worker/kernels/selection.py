"""Whether the compiled kernels compute, a team for them, and the form of its weights."""

from __future__ import annotations

import structlog
import torch

from xllm.errors import ConfigError
from xllm.worker.kernels.compiled import load
from xllm.worker.kernels.packing import Kind
from xllm.worker.kernels.team import Team

MAX_HEAD_DIM = 512
"""kMaxHeadDim of attention.h."""

_TYPES = (torch.bfloat16, torch.float32)

_QUANTIZED = {"int8": Kind.INT8, "int4": Kind.INT4, "w8a8": Kind.W8A8}

log = structlog.get_logger(__name__)


def select_team(
    asked: str,
    device: torch.device,
    dtype: torch.dtype,
    num_threads: int,
    *,
    invariant: bool = False,
    head_dim: int = 0,
) -> Team | None:
    """A team of the compiled kernels, or None where torch is to compute: on another device, with
    numbers or heads that the kernels do not know, or without the library, which a line in the log
    then says. `asked`: auto, compiled or torch (WorkerSettings.kernels); ConfigError where the
    compiled ones are asked for and cannot be had. `invariant`: one variant computes the products
    of all row counts, so that a row has the same bits in each."""
    if asked == "torch":
        return None
    loaded = load()
    reason = loaded.reason
    if device.type != "cpu":
        reason = f"they are for CPUs, not {device.type}"
    elif dtype not in _TYPES:
        reason = f"they compute in bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    elif head_dim > MAX_HEAD_DIM:
        reason = f"they take heads of at most {MAX_HEAD_DIM} numbers, not {head_dim}"
    if loaded.compiled is not None and not reason:
        variant = loaded.compiled.best.number if invariant else 0
        described = loaded.compiled.describe(mixed=not invariant)
        log.info("compiled_kernels", variant=described, num_threads=num_threads)
        return Team(loaded.compiled, num_threads, variant)
    if asked == "compiled":
        raise ConfigError(
            f"worker.kernels: the compiled kernels cannot run: {reason}", param="worker.kernels"
        )
    if device.type == "cpu":
        log.warning("compiled_kernels_not_used", reason=reason)
    return None


def require_team(team: Team | None, setting: str, value: str) -> None:
    """ConfigError where there is no team for what `setting` asks."""
    if team is None:
        raise ConfigError(
            f"{setting}: {value} needs the compiled kernels, which do not run here: they are for "
            f"CPUs, must have been built, and worker.kernels must not ask for torch",
            param=setting,
        )


def choose_kind(quantization: str, dtype: torch.dtype, *, is_head: bool) -> Kind:
    """The packed form of a linear map. The head, on whose rounding the choice of each token
    hangs, keeps 8 bits and exact inputs."""
    if quantization == "none":
        return Kind.BF16 if dtype == torch.bfloat16 else Kind.FP32
    return Kind.INT8 if is_head else _QUANTIZED[quantization]
