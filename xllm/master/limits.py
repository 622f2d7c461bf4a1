"""What an instance can hold, and whether a request can ever fit.

Made once from what the worker reported and the settings. Knows no load: a request that does not
fit here will not fit on an idle instance either.
"""

from __future__ import annotations

import dataclasses

from xllm.config.scheduling import SchedulerSettings
from xllm.errors import ContextLengthError
from xllm.protocol.step import WorkerReady


@dataclasses.dataclass(frozen=True, slots=True)
class InstanceLimits:
    """Bounds of one instance. Lengths are in tokens."""

    model: str
    num_blocks: int
    block_size: int
    max_model_len: int
    vocab_size: int
    eos_ids: tuple[int, ...] = ()
    revision: str = ""
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    prefix_cache: bool = True
    max_waiting: int = 8192
    instance: str = ""
    """This instance's name, as requests' stages have it."""
    share_prefixes: bool = True
    """Let a sequence wait for a prefix that another one is computing."""
    max_in_flight: int = 2
    """Plans under way at a time: 2 is the asynchronous pipeline, 1 is one step after another."""
    task: str = "generate"
    """What the model is served for: generate or embed."""
    pooling: str = ""
    """How it makes one vector of a text: last or mean; empty: it does not."""
    embedding_size: int = 0
    """Numbers of a vector."""
    hold_s: float = 10.0
    """How long a prefilled request waits to be taken by the instance that decodes it."""
    num_slots: int = 0
    """Ranges of addresses for a sequence each; 0: the worker reads by block tables alone."""
    max_mappings: int = 0
    """Mappings that the worker's process may have for them."""
    num_experts: int = 0
    """Of each layer that has experts; 0: there are none."""

    @classmethod
    def from_ready(
        cls, ready: WorkerReady, settings: SchedulerSettings, instance: str = ""
    ) -> InstanceLimits:
        """The limits of an instance whose worker is ready."""
        return cls(
            model=ready.model,
            num_blocks=ready.num_blocks,
            block_size=ready.block_size,
            max_model_len=ready.max_model_len,
            vocab_size=ready.vocab_size,
            eos_ids=ready.eos_ids,
            revision=ready.revision,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            prefix_cache=settings.prefix_cache,
            max_waiting=settings.max_waiting,
            instance=instance,
            num_slots=ready.num_slots,
            max_mappings=ready.max_mappings,
            share_prefixes=settings.share_prefixes,
            max_in_flight=2 if settings.async_scheduling else 1,
            task=ready.task,
            pooling=ready.pooling,
            embedding_size=ready.embedding_size,
            num_experts=ready.num_experts,
        )

    @property
    def max_running(self) -> int:
        """Sequences that run at a time: each of them must find room in one step's budget."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)

    @property
    def pages_per_slot(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_model_len // self.block_size)

    @property
    def capacity(self) -> int:
        """Tokens of KV in all blocks."""
        return self.num_blocks * self.block_size

    def sequence_end(self, num_prompt: int, max_tokens: int | None) -> int:
        """Tokens (prompt and output) at which a sequence ends by length.

        The last token needs no KV. ContextLengthError, with the numbers, if it can never fit."""
        longest = min(self.max_model_len, self.capacity + 1)
        wanted = 0 if max_tokens == 0 else 1
        if num_prompt + wanted > self.max_model_len:
            raise ContextLengthError(
                f"the prompt has {num_prompt} tokens and the model's context is "
                f"{self.max_model_len} tokens, prompt and output together",
                param="prompt",
            )
        if num_prompt > self.capacity:
            raise ContextLengthError(
                f"the prompt has {num_prompt} tokens and the instance's KV memory holds "
                f"{self.capacity} ({self.num_blocks} blocks of {self.block_size})",
                param="prompt",
            )
        if max_tokens is None:
            return longest
        end = min(num_prompt + max_tokens, self.max_model_len)
        if end > longest:
            raise ContextLengthError(
                f"{num_prompt} prompt tokens and up to {max_tokens} new ones need KV for "
                f"{end - 1} tokens and the instance's KV memory holds {self.capacity} "
                f"({self.num_blocks} blocks of {self.block_size})",
                param="max_tokens",
            )
        return end
