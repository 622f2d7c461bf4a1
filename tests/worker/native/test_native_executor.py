"""The native executor against the contract of step plans: forks, copies, draws, prompt scores,
items that fail alone, frames, deterministic mode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fixtures.models import make_model
from tests.worker.native.plan_driver import (
    GREEDY,
    KERNELS,
    PlanDriver,
    native_settings,
    random_prompts,
    scores,
)
from tests.worker.native.reference import load_reference, reference_logits
from xllm.errors import EngineError
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import ItemKind, ItemOptions, NewSequence, StepItem, StepPlan
from xllm.worker.execution.native import NativeExecutor

SAMPLED = SamplingParams(temperature=1.0, seed=11)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("executor"))


@pytest.fixture(params=KERNELS)
def driver(directory: Path, request: pytest.FixtureRequest) -> Iterator[PlanDriver]:
    driver = PlanDriver(directory, kernels=request.param)
    yield driver
    driver.executor.check()
    driver.executor.close()


def prefill(seq: int, num_tokens: int, num_samples: int = 1, start: int = 0, **more) -> StepItem:
    return StepItem(seq, ItemKind.PREFILL, start, num_tokens, (), num_samples, **more)


def new(seq: int, prompt: list[int], sampling: SamplingParams, blocks: list[int], **more):
    return NewSequence(seq, tuple(prompt), (), sampling, 0, tuple(blocks), **more)


def test_ready_says_what_was_loaded(driver: PlanDriver) -> None:
    ready = driver.ready
    assert ready.vocab_size == 512
    assert ready.max_model_len == 1024
    assert ready.eos_ids == (510, 508)
    assert ready.block_size == 16
    assert ready.dtype == "float32"
    assert len(ready.revision) == 64
    (group,) = ready.kv_groups
    assert (group.window, group.num_layers) == (0, 3)
    assert group.bytes_per_token == 3 * 2 * 2 * 32 * 4
    assert ready.num_blocks == (8 << 20) // (group.bytes_per_token * 16)
    assert ready.fingerprint.startswith("cpu/")


def test_execute_before_load_is_an_error(directory: Path) -> None:
    with pytest.raises(EngineError, match="not loaded"):
        NativeExecutor(native_settings(directory)).execute(StepPlan(1))


@pytest.mark.parametrize("kernels", KERNELS)
def test_counter_grows_with_each_piece(kernels: str, directory: Path) -> None:
    """A layer: projections, attention, the rest, or more. After the layers: head, best token."""
    driver = PlanDriver(directory, kernels=kernels)
    before = driver.executor.counter
    driver.generate([driver.job([1, 2, 3], 4)])
    least = 4 * (3 * 3 + 2)
    grown = driver.executor.counter - before
    assert grown == least if kernels == "torch" else grown > least


def test_hooks_are_called_around_each_layer(directory: Path) -> None:
    calls: list[str] = []

    class Recorder:
        def before_layer(self, index: int) -> None:
            calls.append(f"before {index}")

        def after_layer(self, index: int, hidden: torch.Tensor) -> None:
            calls.append(f"after {index} {tuple(hidden.shape)}")

    executor = NativeExecutor(native_settings(directory), [Recorder()])
    executor.load(lambda loaded, total: None)
    executor.execute(StepPlan(1, (prefill(1, 2),), (new(1, [5, 6], GREEDY, [0]),)))
    assert calls == [f"{word}" for i in range(3) for word in (f"before {i}", f"after {i} (2, 64)")]


def test_choices_draw_from_one_row_and_forks_go_on(driver: PlanDriver) -> None:
    """n choices: drawn together, then each forked with a copy of the partial block. Each fork
    goes on as a sequence with the same prompt and its first token would."""
    (prompt,) = random_prompts(1, 21, 21)
    sampling = SamplingParams(temperature=1.0, seed=5, n=4)
    output = driver.run([prefill(1, 21, 4)], [new(1, prompt, sampling, [0, 1])])
    (first,) = output.result.tokens
    assert len(first) == 4
    assert len(set(first)) > 1
    news = tuple(
        NewSequence(k + 1, (), (first[k],), sampling, k, (0, k + 1), parent=1) for k in (1, 2, 3)
    )
    copies = tuple((1, k + 1) for k in (1, 2, 3))
    decodes = [StepItem(k + 1, ItemKind.DECODE, 21, 1) for k in range(4)]
    together = driver.run(decodes, news, copies=copies).result
    assert together.failed == ()
    for k in range(4):
        # The same history from the start, in blocks of its own, alone.
        alone = NewSequence(50 + k, tuple(prompt), (first[k],), sampling, k, (40, 41))
        expected = driver.run([prefill(50 + k, 22)], [alone]).result
        assert expected.tokens[0] == together.tokens[k]


def test_a_fork_finds_its_parent_that_ends_in_the_same_plan(driver: PlanDriver) -> None:
    (prompt,) = random_prompts(1, 10, 10)
    driver.run([prefill(1, 10)], [new(1, prompt, GREEDY, [0])])
    fork = NewSequence(2, (), (77,), GREEDY, 1, (1,), parent=1)
    output = driver.run([StepItem(2, ItemKind.DECODE, 10, 1)], [fork], ended=(1,), copies=((0, 1),))
    assert output.result.failed == ()
    whole = NewSequence(3, tuple(prompt), (77,), GREEDY, 0, (5,))
    assert driver.run([prefill(3, 11)], [whole]).result.tokens == output.result.tokens


def test_copies_that_overlap_run_in_order(driver: PlanDriver) -> None:
    (prompt,) = random_prompts(1, 16, 16)
    expected = driver.run([prefill(1, 16)], [new(1, prompt, GREEDY, [0])]).result.tokens
    driver.run([], copies=((0, 7), (7, 8)))
    again = NewSequence(2, tuple(prompt), (), GREEDY, 0, (8,))
    assert driver.run([prefill(2, 1, start=15)], [again]).result.tokens == expected


@pytest.mark.parametrize("chunk", [1, 9, 16, 40])
def test_prompt_scores_across_chunks(driver: PlanDriver, directory: Path, chunk: int) -> None:
    """Every prompt token after the first has its raw logprob, rank and alternatives, wherever
    the chunks end; then the drawn token's."""
    (prompt,) = random_prompts(1, 40, 40)
    sampling = SamplingParams(temperature=0.0, seed=0, prompt_logprobs=3, logprobs=1)
    news = [new(1, prompt, sampling, [3, 2, 1])]
    found = []
    for start in range(0, 40, chunk):
        count = min(chunk, 40 - start)
        last = int(start + count == 40)
        item = prefill(1, count, last, start, score_prompt=True)
        output = driver.run([item], news)
        news = []
        assert output.result.failed == ()
        assert output.result.logprob_rows == (count,)
        # A step of the drawn row alone has no more columns than that row asked for.
        wide = 3 if start + 1 < 40 else 1
        assert output.result.num_top == wide
        found.append(scores(output))
    padding = ((0, 0), (0, 3 - wide))
    found[-1].ids = np.pad(found[-1].ids, padding, constant_values=-1)
    found[-1].logprobs = np.pad(found[-1].logprobs, padding, constant_values=-np.inf)
    ids = np.concatenate([part.ids for part in found])
    logprobs = np.concatenate([part.logprobs for part in found])
    ranks = np.concatenate([part.ranks for part in found])
    want = reference_logits(load_reference(directory), prompt).log_softmax(-1).numpy()
    drawn = output.result.tokens[0][0]
    assert ids[:, 0].tolist() == [*prompt[1:], drawn]
    rows = np.arange(40)
    assert np.abs(logprobs[:, 0] - want[rows, ids[:, 0]]).max() < 1e-4
    assert (ranks == (want > want[rows, ids[:, 0]][:, None]).sum(1) + 1).mean() > 0.97
    for column in (1, 2, 3):
        assert np.abs(logprobs[:39, column] - np.sort(want, axis=1)[:39, -column]).max() < 1e-4
    # The last row is the drawn token's, which asked for one alternative: the rest is padding.
    assert ids[39].tolist()[2:] == [-1, -1]
    assert np.isneginf(logprobs[39, 2:]).all()


