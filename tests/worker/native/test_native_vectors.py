"""Vectors of native models against the library's hidden states: both poolings, with and without
a head, chunked, beside others, after a prefix hit, after giving way."""

from __future__ import annotations

import dataclasses
import json
import shutil
from array import array
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.fixtures.library_models import make_library_model
from tests.fixtures.models import make_model, remove_head
from tests.worker.native.plan_driver import GREEDY, KERNELS, native_settings, random_prompts
from xllm.config.scheduling import SchedulerSettings
from xllm.config.settings import Settings
from xllm.errors import ConfigError, EngineError
from xllm.master.limits import InstanceLimits
from xllm.master.scheduler import Scheduler
from xllm.protocol.instance import AdmitRequest
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import ItemKind, NewSequence, StepItem, StepPlan, WorkerReady
from xllm.worker.execution.native import NativeExecutor
from xllm.worker.executor import Executor

BOUND = 2e-5
"""Numbers of a vector agree within this in fp32."""
POOLINGS = ("last", "mean")
NOTHING = SamplingParams(max_tokens=0, temperature=0.0, seed=0)


def embedder(directory: Path, pooling: str = "auto", **worker: Any) -> Settings:
    plain = native_settings(directory, **worker)
    model = dataclasses.replace(plain.model, task="embed", pooling=pooling)
    return dataclasses.replace(plain, model=model)


def reference_vectors(
    directory: Path, texts: Sequence[Sequence[int]], pooling: str
) -> list[torch.Tensor]:
    """What the library's inner model gives, text by text."""
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()
    vectors = []
    for text in texts:
        with torch.inference_mode():
            rows = model(torch.tensor([list(text)]), use_cache=False).last_hidden_state[0]
        row = rows[-1] if pooling == "last" else rows.mean(0)
        vectors.append(row / row.norm())
    return vectors


