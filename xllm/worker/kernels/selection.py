"""Whether the compiled kernels compute, and a team for them."""

from __future__ import annotations

import structlog
import torch

from xllm.errors import ConfigError
from xllm.worker.kernels.library import load
from xllm.worker.kernels.team import Team

_TYPES = (torch.bfloat16, torch.float32)

log = structlog.get_logger(__name__)


def select_team(
    asked: str, device: torch.device, dtype: torch.dtype, num_threads: int
) -> Team | None:
    """A team of the compiled kernels, or None where torch is to compute: on another device, with
    numbers that the kernels do not know, or without the library, which a line in the log then
    says. `asked`: auto, compiled or torch (WorkerSettings.kernels); ConfigError where the compiled
    ones are asked for and cannot be had."""
    if asked == "torch":
        return None
    loaded = load()
    reason = loaded.reason
    if device.type != "cpu":
        reason = f"they are for CPUs, not {device.type}"
    elif dtype not in _TYPES:
        reason = f"they compute in bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if loaded.library is not None and not reason:
        log.info("compiled_kernels", variant=loaded.library.describe(), num_threads=num_threads)
        return Team(loaded.library, num_threads)
    if asked == "compiled":
        raise ConfigError(
            f"worker.kernels: the compiled kernels cannot run: {reason}", param="worker.kernels"
        )
    if device.type == "cpu":
        log.warning("compiled_kernels_not_used", reason=reason)
    return None
