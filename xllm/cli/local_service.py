"""A service started for one command and stopped after it: `xllm serve` as a child on free ports."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

import click

from xllm.cli.startup import ServiceAddresses
from xllm.errors import DependencyError, XllmError, error_from_exit_code

_PR_SET_PDEATHSIG = 1
_STOP_S = 30.0


@contextlib.contextmanager
def local_service(arguments: Sequence[str]) -> Iterator[ServiceAddresses]:
    """Runs `xllm serve` on free ports for the length of the block; gives its addresses.

    Shows the lines of its start. Raises what it failed with; ends with this process."""
    libc = ctypes.CDLL(None)
    process = subprocess.Popen(
        [sys.executable, "-m", "xllm", "serve", "--port", "0", "--zmq-port", "0", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),  # one thread so far
    )
    assert process.stdout is not None
    with process.stdout as lines:
        try:
            yield _wait_addresses(process, lines)
        finally:
            _stop(process)


def _wait_addresses(process: subprocess.Popen[str], lines: Iterator[str]) -> ServiceAddresses:
    http = zmq = ""
    for line in lines:
        text = line.rstrip()
        if text.startswith("try"):
            return ServiceAddresses(http, zmq)
        click.echo(text, err=True)
        if text.lstrip().startswith("HTTP"):
            http = text.split()[-1].removesuffix("/v1")
        elif text.lstrip().startswith("ZeroMQ"):
            zmq = text.split()[-1]
    code = process.wait()
    raise error_from_exit_code(code, f"the service did not start (exit code {code})")


def _stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        code = process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise DependencyError("the service did not stop and was killed") from None
    if code not in (0, 128 + signal.SIGINT) and sys.exc_info()[0] is None:
        raise XllmError(f"the service ended with exit code {code}")
