"""The master process: what a spawned child runs."""

from __future__ import annotations

from xllm.config.load import decode_settings
from xllm.master.actor import MasterActor, master_name
from xllm.master.rank_processes import WorkerTarget
from xllm.protocol.actor.run import run_role


def main(settings: bytes, worker_target: WorkerTarget | None = None) -> None:
    """Run one master to its end; `settings` as `encode_settings` wrote them. Never returns.

    `worker_target`: the module-level function that runs a worker from the same kind of bytes
    (masters and workers do not import each other); needed where `master.spawn_workers` is on."""
    decoded = decode_settings(settings)
    run_role(
        "master",
        master_name(decoded),
        decoded.cluster,
        lambda: MasterActor(decoded, worker_target),
        fault_hooks=decoded.chaos.hooks,
    )
