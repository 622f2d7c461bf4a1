"""The compiled kernels, loaded with ctypes: found, checked and given their signatures.

Where the library was not built, or is of another version, `load` says why; everything that it
computes then runs on torch (the twins of `linear.py` and its neighbours).
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import torch

_ABI = 6

_I32, _I64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_F64 = ctypes.c_double

# name: (result, arguments); api.cpp says what they are.
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "xk_num_variants": (_I32, []),
    "xk_variant_name": (ctypes.c_char_p, [_I32]),
    "xk_variant_state": (_I32, [_I32]),
    "xk_best_variant": (_I32, []),
    "xk_team_new": (_POINTER, [_I32]),
    "xk_team_free": (None, [_POINTER]),
    "xk_team_progress": (_POINTER, [_POINTER]),
    "xk_allocate": (_POINTER, [_I64]),
    "xk_free": (None, [_POINTER, _I64]),
    "xk_packed_bytes": (_I64, [_I32, _I64, _I32]),
    "xk_pack": (None, [_POINTER, _I32, _POINTER, _I32, _I64, _I32, _I64, _POINTER, _I64, _I64]),
    "xk_pack_integers": (
        None,
        [
            *(_POINTER, _I32, _I32, _POINTER, _I32, _I64, _I32, _I64),
            *(_POINTER, _POINTER, _I64, _I64),
        ],
    ),
    "xk_integer_variant": (ctypes.c_char_p, []),
    "xk_gemm_scratch_bytes": (_I64, [_I32, _I32, _I32]),
    "xk_gemm": (
        None,
        [_POINTER, _POINTER, _POINTER, _I64, _I32, _POINTER, _I64, _I32, _POINTER],
    ),
    "xk_read_bandwidth": (_F64, [_POINTER, _POINTER, _I64]),
    "xk_product_peak": (_F64, [_POINTER, _I32, _F64]),
    "xk_layer_scratch": (_I64, [_POINTER, _POINTER, _POINTER]),
    "xk_layer": (_I32, [_POINTER, _I32, _POINTER, _POINTER, _POINTER, _I32, _POINTER]),
    "xk_layers_scratch": (_I64, [_POINTER, _POINTER, _I32, _POINTER]),
    "xk_layers": (_I32, [_POINTER, _I32, _POINTER, _I32, _POINTER, _POINTER]),
    "xk_head_scratch": (_I64, [_POINTER, _I32]),
    "xk_head": (
        None,
        [_POINTER, _I32, _POINTER, _POINTER, _POINTER, _I32, _POINTER, _POINTER],
    ),
    "xk_experts_scratch": (_I64, [_POINTER, _POINTER, _I32]),
    "xk_experts": (_I32, [_POINTER, _POINTER, _POINTER, _I32, _POINTER, _POINTER]),
    "xk_attend_scratch": (_I64, [_POINTER, _POINTER, _POINTER]),
    "xk_attend": (
        _I32,
        [_POINTER, _I32, _POINTER, _POINTER, _I64, _POINTER, _POINTER, _POINTER],
    ),
    "xk_arg_max": (None, [_POINTER, _I32, _POINTER, _I64, _I32, _I32, _POINTER, _POINTER]),
}


class CWeight(ctypes.Structure):
    """`xk::Weight` of gemm.h."""

    _fields_ = (
        ("kind", _I32),
        ("n", _I32),
        ("k", _I32),
        ("group", _I32),
        ("data", _POINTER),
        ("scales", _POINTER),
        ("bias", _POINTER),
        ("variant", _I32),
    )


@dataclass(frozen=True)
class Variant:
    """One implementation of the products; `wrong`: it disagreed with the portable one at load."""

    number: int
    name: str
    usable: bool
    wrong: bool


class Library:
    """The loaded library; `c` holds its functions, `variants` what may run here."""

    def __init__(self, path: Path) -> None:
        """OSError where it does not load, ValueError where it is of another version."""
        self.path = path
        loaded = ctypes.CDLL(str(path))
        abi = loaded.xk_abi()
        if abi != _ABI:
            raise ValueError(f"{path.name} speaks version {abi}, not {_ABI}: build it again")
        functions = {name: loaded[name] for name in _SIGNATURES}
        for name, (result, arguments) in _SIGNATURES.items():
            functions[name].restype, functions[name].argtypes = result, arguments
        self.c = SimpleNamespace(**functions)
        states = [self.c.xk_variant_state(i) for i in range(self.c.xk_num_variants())]
        self.variants = tuple(
            Variant(i, self.c.xk_variant_name(i).decode(), state == 1, state == 2)
            for i, state in enumerate(states)
        )
        self.best = self.variants[self.c.xk_best_variant()]

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Zeroed bytes [num_bytes] aligned to a page, in huge pages where there are some; freed
        with the last tensor on them. MemoryError."""
        size = max(num_bytes, 1)
        address = self.c.xk_allocate(size)
        if not address:
            raise MemoryError(f"no memory for {size} bytes of packed weights")
        buffer = (ctypes.c_char * size).from_address(address)
        weakref.finalize(buffer, self.c.xk_free, address, size).atexit = False
        return torch.frombuffer(buffer, dtype=torch.uint8)[:num_bytes]

    def fingerprint(self) -> str:
        """What decides the bits of a result beside its inputs."""
        names = "+".join(variant.name for variant in self.variants if variant.usable)
        return f"kernels-{_ABI}-{names}"

    def describe(self, *, mixed: bool = True) -> str:
        """Which variants run: for the log. `mixed`: whether row counts may differ in theirs."""
        usable = {variant.name for variant in self.variants if variant.usable}
        text: str = self.best.name
        if "amx" in usable and mixed:
            text += ", amx from 16 rows"
        wrong = [variant.name for variant in self.variants if variant.wrong]
        text += f"; quantized weights by {self.c.xk_integer_variant().decode()}"
        if wrong:
            text += f"; not used, for wrong results: {', '.join(wrong)}"
        return text


@dataclass(frozen=True)
class Loaded:
    """The library, or why there is none."""

    compiled: Library | None
    reason: str = ""


def load_from(folder: Path) -> Loaded:
    """The library of `folder`."""
    paths = [folder / f"_cpu{suffix}" for suffix in EXTENSION_SUFFIXES]
    found = next((path for path in paths if path.exists()), None)
    if found is None:
        return Loaded(None, "the library was not built (no compiler when xLLM was installed?)")
    try:
        return Loaded(Library(found))
    except (OSError, ValueError, AttributeError) as error:
        return Loaded(None, str(error))


@functools.cache
def load() -> Loaded:
    """The library that was built with the package, loaded once a process."""
    return load_from(Path(__file__).parent)
