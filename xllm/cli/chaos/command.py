"""`xllm chaos`: what is asked for on the command line, and the exit code.

0: every promise was kept. 1: one was not. 2: the run proves nothing, since a fault did not happen
or there was no load to feel it.
"""

from __future__ import annotations

import json

import click

from xllm.cli.chaos.ending import run_to_end
from xllm.cli.chaos.options import MAX_SLACK, ChaosOptions, FiniteRange
from xllm.cli.chaos.scenarios.table import SCENARIOS, Scenario
from xllm.errors import ConfigError

EXIT_BROKEN = 1
EXIT_INVALID = 2


@click.command(context_settings={"max_content_width": 100})
@click.option("--scenario", default="all", help="Names of faults, by commas, or all.")
@click.option("--list", "list_only", is_flag=True, help="List the faults and end.")
@click.option("--seconds", type=FiniteRange(0, 604_800), default=60.0, show_default=True,
              help="Time of the load; each fault comes once at least.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@click.option("--engine", type=click.Choice(["toy", "native"]), default="toy", show_default=True)
@click.option("--instances", type=click.IntRange(2, 16), default=2, show_default=True)
@click.option("--routers", type=click.IntRange(1, 8), default=2, show_default=True)
@click.option("--streams", type=click.IntRange(1, 4096), default=32, show_default=True,
              help="Streams in their middle at each fault.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(20, 4000), default=200, show_default=True,
              help="New tokens of a request, about.")  # fmt: skip
@click.option("--step-ms", type=FiniteRange(0, 1000), default=20.0, show_default=True,
              help="Time of a toy step.")  # fmt: skip
@click.option("--registry", default="embedded", show_default=True, metavar="embedded|etcd|ADDRESS",
              help="The launcher's own, an etcd of its own, or one that runs.")  # fmt: skip
@click.option("--model", default="", help="Model directory; empty: the bundled one.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--slack", type=FiniteRange(1, MAX_SLACK), default=1.0, show_default=True,
              help="Multiplies the bounds of times.")  # fmt: skip
@click.option("--keep", is_flag=True, help="Leave the directory with the logs behind.")
def chaos(scenario: str, list_only: bool, as_json: bool, **options: object) -> int:
    """Start a cluster on this machine, stream from it, hurt it, and compare every token with what
    an undisturbed run gives. Says how long streams paused and how soon the fault was noticed."""
    if list_only:
        for one in SCENARIOS.values():
            click.echo(f"{one.name:<12} {one.title}")
        return 0
    chosen = choose(scenario)
    made = ChaosOptions(**options)  # type: ignore[arg-type]  # click checked them
    return run_to_end(_run(made, chosen, as_json))


def choose(names: str) -> list[Scenario]:
    """The scenarios of these names; ConfigError for an unknown one."""
    if names == "all":
        return list(SCENARIOS.values())
    found = []
    for name in names.split(","):
        matching = [one for one in SCENARIOS.values() if _matches(one.name, name.strip())]
        if not matching:
            raise ConfigError(f"no fault is called {name!r}; --list shows them", param="scenario")
        found += [one for one in matching if one not in found]
    return found


def _matches(known: str, wanted: str) -> bool:
    """F03 stands for F03-kill and F03-segv, too."""
    return known.lower() == wanted.lower() or known.lower().startswith(f"{wanted.lower()}-")


async def _run(options: ChaosOptions, chosen: list[Scenario], as_json: bool) -> int:
    from xllm.cli.chaos.report import table  # tokenizers: not for `--help`
    from xllm.cli.chaos.session import ChaosSession

    session = ChaosSession(options, chosen, lambda line: click.echo(line, err=True))
    report = await session.run()
    found = report.as_json()
    if as_json:
        click.echo(json.dumps(found))
    else:
        for line in table(found):
            click.echo(line)
    if not found["valid"]:
        return EXIT_INVALID
    return 0 if found["passed"] else EXIT_BROKEN
