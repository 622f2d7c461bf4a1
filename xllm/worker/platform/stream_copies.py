"""Copies to the host on a stream of their own, for every device that has streams.

`torch.cuda` and `torch.npu` offer the same streams and events; the module is given. The copy's
stream waits for an event of the stream that computes, never the other way round.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from xllm.errors import EngineError
from xllm.worker.platform.pinned import PinnedBuffers, PinnedMaker, pinned_bytes, shaped


class StreamCopier:
    """Begins copies; see HostCopier. `api` is torch.cuda or torch.npu."""

    def __init__(self, api: Any, device: torch.device, make: PinnedMaker = pinned_bytes) -> None:
        self._api = api
        self._device = device
        self._stream = api.Stream(device=device)
        self._buffers = PinnedBuffers(make)
        self._under_way: deque[StreamCopy] = deque()

    def copy(self, tensor: torch.Tensor) -> StreamCopy:
        """See HostCopier."""
        api, copies = self._api, self._under_way
        try:
            while copies and copies[0].has_arrived():
                copies.popleft()
            # The stream that computes goes on and may overwrite the tensor: it makes a copy first.
            own = tensor.clone(memory_format=torch.contiguous_format)
            ready = api.Event()
            ready.record(api.current_stream(self._device))
            memory = self._buffers.take(own.nbytes)
            host = shaped(memory, own)
            done = api.Event()
            with api.stream(self._stream):
                self._stream.wait_event(ready)
                host.copy_(own, non_blocking=True)
                done.record(self._stream)
        except RuntimeError as error:
            raise EngineError(f"a copy to the host could not begin: {error}") from error
        copy = StreamCopy(own, memory, host, done, self._buffers)
        # Kept until the device is done with it, whoever forgets it: the allocator knows nothing of
        # the copy's stream. Telling it (record_stream) would make it look at events of its own,
        # which it never does again once a capture of a graph has failed.
        copies.append(copy)
        return copy

    def close(self) -> None:
        """See HostCopier."""
        copies = self._under_way
        try:
            while copies:
                copies.popleft().settle()
        finally:
            copies.clear()
            self._buffers.clear()


def event_passed(event: Any) -> bool:
    """Whether a device has come past an event. One that failed comes no further: then it has, and
    whoever waits for its results is told."""
    try:
        return bool(event.query())
    except RuntimeError:
        return True


class StreamCopy:
    """A copy under way."""

    __slots__ = ("_buffers", "_done", "_host", "_memory", "_own", "_result")

    def __init__(
        self,
        own: torch.Tensor,
        memory: torch.Tensor,
        host: torch.Tensor,
        done: Any,
        buffers: PinnedBuffers,
    ) -> None:
        self._own: torch.Tensor | None = own
        self._memory = memory
        self._host = host
        self._done = done
        self._buffers = buffers
        self._result: torch.Tensor | None = None

    def is_done(self) -> bool:
        """See HostCopy."""
        return event_passed(self._done)

    def has_arrived(self) -> bool:
        """Whether the device is done with it. RuntimeError where that failed."""
        return bool(self._done.query())

    def settle(self) -> None:
        """Wait until the device is done with it."""
        try:
            self._done.synchronize()
        except RuntimeError as error:
            raise EngineError(f"the device failed before a result was there: {error}") from error
        self._own = None

    def wait(self) -> torch.Tensor:
        """See HostCopy."""
        if self._result is None:
            self.settle()
            self._result = self._host.clone()
            # Read: only now may another copy be written there.
            self._buffers.give_back(self._memory)
        return self._result
