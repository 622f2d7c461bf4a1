"""The progress counter moves with every bounded piece of work, and only with work that is done.

A master takes a worker whose counter stands for a step that hangs: the longest gap between two
counts must not grow with the step.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.fixtures.models import make_model
from tests.worker.native.plan_driver import PlanDriver
from tests.worker.torch_watch import TorchWatch
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import ItemKind, NewSequence, StepItem
from xllm.worker.attention import plan as attention_plan
from xllm.worker.attention.paged import AttentionWorkspace, PagedAttention
from xllm.worker.attention.plan import Span, plan_window, write_slots
from xllm.worker.execution import drawing
from xllm.worker.execution.batch import BatchEntry, StepBatch
from xllm.worker.execution.drawing import TokenDrawer
from xllm.worker.execution.layer_loop import LayerLoop
from xllm.worker.execution.outputs import StepOutputs
from xllm.worker.execution.progress import ProgressCounter
from xllm.worker.execution.sequences import SequenceState
from xllm.worker.layers import decoder
from xllm.worker.memory.layout import KvLayout
from xllm.worker.memory.pool import KvPool, PoolMemory
from xllm.worker.sampling import logprobs, sampler

CPU = torch.device("cpu")
VOCAB = 20_000


class FlatHead:
    """A model that is its head: every logit is nearly the same."""

    config = SimpleNamespace(vocab_size=VOCAB)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, :1] * torch.linspace(0, 1, VOCAB)


def drawn(watch: TorchWatch, num_rows: int, item: dict, **params: object) -> StepOutputs:
    """Draw (and score) for `num_rows` sequences of four prompt tokens."""
    batch = StepBatch()
    for index in range(num_rows):
        new = NewSequence(index, (1, 2, 3, 4), (), SamplingParams(**params), 0)
        state = SequenceState(new, new.prompt_ids)
        step_item = StepItem(index, ItemKind.PREFILL, 0, 4, **item)
        batch.entries.append(BatchEntry(index, step_item, state, 4 * index))
    outputs = StepOutputs(num_rows, ())
    drawer = TokenDrawer(FlatHead(), CPU, watch.tick)
    with torch.inference_mode(), watch:
        drawer.draw(batch, torch.ones((4 * num_rows, 2)), outputs)
    assert outputs.failed == {}
    return outputs


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight rows of logits at a time, two of scores, one of draws."""
    monkeypatch.setattr(drawing, "_SLICE_BYTES", 8 * 4 * VOCAB)
    monkeypatch.setattr(logprobs, "SLICE_ELEMENTS", 2 * VOCAB)
    monkeypatch.setattr(sampler, "SLICE_ELEMENTS", VOCAB)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize(
    ("item", "params"),
    [
        ({}, {"temperature": 0.0}),
        ({}, {"temperature": 1.0}),
        ({}, {"temperature": 1.0, "top_k": 50}),
        ({}, {"temperature": 1.0, "top_p": 0.99}),
        ({"num_samples": 24}, {"temperature": 1.0, "n": 24}),
        ({"num_samples": 24}, {"temperature": 1.0, "top_p": 0.99, "n": 24}),
        ({"num_samples": 24}, {"temperature": 1.0, "n": 24, "logprobs": 3}),
        ({"score_prompt": True, "num_samples": 0}, {"prompt_logprobs": 2}),
    ],
    ids=str,
)
def test_head_scores_and_sampler_count(item: dict, params: dict) -> None:
    """Four times the rows take four times the counts, and no longer between two of them."""
    few, many = TorchWatch(), TorchWatch()
    drawn(few, 8, item, **params)
    drawn(many, 32, item, **params)
    assert many.num_ticks > 3 * few.num_ticks
    assert many.longest < 1.2 * few.longest
    assert many.longest < 8 * 40 * VOCAB


