"""`xllm role` and `xllm slo` at clusters whose leader changes: who is asked, and for how long."""

from __future__ import annotations

import contextlib
import math

import pytest

from xllm.cli import leading
from xllm.errors import BrokenError, DeadlineError, InvalidRequestError, UnavailableError

LEADER = "tcp://10.0.0.2:1"
ELSEWHERE = f"this router does not lead; b at {LEADER} does: ask there"
NOBODY = "this router does not lead; nobody is known to: ask again"


class Cluster:
    """Routers that answer in turn: an error, or what is done. Records who was asked."""

    def __init__(self, *answers) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []
        self.allowed: list[float] = []
        """Seconds that each answer might have taken."""
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    @contextlib.contextmanager
    def connect(self, at: str = "", longest_s: float = math.inf):
        self.asked.append(at)
        self.allowed.append(longest_s)
        yield self

    def answer(self):
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(found, DeadlineError):
            self.now += self.allowed[-1]
        if isinstance(found, Exception):
            raise found
        return found

    def ask(self, wait_s: float = 10.0):
        return leading.ask_leader(
            self.connect,
            lambda client: client.answer(),
            wait_s,
            clock=lambda: self.now,
            sleep=self.sleep,
        )


def test_the_leader_that_a_router_names_is_asked_at_once(capsys):
    cluster = Cluster(UnavailableError(ELSEWHERE), "done")
    assert cluster.ask(0.0) == "done"
    assert cluster.asked == ["", LEADER]
    assert cluster.now == 0.0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "refusals",
    [
        pytest.param([UnavailableError(NOBODY)] * 3, id="nobody leads"),
        pytest.param(
            [
                UnavailableError(
                    "this router does not lead; b does, at an address that is not known"
                )
            ],
            id="no address",
        ),
        pytest.param(
            [UnavailableError(ELSEWHERE), UnavailableError("this router does not lead any more")],
            id="replaced",
        ),
        pytest.param([UnavailableError(ELSEWHERE), BrokenError("silence")], id="dead"),
        pytest.param(
            [UnavailableError("the registry has not taken the role yet")], id="a slow registry"
        ),
    ],
)
def test_a_change_of_leaders_is_waited_for(capsys, refusals):
    cluster = Cluster(*refusals, UnavailableError(ELSEWHERE), "done")
    assert cluster.ask() == "done"
    assert cluster.asked[-2:] == ["", LEADER]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_wait_ends_and_says_why():
    cluster = Cluster(UnavailableError(NOBODY))
    with pytest.raises(UnavailableError, match=r"nobody is known to.*\(waited 10 s: --wait\)"):
        cluster.ask()
    assert cluster.now == pytest.approx(10.0)
    cluster.asked.clear()
    with pytest.raises(UnavailableError, match="nobody is known to"):
        cluster.ask(0.0)
    assert cluster.asked == [""]


def test_a_leader_that_stays_silent_is_named():
    answers = [UnavailableError(ELSEWHERE), BrokenError("no answer within 5 s")] * 40
    cluster = Cluster(*answers)
    with pytest.raises(UnavailableError, match=f"the leader at {LEADER} does not answer: no ans"):
        cluster.ask()


def test_the_wait_ends_for_an_answer_that_does_not_come():
    cluster = Cluster(UnavailableError(NOBODY), UnavailableError(ELSEWHERE), DeadlineError("late"))
    match = rf"the leader at {LEADER} does not answer: late \(waited 10 s: --wait\)"
    with pytest.raises(UnavailableError, match=match):
        cluster.ask(10.0)
    assert cluster.allowed == [10.0, 9.5, 9.5]
    assert cluster.now == pytest.approx(10.0)
    cluster = Cluster(UnavailableError(NOBODY), DeadlineError("late"))
    with pytest.raises(UnavailableError, match=r"the router does not answer: late \(waited 4 s"):
        cluster.ask(4.0)
    assert cluster.now == pytest.approx(4.0)
    cluster = Cluster(UnavailableError(ELSEWHERE), DeadlineError("late"))
    with pytest.raises(UnavailableError, match="late"):
        cluster.ask(0.0)
    assert cluster.now == leading.MIN_ASK_S


def test_a_timeout_before_the_wait_is_over_is_told_as_one():
    cluster = Cluster(DeadlineError("late"))
    with pytest.raises(DeadlineError):
        leading.ask_leader(
            cluster.connect,
            lambda client: client.answer(),
            10.0,
            clock=lambda: 0.0,
            sleep=cluster.sleep,
        )


@pytest.mark.parametrize("error", [BrokenError("nobody there"), InvalidRequestError("no such")])
def test_what_waiting_does_not_help_is_told_at_once(error):
    cluster = Cluster(error)
    with pytest.raises(type(error)):
        cluster.ask()
    assert cluster.asked == [""]
