"""What does a running service look like? ``make demo``: start one, ask three questions, show where each was answered.

1. ``python -m cluster serve CONFIG`` starts as a child process; its log is shown while it loads the model.
2. One streamed gRPC request, then two HTTP requests with the same long system message, the second one streamed: its
   prompt is mostly cached, so less is computed and less is shipped. Greedy, so that every run says the same.
3. The answers are printed as they come, then one table: where each was prefilled and decoded, and its seconds.
4. SIGTERM; the service has ten seconds to stop. Exit code 0 only if all of this went as described.

The clients are plain ones (generated gRPC stubs, ``http.client``): what they do can be copied into any program.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.config import ServiceConfig, load_config
from cluster.service_process import ServiceProcess
from core.clock import WallClock
from core.errors import PrfaasError
from protos import serving_pb2 as pb
from protos import serving_pb2_grpc as rpc

DEFAULT_CONFIG = "deploy/examples/laptop.yaml"
STOP_WITHIN_S = 10.0
_ANSWER_WITHIN_S = 120.0
_MAX_TOKENS = 64
# Row of the table, and the field of core.request.RequestTiming that it shows.
SECONDS = (
    ("queue, prefill", "prefill_queue_s"),
    ("prefill", "prefill_s"),
    ("transfer of KV", "transfer_s"),
    ("  not hidden", "exposed_transfer_s"),
    ("queue, decode", "decode_queue_s"),
    ("decode", "decode_s"),
    ("to first token", "ttft_s"),
    ("total", "total_s"),
)
_LIGHTHOUSE = """\
You answer questions about this text in one or two sentences.

A lighthouse is a tower with a bright light at the top. It stands on the coast, often on rocks or at the entrance of \
a harbour, and shows sailors where the land is. The first lighthouses burned wood or coal. Later ones burned oil, and \
in 1822 Augustin Fresnel invented a lens made of many rings of glass that sends the light of one small lamp out over \
the sea for more than thirty kilometres. Today most lighthouses are electric and nobody lives in them. In the past a \
keeper lived there with his family. He cleaned the glass, wound the clockwork that turned the lens, and lit the lamp \
every evening. In fog, when no light can be seen, he rang a bell or blew a horn."""


class DemoFailed(PrfaasError):
    """The service did not do what the demo shows; the message says what it did."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One finished request: a row of the table. ``timing`` has the fields of ``core.request.RequestTiming``."""

    door: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    timing: Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if everything went as described above."""
    parser = argparse.ArgumentParser(prog="python -m cluster.demo", description="Show a service at work, then stop it.")
    parser.add_argument("config", nargs="?", default=DEFAULT_CONFIG)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the YAML")
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    try:
        config = load_config(options.config, options.set)
        with _service(options.config, options.set, config, console):
            answered = [*_ask_grpc(config, console), *_ask_http(config, console)]
            console.print(table(answered))
    except (PrfaasError, grpc.RpcError, OSError) as error:
        console.print(f"[red]demo failed:[/red] {error}")
        return 1
    return 0


@contextmanager
def _service(config_path: str, overrides: Sequence[str], config: ServiceConfig, console: Console) -> Iterator[None]:
    """The service, healthy within; stopped in order afterwards, or ``DemoFailed``."""
    command = [sys.executable, "-m", "cluster", "serve", config_path]
    for override in overrides:
        command += ["--set", override]
    console.print(f"[bold]$ prfaas serve {config_path}[/bold]")
    with tempfile.TemporaryDirectory(prefix="prfaas-demo-") as folder:
        health_url = f"http://{config.http.host}:{config.http.port}/health"
        with ServiceProcess(command, health_url, Path(folder) / "log") as service:
            _wait(service, config, console)
            yield
            _stop(service, console)


def _wait(service: ServiceProcess, config: ServiceConfig, console: Console) -> None:
    last = ""

    with console.status("starting") as status:

        def show(waited_s: float, line: str) -> None:
            nonlocal last
            status.update(f"starting, {waited_s:.0f} s  [dim]{escape(line)}[/dim]")
            if line != last and not console.is_terminal:  # where nothing can be updated, a line for each event
                console.print(f"  {waited_s:3.0f} s  {line}", markup=False, soft_wrap=True)
            last = line

        waited_s = service.wait_until_healthy(config.start_timeout_s, show)
    workers = f"{config.prefill.count} prefill and {config.decode.count} decode worker"
    console.print(f"{config.model_name}: {workers}, ready after {waited_s:.1f} s\n", soft_wrap=True)


def _stop(service: ServiceProcess, console: Console) -> None:
    clock = WallClock()
    began_at = clock.now()
    exit_code = service.stop(STOP_WITHIN_S)
    if exit_code != 0:
        raise DemoFailed(f"the service ended with exit code {exit_code} after SIGTERM:\n{service.log_tail()}")
    console.print(f"\nSIGTERM: the service drained and stopped in {clock.now() - began_at:.1f} s, exit code 0")


# ---- gRPC ----


def _ask_grpc(config: ServiceConfig, console: Console) -> list[Answered]:
    question = "What is the capital of France, and what is it known for?"
    request = pb.GenerateRequest(
        chat=pb.ChatInput(messages=[pb.ChatMessage(role="user", content=question)]),
        sampling_params=pb.SamplingParams(max_tokens=_MAX_TOKENS, temperature=0.0),
    )
    console.print("[bold]gRPC prfaas.v1.Generation/Generate[/bold], streamed")
    _print_question(console, question)
    answered: list[Answered] = []
    with grpc.insecure_channel(f"{config.grpc.host}:{config.grpc.port}") as channel:
        for response in rpc.GenerationStub(channel).Generate(request, timeout=_ANSWER_WITHIN_S):
            if response.HasField("chunk"):
                _print_piece(console, response.chunk.text)
            else:
                answered.append(_from_complete(response.complete))
    console.print("\n")
    return answered


def _from_complete(complete: pb.GenerateComplete) -> Answered:
    usage = complete.usage
    timing = {field.name: value for field, value in complete.timing.ListFields()}
    return Answered("gRPC, streamed", usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, timing)


# ---- HTTP ----


def _ask_http(config: ServiceConfig, console: Console) -> list[Answered]:
    return [
        _ask_whole(config, console, "What is a lighthouse?"),
        _ask_streamed(config, console, "Who invented the lens, and when?"),
    ]


def _ask_whole(config: ServiceConfig, console: Console, question: str) -> Answered:
    console.print("[bold]POST /v1/chat/completions[/bold]")
    _print_question(console, question)
    with _post(config, _body(config, question)) as response:
        answer = json.load(response)
    _print_piece(console, answer["choices"][0]["message"]["content"])
    console.print("\n")
    return _from_json("HTTP", answer)


def _ask_streamed(config: ServiceConfig, console: Console, question: str) -> Answered:
    console.print("[bold]POST /v1/chat/completions[/bold], streamed, the same system message")
    _print_question(console, question)
    last: dict[str, Any] = {}
    with _post(
        config, _body(config, question) | {"stream": True, "stream_options": {"include_usage": True}}
    ) as response:
        for event in _events(response):
            last |= {key: event[key] for key in ("usage", "prfaas") if event.get(key)}
            for choice in event["choices"]:
                _print_piece(console, choice["delta"].get("content") or "")
    console.print("\n")
    return _from_json("HTTP, streamed", last)


def _body(config: ServiceConfig, question: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": _LIGHTHOUSE}, {"role": "user", "content": question}]
    return {"model": config.model_name, "messages": messages, "max_tokens": _MAX_TOKENS, "temperature": 0}


@contextmanager
def _post(config: ServiceConfig, body: Mapping[str, Any]) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(config.http.host, config.http.port, timeout=_ANSWER_WITHIN_S)
    try:
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise DemoFailed(f"HTTP {response.status}: {response.read().decode(errors='replace')}")
        yield response
    finally:
        connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event up to ``[DONE]``."""
    for line in response:
        data = line.strip().removeprefix(b"data: ")
        if data == b"[DONE]":
            return
        if data:
            yield json.loads(data)


