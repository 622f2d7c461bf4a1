"""The routing policies: tables of what they choose, and what none of them may ever do."""

from __future__ import annotations

import dataclasses
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.config.routing import POLICIES, RoutingSettings
from xllm.errors import ConfigError
from xllm.protocol.bus import InstanceHeartbeat, InstanceLoad, RouterPresence
from xllm.protocol.records import InstanceRecord
from xllm.router.policies.guard import ImbalanceGuard
from xllm.router.policies.kv_load import kv_share
from xllm.router.policies.load import (
    free_blocks,
    num_requests,
    num_waiting,
    queued_tokens,
    takes_more,
)
from xllm.router.policies.make import make_policy
from xllm.router.policies.prefix_aware import CostWeights, PrefixAware, credited_blocks
from xllm.router.policies.question import RouteFigures, RouteQuestion
from xllm.router.policies.session_affinity import rendezvous
from xllm.router.traffic import UNDER_WAY_S, Traffic
from xllm.router.view import ClusterView, InstanceView

BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Held:
    """What an index says of one instance."""

    device: int = 0
    dram: int = 0
    ssd: int = 0


def record(name: str, **more) -> InstanceRecord:
    facts = {"max_model_len": 4096, "vocab_size": 320, "block_size": BLOCK, "num_blocks": 1000}
    addresses = {"incarnation": "1", "endpoint": "", "bus_endpoint": "", "model_path": ""}
    return InstanceRecord(name=name, model="m", **{**facts, **addresses, **more})


def instance(name: str, inflight: int = 0, max_num_seqs: int = 0, **load: int) -> InstanceView:
    load = {"num_blocks": 1000, "num_free_blocks": 1000, **load}
    one = InstanceView(record(name, max_num_seqs=max_num_seqs), connected=True, state="ready")
    one.load = InstanceLoad(**load)
    one.num_inflight = inflight
    return one


def policy(name: str, figures: RouteFigures | None = None, **settings):
    return make_policy(name, RoutingSettings(**settings), figures or RouteFigures())


def chosen(one, candidates, ask: RouteQuestion | None = None) -> str:
    [(role, name)] = one.choose(candidates, ask or RouteQuestion(100, BLOCK))
    assert role == "both"
    return name


def ready_view(*names: str) -> tuple[ClusterView, Traffic]:
    view = ClusterView(0.2)
    for name in names:
        view.registered(record(name), 0.0)
        view.connected(name)
        view.heartbeat(InstanceHeartbeat(name, "1", 1, "ready"), 0.0)
    return view, Traffic(view)


# -- how busy an instance is ------------------------------------------------------------------


def test_a_heartbeat_is_brought_forward_by_what_was_sent_and_what_ended():
    view, traffic = ready_view("a")
    one = view.get("a")
    traffic.placed("a", 100, 1.0)
    traffic.placed("a", 50, 1.0)
    assert (num_requests(one), queued_tokens(one)) == (2, 150)
    load = InstanceLoad(num_running=7, waiting_tokens=30)  # five are of another router
    word = InstanceHeartbeat("a", "1", 2, "ready", load=load)
    view.heartbeat(word, 1.2)
    traffic.heartbeat(word, 1.2)
    assert (num_requests(one), queued_tokens(one)) == (7, 30)
    traffic.left("a")
    assert num_requests(one) == 6
    traffic.placed("a", 40, 1.3)
    traffic.placed("a", 40, 1.3)
    assert (num_requests(one), queued_tokens(one)) == (8, 110)


def test_what_was_under_way_when_a_heartbeat_was_made_still_counts():
    view, traffic = ready_view("a")
    traffic.placed("a", 100, 1.0)
    traffic.placed("a", 64, 1.2 - UNDER_WAY_S / 2)
    word = InstanceHeartbeat("a", "1", 2, "ready", load=InstanceLoad(num_running=1))
    view.heartbeat(word, 1.2)
    traffic.heartbeat(word, 1.2)
    one = view.get("a")
    assert (num_requests(one), queued_tokens(one)) == (2, 64)


def test_requests_of_other_routers_count_while_they_speak():
    view, traffic = ready_view("a", "b")
    traffic.presence(RouterPresence("r2", "1", 1, (("a", 3), ("gone", 9))), 1.0)
    traffic.presence(RouterPresence("r3", "1", 1, (("a", 4),)), 1.1)
    assert (num_requests(view.get("a")), num_requests(view.get("b"))) == (7, 0)
    traffic.forget(5.0)
    traffic.heartbeat(InstanceHeartbeat("a", "1", 2, "ready"), 5.0)
    assert num_requests(view.get("a")) == 0


