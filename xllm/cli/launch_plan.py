"""Which processes make a service on one machine, with which settings each, and what is said when
all of them are ready.

Pure: starts nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence

from xllm.cli.startup import ServiceAddresses
from xllm.cli.targets import run_kvcache, run_master, run_router
from xllm.config.cpu_list import is_list, share_cpus
from xllm.config.load import encode_settings
from xllm.config.settings import Settings
from xllm.config.worker import WorkerSettings
from xllm.errors import ConfigError
from xllm.protocol.actor.children import ChildSpec

_MARK_CHARS = 6
"""Of the run directory's random name."""


@dataclasses.dataclass(frozen=True)
class PlannedChild:
    """A process to start; `kind` as in LaunchMessages; `settings`: what `spec` carries."""

    kind: str
    spec: ChildSpec
    settings: Settings | None = None

    @property
    def name(self) -> str:
        """Its name in lines, logs and the registry."""
        return self.spec.name


Plan = Callable[[Settings, str], list[PlannedChild]]
"""Makes the processes from settings and a run directory."""


def plan_children(settings: Settings, run_dir: str) -> list[PlannedChild]:
    """The processes of a service whose launcher listens in `run_dir`; the slowest start first.
    In a registry that others use too, names that nobody chose are this run's own."""
    own_registry = not settings.cluster.registry
    mark = "" if own_registry else f"-{os.path.basename(run_dir)[-_MARK_CHARS:]}"
    cluster = dataclasses.replace(
        settings.cluster,
        run_dir=run_dir,
        registry=f"ipc://{run_dir}/registry" if own_registry else settings.cluster.registry,
        launcher=f"ipc://{run_dir}/launch",
    )
    base = dataclasses.replace(settings, cluster=cluster, worker=share_cores(settings))
    planned = []
    for index in range(settings.serve.instances):
        name = f"{settings.master.name or f'instance{mark}'}-{index}"
        master = dataclasses.replace(base.master, name=name)
        share = share_cpus(base.worker.cpu_affinity, index, settings.serve.instances)
        worker = dataclasses.replace(base.worker, cpu_affinity=share)
        own = dataclasses.replace(base, master=master, worker=worker)
        planned.append(_child("master", name, run_master, own))
    planned += _plan_routers(base, mark)
    if settings.serve.kvcache:
        name = base.kvcache.name or f"kvcache{mark}-0"
        own = dataclasses.replace(base, kvcache=dataclasses.replace(base.kvcache, name=name))
        planned.append(_child("kvcache", name, run_kvcache, own))
    return planned


def _plan_routers(base: Settings, mark: str) -> list[PlannedChild]:
    """One HTTP port for all, and for each a ZeroMQ port from the given one on (0: any free)."""
    known, count = base.router, base.serve.routers
    if known.zmq_port and known.zmq_port + count > 65536:
        raise ConfigError(
            f"{count} routers need ports up to {known.zmq_port + count - 1}",
            param="router.zmq_port",
        )
    planned = []
    for index in range(count):
        name = known.name or f"router{mark}"
        router = dataclasses.replace(
            known,
            name=f"{name}-{index}" if count > 1 or not known.name else name,
            zmq_port=known.zmq_port and known.zmq_port + index,
            share_port=known.share_port or count > 1,
        )
        own = dataclasses.replace(base, router=router)
        planned.append(_child("router", router.name, run_router, own))
    return planned


def keep_ports(router: PlannedChild, addresses: ServiceAddresses) -> PlannedChild:
    """The router, listening at the ports that it was given where any free one would do."""
    if router.settings is None:
        return router
    known = router.settings.router
    http, zmq = _port(addresses.http), _port(addresses.zmq)
    own = dataclasses.replace(known, port=http or known.port, zmq_port=zmq or known.zmq_port)
    return with_settings(router, dataclasses.replace(router.settings, router=own))


def _port(address: str) -> int:
    text = address.rpartition(":")[2].rstrip("/")
    return int(text) if text.isdecimal() else 0


def share_cores(settings: Settings) -> WorkerSettings:
    """The worker's settings, with the cores divided among the instances, and the ranks of each,
    where nobody chose."""
    worker = settings.worker
    if worker.num_threads or settings.serve.instances == 1 or is_list(worker.cpu_affinity):
        return worker
    num_workers = settings.serve.instances * settings.master.num_workers
    cores = len(os.sched_getaffinity(0))
    return dataclasses.replace(worker, num_threads=max(1, cores // num_workers))


_QUESTION = "What is xLLM?"


def announcement(
    models: Sequence[str],
    addresses: ServiceAddresses,
    took_s: float,
    *,
    has_keys: bool = False,
    task: str = "generate",
) -> list[str]:
    """The lines that tell a user how to ask. `has_keys`: clients need one of the API keys.
    `task`: what the first model is served for."""
    lines = [f"ready in {took_s:.1f} s: {', '.join(models)}"]
    if addresses.http:
        lines.append(f"  HTTP    {addresses.http}/v1")
    lines += [f"  ZeroMQ  {zmq}" for zmq in (addresses.zmq, *addresses.more_zmq) if zmq]
    if addresses.http:
        path = "chat/completions"
        what: dict[str, object] = {"messages": [{"role": "user", "content": _QUESTION}]}
        if task == "embed":
            path, what = "embeddings", {"input": [_QUESTION]}
        lines += [
            "try",
            f"  curl {addresses.http}/v1/{path} -H 'Content-Type: application/json' \\",
        ]
        if has_keys:
            # Never a key of the file: this goes to terminals and logs.
            lines.append('    -H "Authorization: Bearer $KEY" \\')
        lines.append(f"    -d '{json.dumps({'model': models[0], **what})}'")
    lines.append("Ctrl-C stops")
    return lines


def with_settings(child: PlannedChild, settings: Settings) -> PlannedChild:
    """The same child with other settings."""
    spec = dataclasses.replace(child.spec, args=(encode_settings(settings),))
    return PlannedChild(child.kind, spec, settings)


def _child(
    kind: str, name: str, target: Callable[[bytes], None], settings: Settings
) -> PlannedChild:
    return PlannedChild(kind, ChildSpec(name, target, (encode_settings(settings),)), settings)
