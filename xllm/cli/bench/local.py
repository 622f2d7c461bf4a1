"""`xllm bench latency` and `xllm bench throughput`: a model in this process, without a service."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import click

from xllm.cli.bench.dataset import Dataset, dataset_options
from xllm.cli.bench.local_engine import LocalEngine
from xllm.cli.bench.measures import Distribution, Objectives, RequestRecord, summarize
from xllm.cli.bench.plot import check_plot, write_plot
from xllm.cli.bench.progress import BenchProgress
from xllm.cli.bench.prompts import PromptMaker
from xllm.cli.bench.report import show_distributions, show_summary, write_json
from xllm.cli.bench.shapes import RequestShape
from xllm.cli.flags import settings_options
from xllm.cli.logs import configure_command_logs
from xllm.cli.model_source import resolve_model
from xllm.config.settings import Settings
from xllm.errors import ConfigError, EngineError

SECTIONS = ("model", "worker", "scheduler", "cluster")
DEFAULTS = {"cluster.log_level": "warning"}


def resolve_settings(settings: Settings) -> Settings:
    """With the model's directory and name; of one rank, whatever they say of an instance's."""
    path, name = resolve_model(settings.model)
    return dataclasses.replace(
        settings,
        model=dataclasses.replace(settings.model, path=path, name=name),
        master=dataclasses.replace(settings.master, num_workers=1),
    )


def open_engine(settings: Settings, executor: Any = None) -> LocalEngine:
    """Load the model of resolved settings, with a bar; `executor` in place of the usual one."""
    from xllm.cli.screen import LaunchScreen
    from xllm.worker.factory import make_executor

    screen = LaunchScreen(sys.stderr)
    name = settings.model.name
    engine = LocalEngine(
        settings,
        executor or make_executor(settings),
        lambda done, total: screen.bar(name, done, total, "bytes"),
    )
    screen.close_bars()
    return engine


@click.command(
    context_settings={"max_content_width": 100},
    short_help="Time one batch, again and again, on a model here.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--input-len", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--output-len", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--iterations", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--warm-up", type=click.IntRange(min=0), default=2, show_default=True)
@click.option("--seed", type=click.INT, default=0, show_default=True)
@click.option("--json", "json_path", default="", metavar="FILE", help="All figures as JSON.")
@click.option("--plot", default="", metavar="FILE", help="Picture (.png, .svg, .pdf).")
@settings_options(*SECTIONS, defaults=DEFAULTS)
def latency(
    batch_size: int,
    input_len: int,
    output_len: int,
    iterations: int,
    warm_up: int,
    seed: int,
    json_path: str,
    plot: str,
    settings: Settings,
) -> None:
    """One batch, again and again, on a model in this process: how long the whole takes, its first
    tokens and each further one. Prompts differ from one iteration to the next."""
    if plot:
        check_plot(plot)
    configure_command_logs("bench", settings)
    settings = resolve_settings(settings)
    shape = RequestShape(input_len, output_len)
    rounds: list[list[RequestRecord]] = []
    with open_engine(settings) as engine:
        maker = PromptMaker(seed, engine.ready.vocab_size)
        with BenchProgress("iterations", warm_up + iterations) as progress:
            for number in range(warm_up + iterations):
                first = number * batch_size
                prompts = [maker.ids(first + k, shape) for k in range(batch_size)]
                rounds.append(engine.run([(prompt, output_len) for prompt in prompts]))
                _check(rounds[-1])
                progress.advance()
    measured = rounds[warm_up:]
    distributions = [
        ("whole batch ms", Distribution.of([max(r.ended_s for r in one) for one in measured])),
        ("TTFT ms", Distribution.of([t for one in measured for r in one if (t := r.ttft_s)])),
        ("TPOT ms", Distribution.of([t for one in measured for r in one if (t := r.tpot_s)])),
    ]
    title = f"{batch_size} x {input_len} in, {output_len} out, {iterations} iterations"
    show_distributions(title, distributions)
    if json_path:
        figures = {name.replace(" ms", "_s"): dataclasses.asdict(d) for name, d in distributions}
        write_json(json_path, {"settings": dataclasses.asdict(settings), "figures": figures})
    if plot:
        write_plot(plot, f"{settings.model.name}: {title}", in_turn(measured))


@click.command(
    context_settings={"max_content_width": 100},
    short_help="Tokens a second of many requests at once, on a model here.",
)
@dataset_options
@click.option("--json", "json_path", default="", metavar="FILE", help="All figures as JSON.")
@click.option("--plot", default="", metavar="FILE", help="Picture (.png, .svg, .pdf).")
@settings_options(*SECTIONS, defaults=DEFAULTS)
def throughput(dataset: Dataset, json_path: str, plot: str, settings: Settings) -> int:
    """All requests of a dataset or trace at once on a model in this process: tokens a second.
    A trace's times are left aside."""
    if plot:
        check_plot(plot)
    shapes = dataset.shapes()
    configure_command_logs("bench", settings)
    settings = resolve_settings(settings)
    with open_engine(settings) as engine:
        maker = PromptMaker(dataset.seed, engine.ready.vocab_size)
        requests = [
            (maker.ids(index, shape), shape.num_output) for index, shape in enumerate(shapes)
        ]
        warm = RequestShape(min(32, engine.ready.max_model_len - 2), 2)
        engine.run([(maker.ids(len(shapes), warm), 2)])
        with BenchProgress("requests", len(requests)) as progress:
            records = engine.run(requests, ended=lambda record: progress.advance())
    summary = summarize(records, Objectives())
    show_summary(summary)
    if json_path:
        content = {"settings": dataclasses.asdict(settings), "dataset": dataclasses.asdict(dataset)}
        write_json(json_path, {**content, "summary": dataclasses.asdict(summary)})
    if plot:
        write_plot(plot, f"{settings.model.name}: {len(records)} requests at once", records)
    return 0 if summary.num_completed else EngineError.exit_code


def in_turn(rounds: Sequence[Sequence[RequestRecord]]) -> list[RequestRecord]:
    """The records of rounds that each began at 0, one round behind the other."""
    found: list[RequestRecord] = []
    begin = 0.0
    for records in rounds:
        for one in records:
            times = [begin + at for at in one.token_s]
            sent, ended = begin + one.sent_s, begin + one.ended_s
            found.append(dataclasses.replace(one, sent_s=sent, token_s=times, ended_s=ended))
        begin = max((one.ended_s for one in found), default=begin)
    return found


def _check(records: list[RequestRecord]) -> None:
    """ConfigError for a batch that the model or its memory cannot take."""
    for record in records:
        if record.error:
            raise ConfigError(record.error)
