"""The device's sampler with top-k, top-p and min-p against the host's, and without a wait."""

from __future__ import annotations

import contextlib
import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from tests.worker.sampling.device_case import (
    INF,
    VOCAB,
    drawn,
    expected,
    row_of,
    seeded,
    some_logits,
)
from tests.worker.triton_interpreter import DEVICE
from xllm.protocol.sampling import SamplingParams
from xllm.worker.sampling.device_sampler import DeviceSampler
from xllm.worker.sampling.rows import SampleRow
from xllm.worker.triton_kernels.draw_rows import FLAG_NOT_DRAWN, FLAG_NOT_FINITE

FILTERS = [
    {"top_k": 1},
    {"top_k": 20},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 20, "top_p": 0.8},
    {"top_p": 0.95, "min_p": 0.02},
    {"top_k": 50, "top_p": 0.95, "min_p": 0.01},
]


def kind(number: int) -> dict[str, float]:
    """One of many ways to draw."""
    ways = [{"temperature": 0.0}, {}, *FILTERS]
    heat = [{}, {"temperature": 0.6}, {"temperature": 1e-35}, {"temperature": 2.0}]
    return {**heat[number % 4], **ways[number % len(ways)]}


def mixed(count: int, seed: int) -> list[SampleRow]:
    rng = random.Random(seed)
    return [
        row_of(rng.randrange(1, 9999), rng.randrange(3), seed=rng.getrandbits(64), **kind(k + seed))
        for k in range(count)
    ]


@pytest.mark.parametrize(
    ("vocab", "chunk", "room"),
    [(7, 128, 8192), (513, 256, 8192), (513, 1024, 16), (4096, 2048, 8192)],
)
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_tokens_are_those_of_the_sampler(vocab, chunk, room, temperature) -> None:
    rows = [row for params in FILTERS for row in seeded(1, temperature=temperature, **params)]
    logits = some_logits(len(rows), vocab)
    assert drawn(logits, rows, chunk=chunk, room=room) == expected(logits, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_large_vocabulary(dtype: torch.dtype) -> None:
    rows = seeded(1, temperature=0.7, top_k=20, top_p=0.9)
    logits = some_logits(1, 151_936).to(dtype)
    assert drawn(logits, rows, chunk=32768) == expected(logits, rows)


def test_a_flat_large_row_is_drawn_without_a_list() -> None:
    rows = seeded(1, top_p=0.9)
    logits = some_logits(1, 20_000, scale=0.1)
    assert drawn(logits, rows, chunk=8192) == expected(logits, rows)


@pytest.mark.parametrize("count", [1, 2, 33])
def test_rows_of_all_kinds_in_a_batch(count: int) -> None:
    rows = mixed(count, count)
    logits = some_logits(count)
    assert drawn(logits, rows, chunk=128) == expected(logits, rows)


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1e-40, 0.25, 1.0, 2.0]),
        "seed": st.integers(0, 2**64 - 1),
    },
    optional={
        "top_k": st.sampled_from([0, 1, 2, 5, 20, 96, 97, 500]),
        "top_p": st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    },
)
# Multiples of 1/4: ties abound, at every border.
LOGITS = st.lists(
    st.one_of(st.integers(-24, 24).map(lambda quarter: quarter / 4), st.just(-INF)),
    min_size=VOCAB,
    max_size=VOCAB,
)


@given(
    work=st.lists(st.tuples(PARAMS, st.integers(0, 2**20), LOGITS), min_size=1, max_size=2),
    room=st.sampled_from([4, 8192]),
)
@settings(max_examples=20)
def test_any_rows_draw_what_the_sampler_draws(work, room) -> None:
    rows = [row_of(position, **params) for params, position, _ in work]
    logits = torch.tensor([numbers for _, _, numbers in work])
    tokens, flags = drawn(logits, rows, chunk=128, room=room)
    wanted, wanted_flags = expected(logits, rows)
    assert flags == wanted_flags
    # Where the mass before a token equals p to seven digits it may be kept or not.
    near = [expected(logits, [_nudged(row, by) for row in rows])[0] for by in (1 - 1e-6, 1 + 1e-6)]
    for index, token in enumerate(tokens):
        assert token in {wanted[index], near[0][index], near[1][index]}


def _nudged(row: SampleRow, factor: float) -> SampleRow:
    fields = {name: getattr(row.sampling, name) for name in row.sampling.__struct_fields__}
    sampling = SamplingParams(**{**fields, "top_p": row.sampling.top_p * factor})
    return dataclasses.replace(row, sampling=sampling)


@pytest.mark.parametrize("room", [8, 8192])
def test_of_equals_at_the_border_the_lower_ids_are_kept(room: int) -> None:
    # 1 better token, then 40 equals of which top-k leaves 9: ids 3 to 27, by threes.
    logits = torch.full((64, VOCAB), -4.0)
    logits[:, 0:VOCAB:3] = 1.0
    logits[:, 60] = 2.0
    rows = seeded(64, temperature=1.0, top_k=10)[: 24 if room > 8 else 4]
    logits = logits[: len(rows)]
    tokens, _ = drawn(logits, rows, chunk=128, room=room)
    assert (tokens, [0] * len(rows)) == expected(logits, rows)
    assert set(tokens) <= {60, *range(0, 27, 3)}
    assert room == 8 or len(set(tokens)) > 4


@pytest.mark.parametrize("room", [2, 8192])
def test_a_mass_of_exactly_p_is_enough(room: int) -> None:
    # 4 equals: half of their mass is 2 of them, and min-p 1 leaves all.
    logits = torch.full((8, VOCAB), -INF)
    logits[:, [9, 10, 70, 80]] = 1.5
    tokens, flags = drawn(logits, seeded(8, top_p=0.5), chunk=128, room=room)
    assert (set(tokens), flags) == ({9, 10}, [0] * 8)
    tokens, flags = drawn(logits, seeded(8, min_p=1.0), chunk=128, room=room)
    assert (len(set(tokens)) > 2, flags) == (True, [0] * 8)


