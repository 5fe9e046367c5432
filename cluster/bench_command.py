"""What does ``prfaas bench`` do? Read a workload, send it to every arm at every load, print: effects only.

What is sent when is bench/schedule.py's, what it says bench/prompts.py's, who sends it bench/load.py's, and which
numbers come of it bench/metrics.py's.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cluster.bench.client_record import MEASURED, ClientRecord
from cluster.bench.endpoints import FORMS, ConfiguredService, Endpoint, make_target, parse_arm, parse_endpoint, running
from cluster.bench.load import LoadLimits, run_load
from cluster.bench.metrics import NO_SLOS, Slos, summary
from cluster.bench.plots import draw_report
from cluster.bench.prompts import TokenWording, Wording, text_wording, word_pool
from cluster.bench.report import BenchReport, Point, comparison_table, loss_lines, point_table, warnings
from cluster.bench.schedule import LENGTH_FORMS, DrawnRequests, Schedule, make_schedule, parse_lengths
from cluster.bench.target import AUTO, GRPC, IGNORE_EOS, EndpointFailed, Facts, Message, Prompt, Target
from cluster.service_process import ServiceNotHealthy
from cluster.simulator.workload import GAMMA, POISSON, TRACE, USERS, ArrivalPlan
from cluster.tokenizer import ChatMessage, Tokenizer
from cluster.workload_traces import TraceRequest, read_trace
from core.clock import Clock, WallClock
from core.errors import InvalidConfig, UnsupportedModel
from engine.model_source import resolve

_FAILED, _WRONG_INPUT, _INTERRUPTED = 1, 2, 130
_PIPE_COLUMNS = 200
_DEFAULT_REQUESTS = 100
_KEY_VARIABLE = "OPENAI_API_KEY"
_WARM_SEED = 0x5EED  # warm-up prompts share nothing with those that are measured
_FIRST_ORDINARY_ID = 256  # ids below are special tokens or bytes in most vocabularies

EPILOG = f"""A hundred requests of 512 tokens in and 64 out, eight at once, over HTTP and over gRPC:

prfaas bench http://127.0.0.1:8000 --lengths 512 --output 64 --concurrency 8

prfaas bench 127.0.0.1:9000 --lengths 512 --output 64 --concurrency 8

A trace at three rates, goodput under two limits, every request as a line of JSON:

prfaas bench http://127.0.0.1:8000 --trace trace.jsonl --rate 1,2,4 --slo ttft=2,tpot=0.05 --records requests.jsonl

Two ways of using the same machine, one after the other, drawn:

prfaas bench --compare split=service.yaml --compare 'whole=service.yaml?prefill.count=0&decode.count=2' --lengths 256
--rate 0.5,1,2 --slo ttft=2,tpot=0.1 --plot plots

