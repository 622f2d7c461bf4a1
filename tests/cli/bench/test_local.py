"""Latency and throughput of a local engine with the toy engine; the phases of a native one."""

from __future__ import annotations

import json

import pytest

from tests.cli.toy_model import make_toy_model
from tests.fixtures.models import make_model
from xllm.cli.bench.local import in_turn, resolve_settings
from xllm.cli.bench.local_engine import LocalEngine
from xllm.cli.bench.measures import RequestRecord
from xllm.cli.bench.roofline import Phase
from xllm.cli.main import run_command
from xllm.config.load import load
from xllm.worker.factory import make_executor
from xllm.worker.machine_limits import MachineLimits


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_toy_model(tmp_path_factory.mktemp("toy") / "toy")


def open_toy(model, **flags):
    settings = load({"model.path": model, "worker.engine": "toy", **flags}, None, {})
    return LocalEngine(settings, make_executor(settings), lambda done, total: None)


def test_all_requests_run_together_and_to_their_lengths(model):
    # No prompt begins as another one does: none waits for a prefix that is being computed.
    prompts = [tuple(range(5 + k, 5 + k + 20 * (k + 1))) for k in range(6)]
    widths, told = [], []
    with open_toy(model) as engine:
        records = engine.run(
            [(prompt, 3 + k) for k, prompt in enumerate(prompts)],
            ended=told.append,
            stepped=lambda plan, took_s: widths.append(len(plan.items)),
        )
        again = engine.run([(prompts[0], 2)])  # the engine is free again
    assert [record.num_output for record in records] == [3, 4, 5, 6, 7, 8]
    assert [record.num_prompt for record in records] == [20, 40, 60, 80, 100, 120]
    assert max(widths) == 6
    assert sorted(record.index for record in told) == list(range(6))
    assert all(record.ended_s >= record.token_s[-1] > 0 for record in records)
    assert again[0].num_output == 2


def test_a_request_that_cannot_run_has_an_error(model):
    with open_toy(model, **{"model.max_model_len": 64}) as engine:
        long, much, short = engine.run([(tuple(range(5, 105)), 3), ((5, 6), 63), ((5, 6), 62)])
    assert long.error.startswith("context_length_exceeded: the prompt has 100 tokens")
    assert much.error.endswith("the context is 64 tokens; this asks for 65")  # it is not cut
    assert short.num_output == 62


@pytest.mark.parametrize("strategy", ["chunked", "prefill-first"])
def test_steps_hold_what_the_strategy_says(model, strategy):
    mixed = []
    flags = {"scheduler.strategy": strategy, "scheduler.max_num_batched_tokens": 16}
    with open_toy(model, **flags) as engine:
        engine.run(
            [(tuple(range(5 + k, 25 + k)), 6) for k in range(3)],
            stepped=lambda plan, took_s: mixed.append(len({item.kind for item in plan.items}) > 1),
        )
    assert any(mixed) == (strategy == "chunked")


def test_no_request_is_too_many(model):
    with open_toy(model, **{"scheduler.max_waiting": 2}) as engine:
        records = engine.run([((5 + k, 6, 7), 2) for k in range(9)])
    assert [record.num_output for record in records] == [2] * 9


def test_a_model_on_this_machine_is_one_rank(model):
    settings = load({"model.path": model, "master.num_workers": 2}, None, {})
    assert resolve_settings(settings).master.num_workers == 1


def test_latency(model, tmp_path, capsys):
    path = tmp_path / "o.json"
    flags = ["--model", model, "--engine", "toy", "--batch-size", "3", "--iterations", "4"]
    picture = tmp_path / "o.svg"
    outputs = ["--json", str(path), "--plot", str(picture)]
    assert run_command(["bench", "latency", *flags, *outputs]) == 0
    assert picture.read_bytes().startswith(b"<?xml")
    shown = capsys.readouterr()
    assert "3 x 128 in, 32 out, 4 iterations" in shown.out
    assert "iterations: 6 of 6" in shown.err
    assert "[info" not in shown.err  # the log level is warning
    figures = json.loads(path.read_text())["figures"]
    assert figures["whole batch_s"]["count"] == 4
    assert figures["TTFT_s"]["count"] == 12
    assert run_command(["bench", "latency", *flags, "--max-model-len", "100"]) == 64
    assert "context" in capsys.readouterr().err


