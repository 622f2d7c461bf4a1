"""The golden bytes of every message: `tests/protocol/golden.json`.

An entry says of one message which conversation it belongs to, what its fields are and which
bytes it has on the wire. Entries are only ever added: old bytes must stay readable.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from scripts.docs.examples import CONVERSATIONS, curated, example, members, plain
from xllm.protocol.codec import encode

GOLDEN = Path(__file__).parents[2] / "tests" / "protocol" / "golden.json"


def current_entries() -> list[dict[str, Any]]:
    """What the classes give today."""
    entries = [_entry(conversation, "typical", message) for conversation, message in curated()]
    for conversation, union in CONVERSATIONS.items():
        for cls in members(union):
            shapes = {"full": example(cls, full=True)}
            least = example(cls, full=False)
            if least != shapes["full"]:
                shapes["minimal"] = least
            entries += [_entry(conversation, *item) for item in shapes.items()]
    return entries


def _entry(conversation: str, shape: str, message: msgspec.Struct) -> dict[str, Any]:
    return {
        "conversation": conversation,
        "message": type(message).__name__,
        "shape": shape,
        "hex": encode(message).hex(),
        "fields": plain(message),
    }


def read_golden() -> list[dict[str, Any]]:
    """The entries of the file."""
    if not GOLDEN.exists():
        return []
    entries: list[dict[str, Any]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return entries


def write_golden() -> None:
    """Add the entries whose bytes are not in the file yet."""
    entries = read_golden()
    known = {(entry["conversation"], entry["message"], entry["hex"]) for entry in entries}
    for entry in current_entries():
        key = (entry["conversation"], entry["message"], entry["hex"])
        if key not in known:
            known.add(key)
            entries.append(entry)
    lines = ",\n".join(json.dumps(entry, ensure_ascii=True) for entry in entries)
    GOLDEN.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
