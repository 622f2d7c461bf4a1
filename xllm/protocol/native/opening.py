"""Compiled libraries: each lies beside the module that loads it with ctypes, or is missing."""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def open_library(folder: Path, name: str, opened: Callable[[Path], T]) -> T | str:
    """The library of that name, or why there is none. `opened` raises ImportError, OSError or
    AttributeError for one that is not what it should be."""
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.is_file():
            try:
                return opened(path)
            except (ImportError, OSError, AttributeError) as error:
                return str(error)
    return "it was not compiled when xllm was installed"
