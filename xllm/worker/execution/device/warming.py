"""What is computed before the first request beside a step of one row that is nobody's, so that no
kernel is compiled in service."""

from __future__ import annotations

import torch

from xllm.worker.execution.device.draws import DeviceDrawing
from xllm.worker.execution.device.ops import DeviceOps, SequenceRows
from xllm.worker.execution.device.tensors import StaticNumbers
from xllm.worker.graphs.choice import DrawKind
from xllm.worker.loader.config import ModelConfig
from xllm.worker.platform.platform import Platform


def attend_nobody(
    ops: DeviceOps,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    most: int,
    rows_each: int,
) -> None:
    """Both attentions for sequences without length, once a window. `most`: sequences of a step,
    with at most `rows_each` rows where they generate."""
    shape = (most * rows_each, config.num_heads, config.head_dim)
    q = torch.zeros(shape, dtype=dtype, device=device)
    none = torch.zeros(most + 1, dtype=torch.int32, device=device)
    address = torch.zeros(most, dtype=torch.int64, device=device)
    tile = torch.tensor([[-1, 0]], dtype=torch.int32, device=device)
    for layer in {window: at for at, window in enumerate(config.layer_windows)}.values():
        # Few are cut into several parts, many are not.
        for count in (1, most):
            of = SequenceRows(address[:count], none[:count])
            for each in range(1, rows_each + 1):
                rows = q[: count * each]
                ops.attend_decodes(layer, rows, of, each, torch.empty_like(rows))
        ops.attend_prompts(layer, q, of, none, tile, torch.empty_like(q))


def draw_nobody(
    drawing: DeviceDrawing, platform: Platform, hidden_size: int, dtype: torch.dtype
) -> None:
    """Both draws of a row that is absent."""
    numbers = StaticNumbers(platform, 1, 1).tensors
    hidden = torch.zeros((1, hidden_size), dtype=dtype, device=platform.device)
    for kind in (DrawKind.PLAIN, DrawKind.FILTERED):
        drawing.draw(hidden, numbers.read_rows, numbers.draws, numbers.places, kind)
