"""The routing policies: tables of what they choose, and what none of them may ever do."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.router.policy_questions import BLOCK, Held, chosen, instance, policy, ready_view
from xllm.config.routing import POLICIES
from xllm.errors import ConfigError
from xllm.protocol.bus import InstanceHeartbeat, InstanceLoad
from xllm.router.policies.guard import ImbalanceGuard
from xllm.router.policies.kv_load import kv_share
from xllm.router.policies.load import free_blocks, num_requests, queued_tokens
from xllm.router.policies.prefix_aware import CostWeights, PrefixAware, credited_blocks
from xllm.router.policies.question import RouteFigures, RouteQuestion

# -- what each chooses ------------------------------------------------------------------------


def test_least_load_counts_what_it_sent_and_what_others_sent():
    view, traffic = ready_view("a", "b", "c")
    word = InstanceHeartbeat("a", "1", 2, "ready", load=InstanceLoad(num_running=4))
    view.heartbeat(word, 0.1)
    traffic.placed("b", 1, 0.2)
    least = policy("least-load")
    names = []
    for _ in range(6):
        names.append(chosen(least, view.usable("m")))
        traffic.placed(names[-1], 0, 0.2)
    assert names == ["c", "c", "b", "c", "b", "c"]  # of equals, the fewer queued tokens


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"random"}))
def test_equals_are_taken_in_turn(name):
    one = policy(name)
    candidates = [instance(letter) for letter in "abc"]
    assert {chosen(one, candidates) for _ in range(3)} == {"a", "b", "c"}


def test_round_robin_goes_on_where_one_is_missing():
    turns = policy("round-robin")
    everybody = [instance("b"), instance("a"), instance("c")]
    assert [chosen(turns, everybody) for _ in range(4)] == ["a", "b", "c", "a"]
    assert chosen(turns, [instance("a"), instance("c")]) == "c"


def test_random_can_be_repeated_and_reaches_everybody():
    candidates = [instance(f"i{k}") for k in range(8)]

    def draws(seed: int) -> list[str]:
        one = policy("random", random_seed=seed)
        return [chosen(one, candidates) for _ in range(400)]

    assert draws(1) == draws(1) != draws(2)
    assert min(Counter(draws(3)).values()) > 20
    assert len(set(draws(3))) == 8


def test_kv_load_counts_what_the_prompt_will_take():
    ask = RouteQuestion(100 * BLOCK, BLOCK, {"a": Held(device=90)})
    a, b = instance("a", num_free_blocks=500), instance("b", num_free_blocks=560)
    assert kv_share(a, ask) == pytest.approx(0.51)
    assert kv_share(b, ask) == pytest.approx(0.54)
    assert chosen(policy("kv-load"), [a, b], ask) == "a"
    assert chosen(policy("kv-load"), [a, b]) == "b"
    queue = instance("b", num_free_blocks=560, waiting_tokens=900 * BLOCK)
    assert kv_share(queue, ask) > 1
    assert chosen(policy("kv-load"), [a, queue]) == "a"


def test_tiers_count_beyond_the_faster_ones():
    weights = CostWeights(dram_credit=0.75, ssd_credit=0.5)
    for held, blocks in (
        (Held(4), 4),
        (Held(0, 4), 3),
        (Held(0, 0, 4), 2),
        (Held(4, 4, 4), 4),
        (Held(2, 6, 10), 2 + 3 + 2),
        (Held(6, 2, 1), 6),
    ):
        assert credited_blocks(held, weights) == blocks


PREFIX_TABLE = [
    # requests and queued tokens of a and b, blocks cached at each, who is chosen
    ((0, 0), (0, 0), Held(10), None, "a", "a prefix on an idle cluster"),
    ((3, 0), (0, 0), Held(10), None, "a", "a long prefix is worth three requests"),
    ((3, 0), (0, 0), Held(1), None, "b", "a short one is not"),
    ((0, 600), (0, 0), Held(20), None, "a", "what is computed again costs others, too"),
    ((0, 700), (0, 0), Held(20), None, "b", "the queue before the blocks is the dearer part"),
    ((1, 0), (0, 0), None, None, "b", "nothing is cached: by load, never by zero"),
    ((0, 0), (0, 0), Held(10), Held(0, 12), "a", "device before DRAM"),
    ((0, 0), (0, 0), Held(0, 12), Held(0, 0, 12), "a", "DRAM before disk"),
    ((0, 0), (0, 0), Held(8), Held(0, 20), "b", "but more blocks in DRAM are worth more"),
    ((0, 0), (0, 0), Held(8), Held(8, 20), "b", "both tiers of one instance add up"),
]


@pytest.mark.parametrize(("a", "b", "at_a", "at_b", "winner"), [row[:5] for row in PREFIX_TABLE],
                         ids=[row[5] for row in PREFIX_TABLE])  # fmt: skip
def test_prefix_aware(a, b, at_a, at_b, winner):
    candidates = [
        instance(name, num_running=running, waiting_tokens=tokens)
        for name, (running, tokens) in (("a", a), ("b", b))
    ]
    cached = {name: held for name, held in (("a", at_a), ("b", at_b)) if held is not None}
    figures = RouteFigures()
    ask = RouteQuestion(32 * BLOCK, BLOCK, cached)
    assert chosen(policy("prefix-aware", figures), candidates, ask) == winner
    held = cached.get(winner)
    assert figures.hit_blocks == (max(held.device, held.dram, held.ssd) if held else 0)
    reason = "prefix" if held else "elsewhere" if cached else "load"
    assert figures.chosen == {reason: 1}


def test_prefix_aware_minds_memory_that_is_not_there():
    full = instance("a", num_free_blocks=2)
    roomy = instance("b", num_running=8)
    ask = RouteQuestion(32 * BLOCK, BLOCK)
    assert chosen(policy("prefix-aware"), [full, roomy], ask) == "b"
    ask = RouteQuestion(32 * BLOCK, BLOCK, {"a": Held(32)})  # it needs no more blocks there
    assert chosen(policy("prefix-aware"), [full, roomy], ask) == "a"


def test_one_wholly_cached_prompt_still_computes_a_token():
    one = PrefixAware(CostWeights(), ImbalanceGuard(8, 1.5), RouteFigures())
    ask = RouteQuestion(32, BLOCK, {"a": Held(9)})
    assert one.costs([instance("a")], ask) == ([0], [CostWeights().prefill_weight])


FIGURES = st.tuples(*(st.integers(0, most) for most in (40, 40, 9, 9, 3000, 3000, 1200, 1)))


@given(st.lists(st.tuples(FIGURES, st.none() | st.tuples(*(st.integers(0, 90),) * 3)), min_size=1))
def test_all_costs_at_once_are_what_the_page_says_of_each(facts):
    weights = CostWeights()
    candidates, cached = [], {}
    for number, ((running, inflight, then, waiting, unseen, queue, free, says), held) in enumerate(
        facts
    ):
        one = instance(f"i{number}", inflight, num_blocks=1000 * says, num_free_blocks=free)
        load = {"num_running": running, "num_waiting": waiting, "waiting_tokens": queue}
        one.load = msgspec.structs.replace(one.load, **load) if says else InstanceLoad(**load)
        one.inflight_then, one.unseen_tokens, one.num_elsewhere = then, unseen, waiting * then
        candidates.append(one)
        if held is not None:
            cached[one.name] = Held(*held)
    ask = RouteQuestion(1000, BLOCK, cached)
    loads, costs = PrefixAware(weights, ImbalanceGuard(8, 1.5), RouteFigures()).costs(
        candidates, ask
    )
    assert loads == [num_requests(one) for one in candidates]
    for one, cost in zip(candidates, costs, strict=True):
        held = cached.get(one.name, Held())
        left = max(1, 1000 - BLOCK * credited_blocks(held, weights))
        short = -(-1000 // BLOCK) - held.device - free_blocks(one, BLOCK)
        wanted = weights.prefill_weight * left + queued_tokens(one)
        wanted += weights.decode_tokens * num_requests(one) + BLOCK * max(0, short)
        assert cost == pytest.approx(wanted)


def test_affinity_yields_to_the_guard():
    figures = RouteFigures()
    one = policy("prefix-aware", figures, guard_requests=4, guard_ratio=1.5)
    ask = RouteQuestion(2048 * BLOCK, BLOCK, {"a": Held(2048)})
    hot = instance("a", inflight=5)
    assert chosen(one, [hot, instance("b"), instance("c")], ask) in "bc"
    assert figures.num_yields == 1
    hot.num_inflight = 4
    assert chosen(one, [hot, instance("b"), instance("c")], ask) == "a"
    assert figures.num_yields == 1


def test_requests_that_no_heartbeat_knows_bound_affinity_too():
    """A thousand requests with one prefix within one heartbeat's period."""
    view, traffic = ready_view(*(f"i{k}" for k in range(8)))
    one = policy("prefix-aware", guard_requests=8, guard_ratio=1.5, decode_tokens=0)
    ask = RouteQuestion(256 * BLOCK, BLOCK, {"i0": Held(256)})
    for _ in range(1000):
        traffic.placed(chosen(one, view.usable("m"), ask), 1, 1.0)
    counts = [num_requests(each) for each in view]
    assert sum(counts) == 1000
    assert max(counts) <= max(min(counts) + 8, 1.5 * sum(counts) / 8) + 1


