"""One chaos run: clusters, load, the scenarios in turn, the report.

Scenarios of one kind of cluster share it. Each scenario is run at least once, then all of them
again and again until the time is over.
"""

from __future__ import annotations

import contextlib
import functools
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from xllm.cli.chaos.asks import Ask, AskMaker
from xllm.cli.chaos.cluster import ChaosCluster
from xllm.cli.chaos.fault_proxy import FaultProxy
from xllm.cli.chaos.ledger import Ledger
from xllm.cli.chaos.load import StreamLoad
from xllm.cli.chaos.options import ChaosOptions
from xllm.cli.chaos.oracle import expected_streams
from xllm.cli.chaos.report import ChaosReport
from xllm.cli.chaos.scenarios.table import Scenario
from xllm.cli.chaos.stage import InvalidRunError, Stage
from xllm.cli.model_source import resolve_model
from xllm.config.settings import ModelSettings
from xllm.errors import ConfigError
from xllm.router.text.model import load_text_model
from xllm.worker.toy.vocabulary import toy_vocabulary

FINISH_S = 60.0
POISON = ("slow", "hang", "crash")

Say = Callable[[str], None]


class ChaosSession:
    """A run over `scenarios`. `say` is called with a line now and then."""

    def __init__(
        self, options: ChaosOptions, scenarios: Sequence[Scenario], say: Say = lambda line: None
    ) -> None:
        self.options = options
        self._scenarios = scenarios
        self._say = say
        self._rng = random.Random(options.seed)
        self._model_dir, self._model = resolve_model(ModelSettings(path=options.model))
        self.report = ChaosReport(options, scenarios)

    async def run(self) -> ChaosReport:
        """All of it. The report says whether it passed, and whether it was valid."""
        kinds = list(dict.fromkeys(one.cluster for one in self._scenarios))
        share_s = self.options.seconds / max(1, len(kinds))
        for kind in kinds:
            chosen = [one for one in self._scenarios if one.cluster == kind]
            try:
                await self._run_cluster(kind, chosen, share_s)
            except InvalidRunError as error:
                self.report.invalid.append(str(error))
                self._say(f"invalid: {error}")
        return self.report

    async def _run_cluster(self, kind: str, chosen: list[Scenario], seconds: float) -> None:
        async with self.stage(kind) as stage:
            end = time.monotonic() + seconds
            try:
                while True:
                    for one in chosen:
                        num_before = len(stage.injections)
                        await one.act(stage)
                        for injection in stage.injections[num_before:]:
                            self._say(stage.describe(injection))
                    if kind == "doomed" or time.monotonic() >= end:
                        break
            finally:
                self.report.injections += stage.injections

    @contextlib.asynccontextmanager
    async def stage(self, kind: str = "plain") -> AsyncIterator[Stage]:
        """A cluster under load, for the length of the block; what became of its requests goes
        into the report."""
        proxies: dict[str, FaultProxy] = {}
        if kind == "proxied":
            proxies = await self._instance_proxies()
        poison = self._poison() if kind == "poisoned" else {}
        cluster = ChaosCluster(self.options, (*_advertised(proxies), *_poisoned(poison)))
        for name, proxy in proxies.items():
            proxy.target = functools.partial(cluster.socket_address, name)
        load: StreamLoad | None = None
        try:
            began = time.monotonic()
            await cluster.start()
            self._say(f"cluster ready in {time.monotonic() - began:.1f} s ({kind})")
            load = self._make_load(cluster)
            load.begin(self.options.num_loops)
            yield Stage(cluster, load, self._rng, proxies, poison)
            self.report.unended += await load.finish(FINISH_S)
        finally:
            if load is not None:
                await load.close()
                self.report.add_ledger(load.ledger)
            await cluster.stop()
            for proxy in proxies.values():
                await proxy.close()
            self.report.leftovers += cluster.leftovers
            cluster.remove()

    async def _instance_proxies(self) -> dict[str, FaultProxy]:
        """One before each socket that an instance has for routers, on TCP."""
        proxies = {}
        for index in range(self.options.instances):
            for what in ("instance", "bus"):
                proxy = FaultProxy("tcp://127.0.0.1:0", self._rng)
                await proxy.start()
                proxies[f"instance-{index}-{what}"] = proxy
        return proxies

    def _poison(self) -> dict[str, int]:
        """Tokens for the faults of the toy engine, none of which it draws. ConfigError where the
        vocabulary has not enough of them."""
        size, drawn = toy_vocabulary(self._model_dir)
        special = [token for token in range(size) if token not in drawn]
        if len(special) < len(POISON):
            raise ConfigError(f"{self._model_dir} has {len(special)} special tokens, not 3")
        return dict(zip(POISON, special, strict=False))

    def _make_load(self, cluster: ChaosCluster) -> StreamLoad:
        text = load_text_model(self._model_dir)
        _, ids = toy_vocabulary(self._model_dir)
        maker: Iterator[Ask] = AskMaker(self._rng, ids, self.options.tokens)
        expect = functools.partial(_toy_streams, self._model_dir)
        return StreamLoad(
            Ledger(), cluster.http, cluster.zmq, maker, expect, text.decode, self._model
        )


def _toy_streams(model_dir: str, ask: Ask) -> tuple[tuple[int, ...], ...]:
    return expected_streams(model_dir, ask.prompt_ids, ask.sampling)


def _advertised(proxies: dict[str, FaultProxy]) -> tuple[str, ...]:
    """Flags of the launcher: where routers find the instances that have proxies."""
    names = [name.removesuffix("-bus") for name in proxies if name.endswith("-bus")]
    return tuple(
        word
        for name in names
        for word in (
            "--advertise",
            f"{name},{proxies[f'{name}-instance'].endpoint},{proxies[f'{name}-bus'].endpoint}",
        )
    )


def _poisoned(poison: dict[str, int]) -> tuple[str, ...]:
    """Flags of the launcher: the tokens that do harm."""
    if not poison:
        return ()
    faults = ",".join(f"{name}={token}" for name, token in poison.items())
    return ("--chaos-toy-faults", faults)
