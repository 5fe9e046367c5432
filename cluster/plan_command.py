"""What does ``prfaas plan`` do? Read a planning document, plan, print: effects only, the plan is capacity_plan.py's."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.capacity_plan import CapacityPlan, make_plan
from cluster.plan_document import PlanDocument, PlanOptions, load_plan, still_inferred
from cluster.plan_plots import draw_plan
from cluster.plan_report import plan_as_dict, plan_tables
from cluster.planned_fleet import demand_of, read_trace_of
from core.errors import InvalidConfig

_WRONG_INPUT = 2
_PIPE_COLUMNS = 160

EPILOG = """What the paper's case study gives, and what it would give on a link of 4 Gbit/s:

prfaas plan deploy/examples/prfaas-paper.yaml

prfaas plan deploy/examples/prfaas-paper.yaml --set links.wan.gbps=4

Your own traffic and SLO, drawn and as JSON:

prfaas plan deploy/examples/prfaas-paper.yaml --trace deploy/examples/trace.jsonl --slo ttft=10,tpot=0.025 --plot plots

prfaas plan deploy/examples/prfaas-paper.yaml --json | jq '.threshold_tokens, .throughput_rps'

The document's keys, and how to plan the YAML that you serve: docs/planning.md."""

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG.yaml", help="A planning document, or a service's YAML with a section `plan`.")
]
Trace = Annotated[
    Path | None,
    typer.Option(help="Take prompt lengths, mean output and rate from this trace (CSV or JSON lines, may be gzipped)."),
]
Lengths = Annotated[
    str | None, typer.Option(metavar="FORM", help="Prompt lengths: fixed:2048 or log_normal:9.9,1.0,128,131072.")
]
Slo = Annotated[
    str | None, typer.Option(metavar="LIMITS", help="Seconds, e.g. ttft=2,tpot=0.025 (and attainment=0.9, a share).")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one key of the document, e.g. links.wan.gbps=4. Repeatable."),
]
CatalogueFile = Annotated[Path | None, typer.Option("--catalogue", help="A YAML file with more models and devices.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Plot = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Draw throughput by threshold, roles and link into DIR.")
]


def plan(
    config_file: ConfigFile,
    trace: Trace = None,
    lengths: Lengths = None,
    slo: Slo = None,
    overrides: Overrides = None,
    catalogue: CatalogueFile = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Say what a fleet would give before you buy it: roles, threshold, rates, latencies, egress, and what more buys."""
    options = PlanOptions(tuple(overrides or ()), trace, lengths, slo, catalogue)
    try:
        document = load_plan(config_file, options)
        made = _planned(document)
        inferred = still_inferred(document)
        drawn = [] if plot is None else draw_plan(made, plot)
    except InvalidConfig as error:
        typer.echo(f"prfaas: {error}", err=True)
        raise typer.Exit(_WRONG_INPUT) from None
    if as_json:
        typer.echo(json.dumps(plan_as_dict(made, inferred), indent=2))
    else:
        console = Console(highlight=False) if sys.stdout.isatty() else Console(width=_PIPE_COLUMNS, highlight=False)
        for table in plan_tables(made, inferred):
            console.print(table)
            console.print()
    for path in drawn:
        typer.echo(f"drawn: {path}", err=True)


def _planned(document: PlanDocument) -> CapacityPlan:
    workload = document.config.workload
    with _progress(document) as on_bytes:
        trace = read_trace_of(workload, document.folder, on_bytes)
    with document.source.errors(document.section, document.overridden_keys):
        return make_plan(document.config, document.catalogue, demand_of(workload, trace))


@contextmanager
def _progress(document: PlanDocument) -> Iterator[Callable[[int], None] | None]:
    """A bar on standard error while a trace is read, if anyone looks at it."""
    name = document.config.workload.trace
    path = None if name is None else document.folder / name
    console = Console(stderr=True)
    if path is None or not path.is_file() or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("reading {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(path.name, total=path.stat().st_size)
        yield lambda num_bytes: bar.update(task, completed=num_bytes)
