"""Budgets: of files, functions and classes; docstrings; names. Each rule says what breaks it."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from tests.architecture.sources import ROOT, public, sources, tracked

MAX_FILE_LINES = 400
USUAL_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
MAX_PUBLIC_METHODS = 15
VAGUE_NAMES = {
    "utils",
    "util",
    "common",
    "helpers",
    "helper",
    "misc",
    "tools",
    "stuff",
    "base_utils",
}

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def nodes(tree, kinds):
    return (node for node in ast.walk(tree) if isinstance(node, kinds))


def test_there_is_something_to_look_at():
    assert len(sources("xllm")) > 50
    assert len(sources("xllm", "tests", "examples", "benchmarks", "scripts")) > 100


def test_no_file_is_beyond_the_wall():
    every = sources("xllm", "examples", "benchmarks", "scripts", "tests")
    too_long = {s.path: s.num_lines for s in every if s.num_lines > MAX_FILE_LINES}
    assert too_long == {}


def test_few_files_are_beyond_the_usual_size():
    package = sources("xllm")
    longer = [s.path for s in package if s.num_lines > USUAL_FILE_LINES]
    assert len(longer) <= len(package) // 10, longer


def test_no_function_is_too_long():
    too_long = {}
    for source in sources("xllm", "examples", "benchmarks", "scripts"):
        for node in nodes(source.tree, FUNCTIONS):
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                too_long[f"{source.path}:{node.name}"] = lines
    assert too_long == {}


def test_no_class_offers_too_much():
    too_much = {}
    for source in sources("xllm"):
        for node in nodes(source.tree, ast.ClassDef):
            methods = [
                child.name
                for child in node.body
                if isinstance(child, FUNCTIONS) and public(child.name) and not _is_property(child)
            ]
            if len(set(methods)) > MAX_PUBLIC_METHODS:
                too_much[f"{source.path}:{node.name}"] = len(set(methods))
    assert too_much == {}


def _is_property(node):
    return any("property" in ast.unparse(mark) for mark in node.decorator_list)


def test_init_files_are_near_empty():
    allowed = {"xllm/__init__.py", "xllm/client/__init__.py"}
    for source in sources("xllm"):
        if source.path.endswith("__init__.py") and source.path not in allowed:
            body = [node for node in source.tree.body if not isinstance(node, ast.Expr)]
            assert body == [], source.path


def test_no_module_has_a_vague_name():
    stems = {path: path.rsplit("/", 1)[-1].removesuffix(".py") for path in tracked()}
    assert [p for p, stem in stems.items() if stem.lower() in VAGUE_NAMES] == []


def test_module_names_of_a_package_do_not_nearly_repeat():
    seen = {}
    for source in sources("xllm"):
        folder, _, name = source.path.removesuffix(".py").rpartition("/")
        plain = name.replace("_", "").rstrip("s")
        first = seen.setdefault((folder, plain), source.path)
        assert first == source.path, "nearly the same name"


def test_every_module_opens_with_a_docstring():
    missing = [
        s.path for s in sources("xllm", "examples", "benchmarks") if not ast.get_docstring(s.tree)
    ]
    assert missing == []


def test_everything_public_has_a_docstring():
    missing = []
    for source in sources("xllm"):
        todo = [("", source.tree)]
        while todo:
            prefix, parent = todo.pop()
            for node in parent.body:
                if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) or not public(node.name):
                    continue
                if isinstance(node, ast.ClassDef):
                    todo.append((f"{prefix}{node.name}.", node))
                if not ast.get_docstring(node) and not _repeats_another(node):
                    missing.append(f"{source.path}:{prefix}{node.name}")
    assert missing == []


def _repeats_another(node):
    """Overloads and setters speak through the function they belong to."""
    marks = {ast.unparse(mark).split(".")[-1] for mark in node.decorator_list}
    return bool(marks & {"overload", "setter", "override"})


def test_class_names_are_unique():
    found = Counter()
    places = {}
    for source in sources("xllm"):
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef) and public(node.name):
                found[node.name] += 1
                places.setdefault(node.name, []).append(source.path)
    assert {name: places[name] for name, count in found.items() if count > 1} == {}


def test_no_state_lives_in_modules():
    """No empty containers at module level waiting to be filled, and no `global`."""
    found = []
    for source in sources("xllm"):
        found += [f"{source.path}:{node.lineno} global" for node in nodes(source.tree, ast.Global)]
        for node in source.tree.body:
            value = getattr(node, "value", None)
            if not isinstance(node, (ast.Assign, ast.AnnAssign)) or value is None:
                continue
            empty = isinstance(value, (ast.List, ast.Dict)) and not ast.unparse(value).strip("[]{}")
            called = isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in (
                "dict", "list", "set", "defaultdict", "deque", "Lock", "Event", "OrderedDict",
            )  # fmt: skip
            if empty or called:
                found.append(f"{source.path}:{node.lineno}")
    assert found == []


def test_all_lists_are_sorted():
    for source in sources("xllm"):
        for node in source.tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names = ast.literal_eval(node.value)
                assert list(names) == sorted(names), source.path
                assert len(set(names)) == len(names), source.path


@pytest.mark.parametrize("module", ["xllm", "xllm.client"])
def test_what_all_promises_exists(module):
    imported = __import__(module, fromlist=["*"])
    assert imported.__all__
    for name in imported.__all__:
        assert getattr(imported, name) is not None


def test_every_test_file_collects_something():
    for source in sources("tests"):
        name = source.path.rsplit("/", 1)[-1]
        if not name.startswith("test_"):
            continue
        tests = [
            node.name
            for node in ast.walk(source.tree)
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and node.name.lower().startswith("test")
        ]
        assert tests, source.path


def test_test_files_have_names_of_their_own():
    names = Counter(
        path.rsplit("/", 1)[-1]
        for path in tracked()
        if path.startswith("tests/test_") or "/test_" in path
    )
    assert {name: count for name, count in names.items() if count > 1} == {}


def test_the_metadata_is_in_one_place():
    assert "\n[project]" not in (ROOT / "pyproject.toml").read_text()
    assert "[metadata]" in (ROOT / "setup.cfg").read_text()