def _from_json(door: str, answer: Mapping[str, Any]) -> Answered:
    usage = answer["usage"]
    cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
    (timing,) = answer["prfaas"]["timing"]  # one for each of n choices
    return Answered(door, usage["prompt_tokens"], usage["completion_tokens"], cached_tokens, timing)


# ---- what is shown ----


def table(answered: Sequence[Answered]) -> Table:
    """A column for each request: where it ran, what was cached and shipped, and its seconds."""
    shown = Table(title="where each request ran, and its seconds")
    shown.add_column("")
    for request in answered:
        shown.add_column(request.door, justify="right")
    for name, cells in _rows(answered):
        shown.add_row(name, *cells)
    return shown


def _rows(answered: Sequence[Answered]) -> Iterator[tuple[str, list[str]]]:
    yield "prefilled on", [request.timing.get("prefill_worker") or "-" for request in answered]
    yield "decoded on", [request.timing.get("decode_worker") or "-" for request in answered]
    yield "prompt tokens", [str(request.prompt_tokens) for request in answered]
    yield "  of them cached", [str(request.cached_tokens) for request in answered]
    yield "output tokens", [str(request.completion_tokens) for request in answered]
    yield "KV shipped", [f"{request.timing.get('bytes_shipped', 0) / 2**20:.2f} MiB" for request in answered]
    for name, field in SECONDS:
        yield name, [f"{request.timing.get(field, 0.0):.3f} s" for request in answered]


def _print_question(console: Console, question: str) -> None:
    console.print(f"[dim]> {question}[/dim]")


def _print_piece(console: Console, text: str) -> None:
    console.print(text, end="", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
