"""`xllm bench serve`: load on an endpoint that runs already, xLLM's or anyone's."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import click

from xllm.cli.bench.dataset import Arrivals, Dataset, arrival_options, dataset_options
from xllm.cli.bench.load import run_load
from xllm.cli.bench.measures import Objectives, RequestRecord, Summary, summarize
from xllm.cli.bench.plot import check_plot, write_plot
from xllm.cli.bench.progress import BenchProgress
from xllm.cli.bench.prompts import PromptMaker
from xllm.cli.bench.report import record_fields, show_summary, write_json
from xllm.cli.bench.shapes import RequestShape
from xllm.cli.bench.targets import OpenAiTarget, ZmqTarget
from xllm.config.environment import read_environment
from xllm.errors import ConfigError, DependencyError

DEFAULT_URL = "http://127.0.0.1:8010/v1"


@dataclasses.dataclass(frozen=True)
class EndpointOptions:
    """Where the load goes and how it is said."""

    base_url: str
    zmq: str
    api: str
    model: str
    api_key_env: str
    prompts: str
    vocab_size: int
    temperature: float
    ignore_eos: bool
    extra_body: str
    timeout: float
    keys_dir: str
    server_key: str


@click.command(
    context_settings={"max_content_width": 100},
    short_help="Put load on a running endpoint and show its figures.",
)
@click.option(
    "--base-url",
    default=DEFAULT_URL,
    show_default=True,
    metavar="URL",
    help="OpenAI-compatible endpoint, as its clients name it.",
)
@click.option("--zmq", default="", metavar="TCP", help="Load this ZeroMQ endpoint of a router.")
@click.option(
    "--api",
    type=click.Choice(["completions", "chat"]),
    default="completions",
    show_default=True,
    help="Which of the two is asked, streamed.",
)
@click.option("--model", default="", metavar="NAME", help="[default: the first that is served]")
@click.option(
    "--api-key-env",
    default="OPENAI_API_KEY",
    show_default=True,
    metavar="VARIABLE",
    help="Environment variable that holds the key, if there is one.",
)
@click.option(
    "--prompts",
    type=click.Choice(["text", "ids"]),
    default="text",
    show_default=True,
    help="Completions: words (about a token each), or token ids of exact number.",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(min=8),
    default=10_000,
    show_default=True,
    metavar="N",
    help="Ids are drawn below this.",
)
@click.option("--temperature", type=click.FLOAT, default=0.0, show_default=True)
@click.option(
    "--ignore-eos/--no-ignore-eos",
    default=True,
    help="Ask for outputs of exact length; off for servers that do not know it. [default: on]",
)
@click.option("--extra-body", default="", metavar="JSON", help="More fields of each request.")
@click.option("--timeout", type=click.FLOAT, default=600.0, show_default=True, metavar="S")
@click.option("--keys-dir", default="", metavar="DIR", help="--zmq: directory with our keys.")
@click.option("--server-key", default="", metavar="KEY", help="--zmq: the router's public key.")
@dataset_options
@arrival_options
@click.option("--max-concurrency", type=click.IntRange(min=1), default=None, metavar="N")
@click.option("--warm-up", type=click.IntRange(min=0), default=1, show_default=True, metavar="N")
@click.option("--slo-ttft", type=click.FLOAT, default=None, metavar="MS", help="For goodput.")
@click.option("--slo-tpot", type=click.FLOAT, default=None, metavar="MS", help="For goodput.")
@click.option("--slo-e2e", type=click.FLOAT, default=None, metavar="MS", help="For goodput.")
@click.option("--json", "json_path", default="", metavar="FILE", help="All figures as JSON.")
@click.option("--plot", default="", metavar="FILE", help="Picture (.png, .svg, .pdf).")
def serve(
    dataset: Dataset,
    arrivals: Arrivals,
    max_concurrency: int | None,
    warm_up: int,
    slo_ttft: float | None,
    slo_tpot: float | None,
    slo_e2e: float | None,
    json_path: str,
    plot: str,
    **endpoint: Any,
) -> int:
    """Put load on a running endpoint and show its latencies and rates: any OpenAI-compatible
    server by --base-url, or an xLLM router by --zmq."""
    options = EndpointOptions(**endpoint)
    if plot:
        check_plot(plot)
    shapes = dataset.shapes()
    times = arrivals.times(shapes, dataset.seed)
    objectives = Objectives(*(_seconds(bound) for bound in (slo_ttft, slo_tpot, slo_e2e)))
    target = make_target(options, dataset.seed)
    records = asyncio.run(
        _measure(target, shapes, times, max_concurrency, warm_up, options.timeout)
    )
    summary = summarize(records, objectives)
    show_summary(summary)
    where = options.zmq or options.base_url
    if json_path:
        asked = dataclasses.asdict(options) | {"dataset": dataclasses.asdict(dataset)}
        asked |= {"arrivals": dataclasses.asdict(arrivals), "max_concurrency": max_concurrency}
        write_json(json_path, _content(asked, objectives, summary, records))
    if plot:
        write_plot(plot, f"{target.model} at {where}", records)
    return 0 if summary.num_completed else DependencyError.exit_code


def make_target(options: EndpointOptions, seed: int) -> OpenAiTarget | ZmqTarget:
    """What the options name. ConfigError for fields that are no JSON object."""
    sampling: dict[str, Any] = {"temperature": options.temperature}
    if options.ignore_eos:
        sampling["ignore_eos"] = True
    if options.zmq:
        return ZmqTarget(
            options.zmq,
            model=options.model,
            seed=seed,
            sampling=sampling,
            timeout_s=options.timeout,
            keys_dir=options.keys_dir,
            server_key=options.server_key,
        )
    try:
        extra = json.loads(options.extra_body or "{}")
        sampling |= extra
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--extra-body is no JSON object: {error}", param="extra-body") from error
    return OpenAiTarget(
        options.base_url,
        chat=options.api == "chat",
        model=options.model,
        maker=PromptMaker(seed, options.vocab_size),
        use_ids=options.prompts == "ids",
        fields=sampling,
        api_key=read_environment().get(options.api_key_env, ""),
        timeout_s=options.timeout,
    )


async def _measure(
    target: OpenAiTarget | ZmqTarget,
    shapes: list[RequestShape],
    times: list[float],
    concurrency: int | None,
    warm_up: int,
    timeout_s: float,
) -> list[RequestRecord]:
    try:
        await target.find_model()
        if warm_up:
            await _warm(target, [shapes[i % len(shapes)] for i in range(warm_up)], timeout_s)
        with BenchProgress("requests", len(shapes)) as progress:
            failed = 0

            def ended(record: RequestRecord) -> None:
                nonlocal failed
                failed += bool(record.error)
                progress.advance(f"{failed} failed" if failed else "")

            return await run_load(target, shapes, times, concurrency, timeout_s, ended)
    finally:
        await target.close()


async def _warm(
    target: OpenAiTarget | ZmqTarget, shapes: list[RequestShape], timeout_s: float
) -> None:
    """Requests that are not counted, so that what is made at first use is there. Their prompts
    differ from those of the load: nothing of it may be cached."""
    unshared = [dataclasses.replace(shape, shared=(("warm-up", 1),)) for shape in shapes]
    times = [0.0] * len(unshared)
    records = await run_load(target, unshared, times, None, timeout_s, lambda record: None)
    errors = [record.error for record in records if record.error]
    if errors:
        click.echo(f"warm-up: {len(errors)} of {len(records)} failed: {errors[0]}", err=True)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _content(
    asked: dict[str, Any],
    objectives: Objectives,
    summary: Summary,
    records: list[RequestRecord],
) -> dict[str, Any]:
    return {
        "asked": asked,
        "objectives": dataclasses.asdict(objectives),
        "summary": dataclasses.asdict(summary),
        "requests": [record_fields(record) for record in records],
    }
