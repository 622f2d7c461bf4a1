"""Bring the generated parts of the documents up to date. `scripts/update-docs` runs it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from scripts.docs.authority_page import authority_reference
from scripts.docs.golden import current_entries, read_golden, write_golden
from scripts.docs.protocol_page import protocol_reference
from scripts.docs.settings_page import errors_reference, settings_reference

DOCS = Path(__file__).parents[2] / "docs"
PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "messages": ("protocol.md", protocol_reference),
    "settings": ("operations.md", settings_reference),
    "errors": ("protocol.md", errors_reference),
    "authority": ("security.md", authority_reference),
}
"""Name of a part: its page and who makes it."""


def replaced(page: str, part: str, text: str) -> str:
    """The page with the text between the part's two markers; ValueError without markers."""
    begin, end = f"<!-- begin {part}: made by scripts/update-docs -->", f"<!-- end {part} -->"
    head, found, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page has no markers for {part}")
    return f"{head}{begin}\n\n{text}\n{end}{tail}"


def stale_parts() -> list[str]:
    """Parts that are not what they should be, without changing anything."""
    known = {(entry["message"], entry["hex"]) for entry in read_golden()}
    stale = []
    if any((entry["message"], entry["hex"]) not in known for entry in current_entries()):
        stale.append("golden")
    for part, (name, make) in PARTS.items():
        page = (DOCS / name).read_text(encoding="utf-8")
        if replaced(page, part, make()) != page:
            stale.append(part)
    return stale


def main() -> None:
    """Write, or with --check only look."""
    if "--check" in sys.argv[1:]:
        stale = stale_parts()
        if stale:
            sys.exit(f"not current: {', '.join(stale)}; run scripts/update-docs")
        return
    write_golden()
    for part, (name, make) in PARTS.items():
        path = DOCS / name
        page = path.read_text(encoding="utf-8")
        path.write_text(replaced(page, part, make()), encoding="utf-8")


if __name__ == "__main__":
    main()
