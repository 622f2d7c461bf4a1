"""Entry functions of child processes that tests start."""

import asyncio
import os
import resource
import signal
import sys
import threading

from xllm.errors import ConfigError


def exit_with(code: str) -> None:
    sys.exit(int(code))


def sleep_forever() -> None:
    threading.Event().wait()


def ignore_sigterm(flag: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(flag, "w").close()
    threading.Event().wait()


def note_pid_and_sleep(path: str) -> None:
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    threading.Event().wait()


def be_a_parent(path: str) -> None:
    """A process with one child."""
    from xllm.protocol.actor.children import Children, ChildSpec

    async def main() -> None:
        children = Children(lambda child: None)
        children.start(ChildSpec("grandchild", note_pid_and_sleep, (path,)))
        with open(path, "a") as file:
            file.write(f"{os.getpid()}\n")
        await asyncio.Event().wait()

    asyncio.run(main())


def family(path: str) -> None:
    """A process with a child that has a child."""
    from xllm.protocol.actor.children import Children, ChildSpec

    async def main() -> None:
        children = Children(lambda child: None)
        children.start(ChildSpec("child", be_a_parent, (path,)))
        await asyncio.Event().wait()

    asyncio.run(main())


def lack_a_package() -> None:
    import xllm_is_not_there  # noqa: F401


def refuse_settings() -> None:
    raise ConfigError("these bytes are no settings")


def lower_limits() -> None:
    """As some shells have it: core dumps, and few files."""
    _, core = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (core, core))
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, files))


def blocked_signals(pid: int) -> set[int]:
    """The signals that a process has blocked."""
    with open(f"/proc/{pid}/status") as status:
        [mask] = [int(line.split()[1], 16) for line in status if line.startswith("SigBlk")]
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


if __name__ == "__main__":
    family(sys.argv[2])