# Logits of tokens 9, 10, ...; the parameters; which of those tokens are drawn.
BORDERS = {
    "p of the mass that top-k leaves, one": ([1.5] * 4, {"top_k": 2, "top_p": 0.5}, 1),
    "p of the mass that top-k leaves, two": ([1.5] * 4, {"top_k": 3, "top_p": 0.5}, 2),
    "top-k beyond the first rung": ([1.5, 0.2, 0.1], {"top_k": 2, "temperature": 2.0}, 2),
    "top-p from all of top-k, not of what min-p leaves": (
        [2.0, 1.5, *[0.0] * 10], {"top_k": 12, "top_p": 0.6, "min_p": 0.37}, 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BORDERS)
def test_what_is_kept_is_drawn_and_nothing_else(case: str) -> None:
    numbers, params, count = BORDERS[case]
    rows = [row_of(seed=seed, **params) for seed in range(12)]
    logits = torch.full((12, VOCAB), -9.0)
    logits[:, 9 : 9 + len(numbers)] = torch.tensor(numbers)
    tokens, flags = drawn(logits, rows, chunk=128)
    assert (tokens, flags) == expected(logits, rows)
    assert set(tokens) == set(range(9, 9 + count))


def test_the_best_is_always_kept() -> None:
    logits = some_logits(3)
    rows = [row_of(top_p=1e-12, seed=5), row_of(min_p=1.0, seed=5), row_of(top_k=1, seed=5)]
    assert drawn(logits, rows) == (logits.argmax(dim=1).tolist(), [0] * 3)


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
def test_a_row_that_is_not_finite_is_flagged_and_harms_no_other(bad: float) -> None:
    rows = [row_of(seed=k, top_k=5, top_p=0.9) for k in range(3)]
    logits = some_logits(3)
    [first, _, last], _ = drawn(logits, rows)
    logits[1, 3:] = bad
    logits[1, :3] = bad if bad == -INF else 1.0
    assert drawn(logits, rows) == ([first, 0, last], [0, FLAG_NOT_FINITE, 0])


def test_a_draw_without_filters_says_which_rows_it_left_out() -> None:
    sampler = DeviceSampler(VOCAB, DEVICE, 2, chunk=128)
    inputs = sampler.prepare([row_of(seed=1), row_of(seed=1, top_k=3)])
    assert inputs.filtered
    assert not sampler.prepare([row_of(seed=1), row_of(top_k=VOCAB)]).filtered
    tokens = torch.full((2,), -7, dtype=torch.int64, device=DEVICE)
    flags = torch.full((2,), 77, dtype=torch.uint8, device=DEVICE)
    numbers = inputs.numbers.to(DEVICE)
    sampler.draw(some_logits(2).to(DEVICE), numbers, tokens, flags, filtered=False)
    assert flags.tolist() == [0, FLAG_NOT_DRAWN]
    assert tokens.tolist()[1] == 0


def test_a_captured_draw_is_replayed_with_other_numbers_and_logits() -> None:
    """As a graph does it: every tensor stays where it is, and what was in the scratch memory
    before does not matter."""
    sampler = DeviceSampler(VOCAB, DEVICE, 4, chunk=128, room=64)
    logits = torch.empty((4, VOCAB), device=DEVICE)
    numbers = sampler.prepare([], 4).numbers.to(DEVICE)
    tokens = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    flags = torch.zeros(4, dtype=torch.uint8, device=DEVICE)
    for step, count in enumerate((4, 2, 3)):
        rows = mixed(count, 5 + step)
        step_logits = some_logits(4, seed=step)
        logits.copy_(step_logits)
        numbers.copy_(sampler.prepare(rows, 4).numbers)
        sampler.draw(logits, numbers, tokens, flags)
        wanted = expected(step_logits[:count], rows)
        assert (tokens[:count].tolist(), flags[:count].tolist()) == wanted


WAITS = (
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "cpu",
    "nonzero",
    "numpy",
)
OF_THE_INTERPRETER = {"aten::new_empty", "aten::set_.source_Storage_storage_offset"}


class Operations(TorchDispatchMode):
    """Notes what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waits(monkeypatch):
    """Everything that brings a tensor's numbers to the host fails."""

    def refuse(self, *args, **kwargs):
        raise AssertionError("the host waits for the device")

    with monkeypatch.context() as patch:
        for name in WAITS:
            patch.setattr(torch.Tensor, name, refuse)
        yield


def test_a_draw_neither_waits_nor_allocates(monkeypatch) -> None:
    rows = mixed(9, 0)
    sampler = DeviceSampler(VOCAB, DEVICE, len(rows), chunk=128)
    logits = some_logits(len(rows)).to(DEVICE)
    numbers = sampler.prepare(rows).numbers.to(DEVICE)
    tokens = torch.zeros(len(rows), dtype=torch.int64, device=DEVICE)
    flags = torch.zeros(len(rows), dtype=torch.uint8, device=DEVICE)
    with no_waits(monkeypatch):
        with pytest.raises(AssertionError, match="waits"):
            bool(tokens[0] == 0)
        sampler.draw(logits, numbers, tokens, flags)
        if DEVICE.type == "cpu":
            # The interpreter makes tensors of its own for each launch.
            monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **kwargs: None)
        with Operations() as operations:
            sampler.draw(logits, numbers, tokens, flags)
            assert operations.names == set()
            torch.zeros(1)
            assert operations.names
    assert (tokens.tolist(), flags.tolist()) == expected(logits.cpu(), rows)
