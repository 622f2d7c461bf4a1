"""What quantization costs in accuracy and gives in speed.

    python -m benchmarks.accuracy [--model DIR] [--threads 2] [--rows 1,4,16,512]
                                  [--parts answers,logits,speed] [--json FILE]

Perplexity of the demo model's answers to phrasings that it was not trained on, and how many of
them it gives word for word (greedy); relative error of the logits of a model of real layer shapes
against fp32, over random tokens (`--model`, whose weights may be random); time of that model's
products against bf16, in alternation: of one thread the time that it had a processor, so that a
busy machine matters less.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from benchmarks.bare import shapes
from scripts.demo.conversations import TURN_END, TURN_START, read_entries, render
from xllm.config.scheduling import SchedulerSettings
from xllm.config.served_model import ModelSettings
from xllm.config.settings import Settings
from xllm.config.worker import WorkerSettings
from xllm.worker.attention.plan import Span
from xllm.worker.execution.layer_loop import LayerLoop
from xllm.worker.execution.loading import load_model
from xllm.worker.kernels.compiled import load
from xllm.worker.kernels.linear import Epilogue, PackedLinear, pack_gate_up, pack_linear
from xllm.worker.kernels.packing import Kind
from xllm.worker.kernels.team import Team
from xllm.worker.loader.config import ModelConfig, read_config
from xllm.worker.memory.making import make_memory
from xllm.worker.models.registry import find_family
from xllm.worker.platform.selection import select_platform

DEMO = Path(__file__).parents[1] / "xllm" / "demo" / "model"
TEXT_TOKENS = 256
PASSES = 7
LAYERS = 6
"""Copies of a layer's weights that are timed: more than a cache holds."""


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to keep a model."""

    name: str
    dtype: str = "bfloat16"
    quantization: str = "none"
    kv_dtype: str = "auto"


FORMS = (
    Form("fp32", "float32"),
    Form("bf16"),
    Form("int8", quantization="int8"),
    Form("int4", quantization="int4"),
    Form("w8a8", quantization="w8a8"),
    Form("bf16, int8 KV", kv_dtype="int8"),
    Form("int8, int8 KV", quantization="int8", kv_dtype="int8"),
)


class Subject:
    """A loaded model in one form; `logits` of texts."""

    def __init__(self, directory: Path, form: Form, num_threads: int) -> None:
        settings = Settings(
            model=ModelSettings(path=str(directory)),
            scheduler=SchedulerSettings(max_num_seqs=1),
            worker=WorkerSettings(kv_cache_bytes=256 << 20, kv_dtype=form.kv_dtype),
        )
        platform = select_platform("cpu")
        loaded = load_model(
            directory,
            form.dtype,
            platform,
            lambda done, total: None,
            num_threads=num_threads,
            kernels="compiled",
            quantization=form.quantization,
        )
        self.model, self.num_bytes = loaded.model, loaded.num_bytes
        memory = make_memory(settings, loaded.model.config, loaded.dtype, platform, 2048)
        self._size = memory.layout.block_size
        self._loop = LayerLoop(
            loaded.model, memory, loaded.dtype, platform.device, lambda: None, loaded.team
        )

    def logits(self, ids: list[int]) -> torch.Tensor:
        """[tokens, vocab] of a text."""
        span = Span(0, len(ids), array("q", range(-(-len(ids) // self._size))))
        with torch.inference_mode():
            return self.model.head(self._loop.run([span], ids, ()))


def held_out_answers() -> list[tuple[list[int], list[int]]]:
    """Prompts and answers, as token ids."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    found = []
    for entry in read_entries():
        for text in entry.held_out:
            prompt = render([("user", text)]) + f"{TURN_START}assistant\n"
            answer = tokenizer.encode(entry.answer + TURN_END).ids
            found.append((tokenizer.encode(prompt).ids, answer))
    return found


def judge_answers(subject: Subject, answers: list[tuple[list[int], list[int]]]) -> dict[str, float]:
    """Perplexity of the answers, and the share of them that greedy decoding gives."""
    loss, count, exact = 0.0, 0, 0
    for prompt, answer in answers:
        rows = subject.logits(prompt + answer)[len(prompt) - 1 : -1]
        wanted = torch.tensor(answer)
        loss += float(F.cross_entropy(rows, wanted, reduction="sum"))
        count += len(answer)
        exact += bool((rows.argmax(-1) == wanted).all())
    return {"perplexity": math.exp(loss / count), "exact": exact / len(answers)}


