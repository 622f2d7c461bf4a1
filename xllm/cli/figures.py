"""One line of figures after an answer."""

from __future__ import annotations

from xllm.client.results import Completion, Timing
from xllm.protocol.generation import Usage


def figures_line(usage: Usage, timing: Timing) -> str:
    """Tokens, time to the first one, time for each further one, throughput."""
    return (
        f"[{usage.prompt_tokens} prompt + {usage.completion_tokens} new tokens;"
        f" TTFT {timing.ttft_s * 1000:.1f} ms, TPOT {timing.tpot_s * 1000:.2f} ms,"
        f" {timing.tokens_per_s:.0f} tokens/s]"
    )


def completion_figures(completion: Completion) -> str:
    """The same for a completion."""
    return figures_line(completion.usage, completion.timing)