def test_throughput_of_a_trace(model, tmp_path, capsys):
    trace = tmp_path / "t.jsonl"
    rows = [{"timestamp": 9e6 * k, "input_length": 20, "output_length": 4} for k in range(5)]
    trace.write_text("\n".join(json.dumps(row) for row in rows))
    flags = ["--model", model, "--engine", "toy", "--json", str(tmp_path / "o.json")]
    picture = tmp_path / "o.png"
    plot = ["--plot", str(picture)]
    assert run_command(["bench", "throughput", "--trace", str(trace), *flags, *plot]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "o.json").read_text())["summary"]
    assert (summary["num_output_tokens"], summary["num_prompt_tokens"]) == (20, 100)
    assert summary["peak_concurrency"] == 5
    assert "output tokens/s" in capsys.readouterr().out
    limit = ["--max-model-len", "16"]
    assert run_command(["bench", "throughput", "--trace", str(trace), *flags, *limit]) == 70
    assert "0 / 5" in capsys.readouterr().out


def test_rounds_are_drawn_one_behind_the_other():
    first = [RequestRecord(0, 0.0, 0.0, [1.0], 2.0), RequestRecord(1, 0.0, 0.5, [1.0], 3.0)]
    second = [RequestRecord(0, 0.0, 0.25, [1.0, 2.0], 2.5)]
    drawn = in_turn([first, second])
    assert drawn[:2] == first
    assert drawn[2] == RequestRecord(0, 0.0, 3.25, [4.0, 5.0], 5.5)
    assert drawn[2].ttft_s == second[0].ttft_s


@pytest.mark.parametrize("command", ["latency", "throughput"])
def test_a_plot_that_cannot_be_drawn_is_refused_first(command, capsys):
    assert run_command(["bench", command, "--model", "/nowhere", "--plot", "load.gif"]) == 64
    assert "--plot load.gif" in capsys.readouterr().err


def test_the_share_of_the_bound():
    limits = MachineLimits(read_bytes_s=100.0, flops_s=1000.0, num_threads=1)
    assert Phase("memory", 1, 2.0, 100.0, 10.0).share(limits) == 0.5
    assert Phase("products", 1, 2.0, 1.0, 2000.0).share(limits) == 1.0
    assert Phase("too short to see", 1, -0.1, 1.0, 1.0).share(limits) == 0.0


def test_the_phases_of_a_native_model(tmp_path, capsys):
    model = make_model("qwen3", tmp_path / "m")
    path = tmp_path / "o.json"
    flags = ["--model", str(model), "--prefill", "16,48,4000000", "--rows", "1,3"]
    flags += ["--json", str(path), "--worker-num-threads", "2"]
    assert run_command(["bench", "roofline", *flags]) == 0
    shown = capsys.readouterr()
    assert "limits, 2 threads" in shown.out
    assert "no prefill of 4000000: the context is" in shown.err
    found = json.loads(path.read_text())
    names = [(phase["name"].split(",")[0], phase["num_rows"]) for phase in found["phases"]]
    assert names[:4] == [("prefill", 16), ("prefill", 48), ("decode", 1), ("decode", 3)]
    assert names[4:6] == [("head and sampling", 1), ("head and sampling", 3)]
    assert {name for name, _ in names[6:]} <= {"attention"}
    assert all(phase["seconds"] > 0 for phase in found["phases"][:6])
    assert found["limits"]["read_bytes_s"] > 0


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--engine", "toy"), "only the native engine"),
        (("--rows", "1,two"), "--rows 1,two: numbers from 1"),
        (("--prefill", "0"), "--prefill 0: numbers from 1"),
    ],
)
def test_refused_rooflines(flags, what, capsys):
    assert run_command(["bench", "roofline", *flags]) == 64
    assert what in capsys.readouterr().err
