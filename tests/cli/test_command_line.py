"""The `xllm` command: its list, its weight, its exit codes."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time

import click
import pytest

from xllm.cli.client_flags import service_options
from xllm.cli.main import COMMANDS, root, run_command
from xllm.config.table import setting_table
from xllm.errors import (
    BrokenError,
    DeadlineError,
    DependencyError,
    OverloadedError,
    UnavailableError,
)

MAX_MODULES_FOR_HELP = 120


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "xllm", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def test_help_imports_little():
    """Who asks for help waits for the imports: `benchmarks/startup.py` says how long."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "from xllm.cli.main import run_command; run_command(['--help'])\n"
        "print(*sorted(set(sys.modules) - before), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert name in done.stdout
    modules = done.stderr.split()
    packages = {module.split(".")[0] for module in modules if "." in module}
    assert packages - sys.stdlib_module_names <= {"xllm", "click"}
    assert len(modules) < MAX_MODULES_FOR_HELP


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name, capsys):
    assert run_command([name, "--help"]) == 0
    assert "Usage: xllm" in capsys.readouterr().out


def test_serve_takes_every_setting_as_a_flag(capsys):
    command = root.get_command(None, "serve")
    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert {entry.flag for entry in setting_table().values()} <= flags
    assert {"--model", "--host", "--port", "--zmq-port", "--device", "--instances"} <= flags
    assert {"--config", "--api-key-file"} <= flags


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nothing"], 64, "nothing"),
        (["serve", "--prot", "1"], 64, "--prot"),
        (["serve", "--port", "x"], 64, "router.port"),
        (["serve", "--port", "70000"], 64, "65535"),
        (["serve", "--config", "/nowhere.toml"], 64, "/nowhere.toml"),
        (["serve", "--host", "0.0.0.0"], 64, "--api-key-file"),
        (["serve", "--zmq-host", "0.0.0.0"], 64, "--cluster-keys-dir"),
        (["serve", "--api-key-file", "/nowhere"], 64, "/nowhere"),
        (["serve", "--cluster-keys-dir", "/nowhere"], 64, "/nowhere"),
        (["serve", "--device", "npu"], 69, "torch_npu"),
        (["serve", "--device", "gpu"], 64, "cuda"),
        (["serve", "--model", "/nowhere"], 69, "/nowhere"),
        (["serve", "/nowhere"], 69, "/nowhere"),
        (["serve", "/here", "--model", "/there"], 64, "name one of them"),
        (["router"], 64, "--registry"),
        (["kvcache"], 64, "--registry"),
        (["master"], 64, "--registry"),
        (["worker"], 64, "--master-worker-endpoint"),
        (["status", "--endpoint", "tcp://127.0.0.1:9", "--timeout", "0.2"], None, ""),
        (["status", "--timeout", "-1"], 64, "timeout_s"),
        (["status", "--server-key", "abc"], 64, "server_key: a public key is 40 characters"),
        (["status", "--server-key", "a b" + "c" * 37], 64, "server_key"),
        (["serve", "--registry", "tcp://127.0.0.1"], 64, "cluster.registry: 'tcp://127.0.0.1'"),
        (["serve", "--registry", "tcp://127.0.0.1:99999"], 64, "from 1 to 65535"),
        (["serve", "--registry", "tcp://:2400"], 64, "tcp://host:port"),
        (["serve", "--registry", "tcp://127.0.0.1:1;key=abc"], 64, "cluster.registry: a public"),
        (["status", "--endpoint", "tcp://127.0.0.1:99999"], 64, "a port from 1 to 65535"),
        (["chat", "--endpoint", "127.0.0.1:8011"], 64, "is not tcp://host:port or ipc://path"),
        (["serve", "--admission-tenant-limits-file", "/nowhere"], 64, "/nowhere"),
    ],
)
def test_refusals_are_one_clear_line(arguments, code, words, capsys, monkeypatch):
    began = time.monotonic()
    found = run_command(arguments)
    err = capsys.readouterr().err
    assert time.monotonic() - began < 3
    assert found == code if code is not None else found in (69, 70)
    assert words in err
    assert err.startswith("xllm: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def fail_with(error, endpoint="tcp://127.0.0.1:1"):
    @service_options
    def command(connect):
        raise error

    command(endpoint=endpoint, timeout=1.0, keys_dir="", server_key="")


@pytest.mark.parametrize(
    "error",
    [
        BrokenError("no router answers"),
        DeadlineError("no answer"),
        UnavailableError("this router does not lead"),
        OverloadedError("full"),
    ],
)
def test_what_a_service_lacks_is_no_bug_of_xllm(error):
    """Exit code 69, not 70."""
    with pytest.raises(DependencyError, match=error.message) as caught:
        fail_with(error)
    assert caught.value.exit_code == 69


def test_a_name_that_nobody_knows_is_what_is_wrong(monkeypatch):
    def unknown(host, port):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(DependencyError) as caught:
        fail_with(BrokenError("no router answers"), endpoint="tcp://mistyped:8011")
    told = "tcp://mistyped:8011: the name mistyped is not known here (Name or service not known)"
    assert caught.value.message == told
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: host == "b" and unknown(host, 0))
    with pytest.raises(DependencyError) as caught:
        fail_with(BrokenError("no router answers"), endpoint="tcp://a:8011,tcp://b:8011")
    told = "no router answers; tcp://b:8011: the name b is not known here"
    assert caught.value.message.startswith(told)


