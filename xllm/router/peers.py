"""The other routers of the cluster, as clients may be told of them.

Knows their records only. Invariant: no address is named that leads nowhere from elsewhere (a
wildcard that a router listens on is no address of it).
"""

from __future__ import annotations

import ipaddress

from xllm.protocol.authority import PeerRole
from xllm.protocol.questions import RouterAddress
from xllm.protocol.records import DaemonRecord, RouterRecord
from xllm.router.membership import MembershipListener

MAX_NAMED = 32


class Peers(MembershipListener):
    """Addresses of routers by their names."""

    def __init__(self) -> None:
        self._addresses: dict[str, RouterAddress] = {}

    @property
    def addresses(self) -> tuple[RouterAddress, ...]:
        """Where clients may go instead of here."""
        return tuple(self._addresses.values())[:MAX_NAMED]

    def publisher_registered(self, record: DaemonRecord | RouterRecord) -> None:
        """See MembershipListener."""
        if isinstance(record, RouterRecord) and _leads_here(record.zmq_endpoint):
            self._addresses[record.name] = RouterAddress(record.zmq_endpoint, record.public_key)

    def publisher_gone(self, role: PeerRole, name: str) -> None:
        """See MembershipListener."""
        if role is PeerRole.ROUTER:
            self._addresses.pop(name, None)


def _leads_here(endpoint: str) -> bool:
    """Whether an endpoint is a TCP address, and not that of every interface."""
    if not endpoint.startswith("tcp://"):
        return False
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        return not ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host != "*"
