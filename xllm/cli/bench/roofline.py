"""`xllm bench roofline`: each phase of a model's step beside what the machine allows just now.

A phase reads some bytes and does some operations. The bound is the longer of both at the limits
that were measured before it; the share is the bound over the time that the phase took.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xllm.cli.bench.local import DEFAULTS, SECTIONS, open_engine, resolve_settings
from xllm.cli.bench.local_engine import LocalEngine, LocalRequest
from xllm.cli.bench.progress import BenchProgress
from xllm.cli.bench.prompts import PromptMaker
from xllm.cli.bench.report import show_table, write_json
from xllm.cli.bench.shapes import RequestShape
from xllm.cli.flags import settings_options
from xllm.cli.logs import configure_command_logs
from xllm.config.settings import Settings
from xllm.errors import ConfigError
from xllm.protocol.step import StepPlan

if TYPE_CHECKING:
    from xllm.worker.layer_clock import LayerClock
    from xllm.worker.machine_limits import MachineLimits
    from xllm.worker.model_costs import ModelCosts

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_QUANTIZED_BYTES = {"int8": 1.0, "w8a8": 1.0, "int4": 0.53}
_DECODE_STEPS = 16
_REPEATS = 3
_SHORT = 32
_LONG = 1024


@dataclasses.dataclass(frozen=True)
class Phase:
    """One measured phase: its least bytes and operations, and the seconds that it took."""

    name: str
    num_rows: int
    seconds: float
    num_bytes: float
    flops: float

    def share(self, limits: MachineLimits) -> float:
        """Of the machine's bound that was reached, 0 to 1."""
        bound_s = max(self.num_bytes / limits.read_bytes_s, self.flops / limits.flops_s)
        return bound_s / self.seconds if self.seconds > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class StepTime:
    """A step that was seen: its rows, tokens of context before it, layers and all of it."""

    num_items: int
    num_rows: int
    num_context: int
    layers_s: float
    whole_s: float


