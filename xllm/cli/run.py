"""`xllm run`: one answer from a model in this process."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

import click
import msgspec

from xllm.cli.client_flags import sampling_options
from xllm.cli.figures import completion_figures
from xllm.cli.flags import settings_options
from xllm.cli.logs import configure_command_logs
from xllm.cli.model_source import resolve_models
from xllm.client.requests import build_submit
from xllm.client.results import AnswerBuilder, Completion
from xllm.config.settings import Settings
from xllm.errors import ConfigError
from xllm.protocol.generation import RequestFinished


@click.command(context_settings={"max_content_width": 100})
@click.argument("prompt")
@click.option("--raw", is_flag=True, help="Continue the text itself, without a chat template.")
@click.option("--system", default="", metavar="TEXT", help="System message.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the text.")
@settings_options(
    "model", "worker", "scheduler", "cluster", defaults={"cluster.log_level": "warning"}
)
@sampling_options()
def run(
    prompt: str,
    raw: bool,
    system: str,
    as_json: bool,
    settings: Settings,
    sampling: dict[str, Any],
) -> None:
    """Answer PROMPT (`-`: standard input) here, without a service: same scheduler, same engine,
    no sockets. The chat template is used where the model has one."""
    from xllm.cli.offline import OfflineEngine
    from xllm.cli.screen import LaunchScreen
    from xllm.router.model_facts import ANY_MODEL
    from xllm.router.sampling_bounds import check_sampling

    configure_command_logs("run", settings)
    if settings.model.more:
        raise ConfigError("model.more: a prompt is answered by one model", param="model.more")
    asked = build_submit(1, dict(sampling), timeout_s=0.0, stream=False, prompt="")
    check_sampling(asked.sampling, settings.router, ANY_MODEL)  # before the model is read
    settings = resolve_models(settings)
    name = settings.model.name
    text = sys.stdin.read() if prompt == "-" else prompt
    screen = LaunchScreen(sys.stderr)
    engine = OfflineEngine(settings, lambda done, total: screen.bar(name, done, total, "bytes"))
    screen.close_bars()
    with contextlib.closing(engine):
        if raw or not engine.can_chat:
            what: dict[str, Any] = {"prompt": text}
        else:
            first = [{"role": "system", "content": system}] if system else []
            what = {"messages": [*first, {"role": "user", "content": text}]}
        completion = _answer(engine, what, sampling, settings.router.timeout_s, as_json)
    if as_json:
        click.echo(msgspec.json.encode(completion).decode())
    else:
        click.echo()
        click.echo(completion_figures(completion), err=True)


def _answer(
    engine: Any, what: dict[str, Any], sampling: dict[str, Any], timeout_s: float, quiet: bool
) -> Completion:
    started = time.monotonic()
    request = build_submit(1, {**sampling, "hold_ms": 0}, timeout_s=timeout_s, stream=True, **what)
    builder = AnswerBuilder(started)
    several = request.sampling.n > 1
    for message in engine.answer(request):
        if isinstance(message, RequestFinished):
            completion = builder.finish(message, time.monotonic())
            break
        delta = builder.add(message, time.monotonic())
        if not quiet and not several:
            click.echo(delta.text, nl=False)
    if several and not quiet:
        click.echo("\n".join(f"[{choice.index}] {choice.text}" for choice in completion.choices))
    return completion