def judge_logits(directory: Path, num_threads: int) -> list[dict[str, object]]:
    """Each form's logits of one random text against fp32's."""
    config = read_model(directory)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, config.vocab_size, (TEXT_TOKENS,), generator=generator).tolist()
    exact, found = torch.empty(0), []
    for form in FORMS:
        subject = Subject(directory, form, num_threads)
        logits = subject.logits(ids)
        if not exact.numel():
            exact = logits
        same = (logits.argmax(-1) == exact.argmax(-1)).float().mean()
        error = (logits - exact).norm() / exact.norm()
        row: dict[str, object] = {"form": form.name, "weight_bytes": subject.num_bytes}
        found.append(row | {"relative_error": float(error), "same_best": float(same)})
    return found


def read_model(directory: Path) -> ModelConfig:
    """A model's configuration."""
    raw = read_config(directory)
    return find_family(raw.architecture()).read(raw)


class Products:
    """The products of some layers in one kind of weights, drawn at random."""

    def __init__(self, config: ModelConfig, kind: Kind, team: Team) -> None:
        self._maps: list[PackedLinear] = []
        gated = (2 * config.intermediate_size, config.hidden_size)
        for shape in shapes(dataclasses.replace(config, num_layers=1))[:4] * LAYERS:
            weight = torch.randn(shape)
            if shape == gated:
                self._maps.append(pack_gate_up(kind, *weight.chunk(2), team))
            else:
                self._maps.append(pack_linear(kind, weight, None, team))

    def run(self, inputs: dict[int, torch.Tensor], clock: Callable[[], float]) -> float:
        """Seconds of one pass."""
        began = clock()
        for linear in self._maps:
            epilogue = Epilogue.SILU_MUL if linear.gated else Epilogue.STORE
            linear(inputs[linear.num_inputs], epilogue)
        return clock() - began


def measure_speed(
    config: ModelConfig, row_counts: list[int], num_threads: int
) -> list[dict[str, object]]:
    """Of each kind the median time of a layer's products by rows, and the median ratio of bf16's
    time to it within a round."""
    library = load().compiled
    assert library is not None
    team = Team(library, num_threads)
    kinds = (Kind.BF16, Kind.INT8, Kind.INT4, Kind.W8A8)
    products = {kind: Products(config, kind, team) for kind in kinds}
    clock = time.thread_time if num_threads == 1 else time.perf_counter
    sizes = {size for _, size in shapes(config)} | {config.hidden_size}
    found: list[dict[str, object]] = []
    for rows in row_counts:
        inputs = {size: torch.randn(rows, size) for size in sizes}
        rounds = [
            {kind: products[kind].run(inputs, clock) for kind in kinds} for _ in range(PASSES + 1)
        ]
        for kind in kinds:
            layer_s = statistics.median(r[kind] for r in rounds[1:]) / LAYERS
            speed = statistics.median(r[Kind.BF16] / r[kind] for r in rounds[1:])
            found.append({"rows": rows, "kind": kind.name, "layer_s": layer_s, "speed": speed})
    team.close()
    return found


def main() -> None:
    """Measure, print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="a model of real shapes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", default="1,4,16,512")
    parser.add_argument("--parts", default="answers,logits,speed")
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    result: dict[str, list[dict[str, object]]] = {"answers": [], "logits": [], "speed": []}
    parts = options.parts.split(",")
    answers = held_out_answers()
    for form in FORMS if "answers" in parts else ():
        got = judge_answers(Subject(DEMO, form, 1), answers)
        result["answers"].append({"form": form.name, **got})
        print(f"{form.name:16} perplexity {got['perplexity']:.4f} exact {got['exact']:.3f}")
    directory = Path(options.model)
    if options.model and "logits" in parts:
        result["logits"] = judge_logits(directory, options.threads)
        for row in result["logits"]:
            print("{form:16} {weight_bytes:12d} B  error {relative_error:.5f}".format(**row))
    if options.model and "speed" in parts:
        row_counts = [int(text) for text in options.rows.split(",")]
        result["speed"] = measure_speed(read_model(directory), row_counts, options.threads)
        for row in result["speed"]:
            print("{rows:4d} rows {kind:5} {layer_s:.6f} s a layer, {speed:.2f}".format(**row))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