def test_items_that_cannot_run_fail_alone(driver: PlanDriver) -> None:
    (prompt,) = random_prompts(1, 20, 20)
    witness = driver.run([prefill(1, 20)], [new(1, prompt, GREEDY, [0, 1])]).result.tokens[0]
    news = [
        new(2, prompt, GREEDY, [2, 3]),
        new(3, prompt, GREEDY, [4]),
        new(4, prompt, GREEDY, [9999]),
        new(5, [600], GREEDY, [5]),
        NewSequence(6, (), (1,), GREEDY, 0, (6,), parent=777),
        new(7, prompt, GREEDY, [7, 8]),
        new(8, prompt, GREEDY, [9, 10]),
        new(9, prompt, GREEDY, [11, 12]),
    ]
    items = [
        prefill(99, 5),
        prefill(3, 20),
        prefill(4, 20),
        prefill(2, 20),
        prefill(5, 1),
        prefill(6, 1),
        prefill(7, 21),
        prefill(8, 10),
        StepItem(9, ItemKind.ENCODE, 0, 20),
        prefill(9, 20, options=ItemOptions(source_step=3)),
        StepItem(1, ItemKind.DUMMY, 0, 0),
    ]
    result = driver.run(items, news).result
    reasons = dict(result.failed)
    assert sorted(reasons) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    for index, words in {
        0: "99 is not known",
        1: "do not fit 1 blocks",
        2: "block 9999",
        4: "token 600",
        5: "parent 777",
        6: "21 are asked for, 20 are known",
        7: "a draw at 10",
        8: "not supported",
        9: "placeholders",
    }.items():
        assert words in reasons[index]
    assert result.tokens[3] == witness
    assert all(result.tokens[index] == () for index in reasons)


