"""Deterministic mode: the bits of a token's logits depend on its text alone.

Random schedules cut random texts into random chunks, beside random neighbours, over blocks
anywhere, in slots or by table, behind prefixes that another sequence computed, with one thread and
with two: every row's logits have the bits of the same text computed alone and whole. So have those
of sequences that begin with the same blocks, which attention then reads once.
"""

from __future__ import annotations

import dataclasses
from array import array

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fixtures.models import make_model
from tests.worker.native.model_runner import BLOCK_SIZE, Runner
from tests.worker.native.plan_driver import KERNELS, random_prompts
from xllm.worker.attention.plan import Span
from xllm.worker.memory.cpu_memory import CpuKvMemory

LENGTH = 75
TEXTS = random_prompts(3, LENGTH, LENGTH)
BLOCKS_A_TEXT = -(-LENGTH // BLOCK_SIZE)
PREFIX = random_prompts(1, 272, 272)[0]
PREFIX_BLOCKS = len(PREFIX) // BLOCK_SIZE
CASES = [
    ("qwen3", "float32", 1),
    ("qwen3", "bfloat16", 2),
    ("mistral-window", "float32", 2),
    ("qwen2", "bfloat16", 1),
    ("qwen3-moe", "float32", 2),
    ("qwen3-moe", "bfloat16", 1),
]

pytestmark = pytest.mark.skipif("compiled" not in KERNELS, reason="the kernels were not built")


@dataclasses.dataclass
class Case:
    """A loaded model and the bits that it must give."""

    runner: Runner
    wanted: list[torch.Tensor]


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, dtype, num_threads = request.param
    directory = make_model(family, tmp_path_factory.mktemp("determinism") / "model", dtype=dtype)
    runner = Runner(directory, dtype=dtype, num_threads=num_threads)
    assert runner.loop.batch_invariant
    table = array("q", range(BLOCKS_A_TEXT))
    return Case(runner, [runner.logits([Span(0, LENGTH, table)], text) for text in TEXTS])


@dataclasses.dataclass
class Running:
    """A sequence on its way: its text, its blocks, in a slot or not."""

    text: int
    table: array
    address: int
    done: int


chunks = st.sampled_from([0, 1, 1, 2, 5, 15, 16, 17, 31, LENGTH])
schedules = st.lists(st.lists(chunks, min_size=5, max_size=5), min_size=4, max_size=12)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    schedule=schedules,
    texts=st.lists(st.integers(0, len(TEXTS) - 1), min_size=5, max_size=5),
    in_slots=st.lists(st.booleans(), min_size=5, max_size=5),
    placement=st.permutations(range(96 // BLOCKS_A_TEXT)),
    prefix=st.integers(0, BLOCKS_A_TEXT - 1),
)
def test_every_schedule_gives_the_same_bits(
    case: Case,
    schedule: list[list[int]],
    texts: list[int],
    in_slots: list[bool],
    placement: list[int],
    prefix: int,
) -> None:
    pool = case.runner.pool
    assert isinstance(pool, CpuKvMemory)
    running = []
    for text, place, in_slot in zip(texts, placement, in_slots, strict=False):
        first = place * BLOCKS_A_TEXT
        ids = range(first, first + BLOCKS_A_TEXT)
        address = pool.pool_address + first * pool.layout.block_bytes if in_slot else 0
        table = array("q", ids if in_slot else reversed(ids))
        running.append(Running(text, table, address, 0))
    hit = _take_prefix(running, prefix)
    for step in schedule:
        _run_step(case, running, step, hit)


def _take_prefix(running: list[Running], num_blocks: int) -> tuple[int, int] | None:
    """Let a sequence find the first blocks of another one of the same text, by table: what it
    finds, (its place, tokens), it has once the other has computed them."""
    last = running[-1]
    for other in running[:-1]:
        if other.text == last.text and num_blocks:
            last.table[:num_blocks] = other.table[:num_blocks]
            last.address = 0
            return running.index(other), num_blocks * BLOCK_SIZE
    return None


def _run_step(
    case: Case, running: list[Running], step: list[int], hit: tuple[int, int] | None
) -> None:
    spans, ids, wanted, after = [], [], [], {}
    for place, (sequence, chunk) in enumerate(zip(running, step, strict=True)):
        if hit is not None and place == len(running) - 1 and sequence.done == 0:
            source, num_tokens = hit
            if running[source].done < num_tokens:
                continue
            sequence.done = num_tokens
        count = min(chunk, LENGTH - sequence.done)
        if count:
            end = sequence.done + count
            spans.append(Span(sequence.done, count, sequence.table, sequence.address))
            ids.extend(TEXTS[sequence.text][sequence.done : end])
            wanted.append(case.wanted[sequence.text][sequence.done : end])
            after[place] = end
    if spans:
        found = case.runner.logits(spans, ids)
        assert torch.equal(found.view(torch.int32), torch.cat(wanted).view(torch.int32))
    for place, end in after.items():
        running[place].done = end


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.lists(st.sampled_from([0, 1, 1, 2, 9]), min_size=6, max_size=6), max_size=4))
def test_a_shared_beginning_gives_the_same_bits(case: Case, schedule: list[list[int]]) -> None:
    """Six sequences behind one prefix that was computed once: chunks, then decodes."""
    prefix = array("q", range(PREFIX_BLOCKS))
    case.runner.logits([Span(0, len(PREFIX), prefix)], PREFIX)
    suffixes = [text[start : start + 25] for text in TEXTS for start in (0, 30)]
    wanted, tables = [], []
    for place, suffix in enumerate(suffixes):
        own = range(PREFIX_BLOCKS + 2 * place, PREFIX_BLOCKS + 2 * place + 2)
        tables.append(prefix + array("q", own))
        alone = array("q", range(96 - PREFIX_BLOCKS - 2, 96))
        text = [*PREFIX, *suffix]
        wanted.append(case.runner.logits([Span(0, len(text), alone)], text)[len(PREFIX) :])
    done = [0] * len(suffixes)
    for step in [*schedule, [5] * 6, [1] * 6]:
        counts = [min(n, 25 - have) for n, have in zip(step, done, strict=True)]
        moving = [place for place, count in enumerate(counts) if count]
        if not moving:
            continue
        spans = [Span(len(PREFIX) + done[i], counts[i], tables[i]) for i in moving]
        ids = [token for i in moving for token in suffixes[i][done[i] : done[i] + counts[i]]]
        found = case.runner.logits(spans, ids)
        expected = torch.cat([wanted[i][done[i] : done[i] + counts[i]] for i in moving])
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
        done = [have + count for have, count in zip(done, counts, strict=True)]


def test_other_bits_are_noticed(case: Case) -> None:
    """The comparison can fail: a text that differs in its first token."""
    text = [TEXTS[0][0] ^ 1, *TEXTS[0][1:]]
    table = array("q", range(BLOCKS_A_TEXT))
    found = case.runner.logits([Span(0, LENGTH, table)], text)
    assert not torch.equal(found, case.wanted[0])
