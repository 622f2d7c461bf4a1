"""etcd's messages as the registry's: requests made, answers and refusals turned. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from xllm.errors import (
    BrokenError,
    ConfigError,
    FencedError,
    InvalidRequestError,
    OverloadedError,
    PermissionDeniedError,
    XllmError,
)
from xllm.protocol.registry.etcd_stubs import grpc, kv_pb2, rpc_pb2
from xllm.protocol.registry_wire import CasResult, Change, Entry, Listing

_MAX_DETAIL_CHARS = 300
_STALE_TOKENS = ("invalid auth token", "revision of auth store is old")
_NOT_ENABLED = "authentication is not enabled"


def range_end(prefix: str) -> bytes:
    """The first key after all that begin with `prefix`; b"\\0" (etcd's "to the end") for none."""
    kept = prefix.encode()  # no byte of UTF-8 is 255
    return kept[:-1] + bytes([kept[-1] + 1]) if kept else b"\0"


def list_request(prefix: str) -> Any:
    """All keys under a prefix, linearizable."""
    return rpc_pb2.RangeRequest(key=prefix.encode() or b"\0", range_end=range_end(prefix))


def witness_request(prefix: str, revision: int) -> Any:
    """What was under a prefix at a revision: the key that was written last, and the count."""
    return rpc_pb2.RangeRequest(
        key=prefix.encode() or b"\0",
        range_end=range_end(prefix),
        revision=revision,
        limit=1,
        sort_order=rpc_pb2.RangeRequest.DESCEND,
        sort_target=rpc_pb2.RangeRequest.MOD,
    )


def watch_request(prefix: str, after_revision: int) -> Any:
    """Every change under a prefix after a revision."""
    create = rpc_pb2.WatchCreateRequest(
        key=prefix.encode() or b"\0",
        range_end=range_end(prefix),
        start_revision=after_revision + 1,
        progress_notify=True,
    )
    return rpc_pb2.WatchRequest(create_request=create)


def cas_request(key: str, expected_mod_revision: int, value: bytes, lease_id: int) -> Any:
    """Write if the mod_revision is the expected one (0: no such key); read it in any case."""
    name = key.encode()
    read = rpc_pb2.RequestOp(request_range=rpc_pb2.RangeRequest(key=name))
    put = rpc_pb2.PutRequest(key=name, value=value, lease=lease_id)
    compare = rpc_pb2.Compare(
        result=rpc_pb2.Compare.EQUAL,
        target=rpc_pb2.Compare.MOD,
        key=name,
        mod_revision=expected_mod_revision,
    )
    return rpc_pb2.TxnRequest(
        compare=[compare], success=[rpc_pb2.RequestOp(request_put=put), read], failure=[read]
    )


def guarded_request(
    guard: str, create_revision: int, puts: Sequence[tuple[str, bytes]], deletes: Sequence[str]
) -> Any:
    """Put and delete if `guard` was created at that revision."""
    compare = rpc_pb2.Compare(
        result=rpc_pb2.Compare.EQUAL,
        target=rpc_pb2.Compare.CREATE,
        key=guard.encode(),
        create_revision=create_revision,
    )
    operations = [
        rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=key.encode(), value=value))
        for key, value in puts
    ]
    operations += [
        rpc_pb2.RequestOp(request_delete_range=rpc_pb2.DeleteRangeRequest(key=key.encode()))
        for key in deletes
    ]
    return rpc_pb2.TxnRequest(compare=[compare], success=operations)


def cas_result(answer: Any) -> CasResult:
    """What a `cas_request` did."""
    kvs = answer.responses[-1].response_range.kvs
    return CasResult(answer.succeeded, answer.header.revision, as_entry(kvs[0]) if kvs else None)


def as_entry(kv: Any) -> Entry:
    """A key of etcd as an entry."""
    key = kv.key.decode(errors="replace")
    return Entry(key, kv.value, kv.create_revision, kv.mod_revision, kv.lease)


def as_listing(answer: Any) -> Listing:
    """The answer to a `list_request`."""
    return Listing(tuple(map(as_entry, answer.kvs)), answer.header.revision)


def as_changes(events: Iterable[Any]) -> tuple[Change, ...]:
    """The events of one watch response, in their order."""
    return tuple(map(_as_change, events))


def _as_change(event: Any) -> Change:
    entry = as_entry(event.kv)
    gone = event.type == kv_pb2.Event.DELETE
    return Change(entry.key, entry.mod_revision, None if gone else entry)


def is_stale_token(error: Any) -> bool:
    """Whether a call failed for its token alone: authenticate and repeat it, it was not done."""
    details = error.details() or ""
    return any(text in details for text in _STALE_TOKENS)


def is_without_auth(error: Any) -> bool:
    """Whether authenticating failed since this etcd asks for none."""
    return _NOT_ENABLED in (error.details() or "")


def as_error(error: Any, target: str) -> XllmError:
    """A failed call as an exception of ours. BrokenError: it may or may not have been done."""
    code, details = error.code(), (error.details() or "").removeprefix("etcdserver: ")
    details = details[:_MAX_DETAIL_CHARS]
    status = grpc.StatusCode
    if code == status.NOT_FOUND and "lease" in details:
        return FencedError(f"etcd: {details}", param="lease_id")
    if code == status.RESOURCE_EXHAUSTED:
        return OverloadedError(f"etcd at {target} refuses writes: {details}", param="key")
    if code == status.PERMISSION_DENIED:
        return PermissionDeniedError(f"etcd at {target}: {details}", param="etcd.user_file")
    if code == status.UNAUTHENTICATED or (
        code in (status.INVALID_ARGUMENT, status.FAILED_PRECONDITION)
        and ("auth" in details or "user" in details)
    ):
        return ConfigError(f"etcd at {target} refuses: {details}", param="etcd.user_file")
    if code in (status.INVALID_ARGUMENT, status.FAILED_PRECONDITION, status.OUT_OF_RANGE):
        return InvalidRequestError(f"etcd: {details}")
    if code == status.DEADLINE_EXCEEDED:
        return BrokenError(f"etcd at {target} has not answered in time")
    return BrokenError(f"etcd at {target}: {details or code.name.lower()}")