def test_numbers_that_are_not_finite_harm_one_sequence(tmp_path: Path) -> None:
    """A token whose embedding overflows fails its sequence; its blocks are used again by others,
    whose tokens are what they would have been."""
    model = make_model("llama", tmp_path)
    driver = PlanDriver(model)
    (prompt,) = random_prompts(1, 20, 20)
    expected = driver.run([prefill(1, 20)], [new(1, prompt, GREEDY, [0, 1])]).result.tokens[0]
    embedding = driver.executor._loaded().loop._model._embedding.weight
    embedding[400] = float("nan")
    assert 400 not in prompt
    news = [new(2, [*prompt[:19], 400], GREEDY, [2, 3]), new(3, prompt, GREEDY, [4, 5])]
    result = driver.run([prefill(2, 20), prefill(3, 20)], news).result
    assert [index for index, _ in result.failed] == [0]
    assert "not a number" in result.failed[0][1]
    assert result.tokens == ((), expected)
    # The spoilt blocks in the hands of the next sequence, which stops short of the spoilt
    # position but reads the rest of its block, masked.
    short = [new(4, prompt[:18], GREEDY, [4, 5]), new(5, prompt[:18], GREEDY, [2, 3])]
    driver.run([prefill(4, 17, 0), prefill(5, 17, 0)], short)
    last = [prefill(4, 1, start=17), prefill(5, 1, start=17)]
    result = driver.run(last).result
    assert result.failed == ()
    assert result.tokens[0] == result.tokens[1] != ()


def test_min_tokens_masks_stop_ids(driver: PlanDriver) -> None:
    """The worker's own history decides when the stop ids are free again: masked for the first
    two tokens, the third is drawn as if they had never been."""
    (prompt,) = random_prompts(1, 12, 12)

    def drawn(seq: int, min_tokens: int, stop_ids: tuple[int, ...]) -> list[int]:
        sampling = SamplingParams(temperature=0.0, seed=0, min_tokens=min_tokens)
        blocks = tuple(driver.free[:2])
        state = NewSequence(seq, tuple(prompt), (), sampling, 0, blocks, stop_ids=stop_ids)
        tokens = list(driver.run([prefill(seq, 12)], [state]).result.tokens[0])
        for position in (12, 13):
            decode = StepItem(seq, ItemKind.DECODE, position, 1)
            tokens.extend(driver.run([decode]).result.tokens[0])
        return tokens

    wanted = drawn(90, 0, ())
    masked = drawn(91, 2, tuple(wanted))
    assert not set(masked[:2]) & set(wanted)
    # The third is a stop id here, and is drawn all the same once two are out.
    stop = (*wanted, masked[2])
    assert masked[2] not in masked[:2]
    assert drawn(92, 2, stop) == masked
    assert drawn(93, 3, stop)[2] not in stop


@pytest.mark.parametrize("moved", [0, 5])
def test_a_resumed_sequence_draws_what_it_would_have_drawn(driver: PlanDriver, moved: int) -> None:
    """Prompt and output so far, sent anew, go on with the same tokens, wherever the border
    between them is: the draw depends on the seed, the choice and the absolute position."""
    (prompt,) = random_prompts(1, 18, 18)
    whole = driver.job(prompt, 12, SAMPLED)
    driver.generate([whole])
    border = len(prompt) + moved
    history = (*prompt, *whole.output[:5])
    resumed = NewSequence(
        91, history[:border], history[border:], SAMPLED, 0, tuple(driver.free[:2])
    )
    tokens = list(driver.run([prefill(91, 23)], [resumed]).result.tokens[0])
    for position in range(23, 29):
        decode = StepItem(91, ItemKind.DECODE, position, 1)
        tokens.extend(driver.run([decode]).result.tokens[0])
    assert tokens == whole.output[5:]


def test_deterministic_mode_gives_equal_bits(directory: Path) -> None:
    """Logprobs, bit by bit: alone and whole, in chunks, beside others."""
    driver = PlanDriver(directory, deterministic=True)
    assert driver.ready.fingerprint.endswith("/deterministic")
    prompts = random_prompts(4, 30, 40)
    sampling = SamplingParams(temperature=0.0, seed=0, logprobs=5, ignore_eos=True)

    def collect(chunk: int, num_jobs: int) -> list[bytes]:
        jobs = [driver.job(prompt, 4, sampling) for prompt in prompts[:num_jobs]]
        found = []
        while not jobs[0].done:
            output = driver.step(jobs, chunk)
            if output.result.num_top >= 0 and output.result.logprob_rows[0]:
                found.append(scores(output).logprobs[0].tobytes())
        driver.release(jobs)
        return found

    alone = collect(1 << 20, 1)
    assert len(alone) == 4
    assert collect(7, 1) == alone
    assert collect(9, 4) == alone


def test_statistics_count(driver: PlanDriver) -> None:
    driver.generate([driver.job([1, 2, 3], 2)])
    found = driver.executor.statistics()
    assert found.num_steps == 2
    assert found.sequences.num_sequences == 1
    assert found.sequences.num_tokens == 5
    assert found.pool.num_blocks == driver.ready.num_blocks
