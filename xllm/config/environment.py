"""The process's environment: the only place that reads or writes it."""

from __future__ import annotations

import os


def read_environment() -> dict[str, str]:
    """The variables of this process."""
    return dict(os.environ)


def prepare_environment() -> None:
    """What libraries of this process and its children read at their import; call it first.

    The etcd client's generated code needs protobuf's pure Python back-end, which protobuf
    chooses when it is loaded; tokenizers warns about forks that never happen here."""
    os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
