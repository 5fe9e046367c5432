"""The ``prfaas`` command: plan a fleet, start a service, talk to one, look into one.

``serve`` runs a service in this process; ``generate``, ``chat`` and ``status`` are clients of a running one and speak
nothing but its public gRPC API. What the model says goes to standard output, everything else to standard error.
Exit codes: 0 done, 1 the service refused or could not be reached, 2 the command or the configuration is wrong,
130 interrupted.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import grpc
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from cluster.api_keys import AUTHORIZATION
from cluster.bench_command import EPILOG as BENCH_EPILOG
from cluster.bench_command import bench
from cluster.certificates import (
    AUTHORITY_DAYS,
    CA_KEY_FILE,
    CERTIFICATE_DAYS,
    Authority,
    CertificateSummary,
    read_certificates,
    summarize,
    write_files,
)
from cluster.config import UNSALTED, ServiceConfig, load_config, service_document, service_schema
from cluster.initial_roles import with_initial_roles
from cluster.message_json import as_dict
from cluster.metric_catalogue import document as metric_document
from cluster.plan_command import EPILOG as PLAN_EPILOG
from cluster.plan_command import plan
from cluster.plan_document import check_section
from cluster.simulate_command import EPILOG as SIMULATE_EPILOG
from cluster.simulate_command import simulate
from cluster.tables import (
    check_table,
    cluster_link_table,
    cost_table,
    engine_table,
    link_table,
    plan_history_table,
    plan_table,
    pool_table,
    tier_table,
    timing_table,
    worker_table,
)
from cluster.top_frame import frame
from cluster.version import version
from core.errors import InvalidConfig, PrfaasError, UnsupportedModel
from core.prefix_hash import tenant_of
from protos import serving_pb2 as pb
from protos import serving_pb2_grpc as rpc

DEFAULT_ADDRESS = "127.0.0.1:9000"
_INFO_TIMEOUT_S = 10.0
_INTERRUPTED = 130
_TOP_REQUESTS = 40  # that `top` asks for; percentiles are of these
_PIPE_COLUMNS = 160  # a table that is read by a program must not be folded

app = typer.Typer(
    name="prfaas",
    help="Serve language models with prefill and decode on separate workers.",
    epilog="""Start a service on this machine:

prfaas serve deploy/examples/laptop.yaml

Then, in another terminal:

prfaas generate "Name three rivers." --max-tokens 60 --timing

prfaas status

curl http://127.0.0.1:8000/v1/models""",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Check a configuration, or print what can be configured.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.command(epilog=PLAN_EPILOG)(plan)
app.command(epilog=SIMULATE_EPILOG)(simulate)
app.command(epilog=BENCH_EPILOG)(bench)
certs_app = typer.Typer(help="Make the certificates of a service's processes, or look at them.", no_args_is_help=True)
app.add_typer(certs_app, name="certs")

Address = Annotated[str, typer.Option("--address", "-a", help="host:port of the service's gRPC door.")]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", envvar="PRFAAS_API_KEY", help="A key of the service's api_keys_file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one key over the file, e.g. engine.page_size=32. Repeatable."),
]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The service's configuration.")]
MaxTokens = Annotated[
    int | None, typer.Option(help="Most tokens to generate; else the service's default, or what the context holds.")
]
Temperature = Annotated[
    float | None, typer.Option(help="0: the most likely token; else the service's default (the model's, or 1).")
]
TopP = Annotated[float | None, typer.Option(help="Choose among the most likely tokens of this total probability.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer, wherever it is computed.")]
System = Annotated[str | None, typer.Option(help="A system message, put before the conversation.")]


def main() -> None:
    """The entry point of the ``prfaas`` command."""
    app()


