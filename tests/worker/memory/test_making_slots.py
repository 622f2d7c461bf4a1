"""When there are slots, and what a line says where there are none."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from structlog.testing import capture_logs

from xllm.config.settings import Settings
from xllm.worker.memory.block_layout import BlockLayout
from xllm.worker.memory.cpu_memory import CpuKvMemory
from xllm.worker.memory.making import make_slots


@pytest.fixture
def memory() -> CpuKvMemory:
    return CpuKvMemory(BlockLayout(8, 16, 3, 1, 16, 4), torch.float32)


def test_two_slots_a_sequence_of_the_longest_length(memory: CpuKvMemory) -> None:
    with capture_logs() as lines:
        space = make_slots(Settings(), memory, 100)
    assert space is not None
    assert space.num_slots == 2 * Settings().scheduler.max_num_seqs
    assert (space.pages_per_slot, space.page_bytes) == (7, 8192)
    assert lines[0]["event"] == "kv_slots"
    assert lines[0]["wasted_bytes_a_page"] == 8192 - 3 * 2 * 16 * 16 * 4
    space.close()


@pytest.mark.parametrize(
    ("max_model_len", "reason"),
    [(1 << 36, "more than 17592186044416 bytes of addresses"), (1 << 26, "vm.max_map_count")],
)
def test_a_line_says_why_there_are_none(
    memory: CpuKvMemory, max_model_len: int, reason: str
) -> None:
    with capture_logs() as lines:
        assert make_slots(Settings(), memory, max_model_len) is None
    assert [line["event"] for line in lines] == ["kv_slots_not_used"]
    assert reason in lines[0]["reason"]


def test_none_are_made_where_none_are_wanted(memory: CpuKvMemory) -> None:
    settings = Settings()
    worker = dataclasses.replace(settings.worker, kv_memory="paged")
    with capture_logs() as lines:
        assert make_slots(dataclasses.replace(settings, worker=worker), memory, 100) is None
    assert lines == []
