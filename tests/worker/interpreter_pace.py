"""Triton's interpreter, several times as fast: import `patched_once` into a module of tests."""

from __future__ import annotations

import contextlib

import pytest
from triton.runtime import interpreter


@pytest.fixture(scope="module", autouse=True)
def patched_once():
    """The interpreter patches Triton's language for every launch and again for every call of a
    function within a kernel, which takes most of its time: do it once for each module that has
    such functions, until the tests of this module are done. They compile nothing."""
    patch = interpreter._patch_lang
    seen = set()
    with contextlib.ExitStack() as scopes:

        def patch_new(function):
            if id(function.__globals__) not in seen:
                seen.add(id(function.__globals__))
                scopes.callback(patch(function).restore)
            return interpreter._LangPatchScope()

        interpreter._patch_lang = patch_new
        scopes.callback(setattr, interpreter, "_patch_lang", patch)
        yield
