"""Builds the CPU kernels beside the package; metadata and dependencies are in setup.cfg.

The library is optional: without a compiler the engine runs on torch alone.
"""

from pathlib import Path

from setuptools import Extension, setup

_KERNELS = Path("xllm/worker/kernels/cpu")

setup(
    ext_modules=[
        Extension(
            "xllm.worker.kernels._cpu",
            sources=sorted(str(path) for path in _KERNELS.glob("*.cpp")),
            depends=sorted(str(path) for path in _KERNELS.glob("*.h")),
            language="c++",
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-fno-math-errno",
                "-ffp-contract=off",
                "-Wall",
                "-Wextra",
                "-fvisibility=hidden",
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
