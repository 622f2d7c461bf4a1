"""From a checkpoint to a model of transformers that runs over our KV memory.

The class must take a custom attention function; what its layers hand to attention is learnt by a
probe once the weights are there. Nothing is unpickled and no code but that of the installed
library runs: the class is looked up by name, its weights come from our checkpoint reader.
"""

from __future__ import annotations

from typing import Any

import structlog
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from xllm.errors import ConfigError
from xllm.worker.loader.checkpoint import Checkpoint
from xllm.worker.loader.config import ModelConfig, RawConfig, RopeConfig
from xllm.worker.models.transformers_bridge import (
    ATTENTION_NAME,
    Bridge,
    SeenLayer,
    register_attention,
)
from xllm.worker.models.transformers_model import TransformersModel
from xllm.worker.models.transformers_probe import find_layers, probe

_log = structlog.get_logger(__name__)

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}


def find_class(raw: RawConfig) -> Any:
    """The class of transformers that runs config.json's architecture, out of the library's own
    table of decoders. Raises ConfigError for one that is not in it, or that takes no attention
    but its own."""
    architecture = raw.architecture()
    known = [
        kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name == architecture
    ]
    if not known:
        raise ConfigError(
            f"config.json: architecture {architecture!r} is not supported: transformers "
            f"{transformers.__version__} has no such decoder",
            param="model.path",
        )
    # A few classes serve several model types; which one it is makes their configuration.
    kind = raw.text("model_type", known[0])
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind if kind in known else known[0]]]
    if not found._supports_attention_backend:
        raise ConfigError(
            f"config.json: architecture {architecture!r} is not supported: its class in "
            "transformers takes no attention but its own",
            param="model.path",
        )
    return found


def read_library_config(found: Any, raw: RawConfig) -> Any:
    """config.json as the library's object for that class. Raises ConfigError where the library
    refuses it or the model is no decoder of one text with attention on every layer."""
    architecture = raw.architecture()
    try:
        config = found.config_class.from_dict(dict(raw.values))
    except Exception as error:  # the library's checks raise whatever they like
        raise ConfigError(f"config.json: transformers refuses it: {error}") from error
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ()) - _ATTENTION_LAYERS
    reason = ""
    if config.is_encoder_decoder:
        reason = "it is an encoder and a decoder"
    elif text is not config:
        reason = "it takes more than text"
    elif kinds:
        reason = f"it has layers other than full and sliding attention ({', '.join(sorted(kinds))})"
    elif found._is_stateful:
        reason = "it keeps more than keys and values"
    elif getattr(config, "use_bidirectional_attention", None):
        reason = "its tokens see what comes after them"
    if reason:
        raise ConfigError(
            f"config.json: architecture {architecture!r} is not supported: {reason}",
            param="model.path",
        )
    return config


def _build(
    found: Any, config: Any, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[Any, tuple[str, ...]]:
    """The model over `weights` (by checkpoint name; tensors that need no conversion are used
    where they lie), and the names that it has no use for. Raises ConfigError for weights that
    are missing or do not fit."""
    register_attention()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # library
    try:
        model, report = found.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            local_files_only=True,
            output_loading_info=True,
        )
    except (RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(f"transformers cannot load the weights: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(
            f"the checkpoint lacks {', '.join(missing[:5])}"
            + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""),
            param="model.path",
        )
    return model.eval(), tuple(sorted(report["unexpected_keys"]))


def load_transformers_model(
    raw: RawConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> tuple[TransformersModel, int]:
    """The model of a checkpoint and the bytes of its weights. Raises ConfigError, naming the
    architecture, where it cannot run here."""
    architecture = raw.architecture()
    found = find_class(raw)
    config = read_library_config(found, raw)
    weights = {entry.name: tensor for entry, tensor in checkpoint.tensors()}
    model, unused = _build(found, config, weights, dtype)
    if unused:
        _log.warning("weights_without_use", architecture=architecture, names=unused[:5])
    model.to(device).requires_grad_(False)
    bridge = Bridge(model)
    seen = probe(model, bridge, architecture)
    head = model.get_output_embeddings()
    vocab_size = config.vocab_size if head is None else head.weight.shape[0]
    described = describe_model(raw, config, seen, vocab_size)
    num_bytes = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    return TransformersModel(model, bridge, described, find_layers(model)), num_bytes


def describe_model(
    raw: RawConfig, config: Any, seen: tuple[SeenLayer, ...], vocab_size: int
) -> ModelConfig:
    """What the executor needs to know of a model whose layers were seen."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        raise ConfigError("config.json: max_position_embeddings is missing")
    return ModelConfig(
        architecture=raw.architecture(),
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=0,
        num_layers=len(seen),
        num_heads=config.num_attention_heads,
        num_kv_heads=seen[0].num_kv_heads,
        head_dim=seen[0].head_dim,
        rms_norm_eps=0.0,
        max_positions=min(positions, _fixed_positions(config)),
        tie_word_embeddings=bool(config.tie_word_embeddings),
        rope=RopeConfig(),
        layer_windows=tuple(layer.window for layer in seen),
        dtype=raw.dtype(),
        eos_ids=raw.eos_ids(),
    )


def _fixed_positions(config: Any) -> int:
    """Up to where rotary frequencies do not depend on the longest text of a batch, as those of
    two kinds do: beyond, a text's neighbours would change it."""
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(part for part in found.values() if isinstance(part, dict))]
    limits: list[int] = [
        part.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for part in kinds
        if part.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=int(config.max_position_embeddings))
