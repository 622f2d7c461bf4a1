"""Nobody starves: the bounds of docs/scheduling.md, held by whole schedulers under load that does
not end before the bound is due."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.master.toy_instance import ToyInstance
from xllm.config.scheduling import COMBINATIONS
from xllm.master.strategies.fairness import bound
from xllm.master.strategies.phases import DECODE_STREAK, PREFILL_STREAK
from xllm.protocol.step import ItemKind

TENANTS = ("a", "b", "c")
LONGEST, OUTPUT = 40, 12


class Loaded(ToyInstance):
    """Memory enough, and requests that keep coming."""

    def __init__(self, rng, **options) -> None:
        defaults = {"num_blocks": 600, "num_slots": 64, "max_mappings": 10_000, "max_num_seqs": 6}
        super().__init__(**{**defaults, "max_num_batched_tokens": 24, **options})
        self.rng = rng
        self.num_admitted = 0

    def admit_some(self, count, tenants=("a",), **fields) -> None:
        for _ in range(count):
            self.num_admitted += 1
            name = f"r{self.num_admitted}"
            # The first ids of a prompt are its number: prompts tell who they belong to.
            prompt = [*divmod(self.num_admitted, 100)]
            prompt += [self.rng.randrange(1000) for _ in range(self.rng.randrange(LONGEST - 2))]
            tokens = self.rng.randrange(1, OUTPUT + 1)
            tenant = self.rng.choice(tenants)
            refusal = self.admit(
                name, prompt, max_tokens=tokens, ignore_eos=True, tenant=tenant, **fields
            )
            assert refusal is None

    def started(self, plan) -> list[int]:
        """Numbers of the requests that a plan introduces."""
        return [100 * new.prompt_ids[0] + new.prompt_ids[1] for new in plan.new]

    def streaming(self) -> dict[tuple, int]:
        """Tokens so far of those that have some and have not ended."""
        return {key: len(s.tokens) for key, s in self.streams.items() if not s.reason}


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from(["chunked", "continuous", "zero-evict"]))
def test_every_stream_moves_in_every_step_and_starts_in_its_order(seed, strategy):
    rng = random.Random(seed)
    one = Loaded(rng, strategy=strategy, max_num_batched_tokens=64)
    order: list[int] = []
    for _ in range(60):
        one.admit_some(rng.choice([0, 0, 1, 3]))
        before = one.streaming()
        one.step()
        for key, count in before.items():
            assert len(one.streams[key].tokens) == count + 1, key
    one.run()
    for plan in one.plans:
        order += one.started(plan)
    assert order == list(range(1, one.num_admitted + 1))


@pytest.mark.parametrize("depth", [1, 2])
def test_prompts_go_first_only_so_often_in_a_row(depth):
    one = Loaded(random.Random(1), strategy="prefill-first", max_num_seqs=64, max_in_flight=depth)
    since: dict[tuple, int] = {}
    worst = 0
    one.admit_some(4)
    for _ in range(200):
        if len(one.requests) - len(one.ended) < 60:
            one.admit_some(2)
        before = one.streaming()
        one.step()
        for key, count in before.items():
            moved = len(one.streams[key].tokens) > count
            since[key] = 0 if moved else since.get(key, 0) + 1
            worst = max(worst, since[key])
    assert PREFILL_STREAK // 2 < worst <= PREFILL_STREAK + depth - 1
    one.run()


@pytest.mark.parametrize("depth", [1, 2])
def test_tokens_go_first_only_so_often_in_a_row(depth):
    one = Loaded(random.Random(2), strategy="decode-first", max_num_seqs=64, max_in_flight=depth)
    one.admit_some(8)
    waits = worst = 0
    for _ in range(200):
        one.admit_some(1 if len(one.requests) - len(one.ended) < 40 else 0)
        can_run = bool(one.scheduler.statistics().waiting_tokens)
        planned = len(one.plans)
        one.step()
        for plan in one.plans[planned:]:
            has_prompts = any(item.kind != ItemKind.DECODE for item in plan.items)
            waits = 0 if has_prompts or not can_run else waits + 1
            worst = max(worst, waits)
    assert DECODE_STREAK // 2 < worst <= DECODE_STREAK
    one.run()


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 1 << 30))
def test_who_is_late_by_an_objective_starts_before_all_with_later_deadlines(seed):
    rng = random.Random(seed)
    one = Loaded(rng, strategy="slo-urgency", max_num_seqs=2)
    due: dict[int, tuple[float, float]] = {}
    waiting: set[int] = set()
    num_late = 0
    for _ in range(40):
        ttft_ms = rng.choice([10, 50, 400])
        one.admit_some(1, ttft_ms=ttft_ms, tpot_ms=50, priority=rng.choice([0, 0, 6]))
        due[one.num_admitted] = (one.now + ttft_ms / 1000, ttft_ms / 1000)
        waiting.add(one.num_admitted)
        planned = len(one.plans)
        one.step()
        for plan in one.plans[planned:]:
            for number in one.started(plan):
                waiting.discard(number)
                for other in waiting:
                    deadline, objective = due[other]
                    late = one.now - deadline > objective
                    num_late += late
                    assert not late or deadline >= due[number][0]
    one.run()
    assert num_late


@pytest.mark.parametrize(
    "strategy", [name for name, row in COMBINATIONS.items() if "tenant" in row.fairness]
)
@pytest.mark.parametrize("weights", ["", "a=2"])
def test_tenants_that_always_wait_stay_close(strategy, weights):
    rng = random.Random(strategy)
    one = Loaded(rng, num_blocks=24, strategy=strategy, fairness="tenant", tenant_weights=weights)
    counters = one.scheduler._state.policy.counters
    limit = bound(LONGEST, 24 * 4)
    counts = [0.0]
    for _ in range(2000):
        waiting = [seq.request.message.tenant for seq in one.scheduler._state.waiting]
        for tenant in TENANTS:
            one.admit_some(max(0, 7 - waiting.count(tenant)), tenants=(tenant,))
        assert one.step()
        counts = [counters.count(tenant) for tenant in TENANTS]
        assert max(counts) - min(counts) <= limit
        if min(counts) > 2 * limit:
            break
    assert min(counts) > 2 * limit
    one.run()


@pytest.mark.parametrize("preemption", ["auto", "recompute", "pause"])
@pytest.mark.parametrize("depth", [1, 2])
def test_offline_requests_end_once_online_ones_leave_them_seats(preemption, depth):
    rng = random.Random(preemption)
    one = Loaded(rng, preemption=preemption, max_num_seqs=2, max_in_flight=depth)
    one.admit_some(4, offline=True)
    for _ in range(40):
        one.step()
        one.admit_some(1 if len(one.requests) - len(one.ended) < 8 else 0)
    one.run()
    assert all(end.code == "" for end in one.ended.values())
    assert len(one.ended) == one.num_admitted