def test_each_part_of_an_attention_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk behind 600 tokens in parts of 32 rows, and decodes in groups of two."""
    monkeypatch.setattr(attention_plan, "_MAX_CHUNK_ROWS", 32)
    monkeypatch.setattr(attention_plan, "_MAX_GROUP_TOKENS", 64)
    layout = KvLayout(64, 16, 1, 2, 8, 4)
    pool = KvPool(layout, PoolMemory(torch.zeros(layout.total_bytes // 4)))
    spans = [Span(600, 256, array("q", range(54)))]
    spans += [Span(20, 1, array("q", (54 + 2 * k, 55 + 2 * k))) for k in range(4)]
    planned = plan_window(spans, 0, 16, torch.float32, CPU)
    watch = TorchWatch()
    attention = PagedAttention(
        pool,
        AttentionWorkspace(pool, torch.float32, CPU),
        torch.tensor(write_slots(spans, 16)),
        {0: planned},
        (0,),
        watch.tick,
    )
    q, k, v = torch.ones((260, 4, 8)), torch.ones((260, 2, 8)), torch.ones((260, 2, 8))
    with watch:
        attention.attend(0, q, k, v)
    assert watch.num_ticks == 1 + 256 // 32 + 2


def test_a_longer_chunk_leaves_no_longer_gap(tmp_path: Path, monkeypatch) -> None:
    """Projections in slices of rows, a fresh prompt in parts: 16 times the rows, the same gap."""
    monkeypatch.setattr(decoder, "_SLICE_ROWS", 16)
    monkeypatch.setattr(attention_plan, "_MAX_FRESH_PART_ROWS", 16)
    monkeypatch.setattr(attention_plan, "_MAX_CHUNK_ROWS", 16)
    model = make_model("qwen3", tmp_path, intermediate_size=4096)
    engine = PlanDriver(model, kernels="torch").executor._loaded()

    def gap(num_rows: int) -> int:
        watch = TorchWatch()
        loop = LayerLoop(engine.loop._model, engine.pool, torch.float32, CPU, watch.tick)
        spans = [Span(0, num_rows, array("q", range(64)))]
        with torch.inference_mode(), watch:
            loop.run(spans, [5] * num_rows, ())
        return watch.longest

    assert gap(256) < 1.5 * gap(16)


def test_the_masks_of_a_step_are_made_one_at_a_time() -> None:
    """A plan holds no mask of a prefill; making one leaves nothing behind but itself."""
    spans = [Span(4096, 1024, array("q", range(320)))]
    with TorchWatch() as planning:
        planned = plan_window(spans, 0, 16, torch.float32, CPU)
    assert planning.largest < 1 << 16
    assert [part.num_rows for part in planned.prefills] == [512, 512]
    for part in planned.prefills:
        assert part.seen is not None
        mask = part.seen.mask(part.num_rows, torch.float32)
        position = torch.arange(512)[:, None] + part.seen.first
        assert torch.equal(mask == 0, torch.arange(mask.shape[1]) <= position)
    # Behind a very long text a part has fewer rows: its mask is bounded.
    far = [Span(1 << 17, 512, array("q", range((1 << 13) + 32)))]
    rows = [part.num_rows for part in plan_window(far, 0, 16, torch.float32, CPU).prefills]
    assert sum(rows) == 512
    assert max(rows) * (1 << 17) <= 1 << 24


class FakeDevice:
    """Work that was launched is done when the test says so."""

    def __init__(self) -> None:
        self.launched = 0
        self.done = 0

    def mark(self):
        self.launched += 1
        place = self.launched
        return lambda: self.done >= place


def test_launched_work_counts_when_the_device_is_past_it() -> None:
    device = FakeDevice()
    progress = ProgressCounter()
    progress.follow(device.mark)
    device.launched = 0
    for _ in range(12):
        progress.tick()
    assert (device.launched, progress.value) == (3, 0)
    device.done = 1
    assert progress.value == 4
    device.done = 2
    assert progress.value == 8
    progress.tick()
    progress.settle()  # the device was waited for
    assert progress.value == 13


def test_a_host_counts_at_once() -> None:
    progress = ProgressCounter()
    progress.follow(lambda: None)
    progress.tick()
    assert progress.value == 1
