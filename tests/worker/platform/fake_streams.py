"""A device that computes behind the host's back, on the CPU: streams, events, graphs.

It plays torch.cuda or torch.npu. Operations on its tensors are queued on the current stream and run
later, a stream at a time in any order that the events allow, `rng` says which: what is not ordered
by an event goes wrong sooner or later. Each call is held against the parameters of the real module.

Queued are operations that read or write a tensor of the device, and copies that do not block; all
else is work of the host. A tensor that the host forgot before the device read it is found.
"""

from __future__ import annotations

import contextlib
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from tests.worker.platform.device_api import DeviceApi

GARBAGE = -77


class FakeStreams:
    """The module, and the device behind it. `with device.running():` around what computes."""

    def __init__(self, api: DeviceApi, rng: random.Random, graph_class: str = "CUDAGraph") -> None:
        self.api = api
        self.rng = rng
        self.calls: list[str] = []
        self.default = FakeStream(self, "default")
        self.streams = [self.default]
        self.current = self.default
        self.pinned: set[int] = set()
        self.broken = ""  # what the driver says to everything from now on
        self._made_on: dict[int, FakeStream] = {}
        self._kept: list[torch.UntypedStorage] = []  # so that no address is used twice
        self.graph_class = graph_class
        setattr(self, graph_class, lambda *a, **k: FakeGraph(self, graph_class, a, k))

    # What the module offers.

    def Stream(self, *args: Any, **kwargs: Any) -> FakeStream:
        self.check("Stream", args, kwargs)
        stream = FakeStream(self, f"side{len(self.streams)}")
        self.streams.append(stream)
        return stream

    def Event(self, *args: Any, **kwargs: Any) -> FakeEvent:
        self.check("Event", args, kwargs)
        return FakeEvent(self)

    @contextlib.contextmanager
    def stream(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        self.check("stream", args, kwargs)
        before, self.current = self.current, args[0]
        try:
            yield
        finally:
            self.current = before

    def current_stream(self, *args: Any, **kwargs: Any) -> FakeStream:
        self.check("current_stream", args, kwargs)
        return self.current

    def synchronize(self, *args: Any, **kwargs: Any) -> None:
        self.check("synchronize", args, kwargs)
        self.not_while_capturing("synchronize")
        self.run_all()

    def graph_pool_handle(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        self.check("graph_pool_handle", args, kwargs)
        return (0, 1)

    def graph(self, *args: Any, **kwargs: Any) -> FakeCapture:
        self.check("graph", args, kwargs)
        return FakeCapture(self, args[0], **kwargs)

    # The device.

    def check(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.api.check(name, args, kwargs)
        self.calls.append(name)
        if self.broken:
            raise RuntimeError(self.broken)

    def not_while_capturing(self, what: str) -> None:
        if self.current.capture is not None:
            self.current.capture.spoilt = True
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")

    def tensor(self, values: list[int]) -> torch.Tensor:
        """A tensor of the device, filled before anything ran."""
        return self.adopt(torch.tensor(values))

    def adopt(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self._made_on.setdefault(storage.data_ptr(), self.current)
        self._kept.append(storage)
        return tensor

    def pinned_bytes(self, num_bytes: int) -> torch.Tensor:
        memory = torch.full((num_bytes,), GARBAGE & 0xFF, dtype=torch.uint8)
        self.pinned.add(memory.untyped_storage().data_ptr())
        self._kept.append(memory.untyped_storage())
        return memory

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with _Queueing(self):
            yield

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._made_on

    def is_foreign(self, tensor: torch.Tensor) -> bool:
        """Whether it was made on another stream: there its memory is used again as soon as the
        host lets it go, in the order of that stream alone."""
        made_on = self._made_on.get(tensor.untyped_storage().data_ptr(), self.current)
        return made_on is not self.current

    def step(self) -> bool:
        """Let one of the streams that can go on do its next piece of work; False: none can."""
        ready = [stream for stream in self.streams if stream.can_go_on()]
        if ready:
            self.rng.choice(ready).go_on()
        return bool(ready)

    def run_all(self) -> None:
        while self.step():
            pass
        assert not any(stream.queue for stream in self.streams), "streams wait for each other"

    def launch(self, work: Callable[[], None]) -> None:
        """Queue work on the current stream, or record it there."""
        if self.current.capture is not None:
            self.current.capture.work.append(work)
        else:
            self.current.queue.append(work)


class FakeStream:
    def __init__(self, device: FakeStreams, name: str) -> None:
        self.device = device
        self.name = name
        self.queue: deque[Callable[[], None] | _Wait] = deque()
        self.capture: FakeGraph | None = None

    def wait_event(self, *args: Any, **kwargs: Any) -> None:
        self.device.check("Stream.wait_event", args, kwargs)
        event = args[0]
        self.queue.append(_Wait(event, event.num_recorded))

    def wait_stream(self, *args: Any, **kwargs: Any) -> None:
        self.device.check("Stream.wait_stream", args, kwargs)
        event = FakeEvent(self.device)
        event.put_on(args[0])
        self.queue.append(_Wait(event, event.num_recorded))

    def can_go_on(self) -> bool:
        if not self.queue:
            return False
        head = self.queue[0]
        return not isinstance(head, _Wait) or head.event.num_reached >= head.number

    def go_on(self) -> None:
        head = self.queue.popleft()
        if not isinstance(head, _Wait):
            with _disable_current_modes():
                head()


class _Wait:
    def __init__(self, event: FakeEvent, number: int) -> None:
        self.event = event
        self.number = number


class FakeEvent:
    def __init__(self, device: FakeStreams) -> None:
        self.device = device
        self.num_recorded = 0
        self.num_reached = 0

    def record(self, *args: Any, **kwargs: Any) -> None:
        self.device.check("Event.record", args, kwargs)
        self.put_on(args[0] if args else self.device.current)

    def put_on(self, stream: FakeStream) -> None:
        self.num_recorded += 1
        number = self.num_recorded

        def reach() -> None:
            self.num_reached = max(self.num_reached, number)

        stream.queue.append(reach)

    def query(self, *args: Any, **kwargs: Any) -> bool:
        self.device.check("Event.query", args, kwargs)
        self.device.not_while_capturing("query")
        return self.num_reached == self.num_recorded

    def synchronize(self, *args: Any, **kwargs: Any) -> None:
        self.device.check("Event.synchronize", args, kwargs)
        self.device.not_while_capturing("synchronize")
        while self.num_reached < self.num_recorded:
            assert self.device.step(), "nothing can run, and the event was not reached"


class FakeGraph:
    def __init__(
        self, device: FakeStreams, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        device.check(name, args, kwargs)
        self.device = device
        self.name = name
        self.work: list[Callable[[], None]] = []
        self.pool: Any = None
        self.spoilt = False
        self.state = "new"

    def replay(self, *args: Any, **kwargs: Any) -> None:
        self.device.check(f"{self.name}.replay", args, kwargs)
        assert self.state == "captured", self.state
        for work in self.work:
            self.device.launch(work)

    def reset(self, *args: Any, **kwargs: Any) -> None:
        # A device that failed makes the real one warn, not raise.
        self.device.api.check(f"{self.name}.reset", args, kwargs)
        self.device.calls.append(f"{self.name}.reset")
        self.state = "reset"
        self.work = []


class FakeCapture:
    """The context in which a graph is recorded. Like the real one it leaves its stream current
    where the end of the capture fails."""

    def __init__(
        self,
        device: FakeStreams,
        graph: FakeGraph,
        pool: Any = None,
        stream: FakeStream | None = None,
        capture_error_mode: str = "global",
    ) -> None:
        assert capture_error_mode in ("global", "thread_local", "relaxed")
        assert stream is not None
        self.device, self.graph, self.capturing = device, graph, stream
        graph.pool = pool

    def __enter__(self) -> None:
        self.device.run_all()
        self.before, self.device.current = self.device.current, self.capturing
        if self.capturing is self.device.default:
            raise RuntimeError("graphs must be captured on a non-default stream")
        self.capturing.capture = self.graph

    def __exit__(self, *args: object) -> None:
        self.capturing.capture = None
        if self.graph.spoilt:
            self.graph.state = "spoilt"
            raise RuntimeError("operation failed due to a previous error during capture\nmore")
        self.graph.state = "captured"
        self.device.current = self.before


class _Queueing(TorchDispatchMode):
    """Queues the operations on the device's tensors."""

    def __init__(self, device: FakeStreams) -> None:
        super().__init__()
        self._device = device

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import the compiler, seconds, for nothing

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        device, kwargs = self._device, kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours = [tensor for tensor in tensors if device.holds(tensor)]
        is_copy = func is torch.ops.aten.copy_.default
        if is_copy and len(ours) == 1:
            assert args[2:] == (True,), "a copy between host and device that blocks"
            other = args[0] if args[1] is ours[0] else args[1]
            assert other.untyped_storage().data_ptr() in device.pinned, "memory is not pinned"
        if not ours or func.is_view:
            out = func(*args, **kwargs)
            if ours:
                device.adopt(out)
            return out
        if func._schema.is_mutable:
            device.launch(_later(func, args, kwargs, device))
            return args[0]
        out = func(*args, **kwargs).clone()
        device.adopt(out).fill_(GARBAGE)
        device.launch(_later(func, args, kwargs, device, out))
        return out


def _later(func, args, kwargs, device, out=None) -> Callable[[], None]:
    """The operation. It does not keep what was made on other streams: there it is an error of the
    host to let it go before the operation has run."""
    loose_args, loose_kwargs = tree_map(lambda leaf: _loosened(leaf, device), (args, kwargs))

    def run() -> None:
        own_args, own_kwargs = tree_map(_fastened, (loose_args, loose_kwargs))
        found = func(*own_args, **own_kwargs)
        if out is not None:
            out.copy_(found)

    return run


def _loosened(leaf, device):
    if isinstance(leaf, torch.Tensor) and device.holds(leaf) and device.is_foreign(leaf):
        return weakref.ref(leaf)
    return leaf


def _fastened(leaf):
    if not isinstance(leaf, weakref.ref):
        return leaf
    found = leaf()
    assert found is not None, "memory was let go before the device was done with it"
    return found