class PhaseMeter:
    """Runs a model and times its steps."""

    def __init__(
        self,
        engine: LocalEngine,
        clock: LayerClock,
        costs: ModelCosts,
        item_bytes: float,
        budget: int,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._costs = costs
        self._item_bytes = item_bytes
        self._budget = budget
        self._maker = PromptMaker(0, engine.ready.vocab_size)
        self._serial = 0
        self._kv_bytes = sum(group.bytes_per_token for group in engine.ready.kv_groups)

    def prefill(self, num_tokens: int) -> Phase:
        """The layers of one prompt's only chunk; ConfigError where it takes several."""
        seen = []
        for _ in range(_REPEATS):
            steps = self._run(1, num_tokens, 1)
            if steps[0].num_rows != num_tokens:
                raise ConfigError(
                    f"a prompt of {num_tokens} tokens takes several steps: "
                    "--scheduler-max-num-batched-tokens",
                    param="scheduler.max_num_batched_tokens",
                )
            seen.append(steps[0].layers_s)
        costs = self._costs
        flops = costs.layer_flops(num_tokens) + costs.score_flops * num_tokens**2 / 2
        num_bytes = costs.layer_reads(num_tokens) * self._item_bytes
        return Phase("prefill, layers", num_tokens, statistics.median(seen), num_bytes, flops)

    def decode(self, num_rows: int) -> tuple[Phase, Phase, StepTime]:
        """The layers, and head with sampling, of steps that decode so many short sequences; and
        the middle one of those steps."""
        step = self._decode(num_rows, _SHORT)
        costs = self._costs
        num_bytes = costs.layer_reads(num_rows) * self._item_bytes
        num_bytes += step.num_context * self._kv_bytes
        flops = costs.layer_flops(num_rows) + costs.score_flops * step.num_context
        layers = Phase("decode, layers", num_rows, step.layers_s, num_bytes, flops)
        head_bytes = costs.head_weights * max(self._item_bytes, 1)  # no less than 8 bits
        head_s = step.whole_s - step.layers_s
        head = Phase("head and sampling", num_rows, head_s, head_bytes, costs.head_flops(num_rows))
        return layers, head, step

    def attention(self, num_rows: int, short: StepTime) -> Phase | None:
        """What a long context adds to a step: the reading of its KV. None where the memory for
        KV has no room for contexts that are longer."""
        ready = self._engine.ready
        room = ready.num_blocks * ready.block_size // num_rows - ready.block_size
        longest = min(room, ready.max_model_len, _LONG)
        length = longest - self._num_output(num_rows, longest)
        if length <= 2 * _SHORT:
            return None
        step = self._decode(num_rows, length)
        num_more = step.num_context - short.num_context
        return Phase(
            f"attention, {step.num_context // num_rows} tokens each",
            num_rows,
            step.layers_s - short.layers_s,
            num_more * self._kv_bytes,
            num_more * self._costs.score_flops,
        )

    def _num_output(self, num_rows: int, num_prompt: int) -> int:
        """Enough that the first sequence still decodes when the last one has been prefilled."""
        num_steps = math.ceil(num_rows * num_prompt / max(self._budget - num_rows, 1))
        return num_steps + _DECODE_STEPS

    def _decode(self, num_rows: int, num_prompt: int) -> StepTime:
        steps = self._run(num_rows, num_prompt, self._num_output(num_rows, num_prompt))
        full = [one for one in steps if one.num_items == one.num_rows == num_rows]
        if not full:
            raise ConfigError(f"{num_rows} sequences never decode together here", param="rows")
        return sorted(full, key=lambda one: one.layers_s)[len(full) // 2]

    def _run(self, num_rows: int, num_prompt: int, num_output: int) -> list[StepTime]:
        shape = RequestShape(num_prompt, num_output)
        requests: list[LocalRequest] = []
        for _ in range(num_rows):
            requests.append((self._maker.ids(self._serial, shape), num_output))
            self._serial += 1
        steps: list[StepTime] = []

        def stepped(plan: StepPlan, took_s: float) -> None:
            rows = sum(item.num_tokens for item in plan.items)
            context = sum(item.start + item.num_tokens for item in plan.items)
            steps.append(StepTime(len(plan.items), rows, context, self._clock.layers_s, took_s))

        for record in self._engine.run(requests, stepped=stepped):
            if record.error:
                raise ConfigError(record.error)
        return steps


@click.command(
    context_settings={"max_content_width": 100},
    short_help="What each phase of a step reaches of this machine's limits.",
)
@click.option("--prefill", default="128,512", show_default=True, metavar="N,N", help="Prompts.")
@click.option("--rows", default="1,4,16,32", show_default=True, metavar="N,N", help="Decodes.")
@click.option("--json", "json_path", default="", metavar="FILE", help="All figures as JSON.")
@settings_options(*SECTIONS, defaults=DEFAULTS)
def roofline(prefill: str, rows: str, json_path: str, settings: Settings) -> None:
    """The bandwidth and the operations a second that each phase of a model's step reaches, beside
    this machine's limits, measured just before."""
    from xllm.worker.layer_clock import make_clocked_executor
    from xllm.worker.machine_limits import measure_limits
    from xllm.worker.model_costs import read_costs

    prompts, row_counts = _numbers(prefill, "prefill"), _numbers(rows, "rows")
    if settings.worker.engine != "native":
        raise ConfigError("only the native engine has phases to measure", param="worker.engine")
    configure_command_logs("bench", settings)
    settings = resolve_settings(settings)
    executor, clock = make_clocked_executor(settings)
    costs = read_costs(Path(settings.model.path))
    with open_engine(settings, executor) as engine:
        ready = engine.ready
        dtype, quantization = ready.dtype.split("+")[0], settings.model.quantization
        limits = measure_limits(dtype)
        budget = settings.scheduler.max_num_batched_tokens
        item_bytes = _QUANTIZED_BYTES.get(quantization, _ITEM_BYTES[dtype])
        meter = PhaseMeter(engine, clock, costs, item_bytes, budget)
        phases: list[Phase] = []
        left_out: list[str] = []
        with BenchProgress("phases", len(prompts) + len(row_counts)) as progress:
            for count in prompts:
                if count < ready.max_model_len:
                    phases.append(meter.prefill(count))
                else:
                    left_out.append(str(count))
                progress.advance()
            heads, scores = [], []
            for count in row_counts:
                layers, head, step = meter.decode(count)
                phases.append(layers)
                heads.append(head)
                if (found := meter.attention(count, step)) is not None:
                    scores.append(found)
                progress.advance()
        phases += [*heads, *scores]
    if left_out:
        numbers = ", ".join(left_out)
        click.echo(f"no prefill of {numbers}: the context is {ready.max_model_len}", err=True)
    _show(f"{ready.model}, {ready.dtype}, {ready.device}", limits, phases)
    if json_path:
        content: dict[str, Any] = {"settings": dataclasses.asdict(settings)}
        content |= {"limits": dataclasses.asdict(limits), "costs": dataclasses.asdict(costs)}
        shares = [dataclasses.asdict(p) | {"share": p.share(limits)} for p in phases]
        write_json(json_path, content | {"phases": shares})


def _show(title: str, limits: MachineLimits, phases: list[Phase]) -> None:
    click.echo(
        f"limits, {limits.num_threads} threads: {limits.read_bytes_s / 1e9:.1f} GB/s read, "
        f"{limits.flops_s / 1e9:.0f} GFLOP/s"
    )
    rows = [
        (
            phase.name,
            str(phase.num_rows),
            f"{1e3 * phase.seconds:.2f}",
            f"{phase.num_bytes / phase.seconds / 1e9:.1f}" if phase.seconds > 0 else "-",
            f"{phase.flops / phase.seconds / 1e9:.0f}" if phase.seconds > 0 else "-",
            f"{100 * phase.share(limits):.0f}%" if phase.seconds > 0 else "-",
        )
        for phase in phases
    ]
    show_table(title, ("phase", "rows", "ms", "GB/s", "GFLOP/s", "of the bound"), rows)


def _numbers(text: str, option: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ConfigError(f"--{option} {text}: numbers from 1, by commas", param=option)
    return found
