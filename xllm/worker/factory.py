"""Chooses the executor that the settings name.

The implementations are imported when they are chosen: a worker with the toy engine holds no torch.
"""

from __future__ import annotations

from xllm.config.settings import Settings
from xllm.worker.executor import Executor


def make_executor(settings: Settings) -> Executor:
    """The executor of `settings.worker.engine`, not yet loaded."""
    if settings.worker.engine == "toy":
        from xllm.worker.toy.executor import make_toy_executor

        return make_toy_executor(settings)
    from xllm.worker.execution.native import make_native_executor

    return make_native_executor(settings)
