"""The workloads that all peers get are the ones that the published figures were taken with."""

from __future__ import annotations

import hashlib
import json

import pytest

from benchmarks import workloads

DIGESTS = {
    "W1": "06dff5a30f38acd5ee6a722c8a7dd2c3ab990d8b2362954f1824bb2b111f4f74",
    "W2": "90ee58e39c137dd536c71bba0cac875a37427c87c5b755b78df2972e651978d9",
    "W3": "15da04d716892bbc543590ad6576cad20345f0ecbcbbf4bf842fcef291e701a4",
    "W4": "2217f349d6d84bcda5b710681048ea76154c99a3df9a5f3619c71177fcfcecfc",
    "W4b": "da91594db459dac7e454c59c142e8ca7b4b606351cea0b248e70abae3f859f9d",
    "warm": "083870a7aea8320f1217afb3ad988e04a5a58eb13af8c402e289a751ec0e2897",
}
"""SHA-256 of the JSON of each workload's first three repetitions."""


@pytest.mark.parametrize("name", [*workloads.NAMES, "warm"])
def test_the_requests_are_the_same_for_ever(name):
    text = json.dumps([workloads.make(name, rep) for rep in range(3)])
    assert hashlib.sha256(text.encode()).hexdigest() == DIGESTS[name]


def test_lengths_are_exact():
    requests = workloads.make("W2")
    clocks = dict.fromkeys(range(16), 1.0)
    with pytest.raises(RuntimeError, match="63 tokens, wanted 64"):
        workloads.metrics(requests, 0.0, clocks, clocks, {**dict.fromkeys(range(16), 64), 3: 63})