@app.callback(invoke_without_command=True)
def root(show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options of the command itself."""
    if show_version:
        typer.echo(f"prfaas {version()}")
        raise typer.Exit


@app.command(epilog="Example: prfaas serve deploy/examples/laptop.yaml --set http.port=8080 --set decode.count=2")
def serve(config_file: ConfigFile, overrides: Overrides = None) -> None:
    """Run a service until Ctrl-C or SIGTERM; running requests get to finish first.

    A configuration with the key join runs a cluster of prefill workers for services elsewhere: it opens no door.
    """
    with _config_errors():
        config, said = with_initial_roles(load_config(config_file, overrides or ()), config_file.parent)
        if said:
            typer.echo(f"prfaas: {said}")
        # here, because they take seconds to import
        if config.join:
            from cluster.remote_cluster import serve as run_cluster

            raise typer.Exit(run_cluster(config))
        from cluster.launch import serve as run_service

        raise typer.Exit(run_service(config))


@app.command(epilog='Example: prfaas generate "Name three rivers." --max-tokens 60 --temperature 0 --timing')
def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model; - reads standard input.")],
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text. Repeatable.")] = None,
    system: System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    timing: Annotated[bool, typer.Option("--timing", help="Show where it was computed and where time went.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead of text.")] = False,
) -> None:
    """Send one prompt and print the answer as it streams."""
    text = sys.stdin.read() if prompt == "-" else prompt
    request = pb.GenerateRequest(sampling_params=_sampling(max_tokens, temperature, top_p, seed, stop or ()))
    with _service(address, api_key) as stub:
        if raw or not stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=_INFO_TIMEOUT_S).has_chat_template:
            request.text = text
        else:
            request.chat.CopyFrom(pb.ChatInput(messages=[*_system(system), _message("user", text)]))
        complete = _stream(stub, request, show=not as_json)
    if as_json:
        typer.echo(json.dumps(as_dict(complete), ensure_ascii=False))
    if timing:
        Console(stderr=True).print(timing_table(complete))


@app.command(epilog="In the conversation: /reset forgets it, /exit or Ctrl-D ends it, Ctrl-C ends an answer early.")
def chat(
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    system: System = None,
) -> None:
    """Talk with the model, turn by turn."""
    sampling = _sampling(max_tokens, temperature, top_p, seed, ())
    beginning = _system(system)
    messages = list(beginning)
    with _service(address, api_key) as stub:
        info = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=_INFO_TIMEOUT_S)
        if not info.has_chat_template:
            _fail(f"{info.model} has no chat template; use: prfaas generate --raw", code=1)
        typer.echo(f"{info.model}; /reset forgets, /exit ends", err=True)
        for line in _typed_lines():
            if line == "/reset":
                messages = list(beginning)
                continue
            messages.append(_message("user", line))
            request = pb.GenerateRequest(chat=pb.ChatInput(messages=messages), sampling_params=sampling)
            try:
                answer = _stream(stub, request, show=True).text
            except KeyboardInterrupt:
                typer.echo("")
                messages.pop()
                continue
            messages.append(_message("assistant", answer))


@app.command(epilog="Example: prfaas status --json | jq '.workers[].worker_id'")
def status(
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the workers of a service: roles, pages, queues, bytes shipped; the links between them; what work is
    predicted to cost, with the error of that; and the plan.
    """
    with _service(address, api_key) as stub:
        info = stub.GetClusterInfo(pb.GetClusterInfoRequest(), timeout=_INFO_TIMEOUT_S)
    if as_json:
        typer.echo(json.dumps(as_dict(info), ensure_ascii=False))
        return
    console = Console() if sys.stdout.isatty() else Console(width=_PIPE_COLUMNS)
    console.print(
        f"{info.model}, prfaas {info.version}, up {info.uptime_s:.0f} s, policy {info.policy}: "
        f"{info.num_inflight} running, {info.num_requests} requests so far, "
        f"{info.num_retries} retries, {info.num_resumes} resumes, {info.num_queued} queued, "
        f"{sum(info.refusals.values())} refused{_by_reason(info.refusals)}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"internal TLS {info.internal_tls}", highlight=False, soft_wrap=True, markup=False)
    console.print(worker_table(info.workers))
    console.print()
    console.print(engine_table(info.workers))
    if any(worker.tiers for worker in info.workers):
        console.print()
        console.print(tier_table(info.workers))
    if info.links:
        console.print()
        console.print(link_table(info.links))
    if info.cluster_links:
        console.print()
        console.print(cluster_link_table(info.cluster_links))
    if info.costs:
        console.print()
        console.print(cost_table(info.costs))
    console.print()
    for line in _routing_lines(info):
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    if info.HasField("plan"):
        console.print()
        console.print(plan_table(info.plan))
        if info.plan.pools:
            console.print()
            console.print(pool_table(info.plan.pools))
        if any(sample.change for sample in info.plan.history):
            console.print()
            console.print(plan_history_table(info.plan.history))


@app.command(epilog="Example: prfaas top --address gateway:9000 --interval 2")
def top(
    address: Address = DEFAULT_ADDRESS,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one look and end.")] = False,
    api_key: ApiKey = None,
) -> None:
    """Watch a service: workers, links, threshold and roles, and where each second of the last requests went.

    The same as the page at / of the service's HTTP door. Ctrl-C ends it.
    """
    console = Console() if sys.stdout.isatty() else Console(width=_PIPE_COLUMNS)

    def look(stub: rpc.GenerationStub) -> Group:
        info = stub.GetClusterInfo(pb.GetClusterInfoRequest(), timeout=_INFO_TIMEOUT_S)
        recent = stub.GetRecentRequests(pb.GetRecentRequestsRequest(limit=_TOP_REQUESTS), timeout=_INFO_TIMEOUT_S)
        return frame(info, recent.requests)

    with _service(address, api_key) as stub:
        if once:
            console.print(look(stub))
            return
        with Live(look(stub), console=console, screen=sys.stdout.isatty(), auto_refresh=False) as live:
            pause = threading.Event()
            while not pause.wait(interval):
                live.update(look(stub), refresh=True)


@app.command(epilog="Examples: prfaas scale decode 3, and to let it follow the load again: prfaas scale decode auto")
def scale(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="prefill or decode.")],
    replicas: Annotated[str, typer.Argument(metavar="N", help="Workers, within the pool's bounds; or auto.")],
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Set how many workers a pool has, within its min_replicas and max_replicas, and keep it there.

    Workers that go drain first: no request is lost. With auto, the pool follows the load again. A restart of the
    service forgets it.
    """
    if replicas != "auto" and not replicas.isdecimal():
        _fail(f"N must be a number of workers or auto, got {replicas!r}", code=2)
    request = pb.ScalePoolRequest(pool=pool, replicas=None if replicas == "auto" else int(replicas))
    with _service(address, api_key) as stub:
        answer = stub.ScalePool(request, timeout=_INFO_TIMEOUT_S)
    if as_json:
        typer.echo(json.dumps(as_dict(answer), ensure_ascii=False))
        return
    typer.echo(answer.answer)
    console = Console() if sys.stdout.isatty() else Console(width=_PIPE_COLUMNS)
    console.print(pool_table([answer.pool]))


def _routing_lines(info: pb.GetClusterInfoResponse) -> Iterator[str]:
    """Where prompts go, and by which threshold."""
    offload = info.offload
    threshold = f"{offload.threshold_tokens:,.0f} tokens" if offload.HasField("threshold_tokens") else "none goes"
    yield f"offload to PrfaaS clusters beyond: {threshold}, bandwidth {offload.mode}: {offload.reason}"
    for what, counts in (("routes", info.routes_by_place), ("fallbacks", info.fallbacks_by_reason)):
        if counts:
            yield f"{what}: {', '.join(f'{count} {name}' for name, count in sorted(counts.items()))}"


@app.command(
    epilog="Examples: prfaas check service.yaml --set decode.count=2, or: prfaas check --address gateway:9000 --json"
)
def check(
    config_file: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="Start the workers that it describes.")
    ] = None,
    address: Annotated[
        str | None, typer.Option("--address", "-a", help="Ask the running service with this gRPC door instead.")
    ] = None,
    api_key: ApiKey = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Test every link between a prefill and a decode worker with real bytes.

    Given a configuration, starts its workers as `serve` would, opens no door, tests, and stops them. With --address,
    asks a running service, which goes on serving. Random bytes go from real pages of the one worker into real pages of
    the other, as K/V does, and are compared there.

    from, to: the sending and the receiving worker. path: what was found to carry the bytes (tcp, tcp+tls1.3, ucx:shm).
    exact: every byte arrived as it was sent. GB/s: of the longest transfer. RTT: as the transport measures it.

    Exit code 0: every link works. 1: one does not, or none could be tested. 2: the configuration is wrong.
    """
    if (config_file is None) == (address is None):
        _fail("give either a configuration or --address", code=2)
    checks: list[pb.LinkCheck] = []
    with Console(stderr=True).status("starting the workers" if address is None else f"asking {address}") as progress:

        def note(link: pb.LinkCheck) -> None:
            checks.append(link)
            progress.update(f"{len(checks)} of {link.num_pairs} links tested")

        if address is None:
            assert config_file is not None, "one of the two is given"
            with _config_errors():
                config = load_config(config_file, overrides or ())
                if config.join:
                    raise InvalidConfig("join", "the gateways test the links of such a cluster: prfaas check --address")
                _check_config_links(config, note)
        else:
            with _service(address, api_key) as stub:
                for link in stub.CheckLinks(pb.CheckLinksRequest()):
                    note(link)
    checks.sort(key=lambda link: (link.from_worker, link.to_worker))
    num_passed = sum(link.passed for link in checks)
    passed = bool(checks) and num_passed == len(checks)
    if as_json:
        typer.echo(json.dumps({"passed": passed, "links": [as_dict(link) for link in checks]}))
    else:
        console = Console() if sys.stdout.isatty() else Console(width=_PIPE_COLUMNS)
        console.print(check_table(checks))
        console.print(f"{num_passed} of {len(checks)} links work" if checks else "there is no link to test")
    raise typer.Exit(0 if passed else 1)


@app.command(epilog="Example: prfaas tenant team-a, or from standard input: prfaas tenant - < salt")
def tenant(salt: Annotated[str, typer.Argument(help="A cache_salt; - reads it from standard input.")]) -> None:
    """Print the name under which the configuration knows the tenant of a cache_salt (admission.tenant_weights).

    The name tells nobody the salt. Requests without one belong to the tenant `unsalted`.
    """
    given = sys.stdin.read().rstrip("\n") if salt == "-" else salt
    typer.echo(tenant_of(given.encode()) or UNSALTED)


@app.command(epilog="docs/metrics.md is this: prfaas metrics > docs/metrics.md")
def metrics() -> None:
    """Print every Prometheus metric of the gateway, with its labels and what it means, as Markdown."""
    typer.echo(metric_document(), nl=False)


@config_app.command("check", epilog="Example: prfaas config check service.yaml --set engine.page_size=32")
def check_config(config_file: ConfigFile, overrides: Overrides = None) -> None:
    """Say whether a configuration is valid, and what is wrong with it."""
    with _config_errors():
        config = load_config(config_file, overrides or ())
        check_section(config)
        config, _ = with_initial_roles(config, config_file.parent)
    typer.echo(f"{config_file}: valid; {config.prefill.count} prefill + {config.decode.count} decode of {config.model}")


@config_app.command("schema")
def print_schema() -> None:
    """Print the JSON schema of a configuration, for editors."""
    typer.echo(json.dumps(service_schema(), indent=2))


@config_app.command("docs", epilog="Example: prfaas config docs > docs/configuration.md")
def print_docs() -> None:
    """Print every key with its type, default and meaning, as Markdown."""
    typer.echo(service_document(), nl=False)


@certs_app.command("make", epilog="Example: prfaas certs make certs && prfaas certs make node2 --ca certs --name node2")
def make_certs(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write to; it is made if need be.")],
    name: Annotated[str, typer.Option(help="Whose certificate this is, for people and logs.")] = "prfaas",
    days: Annotated[int, typer.Option(min=1, max=AUTHORITY_DAYS, help="How long it is valid.")] = CERTIFICATE_DAYS,
    ca: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Sign with the authority in this folder, not with a new one.")
    ] = None,
) -> None:
    """Make a certificate for the processes of a service, and the authority that signs it.

    Writes ca.pem, cert.pem and key.pem, and without --ca also ca-key.pem; nothing is ever overwritten. Put the first
    three on every node and name them under tls: in the service's configuration. Whoever holds ca-key.pem can let
    others in: keep it off the nodes. A node may have a certificate of its own, made with --ca.
    """
    with _config_errors():
        authority = Authority.create("service") if ca is None else Authority.load(ca)
        held = write_files(directory, authority.issue(name, days), authority if ca is None else None)
        held.check()
    typer.echo(f"{directory}: a certificate of {name}, valid for {days} days at most; in the configuration:\n")
    typer.echo(f"tls:\n  ca_file: {held.ca_file}\n  cert_file: {held.cert_file}\n  key_file: {held.key_file}")
    if ca is None:
        typer.echo(f"\n{directory / CA_KEY_FILE} signs further certificates: keep it away from the nodes.")


