"""The facade that both front ends call: requests, questions, health and figures.

Knows neither HTTP nor sockets. Invariant: each submitted request gets exactly one terminal
message, whatever happens.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from xllm.protocol.client import (
    DetokenizedText,
    DetokenizeIds,
    HealthReport,
    ModelInfo,
    StatusReport,
    SubmitRequest,
    TokenizedText,
    TokenizeText,
)
from xllm.router.front import Sink, Tenant


class RouterService:
    """All methods are called on the event loop's thread."""

    registry: CollectorRegistry
    """The router's own metrics; front ends add theirs here."""

    def submit(self, request: SubmitRequest, tenant: Tenant, sink: Sink) -> str:
        """Start a request and return the server's id of it (128 random bits, hex).

        Never raises for a fault of the request: `sink` gets deltas (where `request.stream`; the
        last one of each choice has its `finish_reason`), then exactly one RequestFinished or
        RequestFailed, possibly before this returns."""
        raise NotImplementedError

    def abort(self, request_id: str) -> None:
        """Stop a request: its sink gets RequestFailed with code `aborted`. Unknown: ignored."""
        raise NotImplementedError

    def models(self) -> tuple[ModelInfo, ...]:
        """The models served here, ready or not."""
        raise NotImplementedError

    async def tokenize(self, request: TokenizeText, tenant: Tenant) -> TokenizedText:
        """Token ids of a text or of messages; XllmError where it cannot."""
        raise NotImplementedError

    async def detokenize(self, request: DetokenizeIds, tenant: Tenant) -> DetokenizedText:
        """The text of token ids; XllmError where it cannot."""
        raise NotImplementedError

    def token_bytes(self, model: str, token_id: int) -> bytes:
        """The bytes that a token stands for (special tokens: their name), for logprobs."""
        raise NotImplementedError

    async def health(self, probe: bool) -> HealthReport:
        """`live`: this process works. `ready`: an instance is; with `probe`, one answered
        through its worker within 1 s."""
        raise NotImplementedError

    def status(self) -> StatusReport:
        """The router's view of the cluster."""
        raise NotImplementedError

    def metrics_text(self) -> bytes:
        """Prometheus text of all processes, labelled by role and instance."""
        raise NotImplementedError

    @property
    def num_open(self) -> int:
        """Requests without a terminal message."""
        raise NotImplementedError
