"""Who computes, and by which variant."""

import subprocess
import sys

import pytest
import torch

from tests.fixtures.models import make_model
from xllm.config.served_model import ModelSettings
from xllm.config.settings import Settings
from xllm.config.worker import WorkerSettings
from xllm.errors import ConfigError
from xllm.worker.execution import loading
from xllm.worker.execution.native import make_native_executor
from xllm.worker.kernels.compiled import load
from xllm.worker.kernels.linear import PackedLinear
from xllm.worker.kernels.packing import Kind
from xllm.worker.kernels.selection import MAX_HEAD_DIM, select_team
from xllm.worker.kernels.team import Team

CPU = torch.device("cpu")
LIBRARY = load().compiled
compiled_only = pytest.mark.skipif(LIBRARY is None, reason=load().reason)


def select(asked: str = "auto", **more):
    return select_team(asked, CPU, torch.bfloat16, 1, **more)


@compiled_only
def test_an_invariant_team_keeps_its_products_to_one_variant():
    kinds = {
        invariant: {
            kind: PackedLinear(kind, 16, 64, select(invariant=invariant)).c_weight.variant
            for kind in Kind
        }
        for invariant in (False, True)
    }
    best = LIBRARY.best.number
    assert best > 0
    assert kinds[True] == {
        Kind.BF16: best,
        Kind.FP32: best,
        Kind.INT8: 0,
        Kind.INT4: 0,
        Kind.W8A8: 0,
    }
    assert set(kinds[False].values()) == {0}
    assert PackedLinear(Kind.BF16, 16, 64, select(invariant=True), variant=1).c_weight.variant == 1


@compiled_only
@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_mode_asks_for_one_variant(deterministic, tmp_path, monkeypatch):
    teams: list[Team] = []

    def selecting(*args, **kwargs):
        teams.append(select_team(*args, **kwargs))
        return teams[-1]

    monkeypatch.setattr(loading, "select_team", selecting)
    directory = make_model("qwen3", tmp_path / "model", dtype="bfloat16")
    executor = make_native_executor(
        Settings(
            model=ModelSettings(path=str(directory)),
            worker=WorkerSettings(
                deterministic=deterministic, kv_cache_bytes=1 << 22, device="cpu", num_threads=1
            ),
        )
    )
    executor.load(lambda done, total: None)
    executor.close()
    assert [team.variant for team in teams] == [LIBRARY.best.number if deterministic else 0]


@compiled_only
def test_heads_wider_than_the_kernels_take_are_left_to_torch():
    assert select(head_dim=MAX_HEAD_DIM) is not None
    assert select(head_dim=MAX_HEAD_DIM + 2) is None
    with pytest.raises(
        ConfigError, match=f"at most {MAX_HEAD_DIM} numbers, not {MAX_HEAD_DIM + 2}"
    ):
        select("compiled", head_dim=MAX_HEAD_DIM + 2)


_FEW_THREADS = """
import resource
from pathlib import Path
from xllm.errors import EngineError
from xllm.worker.kernels.compiled import load
from xllm.worker.kernels.team import Team

library = load().compiled
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
try:
    Team(library, 400)
except EngineError as error:
    print(error.message)
Team(library, 2).close()
"""


@compiled_only
def test_a_system_that_gives_no_more_threads_is_an_error():
    done = subprocess.run(
        [sys.executable, "-c", _FEW_THREADS], capture_output=True, text=True, check=False
    )
    assert done.stdout == "the system does not give 399 more threads\n", done.stderr
    assert done.returncode == 0
