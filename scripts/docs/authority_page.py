"""The table of who may say what, for docs/security.md."""

from __future__ import annotations

import typing

from xllm.protocol.authority import (
    CONVERSATIONS,
    KEY_RULES,
    SHARED_RULE,
    KeyRule,
    PeerRole,
    Roles,
    may_say,
)


def authority_reference() -> str:
    """One row a message and role by role whether it may say it; then the registry's keys."""
    heading = " | ".join(PeerRole)
    lines = [f"| message | heard by | {heading} |", "|---|---|" + "---|" * len(PeerRole)]
    for listener, union in CONVERSATIONS.values():
        for message in typing.get_args(union) or (union,):
            roles = frozenset(role for role in PeerRole if may_say(frozenset((role,)), message))
            lines.append(f"| `{message.__name__}` | {listener} | {_cells(roles)} |")
    lines += ["", f"| registry key | only its maker may change it | {heading} |"]
    lines.append("|---|---|" + "---|" * len(PeerRole))
    lines += [_key_row(f"`/xllm/<cluster>/{kind}`", rule) for kind, rule in KEY_RULES.items()]
    lines.append(_key_row("all others", SHARED_RULE))
    return "\n".join(lines) + "\n"


def _key_row(name: str, rule: KeyRule) -> str:
    return f"| {name} | {'yes' if rule.owned else 'no'} | {_cells(rule.writers)} |"


def _cells(roles: Roles) -> str:
    return " | ".join("yes" if role in roles else "" for role in PeerRole)
