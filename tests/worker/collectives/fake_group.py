"""Stands in for torch.distributed between devices: ranks are threads, parts cross when all came.

Calls are held against the parameters of the real functions. A work is over for the host at once and
for the stream at `wait`, as NCCL's is: what is read before that is garbage.
"""

from __future__ import annotations

import inspect
import threading
import types
from typing import Any

import torch
import torch.distributed as dist

WAIT_S = 20.0


class FakeCluster:
    """What the ranks' processes share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.parts: dict[tuple[int, int], dict[int, torch.Tensor]] = {}
        self.changed = threading.Condition()
        self.aborted: set[int] = set()
        self.all_there = threading.Barrier(size, timeout=WAIT_S)


class FakeDistributed:
    """torch.distributed as one rank's process has it."""

    def __init__(self, cluster: FakeCluster, can_abort: bool = True) -> None:
        self.cluster = cluster
        self.available = True
        self.refusal = ""
        self.calls: list[str] = []
        self.options: dict[str, Any] = {}
        self._rank = -1
        self._meeting = -1
        self._num_works = 0
        self._can_abort = can_abort
        self.group = types.SimpleNamespace(WORLD=None)

    def is_backend_available(self, *args: Any, **kwargs: Any) -> bool:
        self._check("is_backend_available", args, kwargs)
        return self.available

    def init_process_group(self, *args: Any, **kwargs: Any) -> None:
        bound = self._check("init_process_group", args, kwargs)
        assert self.group.WORLD is None, "there is a default group already"
        if self.refusal:
            self.cluster.all_there.wait()  # so that none leaves while another one comes
            raise RuntimeError(self.refusal)
        self.options = bound
        self._rank, self._meeting, self._num_works = bound["rank"], self._meeting + 1, 0
        store = bound["store"]
        # As a back-end does: one tells its address, all wait for it.
        if self._rank == 0:
            store.set("id", b"address")
        assert store.get("id") == b"address"
        assert store.check(["id"])
        assert not store.check(["id", "other"])
        self.group.WORLD = types.SimpleNamespace(abort=self._abort)

    def all_gather_into_tensor(self, *args: Any, **kwargs: Any) -> FakeWork:
        bound = self._check("all_gather_into_tensor", args, kwargs)
        assert bound["async_op"]
        out, part = bound["output_tensor"], bound["input_tensor"]
        assert out.is_contiguous()
        assert part.is_contiguous()
        assert out.numel() == part.numel() * self.cluster.size
        out.fill_(float("nan"))
        self._num_works += 1
        key = self._meeting, self._num_works
        with self.cluster.changed:
            self.cluster.parts.setdefault(key, {})[self._rank] = part.clone()
            self.cluster.changed.notify_all()
        return FakeWork(self, key, out)

    def destroy_process_group(self, *args: Any, **kwargs: Any) -> None:
        self._check("destroy_process_group", args, kwargs)
        assert self.group.WORLD is not None
        self.group.WORLD = None
        if self.refusal:
            raise RuntimeError(self.refusal)

    def _abort(self) -> None:
        self.calls.append("abort")
        if not self._can_abort:
            raise RuntimeError("Backend hccl does not support abort")
        with self.cluster.changed:
            self.cluster.aborted.add(self._meeting)
            self.cluster.changed.notify_all()

    def _check(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = inspect.signature(getattr(dist, name)).bind(*args, **kwargs)
        self.calls.append(name)
        return bound.arguments


class FakeWork:
    def __init__(self, owner: FakeDistributed, key: tuple[int, int], out: torch.Tensor) -> None:
        self._owner, self._key, self._out = owner, key, out

    def wait(self) -> None:
        cluster = self._owner.cluster
        with cluster.changed:
            cluster.changed.wait_for(
                lambda: (
                    len(cluster.parts[self._key]) == cluster.size or self._key[0] in cluster.aborted
                ),
                WAIT_S,
            )
            found = cluster.parts[self._key]
        if len(found) < cluster.size:
            raise RuntimeError("NCCL communicator was aborted\nmore")
        self._out.copy_(torch.cat([found[rank] for rank in range(cluster.size)]))
