"""Who may know whom, and what an import may cost."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from tests.architecture.sources import ROOT
from tests.router.model_dirs import byte_level_tokenizer, write_model

WEIGHT = """
import sys
{code}
heavy = sorted(set(sys.modules) & {{"torch", "transformers", "triton", "pandas", "matplotlib"}})
assert not heavy, heavy
"""

ENCODE = """
from xllm.protocol.generation import ChatMessage
from xllm.router.text.model import load_text_model

model = load_text_model({path!r})
text = model.render([ChatMessage(role="user", content="hello world")], {{}})
assert "hello world" in text
ids = model.encode(text, add_special_tokens=False)
assert ids
assert model.decode(ids, skip_special_tokens=False) == text
"""


def run_fresh(code):
    return subprocess.run(
        [sys.executable, "-c", WEIGHT.format(code=code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def modules_of(package):
    folder = ROOT / pathlib.Path(*package.split("."))
    found = []
    for path in sorted(folder.rglob("*.py")):
        if path.name == "__main__.py":
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


@pytest.mark.parametrize(
    "package",
    ["xllm.router", "xllm.master", "xllm.kvcache", "xllm.protocol", "xllm.client", "xllm.cli"],
)
def test_no_module_of_the_service_brings_torch(package):
    modules = modules_of(package)
    assert len(modules) > 3
    done = run_fresh("\n".join(f"import {module}" for module in modules))
    assert done.returncode == 0, done.stderr


SPEAKS_ETCD = "xllm.protocol.registry.etcd"
"""With what follows: modules that load gRPC. Addresses and files of etcd are light."""
LIGHT = ("xllm.protocol.registry.etcd_address", "xllm.protocol.registry.etcd_files")


def test_only_those_who_speak_to_etcd_load_its_client():
    packages = ("router", "master", "kvcache", "protocol", "client", "cli", "config")
    found = [one for package in packages for one in modules_of(f"xllm.{package}")]
    light = [one for one in found if not one.startswith(SPEAKS_ETCD) or one in LIGHT]
    assert len(found) - len(light) >= 5
    done = run_fresh(
        "\n".join(f"import {module}" for module in light)
        + "\nbrought = {'grpc', 'etcd3', 'google.protobuf'} & set(sys.modules)\n"
        "assert not brought, brought"
    )
    assert done.returncode == 0, done.stderr


def test_the_etcd_client_refuses_another_protobuf():
    done = subprocess.run(
        [sys.executable, "-c", f"import {SPEAKS_ETCD}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "upb"},
    )
    assert done.returncode != 0
    assert "DependencyError" in done.stderr
    assert "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python" in done.stderr


def test_the_import_contracts_hold():
    done = subprocess.run(
        [str(pathlib.Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "0 broken" in done.stdout


def test_the_client_is_light():
    done = run_fresh(
        "import xllm.client\n"
        "assert not [m for m in sys.modules if m.startswith(('xllm.router', 'xllm.worker',"
        " 'xllm.master', 'xllm.cli.', 'starlette', 'uvicorn', 'tokenizers'))]"
    )
    assert done.returncode == 0, done.stderr


def test_rendering_a_template_and_encoding_a_prompt_brings_no_torch(tmp_path):
    path = write_model(tmp_path / "model", byte_level_tokenizer())
    done = run_fresh(ENCODE.format(path=str(path)))
    assert done.returncode == 0, done.stderr
