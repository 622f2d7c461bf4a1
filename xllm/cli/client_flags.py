"""Options of the commands that talk with a service, and of those that sample.

Sampling flags are made from SamplingParams: a field added there is a flag at once.
"""

from __future__ import annotations

import functools
import math
import socket
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from xllm.client.asynchronous import DEFAULT_ENDPOINT
from xllm.client.synchronous import Client
from xllm.errors import (
    BrokenError,
    DeadlineError,
    DependencyError,
    OverloadedError,
    UnavailableError,
)
from xllm.protocol.sampling import SamplingParams

F = TypeVar("F", bound=Callable[..., Any])

_TYPES: dict[Any, Any] = {
    int: click.INT,
    int | None: click.INT,
    float: click.FLOAT,
    tuple[str, ...]: click.STRING,
    tuple[int, ...]: click.INT,
}


def service_options(function: F) -> F:
    """Decorator: where the service is. The command gets a `connect()` that makes a Client of all
    routers of --endpoint."""

    @functools.wraps(function)
    def command(
        *args: Any, endpoint: str, timeout: float, keys_dir: str, server_key: str, **kwargs: Any
    ) -> Any:
        asked = routers = tuple(one.strip() for one in endpoint.split(","))

        def connect(at: str = "", longest_s: float = math.inf) -> Client:
            nonlocal asked
            asked = (at,) if at else routers
            timeout_s = min(timeout, longest_s)
            return Client(asked, timeout_s=timeout_s, keys_dir=keys_dir, server_key=server_key)

        try:
            return function(*args, connect=connect, **kwargs)
        except BrokenError as error:
            unknown = [f"{one}: {what}" for one in asked if (what := _unknown_name(one))]
            if len(unknown) == len(asked):
                raise DependencyError("; ".join(unknown)) from error
            hint = "".join(f"; {one}" for one in unknown)
            hint += "; `xllm serve` starts a service here, --endpoint names another one's"
            if not server_key:
                hint += ", and one with keys wants --keys-dir and --server-key"
            else:
                hint += "; silent, too, is one with another key than --server-key, or that does "
                hint += "not admit the key of --keys-dir"
            raise DependencyError(error.message + hint) from error
        except (OverloadedError, UnavailableError) as error:
            raise DependencyError(error.message) from error
        except DeadlineError as error:
            raise DependencyError(f"{', '.join(asked)}: {error.message} (--timeout)") from error

    options = (
        click.option(
            "--endpoint",
            default=DEFAULT_ENDPOINT,
            show_default=True,
            metavar="TCP[,TCP...]",
            help="ZeroMQ endpoint of a router, or of several: where one does not answer, the next "
            "is asked.",
        ),
        click.option(
            "--timeout",
            type=click.FLOAT,
            default=600.0,
            show_default=True,
            metavar="S",
            help="Longest wait for an answer.",
        ),
        click.option("--keys-dir", default="", metavar="DIR", help="Directory with our keys."),
        click.option("--server-key", default="", metavar="KEY", help="The router's public key."),
    )
    decorated: Any = command
    for option in reversed(options):
        decorated = option(decorated)
    return typing.cast("F", decorated)


def _unknown_name(endpoint: str) -> str:
    """What is wrong with the host of an endpoint where nobody answers, if its name is."""
    scheme, _, rest = endpoint.partition("://")
    host = rest.rpartition(":")[0].strip("[]")
    try:
        if scheme == "tcp":
            socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        return f"the name {host} is not known here ({getattr(error, 'strerror', error)})"
    return ""


def sampling_options(*, without: Sequence[str] = ()) -> Callable[[F], F]:
    """Decorator: a flag for each field of SamplingParams but logit_bias and those in `without`.
    The command gets those that were given as `sampling`."""
    hidden = {"logit_bias", *without}
    names = [name for name in SamplingParams.__struct_fields__ if name not in hidden]
    hints = typing.get_type_hints(SamplingParams)

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def command(*args: Any, **kwargs: Any) -> Any:
            given = {name: kwargs.pop(name) for name in names}
            sampling = {name: value for name, value in given.items() if value not in (None, ())}
            return function(*args, sampling=sampling, **kwargs)

        decorated: Any = command
        for name in reversed(names):
            decorated = _sampling_option(name, hints[name])(decorated)
        return typing.cast("F", decorated)

    return decorate


def _sampling_option(name: str, kind: Any) -> Callable[[F], F]:
    flag = "--" + name.replace("_", "-")
    if kind is bool:
        return click.option(f"{flag}/--no-{flag.removeprefix('--')}", name, default=None)
    several = kind in (tuple[str, ...], tuple[int, ...])
    return click.option(flag, name, type=_TYPES[kind], multiple=several, default=None)
