"""What a device's module offers: names and parameters, to hold the calls of our code against.

`cuda_api` reads the torch.cuda of this machine, whose Python is the same in a build for CPUs: where
a class there only hands its arguments on to one in C++, what that takes is not known here.
`npu_api` reads `npu_api.json`, which `scripts/npu-api` makes from wheels of torch_npu.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FACTS = Path(__file__).parent / "npu_api.json"


@dataclasses.dataclass(frozen=True)
class DeviceApi:
    """`find(name)` gives a signature ("Event.record": without self), or raises AttributeError."""

    find: Callable[[str], inspect.Signature]

    def check(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """TypeError where the real one would not take these arguments."""
        self.find(name).bind(*args, **kwargs)


def cuda_api() -> DeviceApi:
    def find(name: str) -> inspect.Signature:
        owner: Any = torch.cuda
        *classes, last = name.split(".")
        for part in classes:
            owner = getattr(owner, part)
        found = getattr(owner, last)
        signature = inspect.signature(found)
        if classes:
            first, *others = signature.parameters.values()
            assert first.name == "self"
            signature = signature.replace(parameters=others)
        # What goes on to C++ by ** is not known here: our code passes nothing that way.
        known = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        return signature.replace(parameters=known)

    return DeviceApi(functools.cache(find))


def npu_versions() -> list[str]:
    return sorted(json.loads(FACTS.read_text(encoding="utf-8")))


def npu_facts(version: str) -> dict[str, Any]:
    return json.loads(FACTS.read_text(encoding="utf-8"))[version]


def npu_api(version: str) -> DeviceApi:
    facts = npu_facts(version)["npu"]

    def find(name: str) -> inspect.Signature:
        if name not in facts:
            raise AttributeError(f"torch_npu {version} has no {name}, or its facts were not kept")
        return signature_of(facts[name])

    return DeviceApi(functools.cache(find))


def signature_of(parameters: list[dict[str, Any]]) -> inspect.Signature:
    """A signature from its facts: name, kind, whether there is a default."""
    return inspect.Signature(
        [
            inspect.Parameter(
                fact["name"],
                getattr(inspect.Parameter, fact["kind"]),
                default=None if fact["optional"] else inspect.Parameter.empty,
            )
            for fact in parameters
            if fact["kind"] != "VAR_KEYWORD"
        ]
    )
