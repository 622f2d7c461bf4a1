"""The table of `xllm status`: what a row says."""

from __future__ import annotations

import pytest

from xllm.cli.status import status_row
from xllm.protocol.questions import ProcessStatus


@pytest.mark.parametrize(
    ("age_ms", "text"),
    [
        (0, "0 ms ago"),
        (9_999, "9999 ms ago"),
        (10_000, "10 s ago"),
        (119_999, "119 s ago"),
        (120_000, "2 min ago"),
        (899_000, "14 min ago"),
    ],
)
def test_when_a_process_was_heard_last(age_ms, text):
    lost = ProcessStatus(name="i", kind="instance", state="lost", heartbeat_age_ms=age_ms)
    row = status_row(lost)
    assert (row[4], row[-1]) == ("lost", text)


@pytest.mark.parametrize(("state", "used"), [("ready", "75% of 8"), ("unknown", "")])
def test_memory_is_shown_of_who_has_said_what_is_free(state, used):
    row = status_row(
        ProcessStatus(name="i", kind="instance", state=state, num_blocks=8, num_free_blocks=2)
    )
    assert row[-2] == used
