"""Log-probabilities: raw, ranked by logit and id, packed as StepResult wants them."""

from __future__ import annotations

import array
import math

import pytest
import torch

from xllm.protocol.sampling import SamplingParams
from xllm.worker.sampling import logprobs
from xllm.worker.sampling.logprobs import empty_table, pack_logprobs, score_rows
from xllm.worker.sampling.rows import SampleRow
from xllm.worker.sampling.sampler import Sampler

VOCAB = 50


def some_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, VOCAB), generator=torch.Generator().manual_seed(seed)) * 3


def ranking(logits: list[float]) -> list[int]:
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))


@pytest.mark.parametrize("num_top", [0, 1, 7, VOCAB - 1, VOCAB])
@pytest.mark.parametrize("ties", [False, True])
def test_tables_against_a_plain_ranking(num_top: int, ties: bool, monkeypatch) -> None:
    monkeypatch.setattr(logprobs, "SLICE_ELEMENTS", 3 * VOCAB)  # several slices
    logits = some_logits(11)
    if ties:
        logits = logits.round()
    before = logits.clone()
    targets = [(7 * k) % VOCAB for k in range(11)]
    table = score_rows(logits, torch.tensor(targets), num_top)
    assert torch.equal(logits, before)
    assert (table.num_rows, table.num_top) == (11, num_top)
    for k, target in enumerate(targets):
        row = logits[k].tolist()
        order = ranking(row)
        norm = math.log(math.fsum(math.exp(x) for x in row))
        assert table.ids[k].tolist() == [target, *order[:num_top]]
        expected = [row[token] - norm for token in [target, *order[:num_top]]]
        assert table.logprobs[k].tolist() == pytest.approx(expected, abs=1e-5)
        assert table.ranks[k].item() == 1 + order.index(target)


def test_more_alternatives_than_tokens_are_padding() -> None:
    table = score_rows(some_logits(2), torch.tensor([0, 1]), VOCAB + 3)
    assert table.ids.shape == (2, VOCAB + 4)
    assert (table.ids[:, -3:] == -1).all()
    assert torch.isneginf(table.logprobs[:, -3:]).all()


def test_no_rows() -> None:
    table = score_rows(torch.empty((0, VOCAB)), torch.empty(0, dtype=torch.int64), 2)
    assert (table.num_rows, table.num_top) == (0, 2)


def test_logprobs_are_raw_whatever_changes_the_draw() -> None:
    logits = some_logits(2)
    params = SamplingParams(
        temperature=0.3, top_k=2, repetition_penalty=1.8, presence_penalty=2.0,
        logit_bias={4: 30.0}, logprobs=3, seed=1,
    )  # fmt: skip
    rows = [
        SampleRow(params, 0, 9, [1, 2], [3, 4], (), 3),
        SampleRow(SamplingParams(seed=1), 0, 9, [], []),
    ]
    result = Sampler(VOCAB, torch.device("cpu")).sample(logits.clone(), rows)
    table = result.logprobs[0]
    assert table is not None
    assert result.logprobs[1] is None
    assert table.ids[:, 0].tolist() == list(result.tokens[0])
    raw = torch.log_softmax(logits[0], dim=0)
    torch.testing.assert_close(table.logprobs, raw[table.ids.long()])
    assert table.ids[0, 1:].tolist() == ranking(logits[0].tolist())[:3]


def test_the_frames_of_a_step() -> None:
    prompt = score_rows(some_logits(3), torch.tensor([5, 6, 7]), 1)
    drawn = score_rows(some_logits(1, seed=1), torch.tensor([8]), 2)
    rows, num_top, frames = pack_logprobs([[], [prompt, drawn], [empty_table(0)]])
    assert (rows, num_top) == ((0, 4, 0), 2)
    ids, values, ranks = (
        array.array(kind, frame) for kind, frame in zip("ifi", frames, strict=True)
    )
    assert len(ids) == len(values) == 4 * 3
    assert list(ids[0::3]) == [5, 6, 7, 8]
    assert list(ids[2:9:3]) == [-1, -1, -1]
    assert list(ids[9:]) == drawn.ids[0].tolist()
    assert list(values[9:]) == drawn.logprobs[0].tolist()
    assert list(ranks) == [*prompt.ranks.tolist(), *drawn.ranks.tolist()]


def test_a_step_without_logprobs_has_no_frames() -> None:
    assert pack_logprobs([[], []]) == ((), -1, ())
