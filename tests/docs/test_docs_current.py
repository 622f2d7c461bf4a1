"""The documents say what the code does: generated parts are current, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.docs.update import DOCS, PARTS, replaced, stale_parts
from xllm.cli.flags import ALIASES
from xllm.config.table import setting_table

ROOT = DOCS.parent
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md"])
LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]+)?(#[^)\s]+)?\)")


def test_generated_parts_are_current() -> None:
    assert stale_parts() == []


def test_a_stale_part_is_noticed() -> None:
    for part, (name, make) in PARTS.items():
        page = (DOCS / name).read_text(encoding="utf-8")
        assert replaced(page, part, make() + "more") != page


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="no markers for settings"):
        replaced("a page", "settings", "text")


def test_every_setting_is_documented() -> None:
    page = (DOCS / "operations.md").read_text(encoding="utf-8")
    for entry in setting_table().values():
        assert f"`{entry.flag}`" in page
    for short in ALIASES.values():
        assert f"`{short}`" in page


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as forges make them."""
    found = set()
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            words = line.lstrip("#").strip().lower()
            found.add("#" + re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {path}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name}: {path}{anchor}"
