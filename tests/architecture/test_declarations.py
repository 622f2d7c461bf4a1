"""What is declared is documented: settings, errors, records."""

from __future__ import annotations

import dataclasses

from xllm import errors
from xllm.config.field import setting_info
from xllm.config.settings import Settings


def sections():
    return [(field.name, type(getattr(Settings(), field.name))) for field in fields(Settings)]


def fields(cls):
    return dataclasses.fields(cls)


def test_every_setting_has_a_sentence_a_default_and_a_fitting_unit():
    assert len(sections()) >= 8
    for section, cls in sections():
        assert cls.__doc__, section
        assert cls.__dataclass_params__.frozen, section
        for field in fields(cls):
            where = f"{section}.{field.name}"
            info = setting_info(field)
            assert info.doc.endswith("."), where
            assert field.default is not dataclasses.MISSING, where
            if field.name.endswith("_bytes"):
                assert info.unit == "bytes", where
            for ending, unit in (("_s", "s"), ("_ms", "ms")):
                if field.name.endswith(ending):
                    assert info.unit == unit, where
            if info.choices:
                assert field.default in info.choices, where
            if info.low is not None:
                assert field.default >= info.low, where
            if info.high is not None:
                assert field.default <= info.high, where
            if isinstance(field.default, int | float) and not isinstance(field.default, bool):
                assert info.low is not None, f"{where} has no lower bound"


def test_the_error_tree_is_its_docstring():
    drawn = [line for line in errors.__doc__.splitlines() if line.endswith("Error")]
    assert drawn == tree_lines(errors.XllmError)


def tree_lines(cls, prefix=""):
    """The tree below `cls`, by name, drawn as the docstring draws it."""
    lines = [cls.__name__] if not prefix else []
    children = sorted(
        (c for c in cls.__subclasses__() if c.__module__ == "xllm.errors"), key=lambda c: c.__name__
    )
    for index, child in enumerate(children):
        last = index == len(children) - 1
        lines.append(f"{prefix}{'└── ' if last else '├── '}{child.__name__}")
        inner = prefix + ("    " if last else "│   ")
        lines += tree_lines(child, inner)
    return lines


def test_every_error_has_its_own_code_and_a_sensible_status():
    classes = errors.error_classes()
    assert len(classes) == len(tree_lines(errors.XllmError))
    for code, cls in classes.items():
        assert cls.__doc__, code
        assert 400 <= cls.http_status < 600, code
        assert cls.exit_code in (64, 69, 70, 71, 75), code
        assert type(errors.error_from_code(code, "text")) is cls


def test_all_errors_of_the_package_are_in_the_tree():
    stray = [
        cls
        for cls in walk(errors.XllmError)
        if cls.__module__ != "xllm.errors" and cls.__module__.startswith("xllm.")
    ]
    assert stray == []


def walk(cls):
    for child in cls.__subclasses__():
        yield child
        yield from walk(child)
