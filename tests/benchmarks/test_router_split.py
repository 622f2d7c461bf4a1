"""How the router's benchmark tells where CPU goes: by the innermost frame that is known."""

import os
import pathlib
import sys
import threading

import pytest

from benchmarks.cpu import exact_cpu_seconds
from benchmarks.split import classify, py_spy, sample

LOOP = "<module> (xllm/__main__.py);run_role (xllm/protocol/actor/run.py);run (asyncio/runners.py)"
READ = f"{LOOP};data_received (xllm/router/http/protocol.py);begin (xllm/router/http/direct.py)"
LOOK = f"{LOOP};_look (xllm/protocol/transport/channel.py)"


@pytest.mark.parametrize(
    ("stack", "kind"),
    [
        (LOOP, "loop"),
        (READ, "HTTP"),
        (f"{READ};submit (xllm/router/submission.py)", "decide"),
        (f"{READ};_begin (xllm/router/submission.py);chain (xllm/kvcache/hashing.py)", "hash"),
        (f"{READ};pack (xllm/router/text/segments.py)", "tokenize"),
        (f"{READ};pack (xllm/router/text/words.py)", "tokenize"),
        (f"{READ};encode (xllm/router/text/word_encoder.py)", "tokenize"),
        (f"{READ};send (xllm/router/links.py);encode (xllm/protocol/codec.py)", "send and receive"),
        (f"{LOOK};batch (xllm/router/dispatcher.py)", "decide"),
        ("_worker (concurrent/futures/thread.py)", "other"),
    ],
)
def test_a_sample_belongs_to_its_innermost_known_frame(stack, kind):
    assert classify(stack) == kind


def test_threads_are_counted_by_name():
    own = pathlib.Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text().strip()
    assert 0 < exact_cpu_seconds(os.getpid(), own) <= exact_cpu_seconds(os.getpid())
    assert exact_cpu_seconds(os.getpid(), "no such thread") == 0


def test_the_sampler_is_found_beside_the_interpreter(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert py_spy() == str(pathlib.Path(sys.executable).with_name("py-spy"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(OSError):
        sample(os.getpid(), 1, {})
