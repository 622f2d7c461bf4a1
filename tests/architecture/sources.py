"""The project's Python sources, parsed once, for the tests of its rules."""

from __future__ import annotations

import ast
import dataclasses
import functools
import pathlib
import subprocess
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
_SHEBANG = "python"


@dataclasses.dataclass(frozen=True)
class Source:
    """One file: its path from the root, its lines, its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def num_lines(self) -> int:
        """Lines of the file."""
        return self.text.count("\n")


@functools.cache
def tracked() -> tuple[str, ...]:
    """Paths that belong to the project: tracked by git, or new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(sorted(p for p in set(listed.stdout.splitlines()) if (ROOT / p).is_file()))


@functools.cache
def sources(*folders: str) -> tuple[Source, ...]:
    """All Python files under the folders, scripts without a suffix included."""
    return tuple(_read(folders))


def _read(folders: tuple[str, ...]) -> Iterator[Source]:
    for path in tracked():
        if path.split("/")[0] not in folders:
            continue
        file = ROOT / path
        if not path.endswith(".py") and not _is_script(file):
            continue
        text = file.read_text(encoding="utf-8")
        yield Source(path, text, ast.parse(text, path))


def _is_script(file: pathlib.Path) -> bool:
    if file.suffix:
        return False
    with file.open("rb") as opened:
        return opened.read(2) == b"#!" and _SHEBANG.encode() in opened.readline()


def public(name: str) -> bool:
    """Whether a name is meant for others."""
    return not name.startswith("_")
