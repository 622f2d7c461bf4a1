"""What a cluster lets `xllm chaos` do to it. All of it is off: a service has no use for it."""

from __future__ import annotations

import dataclasses

from xllm.config.field import setting


@dataclasses.dataclass(frozen=True)
class ChaosSettings:
    """Faults on demand, for `xllm chaos` and the soak alone."""

    hooks: bool = setting(
        False,
        "Obey signals: SIGUSR1 keeps the whole process from running for 3 s, SIGUSR2 writes counts "
        "of live objects beside its log.",
    )
    toy_faults: str = setting(
        "",
        "Tokens of a prompt that do harm in the toy engine, as slow=ID,hang=ID,crash=ID: a step of "
        "8 s, one that never ends, the worker's end.",
    )