@certs_app.command("show", epilog="Example: prfaas certs show certs/cert.pem")
def show_certs(file: Annotated[Path, typer.Argument(metavar="FILE", help="PEM file of certificates.")]) -> None:
    """Print whom the certificates in a file belong to, who signed them and until when they are valid."""
    with _config_errors():
        certificates = [summarize(certificate) for certificate in read_certificates(file)]
    for certificate in certificates:
        table = Table(show_header=False, box=None, pad_edge=False)
        for row in _certificate_rows(certificate):
            table.add_row(*row)
        Console(width=_PIPE_COLUMNS, highlight=False).print(table)


def _certificate_rows(certificate: CertificateSummary) -> Iterator[tuple[str, str]]:
    usable = certificate.is_valid(datetime.now(UTC))
    yield "belongs to", f"{certificate.subject}{' (an authority)' if certificate.is_authority else ''}"
    yield "signed by", certificate.issuer
    yield "DNS names", ", ".join(certificate.names) or "none"
    yield "valid", f"{certificate.valid_from:%Y-%m-%d %H:%M} to {certificate.valid_until:%Y-%m-%d %H:%M} UTC"
    yield "now", "valid" if usable else "NOT VALID"
    yield "SHA-256", certificate.sha256


def _check_config_links(config: ServiceConfig, note: Callable[[pb.LinkCheck], None]) -> None:
    """Start the workers and test their links. What they say on the way goes to standard error."""
    from cluster.cluster_info import link_check
    from cluster.launch import check_links  # here, because Ray takes seconds to import

    try:
        with redirect_stdout(sys.stderr):
            done = asyncio.run(check_links(config, lambda result: note(link_check(result))))
    except (InvalidConfig, UnsupportedModel):
        raise
    except PrfaasError as error:
        _fail(str(error), code=1)
    if not done:
        raise typer.Exit(_INTERRUPTED)


