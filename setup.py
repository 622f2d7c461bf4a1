"""Builds the CPU kernels, and the routers' loops over token ids and text, beside the package;
metadata and dependencies are in setup.cfg.

The libraries are optional: without a compiler the engine runs on torch alone, and routers on
Python. Files are compiled at the same time, as many as there are CPUs or MAX_JOBS allows, and again
only where they, a header that they include or this file changed.
"""

import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

_KERNELS = Path("xllm/worker/kernels/cpu")
_TOKEN_IDS = Path("xllm/protocol/native")
_WORDS = Path("xllm/router/text/native")
_OBJECTS = "build/kernels"


def num_jobs() -> int:
    """How many compilers may run at once."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_current(compiled: Path) -> bool:
    """Whether an object file is younger than all that it was made of, which the compiler wrote
    beside it as a rule of make."""
    rule = compiled.with_suffix(".d")
    if not compiled.exists() or not rule.exists():
        return False
    made_of = shlex.split(rule.read_text().replace("\\\n", " ").partition(":")[2])
    sources = [Path(__file__), *map(Path, made_of)]
    made_at = compiled.stat().st_mtime_ns
    return all(path.exists() and path.stat().st_mtime_ns < made_at for path in sources)


class BuildLibraries(build_ext):
    """Compiles what changed, file beside file."""

    def initialize_options(self) -> None:
        """Keep the object files for the next time, also where pip builds."""
        super().initialize_options()
        self.build_temp = _OBJECTS

    def build_extensions(self) -> None:
        """See build_ext."""
        compile_serially = self.compiler.compile

        def compile_one(source: str, output_dir: str, **options: object) -> str:
            (name,) = self.compiler.object_filenames([source], output_dir=output_dir)
            if not is_current(Path(name)):
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                compile_serially([source], output_dir=output_dir, **options)
            return name

        def compile_together(
            sources: list[str], output_dir: str = "", **options: object
        ) -> list[str]:
            with ThreadPoolExecutor(num_jobs()) as pool:
                tasks = [pool.submit(compile_one, s, output_dir, **options) for s in sources]
                return [task.result() for task in tasks]

        self.compiler.compile = compile_together
        super().build_extensions()


def library(name: str, directory: Path) -> Extension:
    """A library of all C++ files of a directory, loaded with ctypes."""
    return Extension(
        name,
        sources=sorted(str(path) for path in directory.glob("*.cpp")),
        depends=["setup.py", *sorted(str(path) for path in directory.glob("*.h"))],
        language="c++",
        extra_compile_args=[
            "-std=c++20",
            "-O3",
            "-fno-math-errno",
            "-ffp-contract=off",
            "-Wall",
            "-Wextra",
            "-fvisibility=hidden",
            "-MMD",
            "-g0",  # Python's own flags ask for what a debugger reads: half of the time
        ],
        extra_link_args=["-pthread"],
        optional=True,
    )


setup(
    cmdclass={"build_ext": BuildLibraries},
    ext_modules=[
        library("xllm.worker.kernels._cpu", _KERNELS),
        library("xllm.protocol.native._token_ids", _TOKEN_IDS),
        library("xllm.router.text.native._words", _WORDS),
    ],
)
