"""Chooses the executor that the settings name.

The implementations are imported when they are chosen: a worker with the toy engine holds no torch.
"""

from __future__ import annotations

from xllm.config.models import each_model
from xllm.config.settings import Settings
from xllm.worker.executor import Executor
from xllm.worker.hosting import ModelHost


def make_executor(settings: Settings) -> Executor:
    """The executor of `settings.worker.engine`, not yet loaded; of all models, if there are
    several."""
    if settings.worker.engine == "toy":
        from xllm.worker.toy.executor import make_toy_models
        from xllm.worker.toy.faults import parse_faults

        return make_toy_models(settings, parse_faults(settings.chaos.toy_faults))
    from xllm.worker.execution.native import make_hosted_executor, make_native_executor
    from xllm.worker.memory.sharing import SharedPages

    models = each_model(settings)
    if len(models) == 1:
        return make_native_executor(settings)
    pages = SharedPages(len(models))
    hosted = [make_hosted_executor(one, pages) for one in models]
    return ModelHost(hosted, models, pages.give_back)
