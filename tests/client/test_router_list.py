"""What a client remembers of the routers that it turned away from."""

from __future__ import annotations

from xllm.client.routers import MAX_ROUTERS, RouterList
from xllm.protocol.questions import RouterAddress
from xllm.protocol.transport.dealer import Reach

ONE, TWO = "tcp://127.0.0.1:1", "tcp://127.0.0.1:2"


def test_what_refused_our_key_is_not_said_to_speak_something_else():
    routers = RouterList([ONE, TWO], "", discover=False)
    routers.leave(Reach.REFUSED, f"{ONE} knows no key of ours")
    routers.turn()
    assert routers.left == (f"{ONE} knows no key of ours",)
    assert f"{ONE} (it does not know our key)" in routers.unanswered()


def test_of_routers_that_nobody_names_any_more_nothing_is_kept():
    routers = RouterList([ONE], "", discover=True)
    for port in range(1000, 1000 + 4 * MAX_ROUTERS):
        routers.learn([RouterAddress(f"tcp://127.0.0.1:{port}")])
        routers.turn()
        routers.leave(Reach.NOTHING, "it does not answer")
        routers.turn()
    assert len(routers._reached) <= 2
    assert len(routers._left) <= 2
