"""The Python programs in the documents, run as they stand against a service with the toy engine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from urllib.parse import urlsplit

import pytest

from tests.cli.toy_model import make_toy_model
from tests.docs.test_docs_current import DOCS, ROOT
from tests.serve.served import Served

pytestmark = pytest.mark.process

PAGES = {"README.md": ROOT / "README.md", "quickstart.md": DOCS / "quickstart.md"}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
MODEL = "xllm-demo"


def blocks(page: str) -> list[str]:
    """The Python blocks of a page."""
    return BLOCK.findall(PAGES[page].read_text(encoding="utf-8"))


SNIPPETS = [
    pytest.param(program, id=f"{page}-{index}")
    for page in PAGES
    for index, program in enumerate(blocks(page))
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model = make_toy_model(tmp_path_factory.mktemp("toy") / MODEL)
    run_dir = tempfile.mkdtemp(prefix="xd-", dir="/tmp")
    # Short answers: the programs do not say how long theirs may be.
    with Served(model, run_dir, "--max-model-len", "128") as served:
        yield served
    served.run_dir.rmdir()


def test_there_are_programs_for_both_endpoints():
    readme = "\n".join(blocks("README.md"))
    assert "OpenAI(" in readme
    assert "xllm.Client(" in readme
    assert blocks("quickstart.md")


@pytest.mark.parametrize("program", SNIPPETS)
def test_a_program_of_the_documents(served, program):
    here = urlsplit(served.http)
    adapted = program.replace("http://127.0.0.1:8010", f"http://{here.netloc}")
    adapted = adapted.replace("xllm.Client(", f"xllm.Client({served.zmq!r}, ")
    assert adapted != program
    done = subprocess.run(
        [sys.executable, "-c", adapted], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_curl_of_the_readme(served):
    [command] = re.findall(r"^curl .*?\}'$", PAGES["README.md"].read_text("utf-8"), re.M | re.S)
    command = command.replace("127.0.0.1:8010", urlsplit(served.http).netloc)
    done = subprocess.run(
        ["bash", "-c", command.replace("curl ", "curl -sf ", 1)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert '"chat.completion"' in done.stdout