@pytest.mark.parametrize(
    ("files", "words"), [([], "tokenizer.json and no weights"), (["tokenizer.json"], "weights")]
)
def test_a_model_without_its_files(tmp_path, capsys, files, words):
    for name in ["config.json", *files]:
        (tmp_path / name).write_text("{}")
    assert run_command(["serve", "--model", str(tmp_path)]) == 69
    assert words in capsys.readouterr().err


def test_a_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr("xllm.cli.preflight._CUDA_DEVICES", ("/nowhere",))
    assert run_command(["serve", "--device", "cuda"]) == 69
    assert "no GPU" in capsys.readouterr().err


def test_a_file_with_an_unknown_key(tmp_path, capsys):
    path = tmp_path / "xllm.toml"
    path.write_text("[router]\nprot = 1\n")
    assert run_command(["serve", "--config", str(path)]) == 64
    err = capsys.readouterr().err
    assert "router.prot" in err
    assert "router.port" in err


def test_unknown_variables_refuse_to_start(capsys, monkeypatch):
    monkeypatch.setenv("XLLM_ROUTER_PROT", "1")
    assert run_command(["serve"]) == 64
    assert "XLLM_ROUTER_PROT" in capsys.readouterr().err


def test_a_port_in_use(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        from xllm.cli.serve import check_free

        with pytest.raises(OSError, match="in use"):
            check_free("127.0.0.1", int(port), "--port")


def test_version():
    done = run("version")
    assert done.returncode == 0
    assert "xllm 0." in done.stdout
    assert "pyzmq" in done.stdout


def groups(command, path="xllm"):
    """Each group of commands, with its path and its context."""
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=path)
        yield path, command, context
        for name in command.list_commands(context):
            yield from groups(command.get_command(context, name), f"{path} {name}")


def test_no_line_of_a_list_of_commands_is_cut():
    found = {path: command.get_help(context) for path, command, context in groups(root)}
    assert set(found) == {"xllm", "xllm node", "xllm keys", "xllm bench"}
    for path, text in found.items():
        lines = text.partition("Commands:")[2].strip().splitlines()
        assert len(lines) > 2, path
        assert [line for line in lines if line.endswith("...")] == []


def test_devices():
    done = run("devices")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {line.split()[0] for line in lines} == {"cpu", "cuda", "npu"}
    assert "worker.device" not in done.stdout  # nobody set it
    assert re.match(
        r"cpu +found +cpu \(.* of [\d.]+ GiB free, kernels cpu, collectives gloo", lines[0]
    )
    assert all(line.split()[1] in ("found", "none") for line in lines)


def test_a_reader_that_leaves_is_no_failure():
    process = subprocess.Popen(
        [sys.executable, "-m", "xllm", "serve", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.wait(30) == 0
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.parametrize("redirect", ["2>/dev/full", "2>&-", ">&- 2>&-"])
def test_a_standard_error_that_takes_nothing_changes_no_exit_code(redirect):
    command = f'exec "$0" -m xllm serve --port x {redirect}'
    done = subprocess.run(["bash", "-c", command, sys.executable], timeout=30)
    assert done.returncode == 64


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--cluster-registry", "http://127.0.0.1:1"], "etcd:// is expected"),
        (["--cluster-registry", "etcd://nowhere"], "'nowhere' is not host:port"),
        (["--cluster-registry", "etcds://h:1", "--etcd-ca-file", "/no/file"], "etcd.ca_file"),
        (["--cluster-registry", "etcd://h:1", "--etcd-key-file", "/no/file"], "without TLS"),
    ],
)
def test_what_is_wrong_with_a_registry_is_said_before_anything_starts(flags, what, capsys):
    assert run_command(["serve", *flags]) == 64
    assert what in capsys.readouterr().err
