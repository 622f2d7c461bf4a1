"""Offline work gives way to online work: as much as lets it start, or not at all."""

from tests.master.toy_instance import PROMPT, ToyInstance


def test_offline_runs_on_where_its_blocks_would_not_let_online_start():
    one = ToyInstance(num_blocks=20, block_size=4)
    one.admit("online", range(20, 60), max_tokens=30)
    one.admit("offline", PROMPT, offline=True, max_tokens=8)
    for _ in range(3):
        one.step()
    one.admit("large", range(100, 150), max_tokens=4)
    for _ in range(4):
        one.step()
    assert one.scheduler.statistics().num_preemptions == 0
    one.run()
    for name in ("online", "offline", "large"):
        one.verify(name)


def test_no_more_offline_gives_way_than_needed():
    one = ToyInstance(num_blocks=24, block_size=4)
    for name in ("x", "y", "z"):
        one.admit(name, range(20 + ord(name), 40 + ord(name)), offline=True, max_tokens=8)
    for _ in range(2):
        one.step()
    one.admit("online", range(300, 332), max_tokens=4)
    one.step()
    assert one.streams["online", 1, 0].tokens
    assert one.scheduler.statistics().num_preemptions == 1
    one.run()
    for name in ("x", "y", "z", "online"):
        one.verify(name)


def test_offline_that_shares_its_blocks_frees_each_once():
    one = ToyInstance(num_blocks=12, block_size=4)
    one.admit("fork", range(20, 44), offline=True, max_tokens=6, n=2)
    one.step()
    one.step()
    one.admit("online", range(300, 344), max_tokens=4)
    one.step()
    assert one.streams["online", 1, 0].tokens
    one.run()
    for name in ("fork", "online"):
        one.verify(name)
