"""Experts: the grouped product against one product a row, the table from number to slot, counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures.models import make_model
from tests.worker.native.plan_driver import KERNELS, PlanDriver, random_prompts
from tests.worker.native.reference import load_reference
from xllm.errors import ConfigError
from xllm.worker.layers.experts import (
    ExpertTables,
    SparseMlp,
    grouped_product,
    grouped_product_by_group,
)
from xllm.worker.loader.config import RawConfig
from xllm.worker.models.registry import find_family

CPU = torch.device("cpu")
HIDDEN, INNER = 24, 12


def sparse_mlp(num_experts: int, num_slots: int, top_k: int, normalise: bool) -> SparseMlp:
    torch.manual_seed(5)
    return SparseMlp(
        1,
        torch.randn(num_experts, HIDDEN),
        torch.randn(num_slots, 2 * INNER, HIDDEN),
        torch.randn(num_slots, HIDDEN, INNER),
        ExpertTables(3, num_experts, CPU),
        top_k,
        normalise,
    )


def row_by_row(mlp: SparseMlp, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, one row and one expert at a time, in fp64; and the counts."""
    tables = mlp._tables
    rows, counts = [], torch.zeros(tables.slots.shape[1], dtype=torch.int32)
    for row in x:
        probabilities = (mlp._router @ row).softmax(0)
        best = probabilities.sort(descending=True).indices[: mlp._top_k].tolist()
        total = sum(float(probabilities[e]) for e in best) if mlp._normalise else 1.0
        out = torch.zeros(HIDDEN, dtype=torch.float64)
        for expert in best:
            counts[expert] += 1
            slot = int(tables.slots[mlp._index, expert])
            gate, up = (mlp._gate_up[slot].double() @ row.double()).chunk(2)
            found = mlp._down[slot].double() @ (F.silu(gate) * up)
            out += found * float(probabilities[expert]) / total
        rows.append(out)
    return torch.stack(rows), counts


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_rows_pass_their_experts(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 9))
    num_slots = num_experts + data.draw(st.integers(0, 2))
    top_k = data.draw(st.integers(1, num_experts))
    mlp = sparse_mlp(num_experts, num_slots, top_k, data.draw(st.booleans()))
    places = data.draw(st.permutations(range(num_slots)))[:num_experts]
    mlp._tables.slots[1] = torch.tensor(places)
    x = torch.randn(data.draw(st.integers(1, 40)), HIDDEN)
    want, counts = row_by_row(mlp, x)
    assert (mlp(x) - want).abs().max() < 1e-3
    taken = mlp._tables.take_counts()
    assert torch.equal(taken[1], counts)
    assert int(taken.sum()) == len(x) * top_k
    assert not mlp._tables.counts.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inner", "out"), [(16, 24), (10, 7), (1, 1)])
def test_grouped_product_equals_products_by_group(dtype: torch.dtype, inner: int, out: int) -> None:
    """Also with shapes that torch's grouped product refuses, empty groups and no rows."""
    torch.manual_seed(1)
    weights = torch.randn(4, out, inner).to(dtype)
    for sizes in ([3, 0, 5, 1], [0, 0, 0, 9], [0, 0, 0, 0]):
        x = torch.randn(sum(sizes), inner).to(dtype)
        ends = torch.tensor(sizes).cumsum(0, dtype=torch.int32)
        want = torch.cat(
            [part.float() @ w.float().T for part, w in zip(x.split(sizes), weights, strict=True)]
        )
        for product in (grouped_product, grouped_product_by_group):
            assert torch.allclose(product(x, weights, ends).float(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kernels", KERNELS)
def test_counts_come_with_each_step(kernels: str, tmp_path: Path) -> None:
    """Against the reference's own choices; the dense layer counts nothing."""
    directory = make_model("qwen3-moe", tmp_path, mlp_only_layers=[1])
    driver = PlanDriver(directory, kernels=kernels)
    prompts = random_prompts(3, 5, 40)
    (frame,) = driver.step([driver.job(prompt, 2) for prompt in prompts]).frames
    counts = np.frombuffer(frame, "<i4").reshape(3, 8)
    model, want = load_reference(directory), np.zeros((3, 8), dtype=np.int64)
    for index in (0, 2):
        model.model.layers[index].mlp.gate.register_forward_hook(
            lambda module, args, output, index=index: np.add.at(
                want[index], output[2].flatten().numpy(), 1
            )
        )
    with torch.inference_mode():
        for prompt in prompts:
            model(torch.tensor([prompt]), use_cache=False)
    assert (counts == want).all()
    assert want[0].sum() == 2 * sum(map(len, prompts))
    # A step's counts are its own, and logprobs come before them.
    output = driver.run([])
    assert output.result.expert_frames == 1
    assert not np.frombuffer(output.frames[-1], "<i4").any()


@pytest.mark.parametrize("kernels", KERNELS)
def test_moved_experts_change_nothing(kernels: str, tmp_path: Path) -> None:
    """One layer's weights permuted over its slots, and the table with them."""
    driver = PlanDriver(make_model("qwen3-moe", tmp_path), kernels=kernels)
    prompts = random_prompts(4, 5, 30)

    def outputs() -> list[list[int]]:
        jobs = [driver.job(prompt, 8) for prompt in prompts]
        driver.generate(jobs)
        driver.release(jobs)
        return [job.output for job in jobs]

    before = outputs()
    model = driver.executor._loaded().loop._model
    mlp = model._layers[1]._mlp
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    if kernels == "torch":
        weights = [mlp._gate_up, mlp._down]
    else:
        weights = [part.packed.view(8, -1) for part in (mlp.gate_up, mlp.down)]
    for weight in weights:
        weight[:] = weight[order]
    assert outputs() != before
    model.experts.slots[1] = order.argsort()
    assert outputs() == before


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"num_experts": 0}, "num_experts"),
        ({"mlp_only_layers": "1"}, "mlp_only_layers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
    ],
)
def test_bad_configurations_are_named(values: dict, named: str, tmp_path: Path) -> None:
    base = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    with pytest.raises(ConfigError, match=named):
        find_family("Qwen3MoeForCausalLM").read(RawConfig({**base, **values}))
