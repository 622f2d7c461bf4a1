"""The dense decoder that the Llama-like families share; each family's file says how it differs."""

from __future__ import annotations

import torch

from xllm.errors import ConfigError, EngineError
from xllm.worker.kernels.fused import FusedHead, LayerParts
from xllm.worker.kernels.linear import PackedLinear
from xllm.worker.layers.decoder import Attention, DecoderLayer, FeedForward, LayerWeights
from xllm.worker.layers.experts import ExpertTables
from xllm.worker.layers.linear import Linear
from xllm.worker.layers.norm import RmsNorm
from xllm.worker.layers.rotary import Rotary, RotaryTables
from xllm.worker.loader.config import ModelConfig, RawConfig
from xllm.worker.loader.kv_groups import kv_groups
from xllm.worker.loader.rope import read_rope
from xllm.worker.loader.weights import WeightTable


class DenseDecoder:
    """Embedding, decoder layers, norm and head over one WeightTable."""

    experts: ExpertTables | None = None
    """Of families that have experts."""

    def __init__(self, config: ModelConfig, table: WeightTable) -> None:
        self.config = config
        self.kv_groups = kv_groups(config)
        vocab, hidden = config.vocab_size, config.hidden_size
        self._dtype = table.dtype
        self._embedding = table.embedding("model.embed_tokens.weight", vocab, hidden)
        self._layers = [
            DecoderLayer(
                config,
                index,
                f"model.layers.{index}",
                table,
                self.feed_forward(index, f"model.layers.{index}.mlp", table),
            )
            for index in range(config.num_layers)
        ]
        self.ops = table.ops
        self._norm = RmsNorm(table.one("model.norm.weight", hidden), config.rms_norm_eps, self.ops)
        self._head = self._make_head(table) if config.has_head else None
        self._fused_head: FusedHead | None = None
        self._rotary = Rotary(config.rope, config.head_dim, table.device, self.ops)

    def _make_head(self, table: WeightTable) -> Linear | PackedLinear:
        tied = self.config.tie_word_embeddings
        if tied and table.team is None:
            return Linear(table.head_rows(self._embedding.weight))
        rows = [table.num_head_rows(self.config.vocab_size)]
        head = table.linear(["lm_head"], rows, self.config.hidden_size, is_head=True)
        if tied:
            table.take_from("lm_head.weight", "model.embed_tokens.weight")
        return head

    def feed_forward(self, index: int, prefix: str, table: WeightTable) -> FeedForward | None:
        """The feed-forward half of layer `index`, whose weights begin with `prefix`; None: the
        gated MLP. For families that have another one."""
        return None

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[rows] to [rows, hidden]."""
        return self._embedding(token_ids)

    def tables(self, positions: torch.Tensor) -> RotaryTables:
        """Cosines and sines of the rows' positions."""
        return self._rotary.tables(positions, self._dtype)

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the rows' positions, fp32 [rows, head_dim / 2]."""
        return self._rotary.angles(positions)

    def layer(
        self, index: int, hidden: torch.Tensor, tables: RotaryTables, attention: Attention
    ) -> torch.Tensor:
        """One decoder layer."""
        return self._layers[index](hidden, tables, attention)

    def attention_half(
        self, index: int, hidden: torch.Tensor, tables: RotaryTables, attention: Attention
    ) -> torch.Tensor:
        """What a layer's attention adds to hidden."""
        return self._layers[index].attention_half(hidden, tables, attention)

    def mlp_half(self, index: int, hidden: torch.Tensor, attention: Attention) -> torch.Tensor:
        """What a layer's feed-forward half adds to hidden."""
        return self._layers[index].mlp_half(hidden, attention)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Norm and head: fp32 logits [rows, vocab]; of a rank, its part of the vocabulary."""
        if self._fused_head is not None:
            return self._fused_head(hidden.float())
        if self._head is None:
            raise EngineError("the model is served for task embed: it was loaded without a head")
        return self._head(self._norm(hidden)).float()

    def normalised(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last norm alone."""
        return self._norm(hidden)

    def finish(self) -> None:
        """Fuse what can only be fused once it is loaded."""
        for layer in self._layers:
            layer.finish()
        if isinstance(self._head, PackedLinear):
            assert self._head.team is not None
            norm = self._norm
            self._fused_head = FusedHead(self._head.team, norm.weight, norm.eps, self._head)

    def weights(self) -> list[LayerWeights] | None:
        """Each layer's weights in torch; None: they are packed."""
        found = [layer.weights() for layer in self._layers]
        plain = [weights for weights in found if weights is not None]
        return plain if len(plain) == len(found) else None

    def parts(self) -> list[LayerParts] | None:
        """Each layer's weights as the kernels take them; None: they are not packed, or not all of
        a kind that the kernels know."""
        found = [layer.parts() for layer in self._layers]
        packed = [parts for parts in found if parts is not None]
        return packed if len(packed) == len(found) else None


def read_dense(
    raw: RawConfig,
    *,
    layer_windows: tuple[int, ...] | None = None,
    head_dim: int | None = None,
    num_kv_heads: int | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    eps: float = 1e-6,
    max_positions: int,
) -> ModelConfig:
    """The configuration of a dense decoder. Keywords are the family's own: its way to see
    windows and biases, and the library's defaults for keys that a file may leave out."""
    activation = raw.text("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"config.json: hidden_act {activation!r} is not supported (silu)")
    num_layers = raw.integer("num_hidden_layers")
    num_heads = raw.integer("num_attention_heads")
    hidden = raw.integer("hidden_size")
    if "num_key_value_heads" in raw.values or num_kv_heads is None:
        num_kv_heads = num_heads  # null means as many as heads; only an absent key, the default
    kv_heads = raw.integer("num_key_value_heads", num_kv_heads)
    if num_heads % kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {num_heads} is no multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    dim = raw.integer("head_dim", head_dim or max(hidden // num_heads, 1))
    if dim % 2:
        raise ConfigError(f"config.json: head_dim {dim} must be even")
    rope = read_rope(raw)
    positions = raw.integer("max_position_embeddings", max_positions)
    if rope.kind == "yarn":
        # Published files often leave the trained length here and say the factor beside it.
        positions = max(positions, int(rope.factor * rope.original_max_positions))
    return ModelConfig(
        architecture=raw.architecture(),
        vocab_size=raw.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=raw.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        rms_norm_eps=raw.number("rms_norm_eps", eps),
        max_positions=positions,
        tie_word_embeddings=raw.flag("tie_word_embeddings", False),
        rope=rope,
        layer_windows=layer_windows or (0,) * num_layers,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        dtype=raw.dtype(),
        eos_ids=raw.eos_ids(),
    )


def qwen_windows(raw: RawConfig) -> tuple[int, ...]:
    """Qwen's windows: none unless `use_sliding_window`; then on the layers that `layer_types`
    names, or on those from `max_window_layers` on. Published files carry an unused window."""
    num_layers = raw.integer("num_hidden_layers")
    if not raw.flag("use_sliding_window", False):
        return (0,) * num_layers
    # Null means none; only an absent key means the library's default.
    window = raw.integer("sliding_window", 0 if "sliding_window" in raw.values else 4096)
    types = raw.values.get("layer_types")
    if types is None:
        first = raw.integer("max_window_layers", 28, low=0)
        return tuple(window if index >= first else 0 for index in range(num_layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != num_layers or set(types) - set(known):
        raise ConfigError(f"config.json: layer_types must name one of {known} for each layer")
    return tuple(window if found == known[1] else 0 for found in types)
