"""First functions of the launcher's children: each imports its own role and nothing else.

The launcher names them without importing what they run.
"""

from __future__ import annotations


def run_router(settings: bytes) -> None:
    """A router; never returns."""
    from xllm.router.process import main

    main(settings)


def run_master(settings: bytes) -> None:
    """A master; never returns."""
    from xllm.master.process import main

    main(settings, run_worker)


def run_worker(settings: bytes) -> None:
    """A worker; never returns."""
    from xllm.worker.process import main

    main(settings)


def run_kvcache(settings: bytes) -> None:
    """A KV cache daemon; never returns."""
    from xllm.kvcache.process import main

    main(settings)
