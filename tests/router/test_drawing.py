"""Random bytes are given once each, however many are asked for."""

from __future__ import annotations

from xllm.router import drawing
from xllm.router.drawing import FETCH_BYTES, RandomBytes


def test_no_byte_is_given_twice(monkeypatch):
    numbers = iter(range(1000))
    fetched = []

    def fetch(count: int) -> bytes:
        assert count == FETCH_BYTES
        first = next(numbers) * FETCH_BYTES // 2
        fetched.append(b"".join((first + i).to_bytes(2, "little") for i in range(count // 2)))
        return fetched[-1]

    monkeypatch.setattr(drawing.os, "urandom", fetch)
    source = RandomBytes()
    taken = [source.take(24) for _ in range(500)]
    assert len(set(taken)) == 500
    assert len(fetched) == 4
    assert all(any(one in block for block in fetched) for one in taken)
    assert len(source.take(FETCH_BYTES)) == FETCH_BYTES


def test_they_are_the_systems():
    taken = {RandomBytes().take(16) for _ in range(50)}
    assert len(taken) == 50
