"""What a process may use of the operating system, set before it opens anything.

Children inherit it. A core dump would put prompts, answers and keys on a disk, so there is none.
"""

from __future__ import annotations

import resource


def set_process_limits() -> None:
    """No core dumps; as many open files as the system allows (a router has one a connection)."""
    _, hard_core = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard_core))
    _, hard_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_files, hard_files))
