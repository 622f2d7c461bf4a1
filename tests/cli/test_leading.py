"""`xllm role` and `xllm slo` at clusters whose leader changes: who is asked, and for how long."""

from __future__ import annotations

import contextlib

import pytest

from xllm.cli import leading
from xllm.errors import BrokenError, InvalidRequestError, UnavailableError

LEADER = "tcp://10.0.0.2:1"
ELSEWHERE = f"this router does not lead; b at {LEADER} does: ask there"
NOBODY = "this router does not lead; nobody is known to: ask again"


class Cluster:
    """Routers that answer in turn: an error, or what is done. Records who was asked."""

    def __init__(self, monkeypatch, *answers) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []
        self.now = 0.0
        monkeypatch.setattr(leading.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(leading.time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    @contextlib.contextmanager
    def connect(self, at: str = ""):
        self.asked.append(at)
        yield self

    def answer(self):
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(found, Exception):
            raise found
        return found

    def ask(self, wait_s: float = 10.0):
        return leading.ask_leader(self.connect, lambda client: client.answer(), wait_s)


def test_the_leader_that_a_router_names_is_asked_at_once(monkeypatch, capsys):
    cluster = Cluster(monkeypatch, UnavailableError(ELSEWHERE), "done")
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
def test_a_change_of_leaders_is_waited_for(monkeypatch, capsys, refusals):
    cluster = Cluster(monkeypatch, *refusals, UnavailableError(ELSEWHERE), "done")
    assert cluster.ask() == "done"
    assert cluster.asked[-2:] == ["", LEADER]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_wait_ends_and_says_why(monkeypatch):
    cluster = Cluster(monkeypatch, UnavailableError(NOBODY))
    with pytest.raises(UnavailableError, match=r"nobody is known to.*\(waited 10 s: --wait\)"):
        cluster.ask()
    assert cluster.now == pytest.approx(10.0)
    cluster.asked.clear()
    with pytest.raises(UnavailableError, match="nobody is known to"):
        cluster.ask(0.0)
    assert cluster.asked == [""]


def test_a_leader_that_stays_silent_is_named(monkeypatch):
    answers = [UnavailableError(ELSEWHERE), BrokenError("no answer within 5 s")] * 40
    cluster = Cluster(monkeypatch, *answers)
    with pytest.raises(UnavailableError, match=f"the leader at {LEADER} does not answer: no ans"):
        cluster.ask()


@pytest.mark.parametrize("error", [BrokenError("nobody there"), InvalidRequestError("no such")])
def test_what_waiting_does_not_help_is_told_at_once(monkeypatch, error):
    cluster = Cluster(monkeypatch, error)
    with pytest.raises(type(error)):
        cluster.ask()
    assert cluster.asked == [""]
