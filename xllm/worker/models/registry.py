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


def is_native(architecture: str) -> bool:
    """Whether a file here makes the models of an architecture."""
    return architecture in NATIVE_ARCHITECTURES


def find_family(architecture: str) -> ModelFamily:
    """The family of an architecture; raises ConfigError for one that is not native."""
    match architecture:
        case "LlamaForCausalLM":
            from xllm.worker.models.llama import llama_family

            return llama_family()
        case "MistralForCausalLM":
            from xllm.worker.models.mistral import mistral_family

            return mistral_family()
        case "Qwen2ForCausalLM":
            from xllm.worker.models.qwen2 import qwen2_family

            return qwen2_family()
        case "Qwen3ForCausalLM":
            from xllm.worker.models.qwen3 import qwen3_family

            return qwen3_family()
        case "Qwen3MoeForCausalLM":
            from xllm.worker.models.qwen3_moe import qwen3_moe_family

            return qwen3_moe_family()
    known = ", ".join(NATIVE_ARCHITECTURES)
    raise ConfigError(
        f"config.json: architecture {architecture!r} is not supported ({known})",
        param="model.path",
    )
