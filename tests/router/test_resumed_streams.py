"""A client's session and the states of several routers: whatever is lost, the stream holds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.router.oracle import STOPS, ServedLife, expected, model, stream
from xllm.client.session import ClientSession
from xllm.protocol.generation import RequestFinished, SubmitRequest
from xllm.protocol.sampling import SamplingParams
from xllm.router.state.instructions import Wish
from xllm.router.state.request import RequestLife
from xllm.router.state.spec import RequestSpec


class Asker:
    """A listener that puts the stream together, and fails where it does not fit."""

    def __init__(self, num_choices: int) -> None:
        self.ids: list[list[int]] = [[] for _ in range(num_choices)]
        self.texts = [""] * num_choices
        self.reasons = [""] * num_choices
        self.end: RequestFinished | None = None

    def on_delta(self, delta) -> None:
        assert self.end is None
        assert not self.reasons[delta.choice]
        assert not delta.token_ids or delta.first_index == len(self.ids[delta.choice])
        self.ids[delta.choice] += delta.token_ids
        self.texts[delta.choice] += delta.text
        self.reasons[delta.choice] = delta.finish_reason

    def on_end(self, message) -> None:
        assert self.end is None
        self.end = message

    def on_error(self, error) -> None:
        raise AssertionError(error)


class Router(ServedLife):
    """One router's life of the request; what it tells the client waits in a queue, which is lost
    with it."""

    def __init__(self, submit: SubmitRequest, num_tokens: int) -> None:
        self.told: list = []
        sampling = submit.sampling
        spec = RequestSpec(
            request_id="r",
            client_id=submit.id,
            model="m",
            prompt_ids=(1, 2, 3),
            sampling=sampling,
            deadline=100.0,
            stream=submit.stream,
            hold_s=0.02,
        )
        outputs = [model().output(sampling, (1, 2, 3)) for _ in range(sampling.n)]
        state = RequestLife(spec, outputs)
        begun = state.resume(submit.resume) if submit.resume else (Wish.PLACE,)
        super().__init__(state, num_tokens, begun)

    def tell(self, message) -> None:
        self.told.append(message)

    def advance(self, data, n: int) -> None:
        """A little of this or that."""
        if self.master.words and data.draw(st.booleans()):
            self.hear(self.master.words.pop(0))
        elif self.master.done:
            attempt = data.draw(st.sampled_from(sorted(self.master.done)))
            choice = data.draw(st.integers(0, n - 1))
            self.master.step(attempt, choice, data.draw(st.integers(1, 6)))
        if self.wished and data.draw(st.booleans()):
            self.flush()

    def run_out(self) -> None:
        """To the end, without further trouble."""
        while not self.state.ended:
            self.step_all(lambda: 100)
            self.hear(self.master.words.pop(0))


@settings(max_examples=300, deadline=None)
@given(
    st.data(),
    st.integers(1, 3),
    st.integers(1, 20),
    st.sampled_from(STOPS),
    st.booleans(),
    st.booleans(),
)
def test_any_losses_of_routers_give_the_oracles_stream(data, n, num_tokens, stop, streams, scored):
    """`scored`: with prompt_logprobs, whose scores the last router must have computed itself."""
    sampling = SamplingParams(
        max_tokens=num_tokens, seed=7, n=n, stop=stop, prompt_logprobs=0 if scored else None
    )
    session, asker = ClientSession(), Asker(n)
    session.open(SubmitRequest(id=5, sampling=sampling, stream=streams), asker, 0.0, 1e6)
    session.waits(5)
    router = None
    for _ in range(data.draw(st.integers(0, 60))):
        if asker.end is not None:
            break
        if router is None:
            entry, words = session.due(0.0)
            entry.is_sent = True
            router = Router(words, num_tokens)
        event = data.draw(st.sampled_from(["step"] * 8 + ["hear"] * 4 + ["lose", "move"]))
        if event == "step":
            router.advance(data, n)
        elif event == "hear" and router.told:
            assert session.receive(router.told.pop(0)) is None
        elif event == "move" and router.state.moves.num_lost < 3:
            router.carry_out(router.state.instance_lost("a"))
        elif event == "lose" and entry.num_losses < 6:
            router = None
            session.lost("lost")
        session.check()
    if asker.end is None:
        if router is None:
            entry, words = session.due(0.0)
            entry.is_sent = True
            router = Router(words, num_tokens)
        router.run_out()
        for message in router.told:
            assert session.receive(message) is None
    assert isinstance(asker.end, RequestFinished)
    for choice in range(n):
        ids, text = expected(choice, num_tokens, sampling)
        result = asker.end.choices[choice]
        if streams:
            assert (asker.ids[choice], asker.texts[choice]) == (ids, text)
            assert asker.reasons[choice] == result.finish_reason
        else:
            assert (list(result.token_ids), result.text) == (ids, text)
    assert stream(0)  # the oracle draws something
    session.check()
