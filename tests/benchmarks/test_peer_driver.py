"""The peer driver, run as other drivers are, with the toy engine."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks.peer_driver import parse, serve_flags
from tests.benchmarks.wide_model import make_wide_model
from xllm.errors import ConfigError

pytestmark = pytest.mark.process
DRIVER = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "peer_driver.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_wide_model(tmp_path_factory.mktemp("wide") / "m")


def drive(model, commands, *flags):
    """Run the driver over these lines; its exit code, lines and errors."""
    command = [sys.executable, DRIVER, "--model", model, "--dtype", "auto"]
    done = subprocess.run(
        [*command, "--set", "worker.engine=toy", *flags],
        input="".join(json.dumps(command) + "\n" for command in commands),
        capture_output=True,
        text=True,
        timeout=90,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("via", ["engine", "zmq", "http"])
def test_it_answers_workloads_and_leaves(model, via):
    commands = [{"workload": name, "rep": 1} for name in ("W2", "W4b", "none such", "warm")]
    quit_or_end = [{"quit": True}] if via == "zmq" else []  # the others see the end of the input
    code, lines, errors = drive(model, [*commands, *quit_or_end], "--via", via)
    assert code == 0, errors
    ready, *results = lines
    assert json.loads(ready.removeprefix("READY "))["via"] == via
    two, shared, wrong, warm = (json.loads(line.removeprefix("RESULT ")) for line in results)
    assert two["out_tokens"] == 16 * 64
    assert two["prompt_tokens"] == 16 * 128
    assert 0 < two["ttft_mean_s"] <= two["ttft_max_s"] <= two["makespan_s"]
    assert two["tpot_mean_s"] > 0
    assert shared["out_tokens"] == 23 * 32
    assert shared["first_request_s"] > 0
    assert "ValueError" in wrong["error"]
    assert warm["out_tokens"] == 32


def test_a_setting_that_is_none_ends_it_in_one_line(model):
    for via in ("engine", "http"):
        code, lines, errors = drive(model, [], "--via", via, "--set", "worker.nonsense=1")
        assert (code, lines) == (1, [])
        assert "unknown setting worker.nonsense" in errors


def test_a_model_that_is_none_ends_it(tmp_path):
    code, lines, errors = drive(str(tmp_path), [], "--set", "worker.engine=native")
    assert (code, lines) == (1, [])
    assert str(tmp_path) in errors


def test_settings_become_flags():
    options = parse(["--model", "/m", "--set", "worker.deterministic=on", "--threads", "3"])
    flags = serve_flags(options.settings)
    assert "--worker-deterministic" in flags
    assert "--worker-num-threads=3" in flags
    assert "--model-max-model-len=2048" in flags
    options = parse(["--model", "/m", "--set", "scheduler.prefix_cache=false"])
    assert "--no-scheduler-prefix-cache" in serve_flags(options.settings)
    with pytest.raises(ConfigError, match=r"model\.dtype"):
        serve_flags(parse(["--model", "/m", "--dtype", "float8"]).settings)
