"""Drafts of the toy engine's streams: what will be drawn, with a mistake now and then."""

import random

from xllm.master.strategies.drafts import DraftProposer
from xllm.worker.toy.stream import predict


class OracleDrafts(DraftProposer):
    """Guesses wrong with some probability a token, and now and then nothing, or less than it may:
    as much as it may where `silent` is 0."""

    def __init__(self, seed: int, block_size: int, wrong: float = 0.2, silent: float = 0.2) -> None:
        self._rng = random.Random(seed)
        self._block_size = block_size
        self._wrong = wrong
        self._silent = silent

    def propose(self, seq, most):
        rng = self._rng
        if rng.random() < self._silent:
            return ()
        tokens = predict(
            seq.prompt_ids,
            seq.request.sampling,
            seq.choice,
            rng.randint(1, most) if self._silent else most,
            outputs=seq.output,
            block_size=self._block_size,
        )
        return tuple(rng.randrange(1000) if rng.random() < self._wrong else t for t in tokens)
