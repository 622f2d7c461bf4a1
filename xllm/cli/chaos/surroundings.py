"""What stands around a cluster for some kinds of faults: proxies, a registry, poisoned prompts,
clocks that step, a small disk for the logs."""

from __future__ import annotations

import dataclasses
import functools
import random

from xllm.cli.chaos.cluster import ChaosCluster
from xllm.cli.chaos.fault_proxy import FaultProxy
from xllm.cli.chaos.log_disk import LogDisk
from xllm.cli.chaos.registry_process import KINDS, RegistryProcess
from xllm.cli.chaos.wall_clock import WallClock
from xllm.errors import ConfigError
from xllm.worker.toy.vocabulary import toy_vocabulary

POISON = ("slow", "hang", "crash")
REGISTRY_S = 30.0
_WAYS = ("instance", "bus")


@dataclasses.dataclass
class Surroundings:
    """`flags`: of the launcher, so that its processes use them."""

    flags: tuple[str, ...] = ()
    proxies: dict[str, FaultProxy] = dataclasses.field(default_factory=dict)
    poison: dict[str, int] = dataclasses.field(default_factory=dict)
    registry: RegistryProcess | None = None
    wall_clock: WallClock | None = None
    log_disk: LogDisk | None = None

    async def close(self) -> None:
        """End them, when the cluster has ended."""
        if self.log_disk is not None:
            self.log_disk.close()
        for proxy in self.proxies.values():
            await proxy.close()
        if self.registry is not None:
            self.registry.close()


async def prepare(
    kind: str, cluster: ChaosCluster, model_dir: str, rng: random.Random
) -> Surroundings:
    """Those of a kind of cluster, as `Scenario` names it, or of several joined by +, before the
    cluster starts."""
    made = Surroundings()
    kinds = kind.split("+")
    options = cluster.options
    try:
        if "proxied" in kinds:
            await _proxy_instances(made, cluster, rng)
        if "poisoned" in kinds:
            made.poison = _poison(model_dir)
            faults = ",".join(f"{name}={token}" for name, token in made.poison.items())
            made.flags += ("--chaos-toy-faults", faults)
        if "clocked" in kinds:
            clock = made.wall_clock = WallClock(cluster.directory)
            clock.build()
            cluster.wrapper = clock.wrapper
        if "cramped" in kinds:
            made.log_disk = LogDisk(cluster.log_dir, keep=options.keep)
            made.log_disk.mount()
        if "etcd" in kinds or options.registry == "etcd":
            await _start_registry("etcd", made, cluster, rng)
        elif "registry" in kinds:
            await _start_registry(options.registry, made, cluster, rng)
        elif options.registry != "embedded":
            cluster.named_registry = options.registry
    except BaseException:
        await made.close()
        raise
    return made


async def _proxy_instances(made: Surroundings, cluster: ChaosCluster, rng: random.Random) -> None:
    """One before each socket that an instance has for routers, on TCP."""
    for index in range(cluster.options.instances):
        name = f"instance-{index}"
        endpoints = []
        for way in _WAYS:
            socket_name = f"{name}-{way}"
            behind = functools.partial(cluster.socket_address, socket_name)
            proxy = FaultProxy("tcp://127.0.0.1:0", rng, behind)
            await proxy.start()
            made.proxies[socket_name] = proxy
            endpoints.append(proxy.endpoint)
        made.flags += ("--advertise", ",".join((name, *endpoints)))


async def _start_registry(
    kind: str, made: Surroundings, cluster: ChaosCluster, rng: random.Random
) -> None:
    """A registry of its own, with a proxy before it for each process."""
    options = cluster.options
    if kind not in KINDS:
        raise ConfigError(
            f"faults of the registry need one that can be killed: {' or '.join(KINDS)}, not {kind}",
            param="registry",
        )
    registry = made.registry = RegistryProcess(kind, cluster.directory)
    registry.start()
    await cluster.until(registry.is_listening, REGISTRY_S, "the registry")
    behind = f"tcp://127.0.0.1:{registry.port}"
    cluster.named_registry = registry.address_at(behind)
    names = [f"instance-{index}" for index in range(options.instances)]
    names += [f"router-{index}" for index in range(options.routers)]
    for name in (*names, "kvcache-0"):
        proxy = FaultProxy("tcp://127.0.0.1:0", rng, lambda: behind)
        await proxy.start()
        made.proxies[f"{name}-registry"] = proxy
        made.flags += ("--registry-of", f"{name},{registry.address_at(proxy.endpoint)}")


def _poison(model_dir: str) -> dict[str, int]:
    """Tokens for the faults of the toy engine, none of which it draws. ConfigError where the
    vocabulary has not enough of them."""
    size, drawn = toy_vocabulary(model_dir)
    special = [token for token in range(size) if token not in drawn]
    if len(special) < len(POISON):
        raise ConfigError(
            f"{model_dir} has {len(special)} special tokens, not {len(POISON)}", param="model"
        )
    return dict(zip(POISON, special, strict=False))
