"""Where numbers lie in a block of a device, how many tokens it has, and the plan of its memory."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures.models import make_model
from xllm.errors import ConfigError
from xllm.worker.loader.config import ModelConfig, read_config
from xllm.worker.memory.device_layout import BLOCK_SIZES, DeviceLayout, choose_block_size
from xllm.worker.memory.plan import MemoryPlan, activation_bytes, graph_bytes
from xllm.worker.models.registry import find_family

PAGE = 2 << 20


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from([1, 16, 128]),
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    dim=st.integers(1, 130),
    item=st.sampled_from([2, 4]),
    granularity=st.sampled_from([4096, PAGE]),
)
def test_numbers_have_places_of_their_own(
    size: int, layers: int, heads: int, dim: int, item: int, granularity: int
) -> None:
    layout = DeviceLayout(3, size, layers, heads, dim, item, granularity)
    used = 2 * layers * heads * dim * size * item
    assert layout.block_bytes % granularity == 0
    assert layout.block_bytes == used + layout.wasted_bytes
    assert 0 <= layout.wasted_bytes < granularity
    assert layout.layer_bytes == 2 * layout.key_bytes == layout.token_bytes * size
    assert layout.total_bytes == 3 * layout.block_bytes
    assert layout.block_numbers * item == layout.block_bytes
    assert (layout.layer_numbers, layout.value_numbers, layout.head_numbers) == (
        layout.layer_bytes // item,
        layout.key_bytes // item,
        layout.head_bytes // item,
    )
    # All places of the first two blocks, in order, tile what is used of each.
    token = dim * item
    for block in range(2):
        places = [
            layout.offset(block * size + t, layer, head, is_value=is_value)
            for layer in range(layers)
            for is_value in (False, True)
            for head in range(heads)
            for t in range(size)
        ]
        first = block * layout.block_bytes
        assert places == list(range(first, first + used, token))


def test_the_address_of_a_token() -> None:
    layout = DeviceLayout(9, 128, 36, 8, 128, 2, PAGE)  # Qwen3-8B
    assert layout.block_bytes == 18 << 20
    assert layout.wasted_bytes == 0
    at = 2 * layout.block_bytes + 5 * layout.layer_bytes + 3 * 128 * 128 * 2 + 7 * 128 * 2
    assert layout.offset(2 * 128 + 7, 5, 3, is_value=False) == at
    assert layout.offset(2 * 128 + 7, 5, 3, is_value=True) == at + 8 * 128 * 128 * 2


@pytest.mark.parametrize("size", [0, 24, -16])
def test_block_sizes_that_cannot_be(size: int) -> None:
    with pytest.raises(ConfigError, match=f"power of two, or 0, on this device, not {size}"):
        DeviceLayout(4, size, 1, 1, 8, 4, PAGE)


@pytest.mark.parametrize(
    ("layers", "heads", "size"),
    [
        (36, 8, 128),  # Qwen3-8B and 4B: 144 KiB a token, 128 of them are nine pages
        (28, 8, 128),  # Qwen3-1.7B and 0.6B: 112 KiB, seven pages
        (32, 8, 16),  # Llama 3 8B: 128 KiB, 16 of them are a page
        (64, 8, 16),  # Qwen3-32B: 256 KiB
        (80, 8, 32),  # Llama 3 70B: 320 KiB, 32 are five pages
    ],
)
def test_blocks_of_published_models_waste_nothing(layers: int, heads: int, size: int) -> None:
    token_bytes = 2 * layers * heads * 128 * 2
    assert choose_block_size(token_bytes, PAGE) == size
    assert DeviceLayout(1, size, layers, heads, 128, 2, PAGE).wasted_bytes == 0


@settings(deadline=None)
@given(token_bytes=st.integers(1, 1 << 22), granularity=st.sampled_from([4096, PAGE]))
def test_the_fewest_tokens_that_waste_little_else_those_that_waste_least(
    token_bytes: int, granularity: int
) -> None:
    def waste(size: int) -> float:
        block = DeviceLayout(1, size, 1, 1, token_bytes, 1, granularity)
        used = size * token_bytes
        whole = -(-used // granularity) * granularity
        assert block.block_bytes == -(-2 * used // granularity) * granularity
        return (whole - used) / whole

    size = choose_block_size(token_bytes, granularity)
    good = [one for one in BLOCK_SIZES if waste(one) <= 1 / 16]
    assert size == (good[0] if good else min(BLOCK_SIZES, key=waste))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    raw = read_config(make_model("qwen3", tmp_path_factory.mktemp("plan") / "model"))
    return find_family(raw.architecture()).read(raw)


def test_the_plan_of_a_devices_memory(config: ModelConfig) -> None:
    eight = dataclasses.replace(  # Qwen3-8B
        config,
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
    )
    network = 2048 * (2 * 4096 + 3 * 12288) * 2
    drawing = 2048 * 4096 * 2 + 256 * 151936 * (2 + 8)
    assert activation_bytes(eight, 2, 2048, 1) == network
    assert activation_bytes(eight, 2, 2048, 256) == drawing
    wide = dataclasses.replace(eight, num_heads=128, intermediate_size=4096)
    assert activation_bytes(wide, 2, 2048, 1) == 2048 * (2 * 4096 + (3 * 128 + 16) * 128) * 2
    # Graphs of 256 rows: as much as 256 tokens of the network, and what they leave for each other.
    left = 256 * ((2 * 32 * 128 + 3 * 4096) * 2 + 128 * 4)
    graphs = graph_bytes(eight, 2, 256, 1)
    assert graphs == network // 8 + left
    assert graph_bytes(eight, 2, 256, 256) == 256 * 151936 * (2 + 8) + left  # their logits
    assert graph_bytes(eight, 2, 0, 0) == 0
    plan = MemoryPlan(16 << 30, 50 << 30, network, graphs)
    assert plan.total_bytes == (66 << 30) + network + graphs
