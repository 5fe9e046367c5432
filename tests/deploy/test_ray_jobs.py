"""`ray job submit`, `status`, `logs` and `stop` against a local Ray cluster, as docs/ray.md has them.

A service comes up, serves and drains; exit codes are right; Ray's token, a working directory and a runtime environment
are in use. The cluster is one node: several on one host would unpack the working directory over each other's.
"""

from __future__ import annotations

import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from tests.deploy.chart import ROOT
from tests.deploy.client import Load
from tests.deploy.pods import Machine

pytestmark = pytest.mark.ray

START_S = 120.0
STOP_S = 30.0


@pytest.fixture(scope="module")
def service(model: str, ports: list[int], tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """deploy/ray/job/service.yaml with a tiny model and free ports."""
    config = yaml.safe_load((ROOT / "deploy" / "ray" / "job" / "service.yaml").read_text())
    return config | {
        "model": model,
        "served_model_name": "tiny",
        "model_cache_dir": str(tmp_path_factory.mktemp("models")),
        "engine": {"device": "cpu", "dtype": "float32", "num_pages": 64, "max_batch_tokens": 64, "max_batch_size": 8},
        "router": {"costs_file": None},
        "http": {"host": "127.0.0.1", "port": ports[4]},
        "grpc": {"host": "127.0.0.1", "port": ports[5]},
    }


@pytest.fixture(scope="module")
def dashboard(machine: Machine, ports: list[int]) -> str:
    """The URL of a Ray cluster's job server; a stopped job gets the time to drain."""
    gcs, port, agent, client, *_ = map(str, ports)
    options = {
        "port": gcs,
        "dashboard-port": port,
        "dashboard-agent-listen-port": agent,
        "ray-client-server-port": client,
    }
    options |= {"num-cpus": "2", "num-gpus": "0", "resources": '{"prefill": 1, "decode": 1}'}
    options |= {"object-store-memory": "134217728", "metrics-export-port": "0"}
    command = ["ray", "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
    machine.start("head", command, machine.environment() | {"RAY_JOB_STOP_WAIT_TIME_S": "50"})
    machine.wait_for("head", "Ray runtime started.", START_S)
    return f"http://127.0.0.1:{port}"


@pytest.mark.timeout(600)  # a cluster, a service and what else this machine does
def test_a_ray_job_serves_and_is_asked_read_and_drained_from_a_second_shell(
    machine: Machine, dashboard: str, service: dict[str, object], ports: list[int], tmp_path: Path
) -> None:
    (tmp_path / "service.yaml").write_text(yaml.safe_dump(service))
    environment = machine.environment() | {"RAY_ADDRESS": dashboard}
    submit = ["job", "submit", "--working-dir", str(tmp_path), "--runtime-env-json", '{"env_vars": {"OF_A_JOB": "1"}}']
    serve = ["--", "python", "-m", "cluster", "serve", "service.yaml"]

    def second_shell(*arguments: str) -> str:
        done = subprocess.run(
            ["ray", "job", *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=START_S
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    machine.start("first shell", ["ray", *submit, "--submission-id", "prfaas", *serve], environment)
    machine.wait_for("first shell", "prfaas: ready: ", START_S)
    assert "RUNNING" in second_shell("status", "prfaas")
    assert "prfaas: ready: " in second_shell("logs", "prfaas")
    load = Load(ports[4])
    load.start()
    assert load.begun.wait(START_S)
    second_shell("stop", "prfaas")

    load.require_whole()
    assert machine.processes["first shell"].wait(STOP_S) == 0
    assert "Job 'prfaas' was stopped" in machine.log("first shell")
    assert "a second signal stops at once" in machine.log("first shell")
    machine.wait_until_no_worker_is_left("head")

    wrong = subprocess.run(
        ["ray", *submit, *serve, "--set", "engine.pagesize=1"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert wrong.returncode == 1
    assert "engine.pagesize: is not a key" in wrong.stdout + wrong.stderr


@pytest.mark.parametrize(("headers", "code"), [({}, 401), ({"authorization": f"Bearer {'f' * 32}"}, 403)])
def test_ray_tells_its_jobs_to_nobody_without_its_token(headers: dict[str, str], code: int, dashboard: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(f"{dashboard}/api/jobs/", headers=headers), timeout=START_S)

    assert caught.value.code == code
    caught.value.close()
