"""Our attention in the place of transformers' own.

transformers looks its attention up by name. The function registered here hands queries, keys and
values to the Attention that the bridge of the module's model holds for the step. Masks are the
attention's own work: in their place a layer is given a marker that says its window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from xllm.errors import ConfigError
from xllm.worker.layers.decoder import Attention

ATTENTION_NAME = "xllm-paged"
"""Under which transformers finds our attention."""

_BRIDGE = "paged_bridge"
_FAR = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class SeenLayer:
    """What a layer handed to its attention: `head_dim` is the larger of the keys' and the
    values'; of the last `window` positions each row sees (0: all)."""

    num_kv_heads: int
    head_dim: int
    window: int


class Bridge:
    """The attention that one model's layers use now. Heads smaller than `head_dim`, that of the
    KV memory, are padded with zeros; while it is 0, the model is being probed and what its
    layers hand over is noted in `seen`, one entry a call."""

    def __init__(self, model: nn.Module) -> None:
        self.attention: Attention | None = None
        self.head_dim = 0
        self.seen: list[tuple[int, SeenLayer]] = []
        for module in model.modules():
            module.__dict__[_BRIDGE] = self


def register_attention() -> None:
    """Make our attention known to transformers; done again, it changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, _bridged_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _marked_mask)


def _bridged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, heads, rows, dim], key and value [1,
    kv_heads, rows, dim] to [1, rows, heads, dim of value]. Raises ConfigError for attention
    sinks."""
    bridge: Bridge = module.__dict__[_BRIDGE]
    assert bridge.attention is not None
    if others.get("s_aux") is not None:
        raise ConfigError("attention sinks are not supported")
    layer = module.layer_idx
    assert isinstance(layer, int)
    dim, value_dim = query.shape[-1], value.shape[-1]
    room = bridge.head_dim
    if not room:
        room = max(dim, value_dim)
        window = sliding_window or 0 if attention_mask is None else int(attention_mask)
        if window < 0:
            raise ConfigError("its attention mask is neither causal nor a sliding window")
        bridge.seen.append((layer, SeenLayer(key.shape[1], room, window)))
    q, k, v = (_padded(x[0].transpose(0, 1), room) for x in (query, key, value))
    scale = dim**-0.5 if scaling is None else float(scaling)
    out = bridge.attention.attend(layer, q, k, v, scale, softcap or 0.0)
    return out.view(1, q.shape[0], q.shape[1], room)[..., :value_dim], None


def _padded(x: torch.Tensor, room: int) -> torch.Tensor:
    missing = room - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def _marked_mask(
    *,
    mask_function: Callable[..., torch.Tensor],
    local_size: int | None = None,
    **others: Any,
) -> torch.Tensor:
    """transformers' mask interface, for the probe of a model alone: a marker [1, 1, 1, 1] with
    the layer's window (0: none), -1 where the mask is neither causal nor a window: some models
    make masks that no layer uses."""
    window = local_size or 0
    return window_marker(window if _is_window(mask_function, window) else -1)


def window_marker(window: int) -> torch.Tensor:
    """What stands for a mask: transformers takes one of four axes as it is."""
    return torch.full((1, 1, 1, 1), window, dtype=torch.int32)


def _is_window(mask_function: Callable[..., torch.Tensor], window: int) -> bool:
    def sees(row: int, column: int) -> bool:
        zero = torch.tensor(0)
        return bool(mask_function(zero, zero, torch.tensor(row), torch.tensor(column)))

    far = window or _FAR
    # A window's row sees the columns behind row - window; blocks of attention see none of the
    # block before them.
    right = not sees(0, 1) and sees(0, 0) and sees(far, 1) and sees(far, far - 1)
    return right and not (window and sees(window, 0))