# -- what holds for all -----------------------------------------------------------------------

LOADS = st.builds(
    instance,
    st.sampled_from("abcdefgh"),
    st.integers(0, 400),
    st.sampled_from((0, 4, 256)),
    num_waiting=st.integers(0, 300),
    num_running=st.integers(0, 256),
    num_free_blocks=st.integers(0, 1000),
    waiting_tokens=st.integers(0, 50_000),
)
CANDIDATES = st.lists(LOADS, min_size=1, max_size=8, unique_by=lambda one: one.name)
HELD = st.builds(Held, st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
ASKS = st.builds(
    RouteQuestion,
    st.integers(1, 5000),
    st.just(BLOCK),
    st.dictionaries(st.sampled_from("abcdefghxy"), HELD),
    st.sampled_from(("", "s1", "s2")),
)


@given(st.sampled_from(POLICIES), st.booleans(), CANDIDATES, st.lists(ASKS, min_size=1, max_size=5))
def test_whoever_is_chosen_was_a_candidate(name, with_sessions, candidates, asks):
    """Unusable instances are never candidates; what an index still says of them tempts nobody."""
    figures = RouteFigures()
    one = policy(name, figures, sessions="named" if with_sessions else "none")
    for ask in asks:
        assert chosen(one, candidates, ask) in {each.name for each in candidates}
    assert sum(figures.chosen.values()) == len(asks)


@given(CANDIDATES, ASKS, st.integers(0, 50), st.floats(1, 4))
def test_affinity_never_passes_the_guards_bound(candidates, ask, spread, ratio):
    figures = RouteFigures()
    one = policy("prefix-aware", figures, guard_requests=spread, guard_ratio=ratio)
    name = chosen(one, candidates, ask)
    loads = {each.name: num_requests(each) for each in candidates}
    limit = max(min(loads.values()) + spread, ratio * sum(loads.values()) / len(loads))
    if {"prefix", "session"} & figures.chosen.keys() and len(candidates) > 1:
        assert loads[name] <= limit + 1e-9


@given(CANDIDATES, st.integers(0, 50), st.floats(1, 4))
def test_the_guard_always_leaves_somebody(candidates, spread, ratio):
    allowed = ImbalanceGuard(spread, ratio).within(candidates)
    assert allowed
    least = min(num_requests(each) for each in candidates)
    assert least in {num_requests(each) for each in allowed}


def test_unknown_policies_are_refused():
    with pytest.raises(ConfigError) as caught:
        policy("best")
    assert caught.value.param == "router.policy"
