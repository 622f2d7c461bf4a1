"""What the build of the kernels compiles, with a compiler that only says what it would read."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT

COMPILER = """#!/bin/bash
# Stands in for g++: notes each source file, writes the rule of what it includes.
out="" source=""
while [ $# -gt 0 ]; do
    case "$1" in -o) out="$2"; shift ;; *.cpp) source="$1" ;; esac
    shift
done
if [ -n "$source" ]; then
    echo "$source" >> compiled.txt
    if [ "$source" = "$(cat wrong.txt 2>/dev/null)" ]; then exit 1; fi
    headers="$(sed -n 's|^#include "\\(.*\\)"$|xllm/worker/kernels/cpu/\\1|p' "$source")"
    printf '%s: %s \\\\\\n %s\\n' "$out" "$source" "$(echo $headers)" > "${out%.o}.d"
fi
touch "$out"
"""
KERNELS = "xllm/worker/kernels/cpu"
OTHERS = {"xllm/protocol/native": "_token_ids", "xllm/router/text/native": "_words"}
"""The other libraries, built beside that of the kernels."""


@pytest.fixture
def tree(tmp_path):
    """A copy of what the build reads."""
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for folder in (KERNELS, *OTHERS):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so"))
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1e9, 1e9))
    return tmp_path


def build(tree, **variables):
    """(files of kernels that were compiled, whether there is their library)."""
    (tree / "compiled.txt").write_text("")
    compiler = str(tree / "compiler")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env={**os.environ, "CC": compiler, "CXX": compiler, "MAX_JOBS": "3", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    paths = map(Path, (tree / "compiled.txt").read_text().splitlines())
    names = [path.name for path in paths if str(path.parent) == KERNELS]
    return sorted(names), any((tree / KERNELS).parent.glob("_cpu*.so"))


def test_only_what_changed_is_compiled_again(tree):
    every = sorted(path.name for path in (tree / KERNELS).glob("*.cpp"))
    assert build(tree) == (every, True)
    assert build(tree) == ([], True)
    (tree / KERNELS / "team.h").touch()
    with_team = sorted(
        path.name for path in (tree / KERNELS).glob("*.cpp") if '"team.h"' in path.read_text()
    )
    assert 0 < len(with_team) < len(every)
    assert build(tree) == (with_team, True)
    (tree / "setup.py").touch()  # its flags may have changed
    assert build(tree) == (every, True)


def test_a_file_that_does_not_compile_leaves_no_library(tree):
    (tree / "wrong.txt").write_text(f"{KERNELS}/team.cpp")
    compiled, is_built = build(tree)
    assert "team.cpp" in compiled
    assert not is_built
    for folder, name in OTHERS.items():
        assert any((tree / folder).glob(f"{name}*.so")), "each is built without the others"
    (tree / "wrong.txt").unlink()
    assert build(tree)[1]


def test_without_a_compiler_the_rest_is_installed(tree):
    missing = str(tree / "missing")
    assert build(tree, CC=missing, CXX=missing) == ([], False)
