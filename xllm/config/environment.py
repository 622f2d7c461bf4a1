"""The process's environment: the only place that reads or writes it."""

from __future__ import annotations

import os

_MAX_BASE_CHARS = 40


def read_environment() -> dict[str, str]:
    """The variables of this process."""
    return dict(os.environ)


def prepare_environment() -> None:
    """What libraries of this process and its children read at their import; call it first.

    The etcd client's generated code needs protobuf's pure Python back-end, which protobuf
    chooses when it is loaded. gRPC would write to standard error what its calls tell us anyway,
    and prepare for forks that never happen here; tokenizers warns about them. OpenMP's threads
    sleep where they wait: spinning, two of them on cores that other processes use made a step of
    a small model 30 times slower. glibc keeps what steps free, their logits above all, for the
    next step: given back to the system, it comes back as pages to be cleared."""
    os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(64 << 20))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(128 << 20))


def runtime_base() -> str:
    """Where run directories of this user are made: short, since ipc paths are, and swept."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if base and len(base) <= _MAX_BASE_CHARS and os.access(base, os.W_OK | os.X_OK):
        return os.path.join(base, "xllm")
    return f"/tmp/xllm-{os.getuid()}"
