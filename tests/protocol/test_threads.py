"""No class of messages is left for msgspec to learn once its module is imported.

It crashes where two threads have it learn one at once, as clients do that start in threads.
"""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from xllm.client.requests import build_embed, build_submit, build_tokenize
from xllm.protocol import bus, cache, client, instance, launch, records, registry_wire, step
from xllm.protocol.codec import Decoder

learned = []

def trace(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_name == "get_class_annotations":
        learned.append(frame.f_locals["obj"])

sys.setprofile(trace)
build_submit(1, {"max_tokens": 1}, timeout_s=1, stream=False, prompt="x")
build_submit(1, {}, timeout_s=1, stream=False, messages=[{"role": "user", "content": "x"}])
build_embed(1, {}, 1.0, prompt="x", dimensions=0)
build_tokenize(1, "", text="x", messages=None, add_special_tokens=True)
for module in (bus, cache, client, instance, launch, records, registry_wire, step):
    for thing in vars(module).values():
        if isinstance(thing, type) and thing.__module__ == module.__name__:
            Decoder(thing)
assert not learned, learned

class Fresh(client.MapMessage, frozen=True):
    number: int

Decoder(Fresh)
assert len(learned) == 1, "what is counted is not called any more"
"""


def test_threads_find_every_class_learned():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