ENDPOINT is {FORMS}. What each number means, and how other load generators count: docs/benchmarking.md."""

Target_ = Annotated[str | None, typer.Argument(metavar="[ENDPOINT]", help="What to measure; see below.")]
Compare = Annotated[
    list[str] | None,
    typer.Option(metavar="LABEL=ENDPOINT", help="Measure several, one after the other. Repeatable."),
]
Api = Annotated[str | None, typer.Option(help="chat (the default over HTTP), completions or grpc.")]
Model = Annotated[str | None, typer.Option(help="Model name; without it, the first that the endpoint lists.")]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", envvar=_KEY_VARIABLE, help="Sent as a bearer token.", show_envvar=True)
]
TokenizerOf = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="MODEL",
        help="Folder, hub id or package of the served model: prompts of exact lengths. Without it one word is taken "
        "for one token, corrected by what the server counts.",
    ),
]
IgnoreEos = Annotated[str, typer.Option(help="Send ignore_eos, so that answers are as long as asked: auto, on, off.")]
Trace = Annotated[Path | None, typer.Option(help="Requests: CSV or JSON lines, may be gzipped.")]
Lengths = Annotated[str | None, typer.Option(metavar="FORM", help=f"Prompt tokens: {LENGTH_FORMS}.")]
Output = Annotated[str | None, typer.Option(metavar="FORM", help="Answer tokens, the same forms; of a trace: its own.")]
Turns = Annotated[int, typer.Option(help="With --lengths: requests of each conversation.")]
Think = Annotated[float, typer.Option(help="With --turns: mean seconds between an answer and the next turn.")]
Rate = Annotated[str | None, typer.Option(metavar="R,...", help="Open loop: requests/s, one run for each.")]
Burstiness = Annotated[
    float | None, typer.Option(help="Gaps are gamma distributed, of this shape: below 1 in bursts, as in vllm bench.")
]
Speed = Annotated[str | None, typer.Option(metavar="S,...", help="A trace's instants, so many times as fast.")]
Concurrency = Annotated[
    str | None, typer.Option(metavar="N,...", help="Closed loop: so many users, each with one conversation at a time.")
]
MaxConcurrency = Annotated[int | None, typer.Option(help="Open loop: hold requests back while so many are under way.")]
Spread = Annotated[float, typer.Option(help="Move a trace's instants by up to so many seconds (Mooncake's: 3).")]
Requests = Annotated[int | None, typer.Option(help=f"Requests at most; {_DEFAULT_REQUESTS} where lengths are drawn.")]
Duration = Annotated[float | None, typer.Option(help="Send nothing later than so many seconds.")]
WarmUp = Annotated[int, typer.Option("--warmup", help="Requests before each run that are not measured.")]
Timeout = Annotated[float, typer.Option(help="Seconds after which a request has failed.")]
SloLimits = Annotated[
    str | None,
    typer.Option("--slo", metavar="LIMITS", help="Seconds: ttft=2,tpot=0.05 (ttst, tbt, e2e; attainment)."),
]
Seed = Annotated[int, typer.Option(help="Equal seeds send equal requests; a server that caches prefixes finds them.")]
Records = Annotated[Path | None, typer.Option(metavar="FILE", help="Write every request there, one JSON line each.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Plot = Annotated[Path | None, typer.Option(metavar="DIR", help="Draw the comparison into DIR.")]


def bench(
    endpoint: Target_ = None,
    compare: Compare = None,
    api: Api = None,
    model: Model = None,
    api_key: ApiKey = None,
    tokenizer: TokenizerOf = None,
    ignore_eos: IgnoreEos = AUTO,
    trace: Trace = None,
    lengths: Lengths = None,
    output: Output = None,
    turns: Turns = 1,
    think: Think = 0.0,
    rate: Rate = None,
    burstiness: Burstiness = None,
    speed: Speed = None,
    concurrency: Concurrency = None,
    max_concurrency: MaxConcurrency = None,
    spread: Spread = 0.0,
    requests: Requests = None,
    duration: Duration = None,
    warmup: WarmUp = 1,
    timeout: Timeout = 600.0,
    slo: SloLimits = None,
    seed: Seed = 0,
    records: Records = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Send requests to a service, any OpenAI-compatible or prfaas one, and say how long they took.

    Exit code 0: measured. 1: an endpoint cannot be used, or no request finished. 2: the command is wrong.
    """
    try:
        if ignore_eos not in IGNORE_EOS:
            raise InvalidConfig("--ignore-eos", f"must be one of {', '.join(IGNORE_EOS)}, got {ignore_eos!r}")
        arms = _arms(endpoint, compare, api)
        loads = _loads(rate, concurrency, speed, burstiness, spread, has_trace=trace is not None)
        source = _source(trace, lengths, output, turns, think, requests)
        limits = _limits(timeout, duration, max_concurrency, loads[0])
        slos = NO_SLOS if slo is None else Slos.parse(slo)
        asked = _Asked(source, loads, limits, slos, seed, warmup, requests, model, api_key, ignore_eos)
        with _opened(records) as lines:
            report, was_interrupted = _measure_all(asked, arms, _tokenizer(tokenizer), lines)
        drawn = [] if plot is None or not report.points else draw_report(report, plot)
    except (InvalidConfig, UnsupportedModel) as error:
        typer.echo(f"prfaas: {error}", err=True)
        raise typer.Exit(_WRONG_INPUT) from None
    except (EndpointFailed, ServiceNotHealthy) as error:
        typer.echo(f"prfaas: {error}", err=True)
        raise typer.Exit(_FAILED) from None
    _print(report, as_json)
    for path in drawn:
        typer.echo(f"drawn: {path}", err=True)
    if was_interrupted:
        raise typer.Exit(_INTERRUPTED)
    raise typer.Exit(0 if any(point.summary["num_finished"] for point in report.points) else _FAILED)


# ---- what was asked for ----


@dataclass(frozen=True)
class _Load:
    """One point of a sweep."""

    value: float
    name: str
    arrivals: ArrivalPlan
    speed: float = 1.0


