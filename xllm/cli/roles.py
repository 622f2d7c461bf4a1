"""`xllm router`, `master`, `worker`, `kvcache`: one role in this process, for bare-metal nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import click

from xllm.cli.flags import settings_options
from xllm.cli.model_source import resolve_models
from xllm.cli.targets import run_kvcache, run_master, run_router, run_worker
from xllm.config.environment import runtime_base
from xllm.config.exposure import check_exposure
from xllm.config.load import encode_settings
from xllm.config.settings import Settings
from xllm.errors import ConfigError
from xllm.protocol.actor.rundir import RunDirectory


@click.command()
@settings_options("cluster", "etcd", "router", "routing", "admission", "kv_index", "model")
def router(settings: Settings) -> None:
    """Run one router: the HTTP and ZeroMQ front of a cluster."""
    _need_registry(settings)
    _run(run_router, resolve_models(settings))


@click.command()
@settings_options("cluster", "etcd", "model", "master", "scheduler", "worker")
def master(settings: Settings) -> None:
    """Run one instance's master, which starts its workers."""
    _need_registry(settings)
    _run(run_master, resolve_models(settings))


@click.command()
@settings_options("cluster", "model", "master", "worker")
def worker(settings: Settings) -> None:
    """Run one worker of an instance whose master starts none (--no-master-spawn-workers)."""
    if not settings.master.worker_endpoint:
        raise ConfigError(
            "a worker on its own needs --master-worker-endpoint", param="master.worker_endpoint"
        )
    _run(run_worker, resolve_models(settings))


@click.command()
@settings_options("cluster", "etcd", "kvcache")
def kvcache(settings: Settings) -> None:
    """Run a node's KV cache daemon."""
    _need_registry(settings)
    _run(run_kvcache, settings)


def _need_registry(settings: Settings) -> None:
    if not settings.cluster.registry:
        raise ConfigError(
            "cluster.registry is missing: a role on its own needs --registry",
            param="cluster.registry",
        )


def _run(target: Callable[[bytes], None], settings: Settings) -> None:
    check_exposure(settings)
    if not settings.cluster.run_dir:
        # Ours for as long as this process lives; the next start sweeps it.
        run = RunDirectory(runtime_base())
        cluster = dataclasses.replace(settings.cluster, run_dir=run.path)
        settings = dataclasses.replace(settings, cluster=cluster)
    target(encode_settings(settings))
