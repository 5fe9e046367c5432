"""``prfaas bench`` from the outside: tables, JSON, records, plots, comparisons, and errors that name the option."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.scripted_endpoint import Script, ScriptedEndpoint
from cluster.bench.client_record import ClientRecord
from cluster.bench.metrics import summary
from cluster.cli import app
from tests.unit.cluster import tiny_tokenizers
from tests.unit.cluster.bench.serving import served_beside

TRACE = "".join(
    f'{{"timestamp": {20 * n}, "input_length": 600, "output_length": 3, "hash_ids": [0, {10 + n}]}}\n' for n in range(5)
)


Scripted = tuple[ScriptedEndpoint, str]  # and its URL


@pytest.fixture
def endpoint() -> Iterator[Scripted]:
    scripted = ScriptedEndpoint(Script((0.01, 0.03), (0.001, 0.002)))
    with served_beside(scripted.application()) as url:
        yield scripted, url


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_every_request_is_a_line_from_which_the_report_follows(endpoint: Scripted, tmp_path: Path) -> None:
    scripted, url = endpoint
    records = tmp_path / "made/requests.jsonl"

    code, out, _ = run(
        url, "--lengths", "uniform:20,40", "--output", 4, "--concurrency", 3, "--requests", 7, "--records", records,
        "--json", "--slo", "ttft=5,tpot=5",
    )  # fmt: skip

    (point,) = json.loads(out)["points"]
    assert (code, point["num_finished"], point["slo_attainment"]) == (0, 7, 1.0)
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert [line["phase"] for line in lines].count("warm-up") == 1
    measured = [ClientRecord.from_dict(line, "line") for line in lines if line["phase"] == "measured"]
    assert summary(measured)["ttft_s"] == point["ttft_s"]
    assert point["asked_input_tokens"]["mean"] == point["prompt_tokens"]["mean"]
    assert len(scripted.bodies) == 8
    texts = [body["messages"][0]["content"] for body in scripted.bodies]  # type: ignore[index]
    assert len(set(texts)) == 8  # the warm-up shares nothing with what is measured


def test_a_trace_keeps_its_instants_and_what_its_prompts_share(endpoint: Scripted, tmp_path: Path) -> None:
    scripted, url = endpoint
    trace = tmp_path / "trace.jsonl"
    trace.write_text(TRACE)

    code, out, _ = run(url, "--api", "completions", "--trace", trace, "--speed", 2, "--warmup", 0, "--json")

    (point,) = json.loads(out)["points"]
    assert (code, point["num_finished"], point["load_name"]) == (0, 5, "speed 2")
    prompts = [str(body["prompt"]).split() for body in scripted.bodies]
    assert {len(prompt) for prompt in prompts} == {600}
    assert len({tuple(prompt[:512]) for prompt in prompts}) == 1
    assert len({tuple(prompt[512:]) for prompt in prompts}) == 5


def test_arms_are_compared_over_a_sweep_and_drawn(endpoint: Scripted, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, url = endpoint
    plots = tmp_path / "plots"

    code, out, err = run(
        "--compare", f"one={url}", "--compare", f"two={url}/v1", "--lengths", 20, "--output", 3, "--requests", 4,
        "--concurrency", "1,2", "--slo", "ttft=1", "--plot", plots,
    )  # fmt: skip

    assert code == 0
    assert [word in out for word in ("one", "two", "goodput", "TTFT p99", "loses in")] == [True] * 5
    assert sorted(path.name for path in plots.iterdir()) == ["attainment.png", "comparison.png"]
    assert "drawn: " in err


def test_a_table_tells_one_run(endpoint: Scripted) -> None:
    _, url = endpoint

    code, out, _ = run(url, "--lengths", 20, "--output", 3, "--rate", 200, "--burstiness", 0.5, "--requests", 4)

    assert code == 0
    assert "requests finished" in out
    assert "TTFT, ms" in out


def test_prompts_are_counted_by_the_models_tokenizer(endpoint: Scripted, tmp_path: Path) -> None:
    _, url = endpoint
    folder = tiny_tokenizers.save(tmp_path)
    (folder / "config.json").write_text("{}")

    code, _, err = run(url, "--lengths", 90, "--output", 2, "--requests", 1, "--warmup", 0, "--tokenizer", folder)

    assert code == 0
    assert "were aimed at" in err  # this server counts words, and says so


def test_a_trace_without_instants_is_drawn_at_a_rate_and_says_so(endpoint: Scripted, tmp_path: Path) -> None:
    _, url = endpoint
    trace = tmp_path / "lengths.csv"
    trace.write_text("input_length,output_length\n20,2\n90000,2\n30,2\n")

    code, out, err = run(url, "--trace", trace, "--rate", 100, "--json")

    assert (code, json.loads(out)["points"][0]["num_finished"]) == (0, 2)
    assert "drawn (Poisson)" in err
    assert "1 of the 3 requests are longer than the model's context" in err
    assert run(url, "--trace", trace)[2].startswith("prfaas: --trace: tells no instants")


def test_an_endpoint_that_nobody_serves_ends_with_1() -> None:
    code, _, err = run("http://127.0.0.1:9", "--lengths", 10)

    assert (code, err.startswith("prfaas: http://127.0.0.1:9/v1: ")) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "ENDPOINT: give one"),
        (("host:1",), "--lengths: give either"),
        (("host:1", "--lengths", "x"), "--lengths: must be TOKENS, fixed"),
        (("host:1", "--lengths", 5, "--trace", "t"), "--lengths: give either"),
        (("host:1", "--lengths", 5, "--rate", "fast"), "--rate: must be numbers above 0"),
        (("host:1", "--lengths", 5, "--concurrency", "1.5"), "--concurrency: must be integers"),
        (("host:1", "--lengths", 5, "--rate", 1, "--concurrency", 1), "--concurrency: must not be given with --rate"),
        (("host:1", "--lengths", 5, "--burstiness", 1), "--burstiness: needs --rate"),
        (("host:1", "--lengths", 5, "--speed", 2), "--speed: needs --trace"),
        (("host:1", "--lengths", 5, "--rate", 1, "--burstiness", 0), "--burstiness: must be above 0"),
        (("host:1", "--lengths", 5, "--max-concurrency", 2), "--max-concurrency: is of an open loop"),
        (("host:1", "--lengths", 5, "--requests", 0), "--requests: must be at least 1"),
        (("host:1", "--lengths", 5, "--turns", 0), "--turns: must be at least 1"),
        (("host:1", "--lengths", 5, "--timeout", 0), "--timeout: must be above 0 s"),
        (("host:1", "--lengths", 5, "--slo", "ttft"), "--slo: must be NAME=SECONDS"),
        (("host:1", "--lengths", 5, "--ignore-eos", "maybe"), "--ignore-eos: must be one of auto, on, off"),
        (("host:1", "--lengths", 5, "--tokenizer", "/nowhere.gguf"), "--tokenizer: cannot be loaded"),
        (("host:1", "--trace", "/nowhere.csv"), "/nowhere.csv: cannot be read"),
        (("--compare", "a=host:1", "--compare", "a=host:2", "--lengths", 5), "--compare: needs a label of its own"),
    ],
)
def test_wrong_input_ends_with_2_and_names_the_option(arguments: tuple[object, ...], message: str) -> None:
    code, _, err = run(*arguments)

    assert (code, err.startswith(f"prfaas: {message}")) == (2, True), err
