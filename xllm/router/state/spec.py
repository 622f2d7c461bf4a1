"""What is settled about a request once it was checked and encoded: it never changes again."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from xllm.protocol.instance import AdmitRequest
from xllm.protocol.sampling import SamplingParams


class RequestSpec(msgspec.Struct, frozen=True, gc=False):
    """A request as the state machine needs it. `sampling` is resolved: its seed is drawn and its
    max_tokens set. `deadline`: monotonic seconds."""

    request_id: str
    client_id: int
    model: str
    prompt_ids: Sequence[int]
    """A tuple, or an array of a long prompt: see `packed_prompt`."""
    sampling: SamplingParams
    deadline: float
    stream: bool = True
    hold_s: float = 0.0
    block_hashes: bytes = b""
    salt: bytes = b""
    priority: int = 0
    offline: bool = False
    traceparent: str = ""
    stop_ids: frozenset[int] = frozenset()
    """All ids that end a choice: the request's own, and the model's unless those are ignored."""
    tenant: str = ""
    ttft_ms: int = 0
    tpot_ms: int = 0
    embed: bool = False
    """Its prompt's vector is wanted, and no choice."""
    dimensions: int = 0
    packed_prompt: bytes = b""
    """The ids as bytes, where that is how they travel."""
    session: str = ""

    def admit(
        self,
        attempt: int,
        stages: tuple[tuple[str, str], ...],
        outputs: tuple[tuple[int, ...], ...],
        now: float,
        *,
        alone: bool = False,
    ) -> AdmitRequest:
        """The words that start an attempt."""
        return AdmitRequest(
            self.request_id,
            attempt,
            self.model,
            () if self.packed_prompt else tuple(self.prompt_ids),
            self.sampling,
            self.block_hashes,
            outputs,
            self.salt,
            "",
            self.priority,
            self.offline,
            max(1, int((self.deadline - now) * 1000)),
            stages,
            (),
            self.traceparent,
            self.tenant,
            self.ttft_ms,
            self.tpot_ms,
            self.embed,
            self.packed_prompt,
            alone,
        )
