"""Several models in one worker process: a plan is run by its model's executor.

Their executors have weights, sequences and slots of their own over one memory of pages, which the
master's books divide. It knows plans' names and nothing in them. Invariant: no model is loaded
before all have said what pages they need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from xllm.config.settings import Settings
from xllm.errors import EngineError
from xllm.protocol.step import StepPlan, WorkerReady
from xllm.worker.executor import HostedExecutor, LoadObserver, StepOutput
from xllm.worker.rank_board import RankBoard


class ModelHost:
    """Implements Executor over those of its models, whose settings are `models`. `give_back`:
    called when all sleep."""

    def __init__(
        self,
        executors: Sequence[HostedExecutor],
        models: Sequence[Settings],
        give_back: Callable[[], None] | None = None,
    ) -> None:
        names = [one.model.name for one in models]
        self._models = dict(zip(names, executors, strict=True))
        self._awake = set(names)
        self._give_back = give_back

    @property
    def counter(self) -> int:
        """Pieces of work of all models."""
        return sum([one.counter for one in self._models.values()])

    def load(self, progress: LoadObserver) -> WorkerReady:
        """Load all, or forget the sequences of all; what sleeps wakes. `more` has the others."""
        for one in self._models.values():
            one.read(progress)
        reports = []
        for name, one in self._models.items():
            reports.append(msgspec.structs.replace(one.load(progress), model=name))
        self._awake = set(self._models)
        return msgspec.structs.replace(reports[0], more=tuple(reports[1:]))

    def sleep(self, model: str, drop_weights: bool) -> None:
        """See Executor."""
        self._of(model).sleep(model, drop_weights)
        self._awake.discard(model)
        if not self._awake and self._give_back is not None:
            self._give_back()

    def wake(self, model: str, progress: LoadObserver) -> None:
        """See Executor."""
        self._of(model).wake(model, progress)
        self._awake.add(model)

    def join(self, board: RankBoard) -> None:
        """EngineError: models share one rank."""
        raise EngineError("several models share one worker, which has no other ranks")

    def arrive(self, plan: StepPlan) -> None:
        """Tell the plan's executor; what is wrong with a plan shows when it runs."""
        one = self._models.get(plan.model)
        if one is not None:
            one.arrive(plan)

    def execute(self, plan: StepPlan) -> StepOutput:
        """Run a plan by its model's executor."""
        return self._of(plan.model).execute(plan)

    def close(self) -> None:
        """Close all."""
        for one in self._models.values():
            one.close()

    def _of(self, model: str) -> HostedExecutor:
        one = self._models.get(model)
        if one is None:
            raise EngineError(f"no model {model!r} is here, but {', '.join(self._models)}")
        return one
