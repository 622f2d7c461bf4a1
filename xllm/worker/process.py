"""The worker process: what a spawned child runs."""

from __future__ import annotations

from xllm.config.environment import prepare_environment
from xllm.config.load import decode_settings
from xllm.protocol.actor.run import run_role
from xllm.worker.actor import WorkerActor, worker_name
from xllm.worker.factory import make_executor


def main(settings: bytes) -> None:
    """Run one worker to its end; `settings` as `encode_settings` wrote them. Never returns."""
    prepare_environment()
    decoded = decode_settings(settings)
    run_role(
        "worker",
        worker_name(decoded),
        decoded.cluster,
        lambda: WorkerActor(decoded, make_executor),
        fault_hooks=decoded.chaos.hooks,
    )
