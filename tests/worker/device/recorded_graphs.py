"""Graphs as a device records them: operations, over the very tensors that they were called with.

Python does not run again in a replay. What a body takes from the host, or reads from a tensor that
its next caller makes anew, is what it was at the capture, and goes wrong. Nothing may look at a
tensor's numbers meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
)
from torch.utils._pytree import tree_leaves

from xllm.errors import EngineError


def kernel(method: Callable[..., None]) -> Callable[..., None]:
    """Launched whole: a recording has the call, not what is done inside."""

    @functools.wraps(method)
    def launched(*args: Any, **kwargs: Any) -> None:
        mode = _get_current_dispatch_mode()
        with _disable_current_modes():
            method(*args, **kwargs)
        if isinstance(mode, Recording):
            mode.calls.append(functools.partial(method, *args, **kwargs))

    return launched


class Recording(TorchDispatchMode):
    """What a body launches."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # see FakeStreams

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise EngineError("operation not permitted when stream is capturing: a number was read")
        out = func(*args, **kwargs)
        if func._schema.is_mutable:
            self.calls.append(functools.partial(func, *args, **kwargs))
        elif not _are_views(_tensors(out), _tensors((args, kwargs))):
            self.calls.append(functools.partial(_again, func, args, kwargs, out))
        return out


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _are_views(found: list[torch.Tensor], given: list[torch.Tensor]) -> bool:
    """Whether nothing was computed; what may be a view (`to`) need not be one."""
    places = {tensor.untyped_storage().data_ptr() for tensor in given}
    return all(tensor.untyped_storage().data_ptr() in places for tensor in found)


def _again(func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """The operation, into the tensors that it made before."""
    found = func(*args, **kwargs)
    for old, new in zip(_tensors(out), _tensors(found), strict=True):
        old.copy_(new)


class RecordedGraph:
    """One recording."""

    def __init__(self, recording: Recording) -> None:
        self._recording: Recording | None = recording

    @property
    def is_open(self) -> bool:
        return self._recording is not None

    def replay(self) -> None:
        assert self._recording is not None
        for call in self._recording.calls:
            call()

    def close(self) -> None:
        self._recording = None


class RecordedGraphs:
    """A GraphDevice that records."""

    def __init__(self) -> None:
        self.graphs: list[RecordedGraph] = []

    def capture(self, run: Callable[[], None]) -> RecordedGraph:
        run()
        recording = Recording()
        with recording:
            run()
        self.graphs.append(RecordedGraph(recording))
        return self.graphs[-1]

    def open_graphs(self) -> list[RecordedGraph]:
        return [graph for graph in self.graphs if graph.is_open]

    def close(self) -> None:
        for graph in self.graphs:
            graph.close()
