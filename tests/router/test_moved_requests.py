"""A request that is refused, lost, moved and told twice, in any order: the answer is the oracle's,
with its stops, its logprobs and its prompt's scores, and it ends once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.router.oracle import make, model, stream
from xllm.protocol.generation import RequestFailed, RequestFinished, TokenDelta
from xllm.protocol.instance import AdmitRequest, PromptScores, RequestEnded, TokenItem
from xllm.protocol.sampling import SamplingParams, TokenLogprobs
from xllm.router.state.instructions import SendTo, Wish
from xllm.router.state.moves import MAX_DEATHS, MAX_MOVES

SCORES = tuple(TokenLogprobs(one, -float(one)) for one in (2, 3))
"""Of the prompt (1, 2, 3) behind its first token."""


def score(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -token_id / 8)


class ScoringMaster:
    """Runs attempts as a master does: stop ids, lengths, logprobs, scores of the prompt. Words wait
    in one queue and may be lost or repeated by the test."""

    def __init__(self, sampling: SamplingParams, stop_ids: frozenset[int]) -> None:
        self.sampling = sampling
        self.stop_ids = stop_ids
        self.words: list = []
        self.running: dict[int, dict[int, int]] = {}

    def hear(self, message) -> None:
        if isinstance(message, AdmitRequest):
            outputs = message.outputs or ((),) * self.sampling.n
            for choice, ids in enumerate(outputs):
                assert ids == stream(choice)[: len(ids)]  # what the router holds is right
            self.running[message.attempt] = {k: len(ids) for k, ids in enumerate(outputs)}
            if self.sampling.prompt_logprobs is not None:
                self.words.append(PromptScores("r", message.attempt, 1, SCORES))
        elif message.choice < 0:
            self.running.pop(message.attempt, None)
        elif message.attempt in self.running:
            self.running[message.attempt].pop(message.choice, None)
            self.close(message.attempt)

    def step(self, attempt: int, choice: int, count: int) -> None:
        running = self.running.get(attempt, {})
        if choice not in running:
            return
        first = running[choice]
        ids, reason, stop_id = [], "", -1
        while len(ids) < count and not reason:
            at = first + len(ids)
            if at < self.sampling.max_tokens:
                ids.append(stream(choice)[at])
            if ids and ids[-1] in self.stop_ids and first + len(ids) > self.sampling.min_tokens:
                reason, stop_id = "stop", ids[-1]
            elif first + len(ids) >= self.sampling.max_tokens:
                reason = "length"
        running[choice] = first + len(ids)
        scores = None if self.sampling.logprobs is None else tuple(map(score, ids))
        item = TokenItem("r", choice, attempt, first, tuple(ids), reason, stop_id, scores)
        self.words.append(item)
        if reason:
            del running[choice]
            self.close(attempt)

    def close(self, attempt: int) -> None:
        if not self.running[attempt]:
            del self.running[attempt]
            self.words.append(RequestEnded("r", attempt))


def wanted(choice: int, sampling: SamplingParams, stop_ids) -> tuple:
    """Ids, text, reason and stop of an undisturbed run."""
    output = model().output(sampling, (1, 2, 3))
    text = ""
    for count, one in enumerate(stream(choice)[: sampling.max_tokens], 1):
        if one in stop_ids and count > sampling.min_tokens:
            return stream(choice)[:count], text + output.finish(), "stop", one
        text += output.feed((one,))
        if output.stop is not None:
            return stream(choice)[:count], text, "stop", output.stop
    return stream(choice)[: sampling.max_tokens], text + output.finish(), "length", None


class Run:
    """One request and what its client hears."""

    def __init__(self, streams: bool, sampling: SamplingParams) -> None:
        self.stop_ids = frozenset(sampling.stop_token_ids)
        fields = {name: getattr(sampling, name) for name in sampling.__struct_fields__}
        self.state = make(streams, 0.02, sampling.stop_token_ids, **fields)
        self.master = ScoringMaster(sampling, self.stop_ids)
        self.ids = [[] for _ in range(sampling.n)]
        self.texts = [""] * sampling.n
        self.scores = [[] for _ in range(sampling.n)]
        self.last = None
        self.wished = False
        self.do((Wish.PLACE,))

    def do(self, instructions) -> None:
        for one in instructions:
            if isinstance(one, SendTo):
                self.master.hear(one.message)
            elif one is Wish.PLACE:
                self.do(self.state.place((("both", "a"),), 0.0))
            elif one is Wish.FLUSH:
                self.wished = True
            elif isinstance(one, TokenDelta):
                assert self.last is None
                assert one.first_index == len(self.ids[one.choice])
                self.ids[one.choice] += one.token_ids
                self.texts[one.choice] += one.text
                self.scores[one.choice] += one.logprobs or ()
            else:
                assert self.last is None
                self.last = one
        self.state.check()

    def hear(self, word) -> None:
        if isinstance(word, TokenItem):
            self.do(self.state.tokens(word))
        elif isinstance(word, RequestEnded):
            self.do(self.state.engine_ended(word))
        else:
            self.do(self.state.prompt_word(word))

    def event(self, data, old: list) -> None:
        moves = self.state.moves
        kinds = ["step"] * 6 + ["hear"] * 6 + ["flush", "repeat", "refuse", "unreached"]
        if moves.num_lost < MAX_MOVES - 1:
            kinds += ["lose a word", "suspect", "killed", "die in company"]
            if moves.num_deaths < MAX_DEATHS - 1:
                kinds.append("die")
        kind = data.draw(st.sampled_from(kinds))
        match kind:
            case "step" if self.master.running:
                attempt = data.draw(st.sampled_from(sorted(self.master.running)))
                choice = data.draw(st.integers(0, len(self.ids) - 1))
                self.master.step(attempt, choice, data.draw(st.integers(1, 6)))
            case "hear" if self.master.words:
                old.append(self.master.words.pop(0))
                self.hear(old[-1])
            case "flush" if self.wished:
                self.wished = False
                self.do(self.state.flush())
            case "repeat" if old:
                word = data.draw(st.sampled_from(old))
                if not isinstance(word, RequestEnded):
                    self.hear(word)
            case "refuse" if self.state.instance and not any(self.ids):
                self.master.running.pop(self.state.attempt, None)
                self.hear(RequestEnded("r", self.state.attempt, "unavailable", "draining"))
            case "unreached" if self.state.instance and not self.state.ended:
                self.master.running.pop(self.state.attempt, None)
                self.do(self.state.unreached("a", self.state.attempt, "unavailable"))
            case "lose a word":
                items = [k for k, one in enumerate(self.master.words) if type(one) is TokenItem]
                if items:
                    del self.master.words[data.draw(st.sampled_from(items))]
            case "suspect":
                self.do(self.state.instance_lost("a"))
            case "die" | "die in company" | "killed" if self.state.instance:
                self.master.running.pop(self.state.attempt, None)
                word = RequestEnded(
                    "r",
                    self.state.attempt,
                    "worker_lost",
                    blameless=kind == "killed",
                    shared=kind == "die in company",
                )
                self.hear(word)

    def run_out(self) -> None:
        while not self.state.ended:
            for attempt in sorted(self.master.running):
                for choice in sorted(self.master.running.get(attempt, ())):
                    self.master.step(attempt, choice, 100)
            if not self.master.words:  # the last ones were lost
                self.do(self.state.instance_lost("a"))
                continue
            self.hear(self.master.words.pop(0))


@settings(max_examples=300, deadline=None)
@given(
    st.data(),
    st.integers(1, 3),
    st.integers(1, 20),
    st.sampled_from([(), ("fox",), ("x j", "the l")]),
    st.lists(st.integers(0, 19), max_size=2),
    st.integers(0, 20),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_any_moves_give_the_oracles_answer(
    data, n, max_tokens, stop, stops_at, min_tokens, scored, prompt_scored, streams
):
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(min_tokens, max_tokens),
        seed=7,
        n=n,
        stop=stop,
        stop_token_ids=tuple(stream(0)[at] for at in stops_at),
        logprobs=1 if scored else None,
        prompt_logprobs=0 if prompt_scored else None,
    )
    run = Run(streams, sampling)
    old: list = []
    for _ in range(data.draw(st.integers(0, 80))):
        if run.last is not None:
            break
        run.event(data, old)
    if run.last is None:
        run.run_out()
    for word in [*old, *run.master.words]:
        run.hear(word)  # late: nothing comes of it
    assert not isinstance(run.last, RequestFailed), run.last
    assert isinstance(run.last, RequestFinished)
    for choice in range(n):
        ids, text, reason, stopped = wanted(choice, sampling, run.stop_ids)
        result = run.last.choices[choice]
        if streams:
            got = tuple(run.ids[choice]), run.texts[choice], tuple(run.scores[choice])
        else:
            got = result.token_ids, result.text, result.logprobs or ()
        assert got == (ids, text, tuple(map(score, ids)) if scored else ())
        assert (result.finish_reason, result.stop_reason) == (reason, stopped)
    if prompt_scored:
        assert run.last.prompt_logprobs == (None, *SCORES)
