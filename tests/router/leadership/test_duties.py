"""What the leader decides and what everybody believes of it, without sockets: the role table, the
mirror, live objectives, standings."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.errors import InvalidRequestError
from xllm.protocol.authority import PeerRole
from xllm.protocol.bus import (
    MAX_EXPERT_LOAD_BYTES,
    DaemonHeartbeat,
    InstanceHeartbeat,
    InstanceLoad,
)
from xllm.protocol.epochs import MAX_BASE, raised_base, read_base
from xllm.protocol.generation import SubmitRequest
from xllm.protocol.records import experts_key, kv_key, load_key
from xllm.protocol.registry.interface import MAX_GUARDED_WRITES
from xllm.router.leadership.mirror import Mirror
from xllm.router.leadership.objectives import (
    LiveObjectives,
    ServiceObjectives,
    amend_objectives,
    read_objectives,
    restore_objectives,
)
from xllm.router.leadership.roles import (
    MAX_ROWS,
    TELL_AGAIN_S,
    RoleTable,
    decode_roles,
    restore_rows,
)

# -- roles ---------------------------------------------------------------------------------------


def test_everybody_is_told_once_a_term_and_again_where_it_did_not_help():
    table = RoleTable()
    table.begin(b'{"a": "prefill"}')
    there = [("a", "1", "both"), ("b", "1", "both")]
    assert table.due(there, 0.0) == [("a", "prefill"), ("b", "both")]
    for name, role in table.due(there, 0.0):
        table.told(name, "1", role, 0.0)
    assert table.due(there, TELL_AGAIN_S / 2) == []
    assert table.due(there, TELL_AGAIN_S) == [("a", "prefill")]
    there[0] = ("a", "1", "prefill")
    assert table.due(there, 100.0) == []
    there[1] = ("b", "2", "both")  # another incarnation heard nothing yet
    assert table.due(there, 100.0) == [("b", "both")]
    table.begin(table.encode())
    assert len(table.due(there, 100.0)) == 2, "a new epoch is told to all"


def there(table, name):
    """An instance is there, and was told its role."""
    table.told(name, "1", "both", 0.0)
    table.registered(name)


def test_rows_that_say_nothing_go_with_their_instances():
    table = RoleTable()
    table.begin(b'{"dead": "both", "away": "decode"}')
    assert table.is_changed
    assert table.rows == (("away", "decode"),)
    for name in ("a", "b"):
        table.registered(name)
        assert table.rows == (("away", "decode"),), "nobody was told yet"
    for name in ("a", "b"):
        there(table, name)
    table.assign("b", "prefill")
    table.written(table.encode())
    table.gone("b")
    assert not table.is_changed
    table.gone("a")
    assert table.is_changed
    assert table.rows == (("away", "decode"), ("b", "prefill"))


def test_a_table_is_written_until_the_registry_has_it():
    table = RoleTable()
    table.begin(b"")
    there(table, "a")
    there(table, "a")
    assert table.is_changed
    old = table.encode()
    table.assign("a", "decode")
    table.written(old)
    assert table.is_changed, "what was written is older"
    table.written(table.encode())
    assert not table.is_changed
    table.assign("a", "decode")
    assert not table.is_changed
    assert decode_roles(table.encode()) == {"a": "decode"}


@pytest.mark.parametrize(
    ("name", "role", "param"),
    [
        ("", "both", "instance"),
        ("a" * 201, "both", "instance"),
        ("a", "boss", "role"),
        ("a", "", "role"),
    ],
)
def test_rows_are_bounded(name, role, param):
    table = RoleTable()
    with pytest.raises(InvalidRequestError) as caught:
        table.assign(name, role)
    assert caught.value.param == param
    assert table.rows == ()


def test_a_full_table_takes_no_more_rows():
    table = RoleTable()
    for number in range(MAX_ROWS + 5):
        there(table, f"i{number}")
    assert len(table.rows) == MAX_ROWS
    with pytest.raises(InvalidRequestError, match=str(MAX_ROWS)):
        table.assign("more", "both")


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_value_is_a_table_or_an_error(value):
    table = RoleTable()
    table.begin(b'{"a": "decode"}')
    before = table.rows
    try:
        table.begin(value)
    except InvalidRequestError:
        assert table.rows == before


LOST = (("a", "decode"), ("b", "both"), ("c", "prefill"))


@pytest.mark.parametrize(
    ("value", "restored"),
    [
        (None, {"a": "decode", "c": "prefill"}),
        (b"", {"a": "decode", "c": "prefill"}),
        (b"{}", {"a": "decode", "c": "prefill"}),
        (b'{"a":"both","d":"decode"}', {"a": "both", "c": "prefill", "d": "decode"}),
    ],
)
def test_rows_that_were_lost_come_back_and_those_written_since_stay(value, restored):
    table, num_left_out = restore_rows(value, LOST)
    assert (decode_roles(table), num_left_out) == (restored, 0)


def test_a_table_that_lacks_no_lost_row_is_left_as_it_is():
    for value in (None, b"", b"no table", b'{"a":"prefill","c":"both"}'):
        assert restore_rows(value, LOST if value else LOST[1:2]) == (value, 0)


def test_lost_rows_go_before_rows_that_say_nothing_and_those_without_room_are_counted():
    lost = [("a", "prefill"), ("b", "both"), ("c", "decode"), ("d", "decode")]
    full = {f"i{number}": "decode" for number in range(MAX_ROWS)}
    table, num_left_out = restore_rows(msgspec.json.encode(full), lost)
    assert (decode_roles(table), num_left_out) == (full, 3)
    full.update(i3="both", i5="both")
    table, num_left_out = restore_rows(msgspec.json.encode(full), lost)
    telling = {name: role for name, role in full.items() if role != "both"}
    assert (decode_roles(table), num_left_out) == ({**telling, "a": "prefill", "c": "decode"}, 1)


# -- the mirror ----------------------------------------------------------------------------------


def beat(name, seq=1, running=0, experts=b""):
    load = InstanceLoad(num_running=running)
    return InstanceHeartbeat(name, "1", seq, "ready", load=load, expert_load=experts)


def test_only_what_changed_is_written_and_what_is_gone_is_deleted():
    mirror = Mirror("c")
    mirror.begin([load_key("c", "dead"), experts_key("c", "dead")])
    mirror.heard(beat("a"))
    puts, deletes = mirror.batch()
    assert [key for key, _ in puts] == [load_key("c", "a")]
    assert msgspec.json.decode(puts[0][1])["state"] == "ready"
    assert set(deletes) == {load_key("c", "dead"), experts_key("c", "dead")}
    assert mirror.batch() == (puts, deletes), "until it is known to be done"
    mirror.wrote(puts, deletes, 1.0)
    mirror.heard(beat("a", seq=2))
    assert mirror.batch() == ([], [])
    mirror.heard(beat("a", seq=3, running=1, experts=b"x" * MAX_EXPERT_LOAD_BYTES))
    puts, deletes = mirror.batch()
    assert [key for key, _ in puts] == [experts_key("c", "a"), load_key("c", "a")]
    mirror.wrote(puts, deletes, 2.0)
    mirror.gone(PeerRole.MASTER, "a")
    puts, deletes = mirror.batch()
    assert puts == []
    assert set(deletes) == {load_key("c", "a"), experts_key("c", "a")}


def test_what_is_cached_is_mirrored_as_a_digest():
    mirror = Mirror("c")
    mirror.heard(DaemonHeartbeat("d", "1", 1, num_cached=3, digest=0xAB))
    mirror.heard(DaemonHeartbeat("old", "1", 1))
    mirror.heard(msgspec.structs.replace(beat("a"), num_cached=0))
    puts, _ = mirror.batch()
    values = {key: value for key, value in puts if "/kv/" in key}
    assert set(values) == {kv_key("c", "a"), kv_key("c", "d")}
    found = msgspec.json.decode(values[kv_key("c", "d")])
    assert found == {"num_cached": 3, "digest": "00000000000000ab"}
    mirror.wrote(puts, [], 1.0)
    mirror.gone(PeerRole.DAEMON, "d")
    assert mirror.batch() == ([], [kv_key("c", "d")])


def test_a_daemon_of_an_instances_name_changes_and_removes_none_of_its_keys():
    mirror = Mirror("c")
    first = msgspec.structs.replace(beat("a"), num_cached=2, digest=1)
    forged = DaemonHeartbeat("a", "1", 2, num_cached=9, digest=0xAB)
    mirror.heard(forged)  # before the instance says a word
    mirror.heard(first)
    mirror.heard(forged)
    mirror.gone(PeerRole.DAEMON, "a")
    puts, deletes = mirror.batch()
    values = dict(puts)
    assert set(values) == {kv_key("c", "a"), load_key("c", "a")}
    assert msgspec.json.decode(values[kv_key("c", "a")])["num_cached"] == 2
    mirror.wrote(puts, deletes, 1.0)
    mirror.gone(PeerRole.MASTER, "a")
    mirror.heard(forged)
    puts, deletes = mirror.batch()
    assert ([key for key, _ in puts], deletes) == ([kv_key("c", "a")], [load_key("c", "a")])


def test_a_report_that_is_too_large_is_counted_and_left_out():
    mirror = Mirror("c")
    mirror.heard(beat("a", experts=b"x" * (MAX_EXPERT_LOAD_BYTES + 1)))
    assert [key for key, _ in mirror.batch()[0]] == [load_key("c", "a")]
    assert mirror.num_oversized == 1


def test_batches_are_bounded_and_everybody_has_a_turn():
    mirror = Mirror("c")
    names = [f"i{number:03}" for number in range(3 * MAX_GUARDED_WRITES)]
    mirror.begin([load_key("c", f"dead{number}") for number in range(MAX_GUARDED_WRITES + 8)])
    left = {load_key("c", name) for name in names}
    for turn in range(1, 6):
        for name in names:
            mirror.heard(beat(name, seq=turn, running=turn))
        puts, deletes = mirror.batch()
        assert 0 < len(puts) + len(deletes) <= MAX_GUARDED_WRITES
        mirror.wrote(puts, deletes, float(turn))
        left -= {key for key, _ in puts}
    assert left == set()


# -- objectives ----------------------------------------------------------------------------------


def test_objectives_fill_what_a_request_leaves_open():
    live = LiveObjectives()
    request = SubmitRequest(id=1, prompt="x", tpot_ms=7)
    assert live.fill(request) is request
    live.changed(b'{"ttft_ms": 500, "tpot_ms": 50}')
    filled = live.fill(request)
    assert (filled.ttft_ms, filled.tpot_ms) == (500, 7)
    vector = SubmitRequest(id=1, prompt="x", embed=True)
    assert live.fill(vector) is vector
    live.changed(None)
    assert live.fill(request) is request


@pytest.mark.parametrize(
    ("standing", "ttft_ms", "tpot_ms", "written"),
    [
        (None, 500, 50, b'{"ttft_ms":500,"tpot_ms":50}'),
        (None, 500, None, b'{"ttft_ms":500,"tpot_ms":0}'),
        (None, None, None, None),
        (None, 0, None, None),
        (b'{"tpot_ms": 50}', 500, None, b'{"ttft_ms":500,"tpot_ms":50}'),
        (b'{"ttft_ms": 500, "tpot_ms": 50}', None, 70, b'{"ttft_ms":500,"tpot_ms":70}'),
        (b'{"ttft_ms":500,"tpot_ms":50}', None, None, b'{"ttft_ms":500,"tpot_ms":50}'),
        (b'{"ttft_ms": 500}', 0, None, b'{"ttft_ms":0,"tpot_ms":0}'),
        (b"fast", 500, 50, b'{"ttft_ms":500,"tpot_ms":50}'),
    ],
)
def test_what_is_not_named_stays_as_it_is(standing, ttft_ms, tpot_ms, written):
    assert amend_objectives(standing, ttft_ms, tpot_ms) == written


@pytest.mark.parametrize(
    ("standing", "ttft_ms", "tpot_ms", "field"),
    [(None, -1, None, "ttft_ms"), (b"{}", None, 3_600_001, "tpot_ms"), (b"fast", 500, None, "slo")],
)
def test_what_cannot_be_set_or_left_is_refused(standing, ttft_ms, tpot_ms, field):
    with pytest.raises(InvalidRequestError, match=field):
        amend_objectives(standing, ttft_ms, tpot_ms)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"[]",
        b"fast",
        b"\xff",
        b'{"ttft_ms": -1}',
        b'{"tpot_ms": 3600001}',
        b'{"ttft": 5}',
        b'{"ttft_ms": 1.5}',
        b'{"ttft_ms": "5"}',
    ],
)
def test_bad_objectives_change_nothing(value):
    live = LiveObjectives()
    live.changed(b'{"ttft_ms": 500}')
    with pytest.raises(InvalidRequestError, match="slo"):
        live.changed(value)
    assert live.now == read_objectives(b'{"ttft_ms": 500}')


def test_objectives_that_were_lost_come_back_where_none_were_written_since():
    lost = ServiceObjectives(300, 20)
    assert read_objectives(restore_objectives(None, lost)) == lost
    assert restore_objectives(None, ServiceObjectives()) is None
    for value in (b"{}", b'{"ttft_ms":0,"tpot_ms":0}', b"fast"):
        assert restore_objectives(value, lost) == value


# -- epochs --------------------------------------------------------------------------------------


def test_bases_are_read_and_raised_within_their_bounds():
    assert read_base(None) == 0
    assert read_base(b"5000") == 5000
    assert raised_base(5000) == 5000
    for highest in (MAX_BASE, MAX_BASE + 1, 2**64 - 1):
        assert raised_base(highest) == MAX_BASE
    assert read_base(str(MAX_BASE).encode()) == MAX_BASE


@pytest.mark.parametrize("value", [b"", b"-1", b"1.5", b"0x10", b"9" * 19, b"1" * 30, "٣".encode()])
def test_a_base_is_a_number_in_its_bounds(value):
    with pytest.raises(InvalidRequestError, match="epoch_base"):
        read_base(value)
