"""Commands that are given several routers: the next is asked where one does not answer."""

from __future__ import annotations

import json

import pytest

from tests.client.fake_router import RouterThread
from tests.client.test_async_client import free_endpoint
from xllm.cli.main import run_command


def status(capsys, endpoint: str, *flags: str) -> tuple[int, str, str]:
    code = run_command(["status", "--endpoint", endpoint, *flags])
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_status_asks_the_next_router_and_says_which_did_not_answer(capsys, flags):
    dead = free_endpoint()
    with RouterThread() as mute, RouterThread() as router:
        mute.mute = True
        code, out, err = status(capsys, f"{dead}, {mute.endpoint},{router.endpoint}", *flags)
        assert code == 0
        # How far one came with the mute one is a matter of time on a busy machine.
        assert err.startswith(f"{dead} does not answer (nothing takes connections there); ")
        assert f"; {mute.endpoint} does not answer" in err
        assert err.endswith(f"; {router.endpoint} was asked instead\n")
        if flags:
            assert [one["name"] for one in json.loads(out)] == ["i0"]
        else:
            assert "i0" in out


def test_nothing_is_said_of_routers_that_were_not_needed(capsys):
    with RouterThread() as router:
        code, out, err = status(capsys, f"{router.endpoint},{free_endpoint()}")
    assert (code, err) == (0, "")
    assert "i0" in out


def test_where_none_answers_all_are_named(capsys):
    several = [free_endpoint(), free_endpoint()]
    code, out, err = status(capsys, ",".join(several), "--timeout", "0.2")
    assert (code, out) == (69, "")
    assert ", ".join(several) in err


@pytest.mark.parametrize("wrong", ["", "127.0.0.1:8011"])
def test_each_has_to_be_an_address(capsys, wrong):
    code, _, err = status(capsys, f"tcp://127.0.0.1:8011,{wrong}")
    assert code == 64
    assert f"endpoint: {wrong!r} is not tcp://host:port" in err
