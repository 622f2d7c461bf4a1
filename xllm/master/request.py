"""One admitted request: what all its choices share, and which of them are still open."""

from __future__ import annotations

from xllm.master.sequence import Sequence, SequencePhase
from xllm.protocol.instance import AdmitRequest, RequestEnded

SortKey = tuple[bool, int, int]
"""(offline, -priority, arrival): the smaller, the earlier."""


class RequestState:
    """The attempt of a request that runs here.

    `sequences`: those that exist and have not finished; before a leader forks, it alone stands
    for all choices. `open_choices`: one bit for each choice without a finish reason.
    `num_scored`: prompt positions whose scores were already reported. `prefill_only`: another
    instance decodes it. `runs_alone`: its steps are shared with no other request."""

    __slots__ = (
        "admitted_at", "attempt", "cached_tokens", "deadline", "end", "first_token_at", "hashes",
        "key", "message", "num_scored", "open_choices", "prefill_only", "prompt_ids",
        "request_id", "root",
        "runs_alone", "sampling", "sequences", "stop_ids", "stop_tuple",
    )  # fmt: skip

    def __init__(
        self,
        message: AdmitRequest,
        arrival: int,
        now: float,
        end: int,
        stop_ids: frozenset[int],
        stop_tuple: tuple[int, ...],
        root: bytes,
        hashes: list[bytes],
        prefill_only: bool = False,
    ) -> None:
        self.message = message
        self.request_id = message.request_id
        self.attempt = message.attempt
        self.prompt_ids = message.prompt_ids
        self.sampling = message.sampling
        self.key: SortKey = (message.offline, -message.priority, arrival)
        self.admitted_at = now
        self.first_token_at = 0.0
        self.deadline = now + message.timeout_ms / 1000 if message.timeout_ms > 0 else 0.0
        self.end = end
        self.stop_ids = stop_ids
        self.stop_tuple = stop_tuple
        self.root = root
        self.hashes = hashes
        self.prefill_only = prefill_only
        self.runs_alone = message.alone
        self.cached_tokens = -1
        self.num_scored = 1
        self.open_choices = (1 << message.sampling.n) - 1
        self.sequences: list[Sequence] = []

    def is_open(self, choice: int) -> bool:
        """Whether this choice still waits for its finish reason."""
        return bool(self.open_choices >> choice & 1)

    def outputs(self) -> tuple[tuple[int, ...], ...]:
        """The tokens so far of each choice that runs; empty for the others."""
        found: list[tuple[int, ...]] = [()] * self.sampling.n
        for seq in self.sequences:
            found[seq.choice] = tuple(seq.output)
        return tuple(found)

    @property
    def wants_logprobs(self) -> bool:
        """Whether results must bring logprobs of any of its tokens."""
        sampling = self.sampling
        return sampling.logprobs is not None or sampling.prompt_logprobs is not None

    @property
    def embeds(self) -> bool:
        """Whether the prompt's vector is wanted and no token."""
        return self.message.embed

    @property
    def is_held(self) -> bool:
        """Whether it is prefilled, and all that is left of it waits to be taken elsewhere."""
        return all(seq.state is SequencePhase.HELD for seq in self.sequences)

    def ended(self, code: str = "", message: str = "") -> RequestEnded:
        """The terminal word on this attempt."""
        cached = max(self.cached_tokens, 0)
        return RequestEnded(self.request_id, self.attempt, code, message, "", cached)
