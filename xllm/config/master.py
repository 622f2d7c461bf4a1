"""An instance's master: its addresses and its workers."""

from __future__ import annotations

import dataclasses

from xllm.config.field import setting


@dataclasses.dataclass(frozen=True)
class MasterSettings:
    """One instance's master."""

    name: str = setting("", "Unique name of this instance; empty: one is made.")
    endpoint: str = setting("", "Where routers connect; empty: ipc in the run directory.")
    bus_endpoint: str = setting(
        "", "Where heartbeats are published; empty: ipc in the run directory."
    )
    advertised_endpoint: str = setting(
        "",
        "What the registry tells routers to connect to, where that is not `endpoint`: an address "
        "in front of this one, behind which a NAT or a proxy passes connections on.",
    )
    advertised_bus_endpoint: str = setting("", "The same for `bus_endpoint`.")
    worker_endpoint: str = setting(
        "",
        "Where workers connect; empty: ipc in the run directory. A worker of another node adds "
        ";key= and the master's public key.",
    )
    num_workers: int = setting(
        1, "Ranks of this instance: each holds a share of every layer.", low=1, high=64
    )
    spawn_workers: bool = setting(
        True, "Start the workers as children; off: they are started on their own."
    )
    worker_start_s: float = setting(
        600.0, "Time that a worker gets to load its model.", unit="s", low=1
    )
