"""What our code names of torch_npu and of its driver exists, in every version that was read."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from scripts.npu.wanted import ACL, NPU, OPERATORS
from tests.worker.platform.device_api import npu_facts, npu_versions
from xllm.worker.platform import ascend_driver, npu, npu_ops

IN_NO_OLD_HEADER = {"2.7.1": {"aclrtMemGetAllocationGranularity"}}


def attributes(module, owner: str) -> set[str]:
    """The names that a module's code takes of `owner`."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == owner
    }


def called_by_name(module, *functions: str) -> set[str]:
    """The constants that a module's code calls these methods with first."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    return {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in functions
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }


@pytest.mark.parametrize("version", npu_versions())
def test_what_our_code_names_exists(version) -> None:
    facts = npu_facts(version)
    names = attributes(npu, "self._npu")
    assert {"mem_get_info", "Event", "NPUGraph"} <= names
    assert names <= set(facts["npu"])
    operators = attributes(npu_ops, "self._api")
    assert "npu_rms_norm" in operators
    assert operators == set(facts["operators"])


@pytest.mark.parametrize("version", npu_versions())
def test_what_the_driver_calls_exists_in_the_header(version) -> None:
    """pyACL names a function of acl_rt.h without its prefix, in snake case."""
    named = called_by_name(ascend_driver, "self._here", "self._call")
    assert "map_mem" in named
    in_c = {"aclrt" + "".join(part.title() for part in name.split("_")) for name in named}
    missing = in_c - set(npu_facts(version)["acl"])
    assert missing == IN_NO_OLD_HEADER.get(version, set())


def test_the_facts_are_those_that_are_wanted() -> None:
    for version in npu_versions():
        facts = npu_facts(version)
        missing = set(facts["missing"])
        for section, names in (("npu", NPU), ("operators", OPERATORS), ("acl", ACL)):
            kept = set(facts[section])
            assert kept == {name for name in names if f"{section}.{name}" not in missing}
            assert all(re.fullmatch(r"[A-Za-z_.]+", name) for name in kept)
