"""The probe reads every byte, with every thread, and frees what it took."""

from __future__ import annotations

import time

import pytest

from xllm.errors import InvariantError
from xllm.worker.read_probe import ReadProbe


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_it_measures(num_threads):
    probe = ReadProbe(num_threads, 8 << 20)
    began = time.perf_counter()
    rate = probe.measure(3)
    # Three passes took at most the whole call: the median pass is no slower than all of it.
    assert rate >= (8 << 20) * 0.99 / (time.perf_counter() - began)
    assert rate < 1e13
    probe.close()


def test_a_byte_that_is_found_is_no_measurement():
    probe = ReadProbe(1, 1 << 20)
    probe._memory[1 << 19] = 0
    with pytest.raises(InvariantError):
        probe._read(0, _Gate())
    probe.close()


class _Gate:
    def wait(self) -> None:
        """Nobody else comes."""
