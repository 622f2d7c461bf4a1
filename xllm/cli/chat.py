"""`xllm chat`: a conversation in the terminal, through the client library."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from xllm.cli.client_flags import sampling_options, service_options
from xllm.cli.figures import completion_figures
from xllm.cli.local_service import local_service
from xllm.client.synchronous import Client
from xllm.errors import XllmError

_HELP = "/exit leaves, /reset forgets the conversation; Ctrl-C stops an answer"


class ChatSession:
    """The conversation so far, and how to go on with it."""

    def __init__(self, client: Client, model: str, system: str, sampling: dict[str, Any]) -> None:
        self._client = client
        self._model = model
        self._sampling = sampling
        self._first = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._first)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self._first)

    def ask(self, text: str) -> None:
        """Show the answer as it comes, then its figures. What failed or was stopped is not part
        of the conversation."""
        question = [*self.messages, {"role": "user", "content": text}]
        stream = self._client.stream(messages=question, model=self._model, **self._sampling)
        with stream:
            for delta in stream:
                click.echo(delta.text, nl=False)
        completion = stream.completion
        assert completion is not None
        click.echo()
        click.echo(completion_figures(completion), err=True)
        self.messages = [*question, {"role": "assistant", "content": completion.text}]


@click.command()
@service_options
@click.option("--model", default="", metavar="NAME", help="Model; empty: the only one served.")
@click.option("--system", default="", metavar="TEXT", help="System message.")
@click.option("--message", default="", metavar="TEXT", help="Ask this, show the answer, leave.")
@click.option("--start", is_flag=True, help="Start a service of our own for this conversation.")
@click.option("--start-model", default="", metavar="DIR_OR_HUB_ID", help="Model of that service.")
@sampling_options(without=("n", "logprobs", "prompt_logprobs"))
def chat(
    connect: Callable[..., Client],
    model: str,
    system: str,
    message: str,
    start: bool,
    start_model: str,
    sampling: dict[str, Any],
) -> None:
    """Chat with a running service (or, with --start, with one of our own)."""
    arguments = ["--model", start_model] if start_model else []
    service = local_service(arguments) if start else contextlib.nullcontext()
    with service as addresses, connect(addresses.zmq if addresses else "") as client:
        client.models()  # nobody types a question to a service that is not there
        session = ChatSession(client, model, system, sampling)
        if message:
            session.ask(message)
            return
        click.echo(_HELP, err=True)
        for line in _lines():
            _take(session, line)


def _take(session: ChatSession, line: str) -> None:
    if line == "/reset":
        session.reset()
        return
    if line.startswith("/"):
        click.echo(f"unknown command {line.split()[0]}: {_HELP}", err=True)
        return
    try:
        session.ask(line)
    except KeyboardInterrupt:
        click.echo("\n[stopped]", err=True)
    except XllmError as error:
        click.echo(f"[{error.message}]", err=True)


def _lines() -> Iterator[str]:
    """What the user types, until /exit, the end of the input, or two interrupts in a row."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # editing and history, where Python has it
    num_interrupts = 0
    while num_interrupts < 2:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            click.echo(err=True)
            return
        except KeyboardInterrupt:
            num_interrupts += 1
            click.echo(f"\n{_HELP}" if num_interrupts < 2 else "", err=True)
            continue
        num_interrupts = 0
        if line == "/exit":
            return
        if line:
            yield line
