"""What would listen beyond loopback without protection: every role refuses to start, with 64."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys

import pytest

from tests.architecture.sources import ROOT, sources
from tests.cli.toy_model import make_toy_model
from xllm.config.environment import read_environment
from xllm.config.exposure import check_exposure
from xllm.config.settings import Settings
from xllm.errors import ConfigError
from xllm.router.http.auth import PUBLIC_PATHS

WIDE = "0.0.0.0"
CASES = [
    ("serve", "--host", WIDE),
    ("serve", "--zmq-host", WIDE),
    ("serve", "--router-bus-endpoint", f"tcp://{WIDE}:0"),
    ("serve", "--master-endpoint", "tcp://*:0"),
    ("serve", "--master-bus-endpoint", "tcp://[::]:0"),
    ("serve", "--master-worker-endpoint", f"tcp://{WIDE}:0"),
    ("serve", "--kvcache-endpoint", f"tcp://{WIDE}:0"),
    ("serve", "--kvcache-bus-endpoint", f"tcp://{WIDE}:0"),
    ("router", "--zmq-host", WIDE),
    ("master", "--master-worker-endpoint", f"tcp://{WIDE}:0"),
    ("kvcache", "--kvcache-endpoint", f"tcp://{WIDE}:0"),
    ("registry", "--registry", f"tcp://{WIDE}:0"),
]


@pytest.mark.process
def test_no_role_starts(tmp_path, run_dir):
    """All at once, since each is a fresh interpreter."""
    model = make_toy_model(tmp_path / "model")
    running = []
    for number, (role, *flags) in enumerate(CASES):
        own = ["--cluster-run-dir", str(run_dir / str(number))]
        if role != "registry":
            own += ["--model", model, "--engine", "toy"]
        if role in ("router", "master", "kvcache"):
            own += ["--registry", f"ipc://{run_dir}/registry"]
        (run_dir / str(number)).mkdir(mode=0o700)
        running.append(
            subprocess.Popen(
                [sys.executable, "-m", "xllm", role, *own, *flags],
                env=read_environment(),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for case, process in zip(CASES, running, strict=True):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 64, (case, errors)
        assert errors.splitlines()[-1].startswith("xllm: "), (case, errors)


def test_every_address_setting_is_checked():
    """A new setting that says where to listen cannot be forgotten."""
    for section in ("router", "master", "kvcache"):
        for field in dataclasses.fields(getattr(Settings(), section)):
            wide = f"tcp://{WIDE}:1" if field.name.endswith("endpoint") else WIDE
            if not field.name.endswith(("endpoint", "host")) or field.name.startswith("advertised"):
                continue
            own = dataclasses.replace(getattr(Settings(), section), **{field.name: wide})
            with pytest.raises(ConfigError, match=f"{section}.{field.name}"):
                check_exposure(dataclasses.replace(Settings(), **{section: own}))


def test_few_paths_are_public():
    assert len(PUBLIC_PATHS) <= 4


def test_secrets_are_compared_in_constant_time():
    """No `==` of digests, keys or signatures where HTTP and tokens of clients are judged."""
    words = ("key_digest", "secret", "signature", "mac")
    found = []
    for source in sources("xllm"):
        if not source.path.startswith(("xllm/router/", "xllm/protocol/transport/")):
            continue
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq):
                sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
                if any(side.split(".")[-1].strip("_") in words for side in sides):
                    found.append(f"{source.path}:{node.lineno} {ast.unparse(node)}")
    assert found == []
    auth = next(s for s in sources("xllm") if s.path == "xllm/router/http/auth.py")
    called = [ast.unparse(n.func) for n in ast.walk(auth.tree) if isinstance(n, ast.Call)]
    assert "hmac.compare_digest" in called
