"""Who may say what: one table of roles and messages, and of roles and registry keys. Pure.

A peer is known by the public key that its connection was authenticated with; the file of that key
says its roles. What stands in no row may be said by nobody. Where there are no keys (ipc, loopback)
everybody is one user, and nothing here is asked.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Mapping
from typing import Any

import msgspec

from xllm.protocol import (
    administration,
    bus,
    cache,
    client,
    generation,
    instance,
    launch,
    questions,
    registry_wire,
    step,
)


class PeerRole(enum.StrEnum):
    """What a key may act as."""

    ROUTER = "router"
    MASTER = "master"
    WORKER = "worker"
    DAEMON = "daemon"
    ADMIN = "admin"
    CLIENT = "client"


Roles = frozenset[PeerRole]

EVERY_ROLE: Roles = frozenset(PeerRole)
"""Of a key in `allowed/` whose file names none: a node's, whose processes share it."""
CLIENT_ROLES: Roles = frozenset((PeerRole.CLIENT,))
"""Of a key in `clients/` whose file names none."""
CLUSTER_ROLES: Roles = EVERY_ROLE - {PeerRole.ADMIN, PeerRole.CLIENT}

_NOBODY: Roles = frozenset()
_ASKING: Roles = frozenset((PeerRole.CLIENT, PeerRole.ADMIN))
_ADMIN: Roles = frozenset((PeerRole.ADMIN,))
_ROUTER: Roles = frozenset((PeerRole.ROUTER,))
_WORKER: Roles = frozenset((PeerRole.WORKER,))
_ENGINE: Roles = frozenset((PeerRole.MASTER, PeerRole.WORKER))
_REGISTERED: Roles = frozenset((PeerRole.ROUTER, PeerRole.MASTER, PeerRole.DAEMON, PeerRole.ADMIN))


@dataclasses.dataclass(frozen=True, slots=True)
class KnownPeer:
    """Whose key a connection was authenticated with. `name`: of the key's file."""

    name: str
    public_key: str
    roles: Roles


class Subscribe(msgspec.Struct, frozen=True):
    """Stands for hearing a bus: a subscription is no message of its own."""


CONVERSATIONS: Mapping[str, tuple[str, Any]] = types.MappingProxyType(
    {
        "client": ("a router's client port", client.ClientMessage),
        "instance": ("a master's endpoint for routers", instance.InstanceRequest),
        "step": ("a master's endpoint for workers", step.WorkerMessage),
        "cache": ("a KV cache daemon's endpoint", cache.CacheRequest | instance.QuerySnapshot),
        "registry": ("the registry", registry_wire.RegistryRequest),
        "launch": ("a launcher's endpoint", launch.LaunchMessage),
        "bus": ("a publisher's endpoint", Subscribe),
    }
)
"""By name, each conversation's listener and the union of what it hears."""

MATRIX: Mapping[type[msgspec.Struct], Roles] = types.MappingProxyType(
    {
        generation.SubmitRequest: _ASKING,
        generation.AbortRequest: _ASKING,
        questions.ListModels: _ASKING,
        questions.QueryHealth: _ASKING,
        questions.QueryStatus: _ASKING,
        questions.TokenizeText: _ASKING,
        questions.DetokenizeIds: _ASKING,
        administration.SetModelSleep: _ADMIN,
        administration.SetRole: _ADMIN,
        administration.SetObjectives: _ADMIN,
        questions.Ping: _ASKING,
        instance.AdmitRequest: _ROUTER,
        instance.CancelRequest: _ROUTER,
        instance.DrainInstance: _ROUTER,
        instance.AssignRole: _ROUTER,
        instance.ReleaseHold: _ROUTER,
        instance.QuerySnapshot: _ROUTER,
        instance.ProbeInstance: _ROUTER,
        instance.SetSleep: _ROUTER,
        instance.PingInstance: _ROUTER,
        instance.QueryTokens: _ROUTER,
        step.StepResult: _WORKER,
        step.WorkerHello: _WORKER,
        step.LoadProgress: _WORKER,
        step.WorkerReady: _WORKER,
        step.WorkerFailed: _WORKER,
        step.WorkerPulse: _WORKER,
        step.WorkerPong: _WORKER,
        step.RankNotice: _WORKER,
        step.ModelAwake: _WORKER,
        cache.OpenArena: _ENGINE,
        cache.LookUpBlocks: _ENGINE,
        cache.ReserveBlocks: _ENGINE,
        cache.CommitBlocks: _ENGINE,
        cache.PinBlocks: _ENGINE,
        cache.ReleaseBlocks: _ENGINE,
        cache.DropBlocks: _ENGINE,
        cache.PrefetchBlocks: _ENGINE,
        registry_wire.GrantLease: _REGISTERED,
        registry_wire.KeepLease: _REGISTERED,
        registry_wire.RevokeLease: _REGISTERED,
        registry_wire.PutEntry: _REGISTERED,
        registry_wire.GetEntry: _REGISTERED,
        registry_wire.ListEntries: _REGISTERED,
        registry_wire.DeleteEntry: _REGISTERED,
        registry_wire.CompareAndSet: _REGISTERED,
        registry_wire.GuardedWrite: _ROUTER,
        registry_wire.OpenWatch: _REGISTERED,
        registry_wire.CloseWatch: _REGISTERED,
        registry_wire.PingRegistry: _REGISTERED,
        launch.ProcessStarted: CLUSTER_ROLES,
        launch.ProcessProgress: CLUSTER_ROLES,
        launch.ProcessReady: CLUSTER_ROLES,
        launch.ProcessFailed: CLUSTER_ROLES,
        launch.ProcessStopping: CLUSTER_ROLES,
        Subscribe: _REGISTERED - _ADMIN,
    }
)
"""By message, the roles that may say it."""

BUS_WORDS: Mapping[PeerRole, type[msgspec.Struct]] = types.MappingProxyType(
    {
        PeerRole.MASTER: bus.InstanceHeartbeat,
        PeerRole.DAEMON: bus.DaemonHeartbeat,
        PeerRole.ROUTER: bus.RouterPresence,
    }
)
"""What who is registered as that may say on its own bus, in its own name; nothing else is heard."""


@dataclasses.dataclass(frozen=True, slots=True)
class KeyRule:
    """Who may write the registry's keys of a kind, and whether only who made a key may change it
    while it exists."""

    writers: Roles
    owned: bool
    is_record: bool = False
    """Whether its value is the record of a process, which says its maker's key."""


KEY_RULES: Mapping[str, KeyRule] = types.MappingProxyType(
    {
        "instances": KeyRule(frozenset((PeerRole.MASTER,)), owned=True, is_record=True),
        "daemons": KeyRule(frozenset((PeerRole.DAEMON,)), owned=True, is_record=True),
        "routers": KeyRule(_ROUTER, owned=True, is_record=True),
        "leader": KeyRule(_ROUTER, owned=True),
    }
)
"""By the part of a key that follows the cluster's name."""
SHARED_RULE = KeyRule(_ROUTER | _ADMIN, owned=False)
"""Of all other keys: the words of the cluster's leader, and leaders change."""


def may_say(roles: Roles, message: type[msgspec.Struct]) -> bool:
    """Whether a peer of these roles may say that."""
    return not roles.isdisjoint(MATRIX.get(message, _NOBODY))


def rule_of(key: str) -> KeyRule:
    """The rule of a registry key; kinds with one of their own are `/xllm/<cluster>/<kind>`."""
    parts = key.split("/", 4)
    if len(parts) < 4 or parts[0] or parts[1] != "xllm":
        return SHARED_RULE
    return KEY_RULES.get(parts[3], SHARED_RULE)
