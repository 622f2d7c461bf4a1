"""What refuses to start: in time, with its exit code, in one line; before and after the checks."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time

import pytest

from tests.cli.toy_model import make_toy_model
from tests.serve.served import wait_until
from xllm.config.environment import read_environment

pytestmark = pytest.mark.process

WITHIN_S = 3.0
NOISE_S = 5.0
"""What a machine that others use may add."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_toy_model(tmp_path_factory.mktemp("toy") / "toy-model")


@pytest.fixture(scope="module")
def taken():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def refused(*arguments, **variables):
    """(exit code, lines of standard error) of a command that refuses to start."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "xllm", *map(str, arguments)],
        env=read_environment() | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert time.monotonic() - began < WITHIN_S + NOISE_S
    return done.returncode, done.stderr.splitlines()


def serve(model, run_dir, *flags, **variables):
    common = ["--model", model, "--engine", "toy", "--cluster-run-dir", run_dir]
    return refused("serve", *common, "--port", 0, "--zmq-port", 0, *flags, **variables)


def write_toml(path, text):
    path.write_text(text)
    return path


def test_settings(model, run_dir, tmp_path):
    file = write_toml(tmp_path / "a.toml", "[router]\nprot = 1\n")
    text = write_toml(tmp_path / "b.toml", '[router]\nport = "8010"\n')
    cases = [
        (serve(model, run_dir, XLLM_ROUTER_PORT="x"), "router.port (XLLM_ROUTER_PORT)"),
        (serve(model, run_dir, XLLM_ROUTER_PROT="1"), "did you mean XLLM_ROUTER_PORT"),
        (serve(model, run_dir, "--config", file), "did you mean router.port"),
        (serve(model, run_dir, "--config", text), f"router.port ({text}) must be a whole number"),
        (serve(model, run_dir, "--worker-block-size", "24"), "power of two"),
    ]
    for (code, lines), words in cases:
        assert code == 64, lines
        assert len(lines) == 1
        assert lines[0].startswith("xllm: ")
        assert words in lines[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("chat_template.jinja", b"\xff"),
        ("chat_template.json", b"[1]"),
        ("tokenizer_config.json", b"{"),
    ],
)
def test_models_whose_text_side_is_broken(tmp_path, run_dir, name, content):
    model = make_toy_model(tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "m" / name).write_bytes(content)
    code, lines = serve(model, run_dir)
    assert (code, len(lines)) == (69, 1)
    assert name in lines[0]
    assert not os.listdir(run_dir)  # no process was started


def test_a_model_that_may_not_be_read(tmp_path, run_dir):
    model = make_toy_model(tmp_path / "m")
    os.unlink(tmp_path / "m" / "tokenizer.json")
    (tmp_path / "m" / "tokenizer.json").symlink_to("/proc/1/mem")  # root may not read it either
    code, lines = serve(model, run_dir)
    assert (code, len(lines)) == (69, 1)
    assert "tokenizer.json" in lines[0]


def test_a_child_that_cannot_have_its_address(model, run_dir, taken):
    code, lines = serve(model, run_dir, "--kvcache-endpoint", f"tcp://127.0.0.1:{taken}")
    assert (code, len(lines)) == (71, 1)
    assert lines[0].startswith("xllm: kvcache-0 (pid ")
    assert f"cannot listen on tcp://127.0.0.1:{taken}: Address already in use" in lines[0]
    assert not os.listdir(run_dir)


def test_a_child_with_a_setting_that_no_check_knows(model, run_dir):
    code, lines = serve(model, run_dir, "--kvcache-endpoint", "http://127.0.0.1")
    assert (code, len(lines)) == (64, 1)
    assert "http" in lines[0]


@pytest.mark.parametrize(("flag", "code"), [("--port", 71), ("--zmq-port", 71)])
def test_a_router_on_its_own_whose_port_is_taken(model, run_dir, taken, flag, code):
    where = f"ipc://{run_dir}/registry"
    with registry(where):
        found, lines = refused(
            *("router", "--registry", where, "--model", model, "--cluster-run-dir", run_dir),
            *("--port", 0, "--zmq-port", 0, flag, taken, "--log-dir", run_dir / "logs"),
        )
    assert (found, len(lines)) == (code, 1)
    assert lines[0].startswith("xllm: cannot listen on ")
    assert f":{taken}: Address already in use" in lines[0]


def test_a_second_process_of_one_name_in_one_run_directory(run_dir):
    """The same exit code as for a name that another process has in the registry."""
    where = f"ipc://{run_dir}/registry"
    daemon = ("kvcache", "--registry", where, "--cluster-run-dir", run_dir, "--kvcache-name", "d")
    with registry(where), process(*daemon) as first:
        path = run_dir / "d-kvcache"
        wait_until(path.exists, 60, "the first one's socket")
        code, lines = refused(*daemon, "--log-dir", run_dir / "logs")
        assert first.poll() is None
    assert (code, len(lines)) == (64, 1)
    assert lines[0].startswith(f"xllm: {path} is in use by process {first.pid}: ")
    assert lines[0].endswith(f"another directory than {run_dir}")


def test_a_registry_whose_port_is_taken(taken):
    code, lines = refused(
        "registry", "--registry", f"tcp://127.0.0.1:{taken}", "--log-level", "error"
    )
    assert code == 71
    assert lines[-1].startswith("xllm: cannot listen on ")


def registry(endpoint):
    """A registry as a process."""
    return process("registry", "--registry", endpoint)


@contextlib.contextmanager
def process(*arguments):
    """A command that runs until the end of the block."""
    command = [sys.executable, "-m", "xllm", *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as started:
        try:
            yield started
        finally:
            started.terminate()
