"""One gRPC channel to one etcd member: stubs, token, calls that end in time.

It decides nothing: what fails is raised as an exception of ours, and who owns the link replaces
it. Invariant: no call outlives its time, and none ends as the cancellation of its caller (gRPC
says "cancelled" for a call whose channel was closed).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import structlog

from xllm.errors import BrokenError, ConfigError, PermissionDeniedError
from xllm.protocol.registry.etcd_files import EtcdSecrets
from xllm.protocol.registry.etcd_stubs import grpc, rpc_pb2, rpc_pb2_grpc
from xllm.protocol.registry.etcd_wire import as_error, is_stale_token, is_without_auth

_log = structlog.get_logger("registry")

HELLO_KEY = b"/xllm/hello"
"""Read to see whether etcd answers; under the prefix that a user of ours may read."""
MAX_ANSWER_BYTES = 256 << 20
_RENEWAL_S = 3.0
"""What a new token may take."""
_LATE_S = 1.0
"""gRPC keeps the time of calls; this much later we stop waiting for it."""
_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new connection
    ("grpc.enable_retries", 0),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
    # etcd closes connections that are pinged more than once in 5 s, or while nothing is open.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.bdp_probe", 0),
)

T = TypeVar("T")
Metadata = tuple[tuple[str, str], ...]


class EtcdLink:
    """A channel to `target` (host:port). Make it inside the running loop; close it."""

    def __init__(self, target: str, tls: bool, secrets: EtcdSecrets) -> None:
        self.target = target
        self._secrets = secrets
        self._metadata: Metadata = ()
        if tls:
            credentials = grpc.ssl_channel_credentials(secrets.ca, secrets.key, secrets.cert)
            self._channel = grpc.aio.secure_channel(target, credentials, options=_OPTIONS)
        else:
            self._channel = grpc.aio.insecure_channel(target, options=_OPTIONS)
        self.kv = rpc_pb2_grpc.KVStub(self._channel)
        self.lease = rpc_pb2_grpc.LeaseStub(self._channel)
        self._auth = rpc_pb2_grpc.AuthStub(self._channel)
        self._watch = rpc_pb2_grpc.WatchStub(self._channel)

    async def open(self, timeout_s: float) -> None:
        """Connect, authenticate, see that it answers. BrokenError: it does not. ConfigError: it
        refuses us."""
        if self._secrets.user:
            await self.authenticate(timeout_s)
        try:
            await self.hello(timeout_s)
        except PermissionDeniedError as error:
            raise ConfigError(error.message, param=error.param) from error

    async def hello(self, timeout_s: float) -> None:
        """Have a quorum answer: a linearizable read of a key that nobody writes."""
        await self.call(self.kv.Range, rpc_pb2.RangeRequest(key=HELLO_KEY), timeout_s)

    async def authenticate(self, timeout_s: float) -> None:
        """Get a token for the user; ConfigError if it is unknown or has another password."""
        request = rpc_pb2.AuthenticateRequest(
            name=self._secrets.user, password=self._secrets.password
        )
        try:
            answer = await self._in_time(
                self._auth.Authenticate(request, timeout=timeout_s), timeout_s
            )
        except grpc.aio.AioRpcError as error:
            if not is_without_auth(error):
                raise as_error(error, self.target) from None
            _log.warning("etcd_asks_for_no_user", target=self.target)
            return
        self._metadata = (("token", answer.token),)

    async def authenticate_again(self) -> None:
        """Replace the token, if there is one: it may be what was refused."""
        if self._metadata:
            await self.authenticate(_RENEWAL_S)

    async def call(self, method: Callable[..., Any], request: Any, timeout_s: float) -> Any:
        """The answer to a request; its errors as those of the Registry interface. A token that
        is no longer good is replaced."""
        return await self._with_token(
            lambda: self._in_time(
                method(request, timeout=timeout_s, metadata=self._metadata), timeout_s
            ),
            timeout_s,
        )

    async def keep_alive(self, lease_id: int, timeout_s: float) -> float:
        """Start a lease's time anew: its time to live in seconds, 0 if it is gone."""
        return await self._with_token(lambda: self._keep_alive(lease_id, timeout_s), timeout_s)

    def open_watch(self, request: Any) -> EtcdStream:
        """A stream for one watch, as long as this link."""
        return EtcdStream(self._watch.Watch, request, self._metadata, self.target)

    async def close(self) -> None:
        """End all calls and the connection."""
        await self._channel.close()

    async def _keep_alive(self, lease_id: int, timeout_s: float) -> float:
        requests = iter((rpc_pb2.LeaseKeepAliveRequest(ID=lease_id),))
        call = self.lease.LeaseKeepAlive(requests, timeout=timeout_s, metadata=self._metadata)
        try:
            answer = await self._in_time(call.read(), timeout_s)
        finally:
            call.cancel()
        if answer is grpc.aio.EOF:
            raise BrokenError(f"etcd at {self.target} ended a renewal without an answer")
        return float(answer.TTL)

    async def _with_token(self, attempt: Callable[[], Awaitable[T]], timeout_s: float) -> T:
        try:
            try:
                return await attempt()
            except grpc.aio.AioRpcError as error:
                if not (self._secrets.user and is_stale_token(error)):
                    raise
            await self.authenticate(timeout_s)
            return await attempt()
        except grpc.aio.AioRpcError as error:
            raise as_error(error, self.target) from None

    async def _in_time(self, answer: Awaitable[T], timeout_s: float) -> T:
        try:
            async with asyncio.timeout(timeout_s + _LATE_S):
                return await not_cancelled(answer, self.target)
        except TimeoutError:
            raise BrokenError(f"etcd at {self.target} has not answered in time") from None


class EtcdStream:
    """A call that answers one request again and again: BrokenError when it ends, however.

    The request goes by an iterator: gRPC's `write` waits forever on a channel that is closed."""

    def __init__(
        self, method: Callable[..., Any], request: Any, metadata: Metadata, target: str
    ) -> None:
        self._over = asyncio.Event()
        self._target = target
        self._call = method(self._requests(request), metadata=metadata)

    async def read(self) -> Any:
        """The next response; waits as long as it takes."""
        try:
            response = await not_cancelled(self._call.read(), self._target)
        except grpc.aio.AioRpcError as error:
            raise as_error(error, self._target) from None
        if response is grpc.aio.EOF:
            raise BrokenError(f"etcd at {self._target} ended a watch")
        return response

    def close(self) -> None:
        """End the call; whoever reads gets BrokenError."""
        self._over.set()
        self._call.cancel()

    async def _requests(self, request: Any) -> AsyncIterator[Any]:
        yield request
        await self._over.wait()  # etcd ends the watch of a client that ends its side


async def not_cancelled(work: Awaitable[T], target: str) -> T:
    """What gRPC gives, where the end of a channel is no cancellation of this task."""
    try:
        return await work
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise BrokenError(f"the connection to etcd at {target} was closed") from None
    except grpc.aio.UsageError:
        raise BrokenError(f"the connection to etcd at {target} is closed") from None
