"""What a model of transformers does with its attention, found by running a few tokens.

Two short passes go through our seam, the second seeing what the first left; the layers' shapes
and windows are noted, and the outcome is compared with the library's own attention over the
whole text. A model that keeps more than keys and values, or hides something else from the seam,
gives other numbers and is refused.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from xllm.errors import ConfigError
from xllm.worker.models.transformers_bridge import (
    ATTENTION_NAME,
    Bridge,
    SeenLayer,
    window_marker,
)

_FIRST, _SECOND = 6, 3
_BOUND_32, _BOUND_16 = 1e-3, 0.1
"""How far both outcomes may be apart, relative to their size. Rounding in 16 bits may send a row
to another expert."""


class _PlainAttention:
    """Attention over all that was handed over so far, without windows."""

    def __init__(self) -> None:
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}

    def tick(self) -> None:
        """Nothing."""

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> torch.Tensor:
        """See layers.decoder.Attention."""
        k = self._keys[layer] = torch.cat((self._keys.get(layer, k[:0]), k))
        v = self._values[layer] = torch.cat((self._values.get(layer, v[:0]), v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).float() for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.float(), k) * (scale or q.shape[-1] ** -0.5)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
        scores.masked_fill_(hidden.triu_(1 + len(k) - len(q)), float("-inf"))
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(q.dtype).flatten(1)


def probe(model: Any, bridge: Bridge, architecture: str) -> tuple[SeenLayer, ...]:
    """What each layer hands to its attention. Raises ConfigError, naming the architecture, for
    a model that cannot run over our KV memory."""
    try:
        with torch.inference_mode():
            return _probe(model, bridge)
    except Exception as error:  # what the library raises where its model does not fit is its own
        reason = error.message if isinstance(error, ConfigError) else repr(error)
        raise ConfigError(
            f"config.json: architecture {architecture!r} is not supported: {reason}",
            param="model.path",
        ) from error


def _probe(model: Any, bridge: Bridge) -> tuple[SeenLayer, ...]:
    base, device = model.base_model, model.device
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise ConfigError("it cannot be told the positions of its tokens")
    config = model.config
    ids = torch.arange(1, 1 + _FIRST + _SECOND, device=device)[None] % config.vocab_size
    positions = torch.arange(ids.shape[1], device=device)[None]
    bridge.attention = _PlainAttention()
    first = base(input_ids=ids[:, :_FIRST], position_ids=positions[:, :_FIRST], use_cache=False)
    seen = _checked(bridge.seen, config.num_hidden_layers)
    second = base(
        input_ids=ids[:, _FIRST:],
        position_ids=positions[:, _FIRST:],
        attention_mask=window_marker(0),
        use_cache=False,
    )
    bridge.attention = None
    bridge.seen.clear()
    got = torch.cat((first[0], second[0]), dim=1)
    model.set_attn_implementation("eager")
    want = base(input_ids=ids, position_ids=positions, use_cache=False)[0]
    model.set_attn_implementation(ATTENTION_NAME)
    _check_outcome(got, want, min((layer.window for layer in seen if layer.window), default=0))
    return seen


def _checked(seen: list[tuple[int, SeenLayer]], num_layers: int) -> tuple[SeenLayer, ...]:
    numbers = [number for number, _ in seen]
    if numbers != list(range(num_layers)):
        raise ConfigError(f"of its {num_layers} layers, {numbers} have attention of the usual form")
    layers = tuple(layer for _, layer in seen)
    if len({(layer.num_kv_heads, layer.head_dim) for layer in layers}) > 1:
        raise ConfigError("its layers have keys and values of different shapes")
    return layers


def _check_outcome(got: torch.Tensor, want: torch.Tensor, window: int) -> None:
    """Rows beyond the smallest window saw more in the probe than they should."""
    rows = min(window or got.shape[1], got.shape[1])
    bound = _BOUND_32 if got.dtype == torch.float32 else _BOUND_16
    got, want = got[:, :rows].float(), want[:, :rows].float()
    apart = float((got - want).norm() / want.norm())
    if not apart <= bound:
        raise ConfigError(
            f"through our attention it gives other numbers than through its own ({apart:.1e})"
        )


def find_layers(model: Any) -> tuple[nn.Module, ...]:
    """The modules of the layers, in order."""
    count = model.config.num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return tuple(module)
    raise ConfigError(f"config.json: no list of {count} layers was found in the model")
