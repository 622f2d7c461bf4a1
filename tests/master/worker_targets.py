"""First functions of worker processes in tests: the toy engine with faults."""

from xllm.config.load import decode_settings
from xllm.protocol.actor.logs import configure_logs
from xllm.protocol.actor.run import run_child
from xllm.worker.actor import WorkerActor, worker_name
from xllm.worker.toy.executor import make_toy_executor
from xllm.worker.toy.faults import ToyFaults

HANG_TOKEN = 990
FAIL_TOKEN = 991


def run_toy_worker(settings: bytes) -> None:
    """A toy worker that hangs, or fails a step, at certain prompt tokens."""
    decoded = decode_settings(settings)
    configure_logs(process=worker_name(decoded), level="warning")
    faults = ToyFaults(hang=HANG_TOKEN, fail_step=FAIL_TOKEN)
    run_child(lambda: WorkerActor(decoded, lambda s: make_toy_executor(s, faults)))


def run_nothing(settings: bytes) -> None:
    """A worker whose configuration is wrong."""
    raise SystemExit(64)


def run_toy_master(settings: bytes) -> None:
    """A master with toy workers."""
    from xllm.master.process import main

    main(settings, run_toy_worker)
