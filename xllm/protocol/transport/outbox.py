"""Messages that a socket has not taken yet, in a bounded queue for each peer. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Sequence

from xllm.errors import BackpressureError, BrokenError
from xllm.protocol.transport.limits import SocketLimits

Parts = Sequence[bytes]


class _Outbox:
    """Messages that wait for one peer."""

    __slots__ = ("messages", "num_bytes")

    def __init__(self) -> None:
        self.messages: deque[Parts] = deque()
        self.num_bytes = 0


class Outboxes:
    """Of one socket. A peer is in it as long as something waits for it."""

    def __init__(self, name: str, limits: SocketLimits) -> None:
        self._name = name
        self._limits = limits
        self._boxes: dict[bytes, _Outbox] = {}
        self.peers: Container[bytes] = self._boxes
        """For whom something waits; who sends much may keep it, it is never another."""

    def __bool__(self) -> bool:
        return bool(self._boxes)

    def put(self, peer: bytes, parts: Parts, *, anyway: bool = False) -> None:
        """Behind what waits for that peer. BackpressureError past the bound, unless the sender
        cannot be told any more (`anyway`)."""
        box = self._boxes.get(peer)
        if box is None:
            box = self._boxes[peer] = _Outbox()
        limits = self._limits
        num_messages = len(box.messages)
        size = sum(map(len, parts))
        if not anyway and (
            num_messages >= limits.max_queued_messages
            or box.num_bytes + size > limits.max_queued_bytes
        ):
            if not num_messages:
                del self._boxes[peer]
            raise BackpressureError(f"{self._name}: {num_messages} messages wait already")
        box.messages.append(parts)
        box.num_bytes += size

    def flush(self, try_send: Callable[[Parts], bool]) -> None:
        """Send what is taken. What waits for a peer that is gone is dropped."""
        for peer in list(self._boxes):
            box = self._boxes[peer]
            messages = box.messages
            try:
                while messages and try_send(messages[0]):
                    box.num_bytes -= sum(map(len, messages.popleft()))
            except BrokenError:
                messages.clear()  # whoever sent them is told that the connection is lost
            if not messages:
                del self._boxes[peer]

    def count(self, peer: bytes) -> int:
        """Messages that wait for a peer."""
        box = self._boxes.get(peer)
        return len(box.messages) if box is not None else 0

    def drop(self, peer: bytes) -> int:
        """Forget what waits for a peer; returns how many messages that was."""
        box = self._boxes.pop(peer, None)
        return len(box.messages) if box is not None else 0

    def totals(self) -> tuple[int, int]:
        """Messages and bytes that wait."""
        boxes = self._boxes.values()
        return sum(len(box.messages) for box in boxes), sum(box.num_bytes for box in boxes)

    def clear(self) -> None:
        """Forget everything."""
        self._boxes.clear()
