"""Reads the small files of a model's directory. Whoever made them, they end in a value or in a
DependencyError that names the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xllm.errors import DependencyError


def read_text(path: Path) -> str:
    """A text file's content."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DependencyError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DependencyError(f"{path} is not UTF-8") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DependencyError(f"{path} is not JSON: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise DependencyError(f"{path} is no JSON object")
    return found
