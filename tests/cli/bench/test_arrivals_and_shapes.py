"""Arrival times, lengths, prompts and traces: what a load consists of."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.cli.bench.arrivals import arrival_times, speed_up
from xllm.cli.bench.dataset import Arrivals, Dataset
from xllm.cli.bench.prompts import WORDS, PromptMaker
from xllm.cli.bench.shapes import (
    CHAT_MOST,
    TRACE_BLOCK,
    RequestShape,
    chat_shapes,
    clip,
    random_shapes,
    read_trace,
)
from xllm.errors import ConfigError


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_spread_that_were_asked(burstiness):
    times = arrival_times(20_000, 5.0, burstiness, random.Random(1))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.05)
    spread = statistics.stdev(gaps) / statistics.fmean(gaps)
    assert spread == pytest.approx(1 / math.sqrt(burstiness), rel=0.1)


@given(st.integers(1, 50), st.floats(0.01, 1e4), st.floats(0.05, 50), st.integers())
def test_times_begin_at_zero_and_grow(count, rate, burstiness, seed):
    times = arrival_times(count, rate, burstiness, random.Random(seed))
    assert len(times) == count
    assert times[0] == 0
    assert times == sorted(times)
    assert times == arrival_times(count, rate, burstiness, random.Random(seed))


def test_no_rate_is_all_at_once():
    assert arrival_times(3, math.inf, 1, random.Random()) == [0, 0, 0]


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (math.nan, 1), (1, 0), (1, -2)])
def test_refused_rates(rate, burstiness):
    with pytest.raises(ConfigError):
        arrival_times(3, rate, burstiness, random.Random())


def test_recorded_times_begin_at_zero_and_can_be_faster():
    assert speed_up([10.0, 12.0, 20.0], 2.0) == [0, 1, 5]
    with pytest.raises(ConfigError, match="speed-up"):
        speed_up([1.0], 0)


def test_random_lengths():
    shapes = random_shapes(2000, 100, 20, 0.5, 32, random.Random(0))
    assert {shape.shared for shape in shapes} == {(("prefix", 32),)}
    prompts = [shape.num_prompt - 32 for shape in shapes]
    assert (min(prompts), max(prompts)) == (50, 150)
    assert {shape.num_output for shape in shapes} == set(range(10, 31))
    exact = random_shapes(5, 100, 20, 0, 0, random.Random(0))
    assert exact == [RequestShape(100, 20)] * 5
    with pytest.raises(ConfigError):
        random_shapes(1, 1, 1, 1.5, 0, random.Random(0))


def test_chat_lengths_are_mostly_short_and_some_long():
    shapes = chat_shapes(4000, random.Random(0))
    prompts = sorted(shape.num_prompt for shape in shapes)
    assert prompts[2000] == pytest.approx(90, rel=0.1)
    assert statistics.fmean(prompts) > 1.3 * prompts[2000]
    assert prompts[0] >= 4
    assert prompts[-1] == CHAT_MOST


def test_clipping():
    shapes = [RequestShape(1000, 500), RequestShape(10, 5)]
    assert clip(shapes, 100, None) == [RequestShape(100, 500), RequestShape(10, 5)]
    assert clip(shapes, None, 50) == [RequestShape(1000, 50), RequestShape(10, 5)]


def test_an_azure_trace(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:04.0319600,3180,8\n"
        "2023-11-16 18:17:03.9799600,4808,0\n"
    )
    first, second = read_trace(path)
    assert (first.num_prompt, first.num_output) == (4808, 1)
    assert second.at_s - first.at_s == pytest.approx(0.052)
    assert read_trace(path, 1) == [first]
    times = Arrivals(None, 1.0, 2.0).times([first, second], 0)
    assert times == pytest.approx([0, 0.026], abs=1e-6)
    assert len(set(Arrivals(3.0, 1.0, 2.0).times([first, second], 0))) == 2  # a rate wins


def test_a_mooncake_trace_shares_blocks(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"timestamp": 2000, "input_length": 700, "output_length": 5, "hash_ids": [1, 2]}\n\n'
        '{"timestamp": 1000, "input_length": 600, "output_length": 6, "hash_ids": [1, 3]}\n'
    )
    first, second = read_trace(path)
    assert (first.at_s, first.num_prompt, second.at_s) == (1, 600, 2)
    assert second.shared == (("1", TRACE_BLOCK), ("2", 700 - TRACE_BLOCK))
    maker = PromptMaker(0, 1000)
    one, other = maker.ids(0, first), maker.ids(1, second)
    assert (len(one), len(other)) == (600, 700)
    assert one[:TRACE_BLOCK] == other[:TRACE_BLOCK]
    assert one[TRACE_BLOCK:] != other[TRACE_BLOCK:600]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("a,b\n1,2\n", "line 2 .* no 'TIMESTAMP'|line 2 .* no 'ContextTokens'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,2\n", "line 2"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1}\n{"a": 1}', "line 2"),
        ('{"timestamp": 1, "input_length": -5, "output_length": 1}', "a length of -5"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1}\n[]', "line 2"),
    ],
)
def test_refused_traces(tmp_path, text, what):
    path = tmp_path / "t"
    path.write_text(text)
    with pytest.raises(ConfigError, match=what):
        read_trace(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_trace(tmp_path / "absent")


@given(st.integers(0, 40), st.integers(1, 60), st.integers(0, 9), st.integers(8, 99))
def test_prompts_have_their_length_and_share_their_begin(num_shared, own, seed, vocab_size):
    shape = RequestShape(num_shared + own, 1, (("p", num_shared),) if num_shared else ())
    maker = PromptMaker(seed, vocab_size)
    one, other = maker.ids(0, shape), maker.ids(1, shape)
    assert len(one) == num_shared + own
    assert one[:num_shared] == other[:num_shared]
    assert all(3 <= token < vocab_size for token in one)
    assert one == PromptMaker(seed, vocab_size).ids(0, shape)
    words = PromptMaker(seed).text(0, shape).split()
    assert len(words) == len(one)
    assert set(words) <= set(WORDS)


def test_a_dataset_is_the_same_for_a_seed():
    values = {"dataset": "chat", "trace": "", "num_requests": 9, "input_len": 1, "output_len": 1}
    values |= {"spread": 0.0, "prefix_len": 0, "max_input": 50, "max_output": None}
    shapes = Dataset(**values, seed=1).shapes()
    assert shapes == Dataset(**values, seed=1).shapes()
    assert shapes != Dataset(**values, seed=2).shapes()
    assert len(shapes) == 9
    assert max(shape.num_prompt for shape in shapes) <= 50
