"""What the documents say of models, against the code."""

from __future__ import annotations

import re

from tests.docs.test_docs_current import DOCS, ROOT
from xllm.worker.models.registry import NATIVE_ARCHITECTURES


def test_the_example_is_the_file_that_it_says():
    page = (DOCS / "adding-a-model.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    assert block == (ROOT / "xllm/worker/models/qwen2.py").read_text(encoding="utf-8")


def test_every_native_architecture_is_listed():
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", page, re.M)
    assert tuple(sorted(listed)) == tuple(sorted(NATIVE_ARCHITECTURES))
