"""What an operator may do to an etcd behind a cluster's back, by etcdctl."""

from __future__ import annotations

import asyncio
import base64
import json

from xllm.cli.chaos.registry_process import etcd_program
from xllm.errors import DependencyError

_COMMAND_S = "5s"
_FILLING = b"x" * (1 << 20)
"""A value that fits in one request of etcd."""
_MOST_PUTS = 64
NO_ROOM = "database space exceeded"


class EtcdControl:
    """etcdctl against one etcd at HOST:PORT."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint

    async def revision(self) -> int:
        """Of its last write."""
        return int(json.loads(await self._run("get", "/", "-w", "json"))["header"]["revision"])

    async def compact(self) -> int:
        """Forget all history but the present; returns the revision."""
        revision = await self.revision()
        await self._run("compact", str(revision))
        return revision

    async def put(self, key: str, value: str) -> None:
        """Write."""
        await self._run("put", key, value)

    async def lease_of(self, key: str) -> int:
        """The lease of a key; 0: it has none, or is not there."""
        found = json.loads(await self._run("get", key, "-w", "json")).get("kvs", [])
        return int(found[0].get("lease", 0)) if found else 0

    async def value_of(self, key: str) -> bytes:
        """Empty where there is none."""
        found = json.loads(await self._run("get", key, "-w", "json")).get("kvs", [])
        return base64.b64decode(found[0].get("value", "")) if found else b""

    async def revoke(self, lease: int) -> None:
        """End a lease, and with it its keys."""
        await self._run("lease", "revoke", f"{lease:x}")

    async def fill(self) -> int:
        """Write until it takes no more; returns how many megabytes that took."""
        for count in range(_MOST_PUTS):
            code, _, told = await self._try("put", f"/fill/{count}", stdin=_FILLING)
            if code and NO_ROOM in told:
                return count
            if code:
                raise DependencyError(f"etcdctl put: {told}", param="registry")
        raise DependencyError(f"etcd takes more than {_MOST_PUTS} MB", param="registry")

    async def alarms(self) -> str:
        """Its alarms, in its words."""
        return await self._run("alarm", "list")

    async def make_room(self) -> None:
        """What an operator does when it is full."""
        await self._run("del", "/fill/", "--prefix")
        await self.compact()
        await self._run("defrag")
        await self._run("alarm", "disarm")

    async def _run(self, *arguments: str) -> str:
        code, shown, told = await self._try(*arguments)
        if code:
            raise DependencyError(f"etcdctl {arguments[0]}: {told}", param="registry")
        return shown

    async def _try(self, *arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            etcd_program("etcdctl"), "--endpoints", self._endpoint, "--command-timeout",
            _COMMAND_S, *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        shown, told = await process.communicate(stdin)
        assert process.returncode is not None
        return process.returncode, shown.decode(), told.decode().strip()[-300:]
