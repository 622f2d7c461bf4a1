"""The sampler on a GPU draws what it draws on a CPU: one noise for all devices."""

from __future__ import annotations

import pytest
import torch

from xllm.protocol.sampling import SamplingParams
from xllm.worker.sampling.noise import draw_keys, token_bits
from xllm.worker.sampling.noise_tensor import draw_keys_tensor, token_bits_tensor
from xllm.worker.sampling.rows import SampleRow
from xllm.worker.sampling.sampler import Sampler


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return torch.device("cuda")


@pytest.mark.gpu
def test_the_noise_bits_are_the_same(gpu) -> None:
    draws = [(2**64 - 1 - k, k, 1000 * k) for k in range(8)]
    ids = torch.arange(5000, dtype=torch.int32, device=gpu)
    bits = token_bits_tensor(draw_keys_tensor(draws, gpu), ids).cpu()
    for row, draw in enumerate(draws):
        keys = draw_keys(*draw)
        assert bits[row, ::97].tolist() == [token_bits(keys, t) for t in range(0, 5000, 97)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        {"top_p": 0.9},
        {"min_p": 0.02, "repetition_penalty": 1.2, "logprobs": 3},
    ],
    ids=str,
)
def test_tokens_are_the_same(gpu, params) -> None:
    vocab = 32_000
    logits = torch.randn((16, vocab), generator=torch.Generator().manual_seed(1)) * 3
    rows = [
        SampleRow(SamplingParams(seed=k, **params), 0, k, [1, 2], [3, 3], (), 1 + k % 3)
        for k in range(16)
    ]
    expected = Sampler(vocab, torch.device("cpu")).sample(logits.clone(), rows)
    found = Sampler(vocab, gpu).sample(logits.to(gpu), rows)
    assert found.tokens == expected.tokens
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(one.ids, other.ids)
            torch.testing.assert_close(one.logprobs, other.logprobs, rtol=1e-5, atol=1e-5)
