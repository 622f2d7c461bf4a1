"""Model directories with random weights, for figures that depend on shapes alone.

    python -m benchmarks.random_model 50m DIR

A Qwen3 in bfloat16 with config.json and model.safetensors; no tokenizer, so prompts are token
ids. Values repeat after a block of them: products take the same time for any values.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import torch
from safetensors.torch import save_file

SHAPES: dict[str, dict[str, int]] = {
    "50m": {
        "vocab_size": 32768,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 11,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
    "0.6b": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "1.7b": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "4b": {
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "8b": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
"""Sizes by name, as config.json calls them: one of about 51 million weights, and those of Qwen3's
dense models."""
_FIXED = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
_NUM_DRAWN = 1 << 20
_SCALE = 0.02


def tensor_shapes(sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    head = sizes["head_dim"]
    queries, keys = sizes["num_attention_heads"] * head, sizes["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (sizes["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    if not sizes.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    for index in range(sizes["num_hidden_layers"]):
        for name, shape in layer.items():
            shapes[f"model.layers.{index}.{name}.weight"] = shape
    return shapes


def write_random_model(sizes: dict[str, int], directory: pathlib.Path) -> pathlib.Path:
    """Write the directory, unless it is there already; returns its path."""
    weights = directory / "model.safetensors"
    if weights.exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    drawn = (_SCALE * torch.randn(_NUM_DRAWN, generator=generator)).to(torch.bfloat16)
    tensors = {}
    for name, shape in tensor_shapes(sizes).items():
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        count = shape[0] * shape[1]
        tensors[name] = drawn.repeat(-(-count // _NUM_DRAWN))[:count].reshape(shape).clone()
    (directory / "config.json").write_text(json.dumps(_FIXED | sizes, indent=1), encoding="utf-8")
    save_file(tensors, weights, metadata={"format": "pt"})
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("directory", type=pathlib.Path)
    options = parser.parse_args()
    print(write_random_model(SHAPES[options.shape], options.directory))


if __name__ == "__main__":
    main()
