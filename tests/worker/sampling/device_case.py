"""A draw by the device's sampler and by the host's, for the tests of the former."""

from __future__ import annotations

import random

import torch

from tests.worker.triton_interpreter import DEVICE
from xllm.protocol.sampling import SamplingParams
from xllm.worker.sampling.device_sampler import DeviceSampler
from xllm.worker.sampling.rows import SampleRow
from xllm.worker.sampling.sampler import Sampler
from xllm.worker.triton_kernels.draw_rows import FLAG_NOT_FINITE

CPU = torch.device("cpu")
INF = float("inf")
VOCAB = 97


def row_of(position: int = 5, choice: int = 0, n: int = 1, **params) -> SampleRow:
    return SampleRow(SamplingParams(**params), choice, position, [1, 2, 3], [4, 4], (0,), n)


def some_logits(rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((rows, vocab), generator=generator) * scale


def drawn(
    logits: torch.Tensor, rows: list[SampleRow], *, chunk: int = 64, size: int = 0, room: int = 8192
) -> tuple[list[int], list[int]]:
    """Tokens and flags of the device's sampler, in a batch of `size` rows."""
    sampler = DeviceSampler(logits.shape[1], DEVICE, max(len(rows), size), chunk=chunk, room=room)
    assert all(sampler.is_for_device(row) for row in rows)
    inputs = sampler.prepare(rows, size)
    logits = logits.to(DEVICE)
    size = len(inputs.numbers)
    tokens = torch.full((size,), -7, dtype=torch.int64, device=DEVICE)
    flags = torch.full((size,), 77, dtype=torch.uint8, device=DEVICE)
    padded = torch.full((size, logits.shape[1]), float("nan"), dtype=logits.dtype, device=DEVICE)
    padded[: len(rows)] = logits
    sampler.draw(padded, inputs.numbers.to(DEVICE), tokens, flags, filtered=inputs.filtered)
    assert tokens[len(rows) :].tolist() == [-7] * (size - len(rows))
    assert flags[len(rows) :].tolist() == [77] * (size - len(rows))
    return tokens[: len(rows)].tolist(), flags[: len(rows)].tolist()


def expected(logits: torch.Tensor, rows: list[SampleRow]) -> tuple[list[int], list[int]]:
    """Tokens and flags by the host's sampler."""
    result = Sampler(logits.shape[1], CPU).sample(logits.float(), rows)
    failed = {index for index, _ in result.failed}
    tokens = [0 if index in failed else result.tokens[index][0] for index in range(len(rows))]
    return tokens, [FLAG_NOT_FINITE if index in failed else 0 for index in range(len(rows))]


def seeded(count: int, **params) -> list[SampleRow]:
    rng = random.Random(count)
    return [
        row_of(rng.randrange(1, 2**20), rng.randrange(4), seed=rng.getrandbits(64), **params)
        for _ in range(count)
    ]
