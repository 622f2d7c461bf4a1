"""Which file makes the models of a Hugging Face architecture name. Imported when asked for."""

from __future__ import annotations

from xllm.errors import ConfigError
from xllm.worker.models.model import ModelFamily

NATIVE_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)

HEADLESS_ARCHITECTURES = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""The same models without a head: they can embed only."""


def is_native(architecture: str) -> bool:
    """Whether a file here makes the models of an architecture."""
    return architecture in NATIVE_ARCHITECTURES or is_headless(architecture)


def is_headless(architecture: str) -> bool:
    """Whether an architecture is one without a head."""
    return architecture in HEADLESS_ARCHITECTURES


def find_family(architecture: str) -> ModelFamily:
    """The family of an architecture; raises ConfigError for one that is not native."""
    match architecture:
        case "LlamaForCausalLM" | "LlamaModel":
            from xllm.worker.models.llama import llama_family

            return llama_family()
        case "MistralForCausalLM" | "MistralModel":
            from xllm.worker.models.mistral import mistral_family

            return mistral_family()
        case "Qwen2ForCausalLM" | "Qwen2Model":
            from xllm.worker.models.qwen2 import qwen2_family

            return qwen2_family()
        case "Qwen3ForCausalLM" | "Qwen3Model":
            from xllm.worker.models.qwen3 import qwen3_family

            return qwen3_family()
        case "Qwen3MoeForCausalLM":
            from xllm.worker.models.qwen3_moe import qwen3_moe_family

            return qwen3_moe_family()
    known = ", ".join((*NATIVE_ARCHITECTURES, *HEADLESS_ARCHITECTURES))
    raise ConfigError(
        f"config.json: architecture {architecture!r} is not supported ({known})",
        param="model.path",
    )
