"""No kernel is compiled in service: every key of Triton's that a step has, warming up had."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from tests.fixtures.models import make_model

ROOT = pathlib.Path(__file__).parents[3]
_PROGRAM = "tests.worker.triton_kernels.launch_keys"
LAYERS = {
    "decode_kernel", "merge_kernel", "prefill_kernel", "rope_write_kernel", "norm_kernel",
    "silu_mul_kernel",
}  # fmt: skip
DRAWS = {"_search_chunk", "_merge_chunks", "_weigh_chunk", "_gather_chunk", "_draw_filtered"}
MODES = {
    "graphs": {"full", "partial", "eager"},
    "eager": {"eager"},
    "full alone": {"full", "eager"},
    "partial alone": {"partial", "eager"},
    "one sequence": {"full", "partial", "eager"},
    "odd bounds": {"full", "partial", "eager"},
    "drafts": {"full", "partial", "eager"},
}


def found(directory: pathlib.Path, *cases: str) -> dict[str, dict[str, Any]]:
    """By case what its steps launched, from a process that does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", _PROGRAM, str(directory), *cases],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    results = [json.loads(line.removeprefix("FOUND ")) for line in lines]
    return {result["case"]: result for result in results}


def check(results: dict[str, dict[str, Any]], *cases: str) -> None:
    assert set(results) == set(cases)
    for case, result in results.items():
        assert set(result["kernels"]) == LAYERS | DRAWS, case
        assert set(result["modes"]) == MODES[case]
        assert result["missing"] == [], case


def test_warming_up_compiles_whatever_steps_launch(tmp_path):
    directory = make_model("qwen3", tmp_path / "model")
    results = found(directory, "graphs", "eager", "odd bounds", "drafts", "unaligned")
    unaligned = results.pop("unaligned")
    check(results, "graphs", "eager", "odd bounds", "drafts")
    # Numbers that begin anywhere are seen.
    assert {name for name, _ in unaligned["missing"]} >= {"decode_kernel", "prefill_kernel"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral-window"])
def test_warming_up_compiles_whatever_steps_of_a_family_launch(tmp_path, family, dtype):
    directory = make_model(family, tmp_path / "model", dtype=dtype)
    check(found(directory, *MODES), *MODES)
