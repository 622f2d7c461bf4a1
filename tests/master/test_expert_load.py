"""What heartbeats say of a model's experts is what its steps counted."""

from __future__ import annotations

import asyncio

import msgspec
import numpy as np
import pytest

from tests.fixtures.models import make_model
from tests.master.test_native_ranks import make_settings, running
from xllm.errors import BadMessageError
from xllm.master.expert_load import KEPT, NUM_HOTTEST, ExpertLoad
from xllm.protocol.bus import MAX_EXPERT_LOAD_BYTES
from xllm.protocol.step import StepResult

COUNTED = StepResult(1, expert_frames=1)


def frame(*rows: list[int]) -> bytes:
    return np.array(rows, "<i4").tobytes()


def test_a_report_names_the_busiest_experts_of_uneven_layers_first():
    load = ExpertLoad(4)
    load.note(COUNTED, [frame([1, 1, 1, 1], [0, 0, 0, 0], [0, 6, 0, 2])])
    scored = StepResult(2, num_top=0, expert_frames=1)
    load.note(scored, [b"ids", b"logprobs", b"ranks", frame([0, 0, 0, 4], [0, 0, 0, 0], [0] * 4)])
    load.note(StepResult(3), [])
    assert msgspec.json.decode(load.report()) == {
        "experts": 4,
        "layers": [[2, 3.0, [1, 3, 0, 2]], [0, 2.5, [3, 0, 1, 2]]],
        "num_left_out": 0,
    }
    assert load.report() == b""  # nothing was counted since


def test_older_steps_count_less():
    load = ExpertLoad(2)
    load.note(COUNTED, [frame([10, 0])])
    load.report()
    load.note(COUNTED, [frame([0, 9])])
    (layer,) = msgspec.json.decode(load.report())["layers"]
    assert layer == [0, 1.0, [0, 1]]
    assert 10 * KEPT == 9


def test_a_report_has_room_in_a_heartbeat():
    load = ExpertLoad(512)
    counts = np.random.default_rng(1).integers(0, 1000, (400, 512), dtype="<i4")
    load.note(COUNTED, [counts.tobytes()])
    report = load.report()
    assert len(report) <= MAX_EXPERT_LOAD_BYTES
    value = msgspec.json.decode(report)
    shown = value["layers"]
    assert len(shown) + value["num_left_out"] == 400
    assert len(shown) > 100
    assert [layer[1] for layer in shown] == sorted((layer[1] for layer in shown), reverse=True)
    assert all(len(layer[2]) == NUM_HOTTEST for layer in shown)


@pytest.mark.parametrize("frames", [[], [b""], [frame([1, 2, 3])], [frame([1, 2], [3, 4])]])
def test_counts_of_another_shape_are_refused(frames):
    load = ExpertLoad(2)
    load.note(COUNTED, [frame([1, 2])])
    with pytest.raises(BadMessageError, match="step 1: counts of 2 experts"):
        load.note(COUNTED, frames)
    assert msgspec.json.decode(load.report())["layers"] == [[0, 1.33, [1, 0]]]


def test_counts_of_a_worker_that_does_not_say_how_many_experts_there_are_are_left_alone():
    load = ExpertLoad(0)
    load.note(COUNTED, [frame([1, 2])])
    assert load.report() == b""


@pytest.mark.process
def test_heartbeats_of_an_instance_with_two_ranks_have_the_report(run_dir, tmp_path):
    directory = make_model("qwen3-moe", tmp_path / "model")

    async def scenario() -> None:
        async with running(make_settings(run_dir, directory)) as (_, router):
            router.admit("a", range(20, 60), max_tokens=8, ignore_eos=True)
            assert (await router.ends("a", timeout_s=60.0)).code == ""
            await router.until(lambda: any(beat.expert_load for beat in router.beats))
            report = next(beat.expert_load for beat in router.beats if beat.expert_load)
            value = msgspec.json.decode(report)
            assert value["experts"] == 8
            layers = {layer[0]: layer for layer in value["layers"]}
            assert set(layers) == {0, 1, 2}
            for _, imbalance, hottest in layers.values():
                assert 1.0 <= imbalance <= 4.0  # each row passes two of eight
                assert len(set(hottest)) == NUM_HOTTEST
                assert set(hottest) <= set(range(8))

    asyncio.run(scenario())
