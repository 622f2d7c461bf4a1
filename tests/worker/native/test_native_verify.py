"""Steps that verify drafts: their rows are single decodes, and what is refused leaves no trace."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.models import make_model
from tests.worker.known_drafts import KnownDrafts
from tests.worker.native.plan_driver import GREEDY, KERNELS, Job, PlanDriver, random_prompts, scores
from tests.worker.native.test_native_scheduler import Instance
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import ItemKind, ItemOptions, StepItem

SAMPLED = SamplingParams(
    seed=11,
    top_p=0.9,
    ignore_eos=True,
    logprobs=3,
    presence_penalty=0.6,
    frequency_penalty=0.3,
    repetition_penalty=1.2,
    min_tokens=9,
)
SCORED = SamplingParams(temperature=0.0, seed=0, ignore_eos=True, logprobs=3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("verified"))


def verify_item(job: Job, drafts: list[int]) -> StepItem:
    """The next item of a job that decodes, with drafts behind its last token."""
    ids = (job.output[-1], *drafts)
    start = len(job.prompt) + len(job.output) - 1
    return StepItem(job.seq, ItemKind.VERIFY, start, len(ids), options=ItemOptions(token_ids=ids))


def verify(driver: PlanDriver, parts: list[tuple[Job, list[int]]], more: tuple = ()) -> list:
    """One step with drafts for some jobs, which go on with what was accepted; `more` jobs have
    their next items in it. The (ids, logprobs) of each row of each of `parts`."""
    items = [verify_item(job, drafts) for job, drafts in parts]
    others = [driver.item(job, 1 << 20) for job in more]
    output = driver.run([*items, *others], driver.news(more))
    assert output.result.failed == ()
    rows: list = [[] for _ in parts]
    if output.result.num_top >= 0:
        table = scores(output)
        ends = list(itertools.accumulate(output.result.logprob_rows, initial=0))
        for number, (begin, end) in enumerate(itertools.pairwise(ends[: len(parts) + 1])):
            rows[number] = list(zip(table.ids[begin:end], table.logprobs[begin:end], strict=True))
    for (job, _), tokens in zip(parts, output.result.tokens, strict=False):
        job.output.extend(tokens)
        job.computed += len(tokens)
    for job, item, tokens in zip(more, others, output.result.tokens[len(parts) :], strict=True):
        job.computed += item.num_tokens
        job.output.extend(tokens)
    return rows


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("sampling", [SCORED, SAMPLED], ids=["greedy", "sampled"])
def test_rows_of_a_verified_step_are_those_of_single_decodes(
    directory: Path, kernels: str, sampling: SamplingParams
) -> None:
    driver = PlanDriver(directory, kernels=kernels)
    prompts = random_prompts(3, 5, 40, seed=3)
    singly = [driver.job(prompt, 12, sampling) for prompt in prompts]
    found: list = [[] for _ in singly]
    while not all(job.done for job in singly):
        output = driver.step(singly)
        for number, (ids, logprobs) in enumerate(
            zip(scores(output).ids, scores(output).logprobs, strict=True)
        ):
            found[number].append((ids, logprobs))
    jobs = [driver.job(prompt, 12, sampling) for prompt in prompts]
    driver.step(jobs)
    # All right, of different lengths, and with a mistake behind two that are right.
    want = [job.output for job in singly]
    wrong = [*want[2][1:3], (want[2][3] + 1) % 400 + 3, *want[2][4:7]]
    rows = verify(driver, list(zip(jobs, [want[0][1:8], want[1][1:5], wrong], strict=True)))
    assert [len(one) for one in rows] == [8, 5, 3]
    for job, other, one, row in zip(jobs, singly, found, rows, strict=True):
        assert job.output == other.output[: len(job.output)]
        for (ids, logprobs), (more_ids, more) in zip(row, one[1:], strict=False):
            assert list(ids) == list(more_ids)
            assert list(logprobs) == pytest.approx(list(more), abs=1e-4)
    driver.generate(jobs)
    assert [job.output for job in jobs] == want


@pytest.mark.parametrize("worker", [{}, {"deterministic": True}, {"kv_memory": "paged"}], ids=str)
@pytest.mark.parametrize("kernels", KERNELS)
def test_what_is_refused_leaves_no_trace(directory: Path, kernels: str, worker: Any) -> None:
    """Wrong drafts across the borders of blocks, at every step, beside a decode and a prompt."""
    driver = PlanDriver(directory, kernels=kernels, **worker)
    prompts = random_prompts(3, 12, 20, seed=5)
    samplings = [GREEDY, SAMPLED, SCORED]
    wanted = [driver.job(p, 20, s) for p, s in zip(prompts, samplings, strict=True)]
    driver.generate(wanted)
    jobs = [driver.job(p, 40, s) for p, s in zip(prompts, samplings, strict=True)]
    driver.step(jobs[:2])
    while len(jobs[0].output) < 20:
        parts = [
            (job, [random_prompts(1, 1, 1, seed=len(job.output) + k)[0][0] for k in range(7)])
            for job in jobs[:2]
        ]
        verify(driver, parts, (jobs[2],))
    for job, want in zip(jobs, wanted, strict=True):
        assert job.output[:20] == want.output[: len(job.output)]
    driver.executor.check()


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_draft_that_overflows_harms_nobody(directory: Path, kernels: str) -> None:
    driver = PlanDriver(directory, kernels=kernels)
    embedding = driver.executor._loaded().loop._model._embedding.weight  # type: ignore[attr-defined]
    embedding[400] = float("nan")
    prompt = [token for token in random_prompts(1, 9, 9)[0] if token != 400]
    want = driver.job(prompt, 9)
    driver.generate([want])
    assert 400 not in want.output
    job = driver.job(prompt, 9)
    driver.step([job])
    verify(driver, [(job, [want.output[1], 400, want.output[3]])])
    # Masked it may still spoil the rows before it: then there is none of them.
    assert job.output in (want.output[:1], want.output[:3])
    assert driver.executor._loaded().pool.may_hold_nan  # type: ignore[attr-defined]
    driver.generate([job])
    assert job.output == want.output


def test_items_that_cannot_be_verified_fail_alone(directory: Path) -> None:
    driver = PlanDriver(directory)
    jobs = [driver.job(prompt, 9) for prompt in random_prompts(4, 5, 9, seed=8)]
    driver.step(jobs)
    foreign, size = verify_item(jobs[2], [4]), driver.ready.vocab_size
    items = [
        verify_item(jobs[0], [3, 4]),
        verify_item(jobs[1], [3, size]),
        StepItem(foreign.seq, ItemKind.VERIFY, foreign.start, 2, options=ItemOptions((3, 4))),
        verify_item(jobs[3], [5] * 40),
    ]
    result = driver.run(items).result
    assert [index for index, _ in result.failed] == [1, 2, 3]
    words = dict(result.failed)
    assert f"of {size} tokens" in words[1]
    assert "verified from token 3" in words[2]
    assert "do not fit" in words[3]
    assert 1 <= len(result.tokens[0]) <= 3


COMBINATIONS: dict[str, dict[str, Any]] = {
    "one at a time": {"max_in_flight": 1},
    "pipeline": {},
    "chunked": {"max_num_batched_tokens": 37},
    "few blocks": {"max_num_batched_tokens": 37, "num_blocks": 18, "max_in_flight": 3},
    "uncached": {"prefix_cache": False, "strategy": "continuous"},
    "urgent": {"strategy": "slo-urgency"},
    "torch": {"kernels": "torch"},
}


def serve(instance: Instance) -> Instance:
    """Requests of all sorts, some beginning alike, that come while others run."""
    prefix = random_prompts(1, 40, 40, seed=1)[0]
    vocabulary = instance.limits.vocab_size
    for number, prompt in enumerate(random_prompts(8, 2, 40, seed=2)):
        begun = [*prefix, *prompt] if number % 2 else prompt
        more: dict[str, Any] = {"ignore_eos": True}
        if number % 4 == 1:
            more = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "min_tokens": number}
        if number % 4 == 2:
            more = {"logprobs": 2, "stop_token_ids": tuple(range(number, vocabulary, 23))}
        if number % 4 == 3:
            more = {"n": 2, "top_k": 50, "logit_bias": {7: 4.0}, "ignore_eos": True}
        heat = float(number % 3 > 0)
        sampling = SamplingParams(seed=number, temperature=heat, max_tokens=24, **more)
        instance.admit(f"r{number}", begun, sampling)
        for _ in range(2):
            instance.step()
    instance.run()
    return instance


@pytest.fixture(scope="module")
def plain(directory: Path) -> Instance:
    return serve(Instance(directory))


def made(directory: Path, mode: dict[str, Any], **more: Any) -> Instance:
    limits = dict(mode)
    driver = PlanDriver(directory, kernels=limits.pop("kernels", KERNELS[0]))
    return Instance(directory, driver=driver, **limits, **more)


@pytest.mark.parametrize("mode", COMBINATIONS)
def test_streams_with_drafts_are_those_without(directory: Path, plain: Instance, mode: str) -> None:
    instance = made(directory, COMBINATIONS[mode], proposer=KnownDrafts(plain.streams))
    serve(instance)
    assert instance.streams == plain.streams
    for key, row in plain.logprobs.items():
        assert instance.logprobs[key] == pytest.approx(row, abs=1e-4)
    stats = instance.scheduler.statistics()
    assert 0 < stats.num_accepted_drafts < stats.num_drafts
    assert mode != "few blocks" or stats.num_preemptions > 0


def test_prompt_lookup_gives_the_same_streams_in_fewer_steps(directory: Path) -> None:
    """A small model repeats itself when it is greedy."""
    steps, streams = [], []
    for drafting in ("none", "prompt-lookup"):
        instance = Instance(directory, drafting=drafting, max_in_flight=1)
        for number, prompt in enumerate(random_prompts(1, 10, 30, seed=6)):
            greedy = SamplingParams(temperature=0.0, seed=0, max_tokens=100, ignore_eos=True)
            instance.admit(f"r{number}", prompt, greedy)
        count = 0
        while instance.step():
            count += 1
        steps.append(count)
        streams.append(instance.streams)
    assert streams[0] == streams[1]
    stats = instance.scheduler.statistics()
    assert stats.num_accepted_drafts > 0
    assert steps[1] < steps[0]
