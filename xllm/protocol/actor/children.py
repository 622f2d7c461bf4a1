"""Starting, watching and stopping child processes.

Children are spawned, never forked, from the main thread (PDEATHSIG fires when the *thread* that
spawned a child ends). A child dies with its parent: PDEATHSIG is set before anything else runs
in it, and its own loop watches the parent too. Each child leads a process group of its own, so
that a Ctrl-C in a terminal reaches the launcher alone, which then drains in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from typing import NoReturn

from xllm.errors import DependencyError, InvariantError, XllmError
from xllm.protocol.actor.logs import LogStream

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_NAME_BYTES = 15


@dataclasses.dataclass(frozen=True)
class ChildSpec:
    """What to start: a module-level function and arguments that are strings and bytes only,
    since this bootstrap is the one place where anything is pickled."""

    name: str
    target: Callable[..., None]
    args: tuple[str | bytes, ...] = ()


@dataclasses.dataclass(frozen=True)
class ChildExit:
    """How a child ended: `code` is its exit code, negative for a signal."""

    name: str
    pid: int
    code: int
    expected: bool


class _Child:
    __slots__ = ("expected", "gone", "pidfd", "process", "spec")

    def __init__(self, spec: ChildSpec, process: SpawnProcess, pidfd: int) -> None:
        self.spec = spec
        self.process = process
        self.pidfd = pidfd
        self.expected = False
        self.gone = asyncio.Event()


class Children:
    """The children of this process, by name. `on_exit(ChildExit)` is called for each end."""

    def __init__(self, on_exit: Callable[[ChildExit], None]) -> None:
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._children: dict[str, _Child] = {}
        self._context = multiprocessing.get_context("spawn")

    @property
    def pids(self) -> dict[str, int]:
        """Pid by name of the children that run."""
        return {name: child.process.pid or 0 for name, child in self._children.items()}

    def start(self, spec: ChildSpec) -> int:
        """Start a child; returns its pid. Its name must be free."""
        if threading.current_thread() is not threading.main_thread():
            raise InvariantError("children are started from the main thread only")
        if spec.name in self._children:
            raise InvariantError(f"child {spec.name} runs already")
        if not all(isinstance(a, str | bytes) for a in spec.args):
            raise InvariantError(f"child {spec.name}: arguments are strings and bytes only")
        process = self._context.Process(
            target=enter_child, args=(spec.target, os.getpid(), *spec.args), name=spec.name
        )
        with _without_interrupts():
            process.start()
        pid = process.pid
        assert pid is not None
        child = _Child(spec, process, os.pidfd_open(pid))
        self._children[spec.name] = child
        self._loop.add_reader(child.pidfd, self._ended, child)
        return pid

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a child, if it runs."""
        if (child := self._children.get(name)) is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(child.pidfd, number)

    async def stop(self, name: str, timeout_s: float) -> None:
        """End a child: SIGTERM, after `timeout_s` SIGKILL to its process group."""
        child = self._children.get(name)
        if child is None:
            return
        child.expected = True
        self.signal(name, signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout_s):
                await child.gone.wait()
        except TimeoutError:
            self._kill(child)
            await child.gone.wait()

    async def stop_all(self, timeout_s: float) -> None:
        """End all children at once."""
        await asyncio.gather(*(self.stop(name, timeout_s) for name in list(self._children)))

    def kill_all(self) -> None:
        """SIGKILL all of them, without waiting."""
        for child in self._children.values():
            child.expected = True
            self._kill(child)

    def _kill(self, child: _Child) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.process.pid or 0, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)

    def _ended(self, child: _Child) -> None:
        self._loop.remove_reader(child.pidfd)
        child.process.join()
        code = child.process.exitcode
        pid = child.process.pid or 0
        # What the child itself had started dies with it by PDEATHSIG; this takes the rest.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        os.close(child.pidfd)
        child.process.close()
        del self._children[child.spec.name]
        child.gone.set()
        self._on_exit(ChildExit(child.spec.name, pid, code or 0, child.expected))


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """A child inherits the signal mask, through its exec: until it leads its own process group, a
    Ctrl-C in the terminal would reach it and end its imports with a traceback."""
    resource_tracker.ensure_running()  # starts with the first child, and would lift the mask
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def enter_child(target: Callable[..., None], parent_pid: int, *args: str | bytes) -> None:
    """First function of a spawned child: bind its life to the parent's, then run `target`."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(70)  # the parent died before the death signal was set
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    libc.prctl(_PR_SET_NAME, process_title(multiprocessing.current_process().name).encode())
    try:
        target(*args)
    except XllmError as error:  # before the role's own frame (see run) holds
        _refuse(error.message, error.exit_code)
    except ImportError as error:
        _refuse(f"a package is missing or broken: {error}", DependencyError.exit_code)


def _refuse(reason: str, exit_code: int) -> NoReturn:
    stream = LogStream(sys.stderr)
    stream.write(f"xllm: {multiprocessing.current_process().name}: {' '.join(reason.split())}\n")
    stream.flush()
    os._exit(exit_code)


def process_title(name: str) -> str:
    """What `ps -o comm` and `top` show of the child `name`: 15 characters at most, its end."""
    return "xllm:" + name[-(_NAME_BYTES - len("xllm:")) :]
