"""When the layers of a step began and ended: a hook around every layer, and nothing else."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from xllm.config.settings import Settings
from xllm.worker.executor import Executor
from xllm.worker.factory import make_executor

if TYPE_CHECKING:
    import torch


class LayerClock:
    """The clocks of the latest step, seconds of `time.perf_counter`."""

    def __init__(self) -> None:
        self.began_s = 0.0
        self.ended_s = 0.0

    @property
    def layers_s(self) -> float:
        """From the first layer's begin to the last one's end; 0 where no layer was seen."""
        return self.ended_s - self.began_s

    def before_layer(self, index: int) -> None:
        """See LayerHook."""
        if index == 0:
            self.began_s = time.perf_counter()

    def after_layer(self, index: int, hidden: torch.Tensor) -> None:
        """See LayerHook."""
        self.ended_s = time.perf_counter()


def make_clocked_executor(settings: Settings) -> tuple[Executor, LayerClock]:
    """An executor of the settings, and the clock of its layers. The toy engine has no layers:
    its clock stands at 0."""
    clock = LayerClock()
    if settings.worker.engine == "toy":
        return make_executor(settings), clock
    from xllm.worker.execution.native import make_native_executor

    return make_native_executor(settings, [clock]), clock
