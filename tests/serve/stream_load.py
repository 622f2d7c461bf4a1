"""Streams that are open all the time, each token compared with what the engine must give."""

from __future__ import annotations

import threading
from typing import Self

from tests.cli.toy_model import expected_ids
from tests.serve.served import wait_until
from xllm import Client
from xllm.errors import XllmError

NUM_TOKENS = 40


class StreamLoad:
    """`num_streams` requests at any time until the block ends; it fails if one of them failed or
    had another token than an undisturbed run gives."""

    def __init__(self, endpoint: str, model: str, num_streams: int = 8) -> None:
        self.num_open = 0
        self.num_done = 0
        self.failures: list[str] = []
        self._endpoint = endpoint
        self._num_streams = num_streams
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._expected = [
            expected_ids(model, prompt_of(number), NUM_TOKENS, seed=number)
            for number in range(num_streams)
        ]

    def __enter__(self) -> Self:
        self._threads = [
            threading.Thread(target=self._run, args=(number,), daemon=True)
            for number in range(self._num_streams)
        ]
        for thread in self._threads:
            thread.start()
        wait_until(lambda: self.num_open >= self._num_streams or self.failures, what="load")
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads), "a stream hangs"
        if kind is None:
            assert self.failures == []

    def wait_done(self, count: int = 8) -> None:
        """Until so many more requests have ended well."""
        goal = self.num_done + count
        wait_until(lambda: self.num_done >= goal or self.failures, 60, "more answers")
        assert self.failures == []

    def _run(self, number: int) -> None:
        with Client(self._endpoint, timeout_s=60) as client:
            while not self._over.is_set():
                self._ask(client, number)

    def _ask(self, client, number: int) -> None:
        opened = False
        try:
            stream = client.stream(prompt_of(number), max_tokens=NUM_TOKENS, seed=number, hold_ms=0)
            for _ in stream:
                if not opened:
                    opened = True
                    with self._lock:
                        self.num_open += 1
            if stream.completion.token_ids != self._expected[number]:
                self.failures.append(f"{number}: {stream.completion.token_ids}")
            self.num_done += 1
        except XllmError as error:
            self.failures.append(f"{number}: {error}")
            self._over.wait(0.1)
        finally:
            if opened:
                with self._lock:
                    self.num_open -= 1


def prompt_of(number: int) -> tuple[int, ...]:
    """The prompt of a stream."""
    return (70, 71, 72 + number)
