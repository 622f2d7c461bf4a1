"""The `xllm` command: its subcommands by name, imported when they are asked for.

Every failure is one clear line on standard error and the error's exit code: 64 configuration,
69 something missing, 70 internal, 71 system.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import click

import xllm
from xllm.config.environment import prepare_environment
from xllm.errors import ConfigError, DependencyError, RequestError, XllmError

EXIT_SYSTEM = 71
EXIT_INTERRUPTED = 130


class CommandEntry(NamedTuple):
    """A subcommand: where its click command is, and one line for the list."""

    module: str
    attribute: str
    summary: str


COMMANDS: dict[str, CommandEntry] = {
    "serve": CommandEntry("xllm.cli.serve", "serve", "Serve a model on this machine."),
    "chat": CommandEntry("xllm.cli.chat", "chat", "Chat with a running service."),
    "run": CommandEntry("xllm.cli.run", "run", "Answer one prompt here, without a service."),
    "status": CommandEntry("xllm.cli.status", "status", "Show processes, roles and load."),
    "sleep": CommandEntry("xllm.cli.sleeping", "sleep", "Put a model to sleep."),
    "wake": CommandEntry("xllm.cli.sleeping", "wake", "Wake a model."),
    "role": CommandEntry("xllm.cli.leading", "role", "Say what an instance is for."),
    "slo": CommandEntry("xllm.cli.leading", "slo", "Set the objectives of all routers."),
    "router": CommandEntry("xllm.cli.roles", "router", "Run one router (bare-metal nodes)."),
    "master": CommandEntry("xllm.cli.roles", "master", "Run one instance's master."),
    "worker": CommandEntry("xllm.cli.roles", "worker", "Run one worker of an instance."),
    "kvcache": CommandEntry("xllm.cli.roles", "kvcache", "Run a node's KV cache daemon."),
    "registry": CommandEntry("xllm.cli.registry", "registry", "Serve a cluster's registry."),
    "node": CommandEntry("xllm.cli.node", "node", "Start, stop, show a node's processes."),
    "keys": CommandEntry("xllm.cli.keys", "keys", "Make and exchange the keys of nodes."),
    "bench": CommandEntry(
        "xllm.cli.bench.command", "bench", "Measure endpoints, models, this machine."
    ),
    "chaos": CommandEntry(
        "xllm.cli.chaos.command", "chaos", "Break a local cluster under load; count its tokens."
    ),
    "devices": CommandEntry("xllm.cli.devices", "devices", "Show this machine's devices."),
    "version": CommandEntry("xllm.cli.version", "version", "Show versions."),
}


class LazyGroup(click.Group):
    """A group that lists its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = getattr(importlib.import_module(entry.module), entry.attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in `xllm --help`, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(xllm.__version__, message="xllm %(version)s")
def root() -> None:
    """Serve large language models: routers, masters, workers and KV caches over ZeroMQ."""


def main() -> None:
    """Entry point of the `xllm` command."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(
    arguments: Sequence[str], command: click.Command = root, prog_name: str = "xllm"
) -> int:
    """Run one command line; returns the exit code."""
    prepare_environment()
    try:
        result = command.main(list(arguments), prog_name=prog_name, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            click.echo(error.format_message())
            return ConfigError.exit_code
        hint = f" (see `{context.command_path} --help`)" if context is not None else ""
        return complain(error.format_message() + hint, ConfigError.exit_code)
    except XllmError as error:
        asked_wrong = isinstance(error, RequestError)
        return complain(error.message, ConfigError.exit_code if asked_wrong else error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except (BrokenPipeError, SystemExit):
        # Who read our output left (click exits at that); nothing may be flushed to it any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return complain(f"{place}{error.strerror or error}", EXIT_SYSTEM)
    except ImportError as error:
        return complain(f"a package is missing or broken: {error}", DependencyError.exit_code)
    except Exception as error:
        return complain(f"internal error: {_describe(error)}", XllmError.exit_code)


def complain(text: str, exit_code: int) -> int:
    """One line on standard error; returns the code."""
    try:
        click.echo(f"xllm: {' '.join(text.split())}", err=True)
    except (OSError, ValueError):
        pass  # a full disk or a closed standard error: the exit code says it
    return exit_code


def _describe(error: Exception) -> str:
    trace = error.__traceback__
    place = ""
    while trace is not None:
        code = trace.tb_frame.f_code
        place = f"{os.path.basename(code.co_filename)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__} at {place}: {str(error)[:300]}"
