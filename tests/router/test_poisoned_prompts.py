"""Prompts that end workers, among others that do not: the states of requests and the schedulers of
instances together, with what the toy engine draws. Innocents get their answers, each culprit is
found, and takes three workers at most."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.master.toy_instance import ToyInstance
from tests.router.oracle import model
from xllm.master.lifecycle import StepInFlight
from xllm.protocol.generation import RequestFailed, RequestFinished
from xllm.protocol.instance import AdmitRequest, CancelRequest, RequestEnded
from xllm.protocol.sampling import SamplingParams
from xllm.router.placement import for_suspects
from xllm.router.state.instructions import SendTo, Wish
from xllm.router.state.request import RequestLife
from xllm.router.state.spec import RequestSpec
from xllm.worker.toy.stream import predict

BLOCK = 4
MAX_LOST = 3


@dataclasses.dataclass
class Asked:
    life: RequestLife
    poison: int
    """The position whose computing ends the worker; -1: none."""
    last: RequestFinished | RequestFailed | None = None


class Instance:
    """A master whose worker can end: it comes back some rounds later, and knows nothing."""

    def __init__(self, name: str, cluster: Cluster, rng: random.Random) -> None:
        self.name = name
        self.cluster = cluster
        self.rng = rng
        self.away = 0
        self.num_lost = 0
        self.options = {
            "max_in_flight": rng.choice([1, 2]),
            "max_num_batched_tokens": rng.choice([5, 16, 64]),
            "max_num_seqs": rng.choice([2, 8, 32]),
            "num_blocks": 60,
            "block_size": BLOCK,
            "strategy": rng.choice(["chunked", "continuous", "prefill-first", "decode-first"]),
        }
        self.engine = ToyInstance(**self.options)

    def is_fatal(self) -> bool:
        """Whether a step under way computes what ends workers."""
        for step in engine_steps(self.engine):
            for seq, item in zip(step.sequences, step.plan.items, strict=True):
                poison = self.cluster.asked[seq.request_id].poison
                if item.start <= poison < item.start + item.num_tokens:
                    return True
        return False

    def check_lone_steps(self) -> None:
        """What is under way with a request that runs alone is nothing but one step of it."""
        steps = engine_steps(self.engine)
        there = {seq.request for step in steps for seq in step.sequences}
        if any(request.runs_alone for request in there):
            assert len(there) == len(steps) == 1
            self.cluster.num_lone_steps += 1

    def turn(self) -> None:
        """One round: plan, and then either settle or end."""
        if self.away:
            self.away -= 1
            return
        engine = self.engine
        while engine.plan():
            pass
        if not engine.in_flight:
            return
        self.check_lone_steps()
        if not self.is_fatal():
            _, output, _ = engine.in_flight.popleft()
            outcome = engine.scheduler.update(output.result, output.frames, engine.now)
            engine.scheduler.check()
            self.cluster.tell(outcome)
            return
        self.num_lost += 1
        shared = engine.scheduler.num_in_steps > 1
        outcome = engine.scheduler.fail_all("unavailable", "the worker ended", "worker_lost")
        self.engine = ToyInstance(**self.options)
        self.away = self.rng.choice([0, 1, 10, 40])
        for word in outcome.ended:
            told = word.code == "worker_lost" and shared
            self.cluster.hear(RequestEnded(word.request_id, word.attempt, word.code, shared=told))


def engine_steps(engine: ToyInstance) -> list[StepInFlight]:
    return list(engine.scheduler._state.steps.values())


class Cluster:
    def __init__(self, rng: random.Random, num_instances: int) -> None:
        self.rng = rng
        self.num_lone_steps = 0
        self.asked: dict[str, Asked] = {}
        self.homeless: list[str] = []
        self.instances = [Instance(f"i{k}", self, rng) for k in range(num_instances)]

    def ask(self, name: str, prompt: list[int], n: int, max_tokens: int, poison: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, n=n, seed=self.rng.randrange(1 << 30))
        spec = RequestSpec(name, 1, "toy", tuple(prompt), params, 1e9, hold_s=0.0)
        outputs = [model().output(params, tuple(prompt)) for _ in range(n)]
        self.asked[name] = Asked(RequestLife(spec, outputs), poison)
        self.do(name, (Wish.PLACE,))

    def do(self, name: str, instructions) -> None:
        asked = self.asked[name]
        for one in instructions:
            if one is Wish.PLACE:
                self.homeless.append(name)
            elif isinstance(one, SendTo):
                self.send(one)
            elif isinstance(one, RequestFinished | RequestFailed):
                assert asked.last is None
                asked.last = one
        asked.life.check()

    def send(self, one: SendTo) -> None:
        engine = next(i.engine for i in self.instances if i.name == one.instance)
        message = one.message
        if isinstance(message, CancelRequest):
            engine.scheduler.cancel(message.request_id, message.attempt, message.choice)
        else:
            assert isinstance(message, AdmitRequest)
            assert engine.scheduler.admit(message, engine.now) is None

    def tell(self, outcome) -> None:
        for item in outcome.items:
            self.do(item.request_id, self.asked[item.request_id].life.tokens(item))
        for ended in outcome.ended:
            self.hear(ended)

    def hear(self, ended: RequestEnded) -> None:
        self.do(ended.request_id, self.asked[ended.request_id].life.engine_ended(ended))

    def place(self) -> None:
        waiting, self.homeless = self.homeless, []
        for name in waiting:
            life = self.asked[name].life
            usable = [one for one in self.instances if not one.away]
            if life.ended:
                continue
            if not usable:
                self.homeless.append(name)
                continue
            if life.is_suspect:
                lives = [one.life for one in self.asked.values()]
                there = Counter(one.instance for one in lives if one.is_suspect and not one.ended)
                usable = for_suspects(usable, life.moves.died_at, there)
            chosen = self.rng.choice(usable).name
            self.do(name, life.place((("both", chosen),), 0.0))

    def run(self) -> None:
        for _ in range(5000):
            self.place()
            for one in self.instances:
                one.turn()
            if all(asked.last is not None for asked in self.asked.values()):
                return
        raise AssertionError({name: one.life.moves for name, one in self.asked.items()})


def run_cluster(seed: int, num_instances: int, num_innocents: int, num_poisoned: int) -> Cluster:
    rng = random.Random(seed)
    cluster = Cluster(rng, num_instances)
    names = [f"r{k}" for k in range(num_innocents)] + [f"p{k}" for k in range(num_poisoned)]
    rng.shuffle(names)
    for name in names:
        length, max_tokens = rng.randrange(1, 30), rng.randrange(5, 30)
        prompt = [rng.randrange(16, 300) for _ in range(length)]
        # Of the last token of an answer nothing is computed.
        poison = rng.randrange(length + max_tokens - 1) if name.startswith("p") else -1
        cluster.ask(name, prompt, rng.choice([1, 1, 3]), max_tokens, poison)
        for _ in range(rng.choice([0, 0, 1, 4])):
            cluster.place()
            for one in cluster.instances:
                one.turn()
    cluster.run()
    return cluster


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 4), st.integers(0, 12), st.integers(0, 2))
def test_innocents_are_answered_and_culprits_are_found(
    seed, num_instances, num_innocents, num_poisoned
):
    cluster = run_cluster(seed, num_instances, num_innocents, num_poisoned)
    for name, asked in cluster.asked.items():
        if asked.poison >= 0:
            assert isinstance(asked.last, RequestFailed), name
            assert asked.last.code == "engine_error"
            assert asked.life.moves.is_convicted
            continue
        assert isinstance(asked.last, RequestFinished), (name, asked.last)
        spec = asked.life.spec
        for choice in range(spec.sampling.n):
            want = predict(
                spec.prompt_ids,
                spec.sampling,
                choice,
                spec.sampling.max_tokens,
                block_size=BLOCK,
            )
            assert list(asked.life.choices[choice].ids) == want
    assert sum(one.num_lost for one in cluster.instances) <= MAX_LOST * num_poisoned


@pytest.mark.parametrize("num_instances", [1, 2])
def test_the_histories_reach_what_they_are_for(num_instances):
    """Innocents are suspected with culprits, and these take three workers each now and then."""
    num_lost, moved, num_lone_steps = set(), 0, 0
    for seed in range(10):
        cluster = run_cluster(seed, num_instances, 12, 1)
        num_lost.add(sum(one.num_lost for one in cluster.instances))
        num_lone_steps += cluster.num_lone_steps
        moved += sum(
            one.life.moves.num_lost >= 2 for one in cluster.asked.values() if one.poison < 0
        )
    assert MAX_LOST in num_lost
    assert moved > 3
    assert num_lone_steps > 20


@pytest.mark.parametrize(
    ("died_at", "there", "want"),
    [
        ("bc", {}, "cb"),
        ("x", {}, "cab"),
        ("", {"a": 1, "c": 2}, "b"),
        ("c", {"c": 1}, "ab"),  # fewest first: where it died is the lesser reason
        ("c", {"c": 1, "a": 1, "b": 1}, "c"),
    ],
)
def test_suspects_go_where_the_fewest_are_and_of_these_where_they_died(died_at, there, want):
    usable = [SimpleNamespace(name=name) for name in "cab"]
    assert [one.name for one in for_suspects(usable, frozenset(died_at), there)] == list(want)
