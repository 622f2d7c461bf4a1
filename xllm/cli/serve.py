"""`xllm serve`: checks, the model, then the launcher until it ends."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import signal
import socket

import click

from xllm.cli.flags import settings_options
from xllm.cli.launch_plan import Plan, plan_children
from xllm.cli.model_source import resolve_models
from xllm.cli.preflight import check_device, check_model_files, check_settings
from xllm.config.models import each_model
from xllm.config.settings import Settings
from xllm.errors import ConfigError

SECTIONS = tuple(field.name for field in dataclasses.fields(Settings))


@click.command(context_settings={"max_content_width": 100})
@click.argument("model", default="", metavar="[MODEL]")
@settings_options(*SECTIONS, defaults={"cluster.log_level": "warning"})
def serve(model: str, settings: Settings) -> int:
    """Serve a model on this machine: router, masters, workers and KV cache daemon, with an
    OpenAI-compatible HTTP endpoint and a ZeroMQ one. MODEL, or --model, is its directory; without
    either, the demo model; further models by --more-models. The registry is one of its own, or
    the one that --registry names."""
    if model:
        if settings.model.path not in ("", model):
            raise ConfigError(
                f"{model} and model.path {settings.model.path}: name one of them; further models "
                "by --more-models",
                param="model.path",
            )
        own = dataclasses.replace(settings.model, path=model)
        settings = dataclasses.replace(settings, model=own)
    check_settings(settings)
    check_device(settings)
    settings = resolve_models(settings)
    for one in each_model(settings):
        check_model_files(one)
    check_free(settings.router.host, settings.router.port, "--port")
    first = settings.router.zmq_port
    for index in range(settings.serve.routers if first else 0):
        check_free(settings.router.zmq_host, min(first + index, 65535), "--zmq-port")
    return run_launcher(settings)


def run_launcher(settings: Settings, plan: Plan = plan_children) -> int:
    """Run the service to its end; returns the exit code. `plan` says which processes it has."""
    import uvloop

    from xllm.protocol.actor.process_limits import set_process_limits

    set_process_limits()  # its children inherit them
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_main(settings, plan))


async def _main(settings: Settings, plan: Plan) -> int:
    from xllm.cli.launcher import LaunchedService
    from xllm.cli.screen import LaunchScreen
    from xllm.protocol.actor.logs import configure_logs

    cluster = settings.cluster
    configure_logs(
        process="launcher",
        level=cluster.log_level,
        log_format=cluster.log_format,
        log_dir=cluster.log_dir,
    )
    service = LaunchedService(settings, LaunchScreen(), plan)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, service.interrupt, number)
    return await service.run()


def check_free(host: str, port: int, flag: str) -> None:
    """OSError where nobody could listen on host and port; the router does later."""
    if port == 0:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            reason = error.strerror or "cannot listen"
            if error.errno == errno.EADDRINUSE:
                reason = f"in use already; {flag} takes another, 0 any free one"
            raise OSError(error.errno, reason, f"{host}:{port}") from error
