"""Recording graphs, for every device that has streams: `torch.cuda` and `torch.npu` do it alike."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from xllm.errors import EngineError


class StreamGraphs:
    """Records graphs; see GraphDevice. `api` is torch.cuda or torch.npu, `make` its class of
    graphs. All are recorded on one side stream, as a shared memory pool wants it."""

    def __init__(self, api: Any, device: torch.device, make: Callable[[], Any]) -> None:
        self._api = api
        self._device = device
        self._make = make
        self._stream: Any = None
        self._pool = api.graph_pool_handle()
        self._open: set[StreamGraph] = set()
        self._failed: list[Any] = []

    def capture(self, run: Callable[[], None]) -> StreamGraph:
        """See GraphDevice. Calls of other threads do not spoil a capture: pages may be mapped
        meanwhile."""
        graph = None
        try:
            if self._stream is None:
                self._stream = self._api.Stream(device=self._device)
            self._warm_up(run)
            graph = self._make()
            self._record(graph, run)
        except Exception as error:
            if graph is not None:
                # torch's allocator may still ask a graph whose capture did not end: it must live.
                self._failed.append(graph)
            # What was begun on the broken stream may never end: the next capture has a new one.
            self._stream = None
            if not isinstance(error, RuntimeError):
                raise
            raise EngineError(f"a graph could not be recorded: {_first_line(error)}") from error
        captured = StreamGraph(graph, self)
        self._open.add(captured)
        return captured

    def _warm_up(self, run: Callable[[], None]) -> None:
        current = self._api.current_stream(self._device)
        self._stream.wait_stream(current)
        with self._api.stream(self._stream):
            run()
        current.wait_stream(self._stream)

    def _record(self, graph: Any, run: Callable[[], None]) -> None:
        api, side = self._api, self._stream
        # Where the end of a capture fails, `graph` leaves its stream current: the outer `stream`
        # puts back what was.
        with (
            api.stream(side),
            api.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"),
        ):
            run()

    def forget(self, graphs: Collection[StreamGraph]) -> None:
        """Let graphs go, once the device is done with them."""
        try:
            self._api.synchronize(self._device)
        except RuntimeError as error:
            raise EngineError(f"the device failed: {_first_line(error)}") from error
        finally:
            for graph in tuple(graphs):
                self._open.discard(graph)
                graph.reset()

    def close(self) -> None:
        """See GraphDevice."""
        if self._open:
            self.forget(self._open)


class StreamGraph:
    """A graph of a device."""

    __slots__ = ("_device", "_graph")

    def __init__(self, graph: Any, device: StreamGraphs) -> None:
        self._graph = graph
        self._device = device

    def replay(self) -> None:
        """See CapturedGraph."""
        if self._graph is None:
            raise EngineError("the graph was closed")
        try:
            self._graph.replay()
        except RuntimeError as error:
            raise EngineError(f"a graph could not be launched: {_first_line(error)}") from error

    def close(self) -> None:
        """See CapturedGraph."""
        if self._graph is not None:
            self._device.forget((self,))

    def reset(self) -> None:
        """Let the driver's graph go. The device must be done with it."""
        self._graph.reset()
        self._graph = None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
