"""One chaos run: clusters, load, the scenarios in turn, the report.

Scenarios of one kind of cluster share it. Each scenario is run at least once, then all of them
again and again until the time is over.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from xllm.cli.chaos.asks import Ask, AskMaker
from xllm.cli.chaos.cluster import ChaosCluster
from xllm.cli.chaos.ledger import Ledger
from xllm.cli.chaos.load import StreamLoad
from xllm.cli.chaos.options import ChaosOptions
from xllm.cli.chaos.oracle import Streams, expected_streams, learn_streams
from xllm.cli.chaos.report import ChaosReport
from xllm.cli.chaos.scenarios.table import Scenario
from xllm.cli.chaos.stage import InvalidRunError, Stage
from xllm.cli.chaos.surroundings import Surroundings, prepare
from xllm.cli.model_source import resolve_model
from xllm.config.served_model import ModelSettings
from xllm.router.text.model import load_text_model
from xllm.worker.toy.vocabulary import toy_vocabulary

FINISH_S = 60.0
NUM_LEARNT = 64
"""Requests of a real model whose streams are learnt before any fault."""

Say = Callable[[str], None]


class ChaosSession:
    """A run over `scenarios`. `say` is called with a line now and then."""

    def __init__(
        self, options: ChaosOptions, scenarios: Sequence[Scenario], say: Say = lambda line: None
    ) -> None:
        self.options = options
        self.scenarios = scenarios
        self._say = say
        self._rng = random.Random(options.seed)
        self._model_dir, self._model = resolve_model(ModelSettings(path=options.model))
        self.report = ChaosReport(options, scenarios)

    async def run(self) -> ChaosReport:
        """All of it. The report says whether it passed, and whether it was valid."""
        if self.options.engine == "native":
            self.scenarios = [one for one in self.scenarios if one.cluster != "poisoned"]
        self._leave_out()
        kinds = list(dict.fromkeys(one.cluster for one in self.scenarios))
        share_s = self.options.seconds / max(1, len(kinds))
        for kind in kinds:
            chosen = [one for one in self.scenarios if one.cluster == kind]
            try:
                await self._run_cluster(kind, chosen, share_s)
            except InvalidRunError as error:
                self.report.invalid.append(str(error))
                self._say(f"invalid: {error}")
        return self.report

    def _leave_out(self) -> None:
        """Leave out what cannot be done here; a run that has nothing else proves nothing."""
        possible = []
        for one in self.scenarios:
            if reason := one.why_not():
                self.report.left_out.append(f"{one.name}: {reason}")
                self._say(f"left out: {one.name}: {reason}")
            else:
                possible.append(one)
        if self.scenarios and not possible:
            self.report.invalid.append("nothing of this can be done here")
        self.scenarios = possible

    async def _run_cluster(self, kind: str, chosen: list[Scenario], seconds: float) -> None:
        async with self.stage(kind) as stage:
            end = time.monotonic() + seconds
            try:
                for turn in itertools.count(1):
                    for one in chosen:
                        num_before = len(stage.injections)
                        await one.act(stage)
                        for injection in stage.injections[num_before:]:
                            self._say(stage.describe(injection))
                    is_over = turn >= self.options.repeats and time.monotonic() >= end
                    if kind == "doomed" or is_over:
                        break
            finally:
                self.report.injections += stage.injections

    @contextlib.asynccontextmanager
    async def stage(self, kind: str = "plain") -> AsyncIterator[Stage]:
        """A cluster under load, for the length of the block; what became of its requests goes
        into the report."""
        cluster = ChaosCluster(self.options)
        made: Surroundings | None = None
        load: StreamLoad | None = None
        try:
            made = await prepare(kind, cluster, self._model_dir, self._rng)
            began = time.monotonic()
            await cluster.start(made.flags)
            self._say(f"cluster ready in {time.monotonic() - began:.1f} s ({kind})")
            load = await self._make_load(cluster)
            load.begin(self.options.num_loops)
            yield Stage(cluster, load, self._rng, made)
            self.report.unended += await load.finish(FINISH_S)
        finally:
            if load is not None:
                await load.close()
                self.report.add_ledger(load.ledger)
            await cluster.stop()
            if made is not None:
                await made.close()
            self.report.leftovers += cluster.leftovers
            cluster.remove()

    async def _make_load(self, cluster: ChaosCluster) -> StreamLoad:
        text = load_text_model(self._model_dir)
        _, ids = toy_vocabulary(self._model_dir)
        asks: Iterator[Ask] = AskMaker(self._rng, ids, self.options.tokens)
        expect: Callable[[Ask], Streams]
        expect = functools.partial(_toy_streams, self._model_dir)
        if self.options.engine == "native":
            few = list(itertools.islice(asks, NUM_LEARNT))
            streams = await learn_streams(cluster.zmq[0], few)
            known = {ask.prompt_ids: one for ask, one in zip(few, streams, strict=True)}
            asks = (self._rng.choice(few) for _ in itertools.count())

            def expect(ask: Ask) -> Streams:
                return known[ask.prompt_ids]

            self._say(f"{len(known)} requests were answered undisturbed")
        return StreamLoad(
            Ledger(), cluster.http, cluster.zmq, asks, expect, text.decode, self._model
        )


def _toy_streams(model_dir: str, ask: Ask) -> Streams:
    return expected_streams(model_dir, ask.prompt_ids, ask.sampling)
