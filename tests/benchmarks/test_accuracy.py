"""The accuracy benchmark on few answers and tiny shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.accuracy import (
    DEMO,
    FORMS,
    Subject,
    held_out_answers,
    judge_answers,
    judge_logits,
    measure_speed,
    read_model,
)
from tests.fixtures.models import make_model
from xllm.worker.kernels.compiled import load

pytestmark = pytest.mark.skipif(load().compiled is None, reason=load().reason)


def test_answers_are_judged() -> None:
    answers = held_out_answers()
    assert len(answers) > 100
    subject = Subject(DEMO, FORMS[0], 1)
    good = judge_answers(subject, answers[:6])
    assert 1.0 < good["perplexity"] < 1.2
    assert good["exact"] > 0.5
    prompt, answer = answers[0]
    wrong = judge_answers(subject, [(prompt, answer[::-1])])
    assert wrong["perplexity"] > 10
    assert wrong["exact"] == 0


def test_forms_are_compared_with_fp32(tmp_path: Path) -> None:
    directory = make_model("qwen3", tmp_path / "model", dtype="bfloat16")
    rows = {row["form"]: row for row in judge_logits(directory, 1)}
    assert rows["fp32"]["relative_error"] == 0
    assert rows["fp32"]["same_best"] == 1
    errors = [rows[name]["relative_error"] for name in ("fp32", "int8", "int4")]
    assert errors == sorted(errors)
    assert rows["int4"]["weight_bytes"] < rows["bf16"]["weight_bytes"]


def test_products_are_timed_by_rows(tmp_path: Path) -> None:
    config = read_model(make_model("qwen3", tmp_path / "model"))
    rows = measure_speed(config, [1, 3], 1)
    assert [(row["rows"], row["kind"]) for row in rows[:2]] == [(1, "BF16"), (1, "INT8")]
    assert len(rows) == 8
    assert all(row["layer_s"] > 0 and row["speed"] > 0 for row in rows)
    assert rows[0]["speed"] == 1