@dataclass(frozen=True)
class _Asked:
    """The command line, understood."""

    source: Callable[[int], Sequence[TraceRequest]]  # seed |-> requests
    loads: Sequence[_Load]
    limits: LoadLimits
    slos: Slos
    seed: int
    warm_up: int
    max_requests: int | None
    model: str | None
    api_key: str | None
    ignore_eos: str

    @property
    def axis(self) -> str:
        """What differs between loads."""
        arrivals = self.loads[0].arrivals
        if arrivals.process == USERS:
            return "users"
        return "requests/s" if arrivals.rate_rps is not None else "speed"


def _arms(endpoint: str | None, compare: list[str] | None, api: str | None) -> list[Endpoint]:
    if (endpoint is None) == (not compare):
        raise InvalidConfig("ENDPOINT", f"give one ({FORMS}), or --compare LABEL=ENDPOINT for each of several")
    if endpoint is not None:
        return [parse_endpoint(endpoint, api)]
    arms = [parse_arm(text, api) for text in compare or ()]
    labels = [arm.label for arm in arms]
    if len(set(labels)) < len(labels):
        raise InvalidConfig("--compare", f"needs a label of its own for each endpoint, got {', '.join(labels)}")
    return arms


def _loads(
    rate: str | None,
    concurrency: str | None,
    speed: str | None,
    burstiness: float | None,
    spread: float,
    *,
    has_trace: bool,
) -> list[_Load]:
    given = {"--rate": rate, "--concurrency": concurrency, "--speed": speed}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise InvalidConfig(chosen[1], f"must not be given with {chosen[0]}: both say when requests come")
    if burstiness is not None and rate is None:
        raise InvalidConfig("--burstiness", "needs --rate")
    if speed is not None and not has_trace:
        raise InvalidConfig("--speed", "needs --trace, whose instants it scales")
    if spread and not has_trace:
        raise InvalidConfig("--spread", "needs --trace, whose instants it moves")
    if concurrency is not None:
        users = _numbers(concurrency, "--concurrency", whole=True)
        return [_Load(n, f"{n:g} users", ArrivalPlan(USERS, num_users=int(n))) for n in users]
    if rate is not None:
        return [
            _Load(value, f"{value:g} req/s", _at_rate(value, burstiness, spread, has_trace))
            for value in _numbers(rate, "--rate")
        ]
    if has_trace:
        speeds = _numbers(speed or "1", "--speed")
        return [_Load(value, f"speed {value:g}", ArrivalPlan(TRACE, spread_s=spread), value) for value in speeds]
    return [_Load(1.0, "1 user", ArrivalPlan(USERS, num_users=1))]


def _at_rate(rate: float, burstiness: float | None, spread: float, has_trace: bool) -> ArrivalPlan:
    if burstiness is not None:
        if not burstiness > 0:
            raise InvalidConfig("--burstiness", f"must be above 0, got {burstiness:g}")
        return ArrivalPlan(GAMMA, rate, burstiness)
    return ArrivalPlan(TRACE, rate, spread_s=spread) if has_trace else ArrivalPlan(POISSON, rate)


def _numbers(text: str, option: str, *, whole: bool = False) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < number < float("inf") for number in found):
        raise InvalidConfig(option, f"must be numbers above 0, separated by commas; got {text!r}")
    if whole and not all(number.is_integer() for number in found):
        raise InvalidConfig(option, f"must be integers of at least 1, separated by commas; got {text!r}")
    return found


def _source(
    trace: Path | None, lengths: str | None, output: str | None, turns: int, think: float, requests: int | None
) -> Callable[[int], Sequence[TraceRequest]]:
    if requests is not None and requests < 1:
        raise InvalidConfig("--requests", f"must be at least 1, got {requests}")
    if (trace is None) == (lengths is None):
        raise InvalidConfig("--lengths", f"give either it ({LENGTH_FORMS}) or --trace FILE")
    if trace is not None:
        for name, is_given in (("--output", output is not None), ("--turns", turns != 1), ("--think", think != 0)):
            if is_given:
                raise InvalidConfig(name, "must not be given with --trace, which says so itself")
        read = list(read_trace(trace))
        return lambda seed: read
    assert lengths is not None, "one of the two is given"
    drawn = DrawnRequests(
        parse_lengths(lengths, "--lengths"),
        parse_lengths(output or "128", "--output"),
        requests or _DEFAULT_REQUESTS,
        turns,
        think,
    )
    return lambda seed: list(drawn.draw(seed))


