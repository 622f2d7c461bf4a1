"""The example programs, as a user runs them, against a service with the toy engine."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from tests.cli.toy_model import make_toy_model
from tests.serve.served import Served

pytestmark = pytest.mark.process

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
OVER_ZMQ = {"generate": (), "chat_stream": (), "async_many": ("20",), "raw_zmq_msgpack": ()}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model = make_toy_model(tmp_path_factory.mktemp("toy") / "toy-model")
    with Served(model, f"/tmp/{tmp_path_factory.mktemp('xe').name}") as served:
        yield served
    served.run_dir.rmdir()


def run_example(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*OVER_ZMQ, "openai_client"}


@pytest.mark.parametrize("name", OVER_ZMQ)
def test_over_zmq(served, name):
    assert run_example(name, served.zmq, *OVER_ZMQ[name]).strip()


def test_over_http(served):
    assert run_example("openai_client", served.http).strip()
