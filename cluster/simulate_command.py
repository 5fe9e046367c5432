"""What does ``prfaas simulate`` do? Read a document and a workload, simulate, print: effects only.

A name of ``--compare`` is a routing policy, or says how ``prfaas`` routes: ``dual`` (the planner), ``local`` (nothing
is offloaded), ``remote`` (everything is) or ``static:TOKENS``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.config import PLANNER_DUAL, PLANNER_OFF, PLANNER_STATIC, load_config
from cluster.plan_document import SECTION, PlanDocument, PlanOptions, load_plan
from cluster.planned_fleet import demand_of, read_trace_of
from cluster.routing_policy import POLICIES
from cluster.simulator.planned_scenario import ScenarioOptions, scenario_of
from cluster.simulator.plots import draw_results
from cluster.simulator.result_report import result_as_dict, result_table
from cluster.simulator.scenario import Scenario
from cluster.simulator.workload import GAMMA, POISSON, TRACE, USERS, ArrivalPlan, Workload, from_lengths, from_trace
from cluster.simulator.world import OnProgress, SimulationResult
from cluster.simulator.world import simulate as run_simulation
from cluster.workload_traces import read_trace
from cluster.yaml_source import read_yaml
from core.errors import InvalidConfig

_WRONG_INPUT = 2
_PIPE_COLUMNS = 160
_PLANNERS = ("dual", "local", "remote")

EPILOG = """The paper's case study, 2,000 requests of its lengths at 2.5 a second:

prfaas simulate deploy/examples/prfaas-paper.yaml --rate 2.5 --requests 2000

A trace, two ways of planning beside each other, drawn:

prfaas simulate deploy/examples/prfaas-paper.yaml --trace deploy/examples/trace.jsonl --compare dual,local --plot plots