def _limits(timeout: float, duration: float | None, max_concurrency: int | None, load: _Load) -> LoadLimits:
    for name, value in (("--timeout", timeout), ("--duration", duration)):
        if value is not None and not value > 0:
            raise InvalidConfig(name, f"must be above 0 s, got {value:g}")
    if max_concurrency is not None:
        if max_concurrency < 1:
            raise InvalidConfig("--max-concurrency", f"must be at least 1, got {max_concurrency}")
        if load.arrivals.process == USERS:
            raise InvalidConfig("--max-concurrency", "is of an open loop (--rate, --trace); a closed one has it")
    return LoadLimits(timeout, duration, max_concurrency)


def _tokenizer(model: str | None) -> Tokenizer | None:
    if model is None:
        return None
    try:
        return Tokenizer.load(resolve(model).folder)
    except (OSError, ValueError, UnsupportedModel) as error:
        raise InvalidConfig("--tokenizer", f"cannot be loaded: {error}") from error


# ---- measuring ----


def _measure_all(
    asked: _Asked, arms: Sequence[Endpoint], tokenizer: Tokenizer | None, lines: TextIO | None
) -> tuple[BenchReport, bool]:
    """Every arm at every load; what there is of it, and whether somebody interrupted."""
    points: list[Point] = []
    facts: dict[str, Facts] = {}
    notes: list[str] = []
    clock = WallClock()
    try:
        with tempfile.TemporaryDirectory(prefix="prfaas-bench-") as folder:
            for arm in arms:
                with _started(arm, Path(folder)) as running_arm:
                    for number, load in enumerate(asked.loads):
                        runner = _Runner(asked, running_arm, tokenizer, lines, clock)
                        try:
                            asyncio.run(runner.run(load, number))
                        finally:
                            if runner.records:
                                found = summary(runner.records, asked.slos, loop_lag_s=runner.loop_lag_s)
                                points.append(Point(arm.label, load.value, load.name, found))
                            if runner.facts is not None:
                                facts[arm.label] = runner.facts
                            notes += [note for note in runner.notes if note not in notes]
    except KeyboardInterrupt:
        return BenchReport(tuple(points), asked.axis, facts, (*notes, "interrupted: the last run is not whole")), True
    return BenchReport(tuple(points), asked.axis, facts, tuple(notes)), False


