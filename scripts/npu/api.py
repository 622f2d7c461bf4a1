"""Read torch_npu wheels without running them: Python by `ast`, schemas of operators, a C header.

Writes, for each wheel, the parameters of what `wanted` lists to tests/worker/platform/npu_api.json.
A name that a wheel lacks is listed as missing there.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import zipfile
from pathlib import Path
from typing import Any

from scripts.npu.wanted import ACL, NPU, OPERATORS

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "tests/worker/platform/npu_api.json"
SCHEMAS = (
    "torch_npu/csrc/aten/npu_native_functions.yaml",
    "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml",
)
HEADER = "torch_npu/include/third_party/acl/inc/acl/acl_rt.h"

Facts = list[dict[str, Any]]


class Wheel:
    """The files of a wheel, and what its modules define."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)
        self._names = frozenset(self._zip.namelist())
        self.version = path.name.split("-")[1].split("+")[0]

    def text(self, name: str) -> str:
        return self._zip.read(name).decode("utf-8")

    def find(self, module: str, name: str) -> ast.FunctionDef | ast.ClassDef | None:
        """The definition that `name` of a module (a path without .py) stands for, also where it
        is imported from another file of the same package."""
        file = f"{module}/__init__.py" if f"{module}/__init__.py" in self._names else f"{module}.py"
        package = module if file.endswith("/__init__.py") else module.rpartition("/")[0]
        tree = ast.parse(self.text(file))
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
                return node
        for node in tree.body:
            if not isinstance(node, ast.ImportFrom) or node.level != 1 or node.module is None:
                continue
            for alias in node.names:
                if alias.name == "*" or (alias.asname or alias.name) == name:
                    wanted = name if alias.name == "*" else alias.name
                    found = self.find(f"{package}/{node.module.replace('.', '/')}", wanted)
                    if found is not None:
                        return found
        return None

    def npu(self, name: str) -> Facts | None:
        """The parameters of a function, a constructor or a method of torch.npu."""
        owner, _, method = name.partition(".")
        found = self.find("torch_npu/npu", owner)
        if isinstance(found, ast.ClassDef):
            own = {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}
            made_by = own.get(method) if method else own.get("__init__") or own.get("__new__")
            return None if made_by is None else _parameters(made_by.args)[1:]
        return None if found is None else _parameters(found.args)

    def operator(self, name: str) -> Facts | None:
        """The parameters of an operator, with their types."""
        for file in SCHEMAS:
            if file in self._names:
                match = re.search(rf"func: {re.escape(name)}\((.*)\) ->", self.text(file))
                if match:
                    return _schema(match.group(1))
        return None

    def acl(self, name: str) -> list[str] | None:
        """The types of a C function's parameters."""
        match = re.search(rf"\b{name}\(([^)]*)\)", self.text(HEADER))
        if match is None:
            return None
        return [_c_type(part) for part in match.group(1).split(",")]


def _parameters(arguments: ast.arguments) -> Facts:
    found: Facts = []
    plain = [*arguments.posonlyargs, *arguments.args]
    first_optional = len(plain) - len(arguments.defaults)
    for index, argument in enumerate(plain):
        found.append(_fact(argument.arg, "POSITIONAL_OR_KEYWORD", index >= first_optional))
    if arguments.vararg is not None:
        found.append(_fact(arguments.vararg.arg, "VAR_POSITIONAL", False))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(_fact(argument.arg, "KEYWORD_ONLY", default is not None))
    if arguments.kwarg is not None:
        found.append(_fact(arguments.kwarg.arg, "VAR_KEYWORD", False))
    return found


def _schema(text: str) -> Facts:
    kind = "POSITIONAL_OR_KEYWORD"
    found: Facts = []
    # Types hold no commas outside of brackets: "int[2]", "Tensor(a!)".
    for part in re.split(r",\s*", text):
        if part == "*":
            kind = "KEYWORD_ONLY"
            continue
        type_, _, rest = part.partition(" ")
        name, equals, _ = rest.partition("=")
        found.append(_fact(name, kind, bool(equals)) | {"type": type_})
    return found


def _c_type(parameter: str) -> str:
    """ "void **virPtr" is "void **"."""
    text = " ".join(parameter.split())
    return re.sub(r"\w+$", "", text).strip() or text


def _fact(name: str, kind: str, optional: bool) -> dict[str, Any]:
    return {"name": name, "kind": kind, "optional": optional}


def read(path: Path) -> tuple[str, dict[str, Any]]:
    """(version, facts) of a wheel."""
    wheel = Wheel(path)
    sections = {
        "npu": {name: wheel.npu(name) for name in NPU},
        "operators": {name: wheel.operator(name) for name in OPERATORS},
        "acl": {name: wheel.acl(name) for name in ACL},
    }
    missing = [
        f"{s}.{n}" for s, facts in sections.items() for n, fact in facts.items() if fact is None
    ]
    kept: dict[str, Any] = {
        section: {name: fact for name, fact in facts.items() if fact is not None}
        for section, facts in sections.items()
    }
    return wheel.version, kept | {"missing": missing}


def _laid_out(value: Any, depth: int = 0) -> str:
    """JSON with a line for each name."""
    if depth == 3 or not isinstance(value, dict):
        return json.dumps(value)
    inner = " " * (depth + 1)
    lines = [
        f"{inner}{json.dumps(key)}: {_laid_out(value[key], depth + 1)}" for key in sorted(value)
    ]
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", nargs="+", type=Path)
    facts = dict(sorted(read(path) for path in parser.parse_args().wheel))
    TARGET.write_text(_laid_out(facts) + "\n", encoding="utf-8")
    for version, kept in facts.items():
        print(f"torch_npu {version}: missing {', '.join(kept['missing']) or 'nothing'}")


if __name__ == "__main__":
    main()
