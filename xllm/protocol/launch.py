"""Children and their launcher: how a start goes. Lost words cost a line on a screen, no more."""

from __future__ import annotations

from xllm.protocol.message import ArrayMessage, learn


class ProcessStarted(ArrayMessage, frozen=True):
    """A process runs: its kind (router, master, worker, kvcache), name and pid."""

    kind: str
    name: str
    pid: int
    detail: str = ""


class ProcessProgress(ArrayMessage, frozen=True):
    """How far a long start is (weights: bytes)."""

    kind: str
    name: str
    done: int
    total: int
    unit: str = "bytes"


class ProcessReady(ArrayMessage, frozen=True):
    """A process does its work from now on; `addresses`: (what, where) pairs."""

    kind: str
    name: str
    pid: int
    addresses: tuple[tuple[str, str], ...] = ()
    detail: str = ""


class ProcessFailed(ArrayMessage, frozen=True):
    """A process cannot go on: an error's wire code, and one clear line."""

    kind: str
    name: str
    code: str
    message: str


class ProcessStopping(ArrayMessage, frozen=True):
    """A process drains: what is still open."""

    kind: str
    name: str
    num_open: int


LaunchMessage = ProcessStarted | ProcessProgress | ProcessReady | ProcessFailed | ProcessStopping

learn(LaunchMessage)