class _Runner:
    """One arm at one load. ``records`` and ``facts`` fill up while it runs, so that an interrupted run leaves some."""

    def __init__(
        self, asked: _Asked, endpoint: Endpoint, tokenizer: Tokenizer | None, lines: TextIO | None, clock: Clock
    ) -> None:
        self._asked = asked
        self._endpoint = endpoint
        self._tokenizer = tokenizer
        self._lines = lines
        self._clock = clock
        self.records: list[ClientRecord] = []
        self.loop_lag_s: Sequence[float] = ()
        self.facts: Facts | None = None
        self.notes: list[str] = []

    async def run(self, load: _Load, number: int) -> None:
        """``number``: of the load; each has prompts of its own, so that no cache answers for an earlier one."""
        target = self._target()
        try:
            self.facts = await target.open()
            schedule = self._schedule(load, number)
            seed = self._asked.seed * 1000 + number
            wording, warm = (self._wording(one) for one in (seed, seed ^ _WARM_SEED))
            with _progress(f"{self._endpoint.label}, {load.name}", schedule.num_requests) as advance:

                def note(record: ClientRecord) -> None:
                    if record.phase == MEASURED:
                        self.records.append(record)
                        advance(record)
                    if self._lines is not None:
                        told = {"arm": self._endpoint.label, "load": load.value, **record.as_dict()}
                        self._lines.write(json.dumps(told) + "\n")

                result = await run_load(schedule, target, wording, warm, self._clock, self._asked.limits, note)
            self.loop_lag_s = result.loop_lag_s
        finally:
            await target.close()

    def _target(self) -> Target:
        tokenizer = self._tokenizer
        count = None if tokenizer is None else lambda text: len(tokenizer.encode(text, field="answer"))
        return make_target(
            self._endpoint,
            model=self._asked.model,
            api_key=self._asked.api_key,
            ignore_eos=self._asked.ignore_eos,
            count_output=count,
        )

    def _schedule(self, load: _Load, number: int) -> Schedule:
        asked, facts = self._asked, self.facts
        assert facts is not None, "asked first"
        requests = asked.source(asked.seed * 1000 + number)

        def make(arrivals: ArrivalPlan) -> Schedule:
            return make_schedule(
                requests,
                arrivals,
                speed=load.speed,
                seed=asked.seed,
                warm_up=asked.warm_up,
                max_requests=asked.max_requests,
                max_model_len=facts.max_model_len,
            )

        try:
            schedule = make(load.arrivals)
        except InvalidConfig as error:
            if error.key != TRACE or load.arrivals.process != TRACE:
                raise
            if load.arrivals.rate_rps is None:
                raise InvalidConfig("--trace", f"{error.message} (--rate or --concurrency)") from error
            # Instants that a trace does not tell are drawn, if there is a rate.
            schedule = make(replace(load.arrivals, process=POISSON))
            self.notes.append("the trace tells no instants that can be stretched: they are drawn (Poisson)")
        if schedule.num_left_out:
            self.notes.append(
                f"{self._endpoint.label}: {schedule.num_left_out} of the {len(requests)} requests are longer than the "
                f"model's context of {facts.max_model_len} tokens: left out, with what follows them"
            )
        return schedule

    def _wording(self, seed: int) -> Wording:
        facts, api = self.facts, self._endpoint.api
        assert facts is not None, "asked first"
        if api == GRPC:
            assert facts.vocab_size is not None, "a prfaas service says so"
            return _token_wording(facts.vocab_size, seed)
        pool = word_pool(self._tokenizer)
        return text_wording(api, facts, pool, None if self._tokenizer is None else self._count, seed)

    def _count(self, prompt: Prompt) -> int:
        """Tokens that the server will count in the prompt."""
        assert self._tokenizer is not None, "counted only then"
        if isinstance(prompt, str):
            return len(self._tokenizer.encode(prompt, field="prompt"))
        turns = [ChatMessage(part.role, part.content) for part in prompt if isinstance(part, Message)]
        return len(self._tokenizer.encode_chat(turns, field="messages"))


def _token_wording(vocab_size: int, seed: int) -> TokenWording:
    return TokenWording(vocab_size, seed, _FIRST_ORDINARY_ID if vocab_size > 2 * _FIRST_ORDINARY_ID else 0)


@contextmanager
def _started(arm: Endpoint, folder: Path) -> Iterator[Endpoint]:
    if not isinstance(arm.at, ConfiguredService):
        yield arm
        return
    with Console(stderr=True).status(f"{arm.label}: starting") as status:

        def say(waited_s: float, line: str) -> None:
            status.update(f"{arm.label}: starting, {waited_s:.0f} s  {line[:80]}")

        with running(arm, folder, say) as started:
            status.stop()
            yield started


@contextmanager
def _opened(path: Path | None) -> Iterator[TextIO | None]:
    if path is None:
        yield None
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as lines:
            yield lines
    except OSError as error:
        raise InvalidConfig("--records", f"cannot be written: {error}") from error


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[ClientRecord], None]]:
    """A bar with an estimate on standard error, if anyone looks at it."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda record: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=total)
        num_failed = 0

        def advance(record: ClientRecord) -> None:
            nonlocal num_failed
            num_failed += not record.ok
            bar.update(task, advance=1, description=f"{name}, {num_failed} failed" if num_failed else name)

        yield advance


# ---- telling ----


def _print(report: BenchReport, as_json: bool) -> None:
    lost = report.losses()
    said = warnings(report)
    if as_json:
        told = {
            "axis": report.axis,
            "endpoints": {label: asdict(facts) for label, facts in report.facts.items()},
            "points": [
                {"arm": point.arm, "load": point.load, "load_name": point.load_name, **point.summary}
                for point in report.points
            ],
            "losses": [asdict(one) for one in lost],
            "warnings": said,
        }
        typer.echo(json.dumps(told, indent=1, allow_nan=False))
    else:
        console = Console(highlight=False) if sys.stdout.isatty() else Console(width=_PIPE_COLUMNS, highlight=False)
        if len(report.arms) == 1 or len(report.points) == 1:
            for point in report.points:
                console.print(point_table(point))
        if len(report.points) > 1:
            console.print(comparison_table(report))
        for line in loss_lines(lost, report.axis):
            console.print(line, markup=False)
    for line in said:
        typer.echo(f"prfaas: {line}", err=True)
