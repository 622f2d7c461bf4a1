"""How a role's process ends: one line, a word to its launcher, its exit code."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest
import uvloop

from tests.protocol import children_targets, role_targets
from xllm.protocol.actor.base import Actor
from xllm.protocol.actor.children import Children, ChildSpec
from xllm.protocol.codec import Decoder
from xllm.protocol.launch import LaunchMessage, ProcessFailed
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.router import RouterSocket

pytestmark = pytest.mark.process

ENDS = [
    ("made", 64, "as asked"),
    ("config", 64, "as asked"),
    ("system", 71, "/nowhere/at/all: No such file or directory"),
    ("bug", 70, "internal error: KeyError at"),
    ("stop", 69, "as asked"),
]
CODES = {64: "config_error", 69: "dependency_error", 70: "internal_error", 71: "os_error"}


def run(coroutine):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(coroutine, 30))


def run_role(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "tests.protocol.role_targets", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=30,
        **options,
    )


@pytest.mark.parametrize(("how", "code", "words"), ENDS)
def test_a_failure_is_one_line_and_an_event_in_the_log(tmp_path, how, code, words):
    done = run_role(how, "", tmp_path)
    assert done.returncode == code
    [line] = done.stderr.splitlines()
    assert line.startswith("xllm: ")
    assert words in line
    assert "SECRET-PROMPT" not in done.stderr
    [event] = [one for one in (tmp_path / "r.log").read_text().splitlines() if "failed" in one]
    assert "process_failed" in event
    assert f"code={CODES[code]} " in event


def test_a_failure_is_one_line_where_logs_and_errors_share_standard_error():
    done = run_role("config", "", "")
    assert done.stderr == "xllm: as asked\n"


def test_a_log_directory_that_cannot_be_is_one_line_too():
    done = run_role("config", "", "/proc/nowhere")
    assert done.returncode == 71
    assert done.stderr.splitlines()[-1].startswith("xllm: cluster.log_dir: /proc/nowhere: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("how", "code", "words"), ENDS)
def test_the_launcher_hears_of_it_before_the_end(run_dir, tmp_path, how, code, words, capfd):
    async def main():
        told, exits = [], []
        transport = Transport()
        socket = RouterSocket(
            transport,
            f"ipc://{run_dir}/launch",
            Decoder(LaunchMessage),
            lambda identity, message, frames: told.append(message),
        )

        def ended(end):
            exits.append((end, list(told)))

        children = Children(ended)
        arguments = (how, socket.endpoint, str(tmp_path))
        children.start(ChildSpec("r", role_targets.fail, arguments))
        while not exits:
            await asyncio.sleep(0.01)
        socket.close()
        transport.close()
        return exits[0]

    end, told = run(main())
    assert end.code == code
    [message] = told
    assert isinstance(message, ProcessFailed)
    assert (message.kind, message.name) == ("router", "r")
    assert words in message.message
    assert capfd.readouterr().err == ""  # it is the launcher's to show


def test_a_child_whose_launcher_is_gone_says_it_itself(run_dir, tmp_path, capfd):
    async def main():
        exits = []
        children = Children(exits.append)
        arguments = ("config", f"ipc://{run_dir}/nobody", str(tmp_path))
        children.start(ChildSpec("r", role_targets.fail, arguments))
        while not exits:
            await asyncio.sleep(0.01)
        return exits[0].code

    assert run(main()) == 64
    assert capfd.readouterr().err == "xllm: r: as asked\n"


@pytest.mark.parametrize(
    ("target", "code", "words"),
    [
        (children_targets.lack_a_package, 69, "No module named 'xllm_is_not_there'"),
        (children_targets.refuse_settings, 64, "these bytes are no settings"),
    ],
)
def test_a_child_that_never_comes_to_its_role_says_why(target, code, words, capfd):
    async def main():
        exits = []
        children = Children(exits.append)
        children.start(ChildSpec("r", target))
        while not exits:
            await asyncio.sleep(0.01)
        return exits[0].code

    assert run(main()) == code
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("xllm: r: ")
    assert words in line


def test_no_core_dumps_and_all_the_files_there_are(tmp_path):
    done = run_role("limits", "", tmp_path, preexec_fn=children_targets.lower_limits)
    assert done.stdout.split() == ["0", "True"]


def test_a_stop_ends_a_start_that_waits(tmp_path):
    class Waiting(Actor):
        async def start(self):
            self.later(0.01, self.request_stop)
            await asyncio.Event().wait()

    async def main():
        return await asyncio.wait_for(Waiting("waiting").run(), 5)

    assert run(main()) == 0


def test_a_ctrl_c_during_the_start_reaches_no_child(tmp_path, capfd):
    """From its first instruction on: before it leads its own group the signal is blocked."""

    async def main():
        exits = []
        children = Children(exits.append)
        flag = tmp_path / "flag"
        children.start(ChildSpec("sleeper", children_targets.note_pid_and_sleep, (str(flag),)))
        pid = children.pids["sleeper"]
        while not flag.exists() or not flag.read_text():
            os.kill(pid, signal.SIGINT)
            await asyncio.sleep(0.002)
        blocked = children_targets.blocked_signals(pid)
        await children.stop_all(5)
        return exits[0], blocked

    end, blocked = run(main())
    assert (end.code, end.expected) == (-signal.SIGTERM, True)
    assert capfd.readouterr().err == ""
    assert signal.SIGINT not in blocked
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