The document's keys and what is simulated: docs/simulation.md."""

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG.yaml", help="A planning document, or a service's YAML with a section `plan`.")
]
Trace = Annotated[Path | None, typer.Option(help="Requests: CSV or JSON lines, may be gzipped (docs/simulation.md).")]
Lengths = Annotated[
    str | None, typer.Option(metavar="FORM", help="Prompt lengths: fixed:2048 or log_normal:9.9,1.0,128,131072.")
]
Rate = Annotated[float | None, typer.Option(help="Requests/s; of a trace with instants: they are stretched to it.")]
Burstiness = Annotated[
    float | None, typer.Option(help="Gaps are gamma distributed, of this shape: below 1 in bursts, as in vllm bench.")
]
Users = Annotated[int | None, typer.Option(help="A closed loop: so many users, each with one conversation at a time.")]
Requests = Annotated[int | None, typer.Option(help="Requests at most; 1,000 where lengths are drawn.")]
Spread = Annotated[float, typer.Option(help="Move a trace's instants by up to so many seconds (Mooncake's: 3).")]
Seed = Annotated[int, typer.Option(help="Equal seeds give equal results.")]
Slo = Annotated[str | None, typer.Option(metavar="LIMITS", help="Seconds, e.g. ttft=2,tpot=0.025.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one key of the document, e.g. links.wan.gbps=4. Repeatable."),
]
Costs = Annotated[Path | None, typer.Option(help="Take seconds from a service's router.costs_file.")]
CatalogueFile = Annotated[Path | None, typer.Option("--catalogue", help="A YAML file with more models and devices.")]
Latency = Annotated[float, typer.Option("--link-latency", help="Of links between clusters, one way, seconds.")]
Compare = Annotated[
    str | None,
    typer.Option(metavar="POLICY,...", help="Routing policies, or dual, local, remote, static:TOKENS, side by side."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Plot = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Draw latencies, goodput, utilisation and plan into DIR.")
]


def simulate(
    config_file: ConfigFile,
    trace: Trace = None,
    lengths: Lengths = None,
    rate: Rate = None,
    burstiness: Burstiness = None,
    users: Users = None,
    requests: Requests = None,
    spread: Spread = 0.0,
    slo: Slo = None,
    seed: Seed = 0,
    overrides: Overrides = None,
    costs: Costs = None,
    catalogue: CatalogueFile = None,
    link_latency: Latency = 0.005,
    compare: Compare = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Run a workload through a fleet in virtual time: production router, planner, schedulers and page allocators."""
    try:
        document = load_plan(config_file, PlanOptions(tuple(overrides or ()), trace, lengths, slo, catalogue))
        scenario = _scenario(document, config_file, ScenarioOptions(link_latency, costs))
        arrivals = _arrivals(rate, burstiness, users, spread, document)
        workload = _workload(document, arrivals, seed, requests)
        variants = [("as configured", scenario)] if compare is None else _variants(scenario, compare)
        results = [(name, _run(name, variant, workload)) for name, variant in variants]
        limits = document.config.slo
        drawn = [] if plot is None else draw_results(results, plot, limits.ttft_s, limits.tpot_s)
    except InvalidConfig as error:
        typer.echo(f"prfaas: {error}", err=True)
        raise typer.Exit(_WRONG_INPUT) from None
    found = [(name, result_as_dict(result, limits.ttft_s, limits.tpot_s)) for name, result in results]
    if as_json:
        typer.echo(json.dumps(found[0][1] if compare is None else dict(found), indent=1, allow_nan=False))
    else:
        console = Console(highlight=False) if sys.stdout.isatty() else Console(width=_PIPE_COLUMNS, highlight=False)
        console.print(result_table(found))
    for path in drawn:
        typer.echo(f"drawn: {path}", err=True)


def _scenario(document: PlanDocument, path: Path, options: ScenarioOptions) -> Scenario:
    workload = document.config.workload
    demand = demand_of(workload, read_trace_of(workload, document.folder))
    service = load_config(path) if SECTION in read_yaml(path).values else None
    with document.source.errors(document.section, document.overridden_keys):
        return scenario_of(document.config, document.catalogue, demand, service, options)


def _arrivals(
    rate: float | None, burstiness: float | None, users: int | None, spread: float, document: PlanDocument
) -> ArrivalPlan:
    rate = document.config.workload.rate_rps if rate is None else rate
    if users is not None:
        return ArrivalPlan(USERS, num_users=users)
    if burstiness is not None:
        return ArrivalPlan(GAMMA, rate, burstiness)
    if document.config.workload.trace is None:
        return ArrivalPlan(POISSON, rate)
    return ArrivalPlan(TRACE, rate, spread_s=spread)


def _workload(document: PlanDocument, arrivals: ArrivalPlan, seed: int, requests: int | None) -> Workload:
    plan = document.config.workload
    if plan.trace is not None:
        path = document.folder / plan.trace
        try:
            return from_trace(read_trace(path), arrivals, seed=seed, max_requests=requests)
        except InvalidConfig as error:
            if error.key != TRACE or arrivals.rate_rps is None:
                raise
            # Instants that a trace does not tell are drawn, if there is a rate.
            return from_trace(read_trace(path), replace(arrivals, process=POISSON), seed=seed, max_requests=requests)
    demand = demand_of(plan)
    output = max(1, round(demand.mean_output_tokens))
    quantile = demand.lengths.quantile
    return from_lengths(
        lambda random: (max(1, round(quantile(random.random()))), output), requests or 1000, arrivals, seed=seed
    )


def _variants(scenario: Scenario, compare: str) -> list[tuple[str, Scenario]]:
    return [(name.strip(), _variant(scenario, name.strip())) for name in compare.split(",")]


def _variant(scenario: Scenario, name: str) -> Scenario:
    """The scenario with another routing policy, or another way of planning."""
    if name in POLICIES:
        return replace(scenario, router=replace(scenario.router, policy=name))
    planner, prfaas = scenario.planner, replace(scenario.router, policy="prfaas")
    kind, _, tokens = name.partition(":")
    if kind == "dual":
        return replace(scenario, router=prfaas, planner=replace(planner, mode=PLANNER_DUAL))
    if kind == "local":
        return replace(scenario, router=prfaas, planner=replace(planner, mode=PLANNER_OFF))
    if kind == "remote" or (kind == "static" and tokens.isdecimal()):
        threshold = 0 if kind == "remote" else int(tokens)
        static = replace(planner, mode=PLANNER_STATIC, threshold_tokens=threshold)
        return replace(scenario, router=prfaas, planner=static)
    allowed = ", ".join([*POLICIES, *_PLANNERS, "static:TOKENS"])
    raise InvalidConfig("--compare", f"must list some of {allowed}, got {name!r}")


def _run(name: str, scenario: Scenario, workload: Workload) -> SimulationResult:
    with _progress(name, workload.num_requests) as on_progress:
        return run_simulation(scenario, workload, on_progress)


@contextmanager
def _progress(name: str, total: int) -> Iterator[OnProgress | None]:
    """A bar with an estimate on standard error, if anyone looks at it."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield _updater(bar, task)


def _updater(bar: Progress, task: object) -> Callable[[int], None]:
    return lambda num_ended: bar.update(task, completed=num_ended)  # type: ignore[arg-type]
