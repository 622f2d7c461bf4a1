"""A model of transformers, run whole with our attention in the place of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from xllm.worker.layers.decoder import Attention
from xllm.worker.layers.experts import ExpertTables
from xllm.worker.loader.config import ModelConfig
from xllm.worker.loader.kv_groups import KvGroupSpec, kv_groups
from xllm.worker.models.transformers_bridge import Bridge, window_marker


class _Given(BaseModelOutputWithPast):
    """What an inner model would have given; of all that some classes give beside it: nothing."""

    def __getattr__(self, name: str) -> None:
        return None


class TransformersModel:
    """Implements WholeModel with a model of transformers. `layers` are the modules of
    its layers, in order."""

    experts: ExpertTables | None = None
    """The library's experts are its own."""

    def __init__(
        self, model: Any, bridge: Bridge, config: ModelConfig, layers: tuple[nn.Module, ...]
    ) -> None:
        self.config = config
        self.kv_groups: tuple[KvGroupSpec, ...] = kv_groups(config)
        self._model = model
        self._bridge = bridge
        self._base = model.base_model
        self._whole_forward: Callable[..., Any] = self._base.forward
        self._marker = window_marker(0)
        self._before: Callable[[int], None] | None = None
        self._after: Callable[[int, torch.Tensor], None] | None = None
        bridge.head_dim = config.head_dim
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._tell_before(index))
            layer.register_forward_hook(self._tell_after(index))

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: Attention,
        before_layer: Callable[[int], None],
        after_layer: Callable[[int, torch.Tensor], None],
    ) -> torch.Tensor:
        """See WholeModel."""
        self._bridge.attention = attention
        self._before, self._after = before_layer, after_layer
        try:
            output = self._base(
                input_ids=token_ids[None],
                position_ids=positions[None],
                attention_mask=self._marker,
                use_cache=False,
            )
        finally:
            self._bridge.attention = self._before = self._after = None
        hidden: torch.Tensor = output[0][0]
        return hidden

    def normalised(self, hidden: torch.Tensor) -> torch.Tensor:
        """The library's models end with their norm."""
        return hidden

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """The library's own way from the last norm to logits (scales, soft caps): its forward
        pass, whose inner model gives `hidden` at once."""
        given = _Given(last_hidden_state=hidden[None])
        self._base.forward = lambda *args, **kwargs: given
        try:
            ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
        finally:
            self._base.forward = self._whole_forward
        return logits[0].float()

    def _tell_before(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if self._before is not None:
                self._before(index)

        return hook

    def _tell_after(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._after is not None:
                hidden = output if isinstance(output, torch.Tensor) else output[0]
                self._after(index, hidden[0])

        return hook
