"""The settings of every process: its cluster, its registry, its periods, its logs."""

from __future__ import annotations

import dataclasses

from xllm.config.field import setting


@dataclasses.dataclass(frozen=True)
class ClusterSettings:
    """What all processes of a cluster agree on."""

    name: str = setting("default", "Name of the cluster: the root of its registry keys.")
    registry: str = setting(
        "",
        "Address of the registry: ipc://... of a launcher, tcp://host:port[;key=...] of "
        "`xllm registry`, or etcd://host:port[,host:port] (etcds:// with TLS).",
    )
    launcher: str = setting(
        "", "Where this process reports its start (set by the launcher); empty: nowhere."
    )
    run_dir: str = setting(
        "", "Directory for sockets and locks (serve: of run-* directories); empty: one is made."
    )
    keys_dir: str = setting("", "Directory with this node's CURVE keys and the allow-list.")
    heartbeat_s: float = setting(
        0.2, "Period of heartbeats on the bus.", unit="s", low=0.01, high=10
    )
    lease_s: float = setting(5.0, "Time to live of registrations.", unit="s", low=2, high=120)
    registry_wait_s: float = setting(
        60.0, "Time that the registry gets to answer at a start.", unit="s", low=0.1, high=3600
    )
    shutdown_s: float = setting(
        15.0, "Time that open requests get to finish at a shutdown.", unit="s", low=0, high=600
    )
    log_level: str = setting(
        "info", "Least severe events to log.", choices=("debug", "info", "warning", "error")
    )
    log_format: str = setting(
        "text", "One event a line, for people or for machines.", choices=("text", "json")
    )
    log_dir: str = setting("", "Directory for one log file a process; empty: standard error.")