def test_a_full_instance_is_believed_until_it_speaks_or_has_one_less():
    view, traffic = ready_view("a")
    one = view.get("a")
    for _ in range(3):
        traffic.placed("a", 1, 1.0)
    for num_left in (2, 1):
        traffic.refused("a")
        assert not takes_more(one, 64)
        traffic.left("a")  # the one that was refused
        assert one.num_inflight == num_left
        assert not takes_more(one, 64)
    traffic.left("a")  # one that ran
    assert takes_more(one, 64)
    traffic.refused("a")  # others fill it
    assert not takes_more(one, 0)
    traffic.heartbeat(InstanceHeartbeat("a", "1", 2, "ready"), 1.1)
    assert takes_more(one, 0)


def test_who_waits_is_beyond_what_runs_at_once():
    assert num_waiting(instance("a", inflight=900)) == 0  # it did not say what it can run
    assert num_waiting(instance("a", inflight=300, max_num_seqs=256)) == 44
    assert num_waiting(instance("a", inflight=200, max_num_seqs=256)) == 0
    assert num_waiting(instance("a", num_waiting=5, num_running=20, max_num_seqs=256)) == 5
    assert num_waiting(instance("a", num_waiting=5)) == 5
    assert takes_more(instance("a", num_waiting=5), 6)
    assert not takes_more(instance("a", num_waiting=5), 5)
    assert takes_more(instance("a", num_waiting=5), 0)


def test_blocks_promised_since_the_last_heartbeat_are_not_free():
    one = instance("a", num_free_blocks=10)
    one.unseen_tokens = 33
    assert free_blocks(one, BLOCK) == 7
    assert free_blocks(InstanceView(record("a")), BLOCK) == 1000


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


# -- sessions ---------------------------------------------------------------------------------


def test_a_session_stays_while_its_instance_is_there():
    figures = RouteFigures()
    one = policy("least-load", figures)
    candidates = [instance(f"i{k}") for k in range(5)]
    ask = RouteQuestion(10, BLOCK, session="talk 1", tenant="t")
    home = chosen(one, candidates, ask)
    assert {chosen(one, candidates, ask) for _ in range(9)} == {home}
    assert figures.chosen == {"session": 10}
    others = [each for each in candidates if each.name != home]
    second = chosen(one, others, ask)
    assert {chosen(one, others, ask) for _ in range(9)} == {second}
    assert chosen(one, candidates, ask) == home


def test_a_session_leaves_an_instance_that_is_overrun():
    figures = RouteFigures()
    one = policy("least-load", figures, guard_requests=4)
    candidates = [instance(f"i{k}") for k in range(3)]
    ask = RouteQuestion(10, BLOCK, session="s")
    home = chosen(one, candidates, ask)
    next(each for each in candidates if each.name == home).num_inflight = 50
    assert chosen(one, candidates, ask) != home
    assert (figures.num_yields, figures.chosen["load"]) == (1, 1)


def test_sessions_can_be_turned_off():
    one = policy("least-load", sessions="none")
    candidates = [instance(f"i{k}") for k in range(3)]
    ask = RouteQuestion(10, BLOCK, session="s")
    assert len({chosen(one, candidates, ask) for _ in range(3)}) == 3


def test_tenants_do_not_share_sessions():
    names = [f"i{k}" for k in range(16)]
    homes = {rendezvous(names, f"t{k}", "s") for k in range(64)}
    assert len(homes) > 8
    assert rendezvous(names, "ab", "c") != rendezvous(names, "a", "bc")


@pytest.mark.parametrize("num", [2, 5, 8, 32])
def test_few_sessions_move_when_an_instance_joins_or_leaves(num):
    names = [f"instance-{k}" for k in range(num)]
    sessions = [f"s{k}" for k in range(2000)]
    before = {session: rendezvous(names, "t", session) for session in sessions}
    joined = {session: rendezvous([*names, "new"], "t", session) for session in sessions}
    moved = [session for session in sessions if joined[session] != before[session]]
    assert all(joined[session] == "new" for session in moved)
    assert len(moved) <= 2000 / (num + 1) * 1.5
    left = {session: rendezvous(names[1:], "t", session) for session in sessions}
    moved = [session for session in sessions if left[session] != before[session]]
    assert all(before[session] == names[0] for session in moved)
    assert max(Counter(before.values()).values()) <= 2000 / num * 1.5


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