class Embedder:
    """A scheduler over an executor that embeds; `vectors` by request."""

    def __init__(self, settings: Settings, executor: Executor | None = None, **limits: Any) -> None:
        self.executor: Any = executor or NativeExecutor(settings)
        self.ready: WorkerReady = self.executor.load(lambda loaded, total: None)
        found = InstanceLimits.from_ready(self.ready, SchedulerSettings(max_num_seqs=32))
        self.limits = dataclasses.replace(found, **limits)
        self.scheduler = Scheduler(self.limits)
        self.vectors: dict[str, torch.Tensor] = {}
        self.cached: dict[str, int] = {}
        self.num_rows = 0
        self.now = 0.0

    def admit(self, request_id: str, text: Sequence[int], **options: Any) -> None:
        request = AdmitRequest(
            request_id, 1, self.ready.model, tuple(text), NOTHING, embed=True, **options
        )
        assert self.scheduler.admit(request, self.now) is None

    def run(self, steps: int = 10_000) -> None:
        in_flight: deque = deque()
        for _ in range(steps):
            self.now += 0.01
            while (plan := self.scheduler.schedule(self.now)) is not None:
                self.num_rows += sum(item.num_tokens for item in plan.items)
                in_flight.append(self.executor.execute(plan))
            if not in_flight:
                break
            self.settle(in_flight.popleft())
        while in_flight:
            self.settle(in_flight.popleft())
        self.executor.check()

    def settle(self, output) -> None:
        assert output.result.failed == ()
        outcome = self.scheduler.update(output.result, output.frames, self.now)
        self.scheduler.check()
        for word in outcome.vectors:
            self.vectors[word.request_id] = torch.tensor(array("f", word.vector))
        for ended in outcome.ended:
            assert ended.code == ""
            self.cached[ended.request_id] = ended.cached_tokens

    def embed(self, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        for index, text in enumerate(texts):
            self.admit(str(index), text)
        self.run()
        assert self.scheduler.is_idle
        return [self.vectors.pop(str(index)) for index in range(len(texts))]


def assert_alike(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() < BOUND


def texts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    return [random_prompts(1, length, length, seed=seed + length)[0] for length in lengths]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("vectors") / "qwen3")


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    return remove_head(make_model("qwen3", tmp_path_factory.mktemp("vectors") / "bare"))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_are_the_librarys_however_texts_are_cut(qwen3, pooling, kernels):
    texts = texts_of(1, 2, 15, 16, 17, 33, 100)
    want = reference_vectors(qwen3, texts, pooling)
    for budget in (32, 512):
        engine = Embedder(embedder(qwen3, pooling, kernels=kernels), max_num_batched_tokens=budget)
        got = engine.embed(texts)
        assert_alike(got, want)
        assert all(abs(float(vector.norm()) - 1) < 1e-6 for vector in got)
    assert (engine.ready.task, engine.ready.pooling) == ("embed", pooling)
    assert engine.ready.embedding_size == len(want[0])


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_checkpoints_without_a_head(family, kernels, tmp_path):
    directory = remove_head(make_model(family, tmp_path / family))
    texts = texts_of(3, 40)
    settings = native_settings(directory, kernels=kernels)
    engine = Embedder(settings)
    assert (engine.ready.task, engine.ready.pooling) == ("embed", "last")
    assert_alike(engine.embed(texts), reference_vectors(directory, texts, "last"))


@pytest.mark.parametrize("tied", [True, False])
def test_inner_names_under_the_outer_architecture(bare, tied, tmp_path):
    """Some embedding models are published so."""
    directory = Path(shutil.copytree(bare, tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": tied}
    (directory / "config.json").write_text(json.dumps(config))
    texts = texts_of(5, 20)
    got = Embedder(embedder(directory)).embed(texts)
    assert_alike(got, reference_vectors(bare, texts, "last"))


def test_a_head_is_not_loaded_where_vectors_are_wanted(qwen3):
    with_head = NativeExecutor(native_settings(qwen3))
    with_head.load(lambda loaded, total: None)
    without = NativeExecutor(embedder(qwen3))
    without.load(lambda loaded, total: None)
    assert without._loaded().num_bytes < with_head._loaded().num_bytes
    new = NewSequence(1, (5, 6), (), GREEDY, 0, (0,))
    item = StepItem(1, ItemKind.PREFILL, 0, 2)
    with pytest.raises(EngineError, match="without a head"):
        without.execute(StepPlan(1, (item,), (new,)))


def test_a_checkpoint_without_a_head_does_not_generate(bare):
    plain = native_settings(bare)
    model = dataclasses.replace(plain.model, task="generate")
    with pytest.raises(ConfigError, match="no head"):
        NativeExecutor(dataclasses.replace(plain, model=model)).load(lambda loaded, total: None)


def test_a_missing_head_is_still_missed_where_text_is_wanted(bare, tmp_path):
    directory = Path(shutil.copytree(bare, tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"lacks lm_head\.weight"):
        NativeExecutor(native_settings(directory)).load(lambda loaded, total: None)


def test_the_last_tokens_vector_after_a_prefix_hit(qwen3):
    (text,) = texts_of(80)
    engine = Embedder(embedder(qwen3, "last"))
    engine.admit("first", text)
    engine.run()
    num_rows = engine.num_rows
    engine.admit("again", text)
    engine.admit("longer", [*text, 7, 8])
    engine.run()
    assert engine.num_rows - num_rows == 16 + 2
    assert engine.cached == {"first": 0, "again": 64, "longer": 80}
    want = reference_vectors(qwen3, [text, text, [*text, 7, 8]], "last")
    assert_alike([engine.vectors[name] for name in ("first", "again", "longer")], want)


def test_a_mean_takes_no_prefix(qwen3):
    (text,) = texts_of(80)
    engine = Embedder(embedder(qwen3, "mean"))
    for name in ("first", "again"):
        engine.admit(name, text)
        engine.run()
    assert engine.num_rows == 2 * len(text)
    assert torch.equal(engine.vectors["first"], engine.vectors["again"])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_text_that_gave_way_is_made_whole(qwen3, pooling):
    texts = texts_of(90, 70)
    engine = Embedder(
        embedder(qwen3, pooling), num_blocks=8, max_num_batched_tokens=32, num_slots=0
    )
    engine.admit("offline", texts[0], offline=True)
    engine.run(steps=1)
    engine.admit("online", texts[1])
    engine.run()
    assert engine.scheduler.statistics().num_preemptions >= 1
    want = reference_vectors(qwen3, texts, pooling)
    assert_alike([engine.vectors["offline"], engine.vectors["online"]], want)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_deterministic_vectors_do_not_depend_on_cuts_nor_neighbours(qwen3, pooling, kernels):
    texts = texts_of(9, 40, 77)
    settings = embedder(qwen3, pooling, kernels=kernels, deterministic=True)
    together = Embedder(settings).embed(texts)
    cut = Embedder(settings, max_num_batched_tokens=16).embed(texts)
    alone = [Embedder(settings).embed([text])[0] for text in texts]
    for one, two, three in zip(together, cut, alone, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_ended_texts_and_new_lives_are_forgotten(qwen3):
    engine = Embedder(embedder(qwen3, "mean"), max_num_batched_tokens=16)
    pooler = engine.executor._loaded().pooler
    engine.admit("a", texts_of(60)[0])
    engine.run(steps=1)
    assert pooler.num_texts == 1
    engine.scheduler.cancel("a", 1)
    engine.admit("b", [5, 6, 7])
    engine.run()
    assert pooler.num_texts == 1
    engine.executor.load(lambda loaded, total: None)
    assert pooler.num_texts == 0


def test_numbers_that_are_none_fail_their_text_alone(tmp_path):
    directory = make_model("qwen3", tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][9] = float("nan")
    save_file(weights, directory / "model.safetensors")
    executor = NativeExecutor(embedder(directory, "mean"))
    executor.load(lambda loaded, total: None)
    news = tuple(
        NewSequence(seq, ids, (), NOTHING, 0, (seq,), pooling="mean")
        for seq, ids in ((1, (5, 9, 6)), (2, (5, 6)))
    )
    items = (StepItem(1, ItemKind.PREFILL, 0, 3, (), 0), StepItem(2, ItemKind.PREFILL, 0, 2, (), 0))
    result = executor.execute(StepPlan(1, items, news)).result
    assert [index for index, _ in result.failed] == [0]
    assert result.pooled == (1,)


def test_a_model_of_the_library_embeds_too(tmp_path):
    directory = make_library_model("GPT2LMHeadModel", tmp_path / "gpt2")
    texts = texts_of(4, 30)
    got = Embedder(embedder(directory, "mean")).embed(texts)
    assert_alike(got, reference_vectors(directory, texts, "mean"))
