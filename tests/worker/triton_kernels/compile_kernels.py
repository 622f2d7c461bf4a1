"""Compiles what the kernels' functions launch, for GPUs that are not there, and says what came out.

    python -m tests.worker.triton_kernels.compile_kernels CASE ... --arch 80 90

Triton compiles to machine code (with the ptxas that it brings) for any GPU; only launching needs
one. So its driver is replaced by one that knows the name of a GPU, and every launch ends once
the kernel is compiled. A process of its own: what the interpreter has touched does not compile.
Prints one JSON object a kernel: registers, bytes of shared memory and of spilled registers, and
the widths in bytes of its loads from global memory.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tests.worker.triton_kernels.compiled_cases import CASES

_DUMP = pathlib.Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
_LOAD = re.compile(r"ld\.global(?:\.\w+::\w+)*(?:\.v(\d))?\.b(\d+)")
_ASYNC = re.compile(r"cp\.async\.c[ag]\.shared\.global.*?\], 0x(\w+)|cp\.async\.\S+ .*?, (\d+)")


class NamedGpu:
    """A driver that only says which GPU kernels are for."""

    def __init__(self, arch):
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return self._target.arch

    def get_current_stream(self, device=0):
        return 0


def compiled(arch, run):
    """(name, kernel) of all that `run` launches, compiled for the compute capability `arch`."""
    found = []
    launch = JITFunction.run

    def only_compile(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.__name__, kernel))
        return kernel

    driver.set_active(NamedGpu(arch))
    JITFunction.run = only_compile
    try:
        run()
    finally:
        JITFunction.run = launch
    return found


def outcome(kernel):
    """What a compiled kernel takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [_DUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", text).group(1)) for name in ("REG", "STACK", "LOCAL")
    )
    ptx = kernel.asm["ptx"]
    widths = {int(n or 1) * int(bits) // 8 for n, bits in _LOAD.findall(ptx)}
    return {
        "registers": registers,
        "spilled": stack + local,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "loads": sorted(widths),
        "async": sorted({int(a, 16) if a else int(b) for a, b in _ASYNC.findall(ptx)}),
        "products": "wgmma" if "wgmma.mma" in ptx else "mma" if "mma.sync" in ptx else "",
    }


def main():
    """Compile the cases that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.cases:
        for arch in arguments.arch:
            for kernel_name, kernel in compiled(arch, CASES[name]):
                head = {"case": name, "arch": arch, "kernel": kernel_name}
                print(json.dumps(head | outcome(kernel)), flush=True)


if __name__ == "__main__":
    main()