# ---- talking to a service ----


class _ShowsKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    """Shows a key with every call."""

    def __init__(self, key: str) -> None:
        self._metadata = ((AUTHORIZATION, f"Bearer {key}"),)

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_key(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_key(client_call_details), request)

    def _with_key(self, details: Any) -> Any:
        return details._replace(metadata=(*(details.metadata or ()), *self._metadata))


@contextmanager
def _service(address: str, api_key: str | None) -> Iterator[rpc.GenerationStub]:
    """A client of the service at ``address``; its refusals end the command with one line."""
    options = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
    with grpc.insecure_channel(address, options=options) as channel:
        try:
            yield rpc.GenerationStub(grpc.intercept_channel(channel, _ShowsKey(api_key)) if api_key else channel)
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED) from None
        except grpc.RpcError as error:
            failed = cast(grpc.Call, error)  # what a call raises is the call itself
            hint = ""
            if failed.code() is grpc.StatusCode.UNAVAILABLE:
                hint = f" (is a service running at {address}? prfaas serve CONFIG.yaml starts one)"
            _fail(f"{failed.code().name}: {failed.details()}{hint}", code=1)


def _stream(stub: rpc.GenerationStub, request: pb.GenerateRequest, *, show: bool) -> pb.GenerateComplete:
    """Run a request, printing its text as it comes. Leaving early, by Ctrl-C too, cancels it on the workers."""
    call = stub.Generate(request)
    complete = pb.GenerateComplete()
    try:
        for response in call:
            if show and response.WhichOneof("response") == "chunk":
                sys.stdout.write(response.chunk.text)
                sys.stdout.flush()
            elif response.WhichOneof("response") == "complete":
                complete = response.complete
    finally:
        call.cancel()
    if show:
        sys.stdout.write("\n")
    return complete


def _sampling(
    max_tokens: int | None, temperature: float | None, top_p: float | None, seed: int | None, stop: Sequence[str]
) -> pb.SamplingParams:
    try:
        return pb.SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop)
    except ValueError as error:  # a negative number for a field that has none
        _fail(str(error), code=2)


def _message(role: str, content: str) -> pb.ChatMessage:
    return pb.ChatMessage(role=role, content=content)


def _system(text: str | None) -> list[pb.ChatMessage]:
    return [] if text is None else [_message("system", text)]


def _typed_lines() -> Iterator[str]:
    """What the user types, without empty lines, until /exit or the end of input."""
    while True:
        typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip()


# ---- showing ----


def _by_reason(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{reason} {number}' for reason, number in sorted(counts.items()))})" if counts else ""


@contextmanager
def _config_errors() -> Iterator[None]:
    try:
        yield
    except (InvalidConfig, UnsupportedModel) as error:
        _fail(str(error), code=2)


def _fail(message: str, *, code: int) -> NoReturn:
    typer.echo(f"prfaas: {message}", err=True)
    raise typer.Exit(code)
