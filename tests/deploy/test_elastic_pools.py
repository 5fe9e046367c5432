"""A surge gets a machine of Ray's autoscaler, and its end gives that machine back, under load and with nothing lost.

Real Ray with its real autoscaler (v2, as KubeRay runs it), whose machines are more Ray nodes on this one (Ray's own
fake provider); a whole service from the command line. The decode pool may have a second worker, for which there is no
room on the head: only a machine that the autoscaler starts has it.
"""

from __future__ import annotations

import json
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.client import MAX_TOKENS, Stream, completion
from tests.deploy.pods import Machine

pytestmark = pytest.mark.ray

START_S = 120.0
HEAD_ID = "f" * 51 + "00000"  # that Ray's fake provider takes for the head
BATCH = 4
CPU_EACH = 0.5


@pytest.fixture
def autoscaling_ray(machine: Machine, ports: list[int], tmp_path: Path) -> Iterator[str]:
    """A head that may start one more node, for one decode worker; its address."""
    gcs, _, agent, client, *_ = map(str, ports)
    config = {
        "cluster_name": "elastic",
        "max_workers": 1,
        "idle_timeout_minutes": 0.02,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": machine.address,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
        },
        "available_node_types": {
            "ray.head.default": {
                "resources": {"CPU": 2, "prefill": 1, "decode": 1},
                "node_config": {},
                "max_workers": 0,
            },
            "decode": {
                "resources": {"CPU": 1, "decode": 1, "object_store_memory": 80_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 1,
            },
        },
        "head_node_type": "ray.head.default",
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{name}_start_ray_commands": [] for name in ("head", "worker")},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    }
    file = tmp_path / "autoscaler.json"
    file.write_text(json.dumps(config))
    options = {
        "autoscaling-config": str(file),
        "port": gcs,
        "dashboard-agent-listen-port": agent,
        "ray-client-server-port": client,
        "node-ip-address": "127.0.0.1",
        "num-cpus": "2",
        "num-gpus": "0",
        "resources": '{"prefill": 1, "decode": 1}',
        "object-store-memory": "80000000",
        "metrics-export-port": "0",
        "include-dashboard": "false",
    }
    fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1"}
    fake |= {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    fake |= {"RAY_NODE_TYPE_NAME": "ray.head.default"}
    command = ["ray", "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
    machine.start("head", command, machine.environment() | fake)
    machine.wait_for("head", "Ray runtime started.", START_S)
    yield machine.address
    for name in [name for name in machine.processes if name != "head"]:
        machine.terminate(name)


class Client(threading.Thread):
    """Asks again once it has its answer, until it is told to stop; every answer must be whole."""

    def __init__(self, http_port: int, *, streams: bool) -> None:
        """``streams``: token by token, which on few cores can keep gateway and client busier than the workers."""
        super().__init__(daemon=True)
        self._http_port = http_port
        self._streams = streams
        self.enough = threading.Event()
        self.num_answers = 0
        self.failure: Exception | None = None

    def run(self) -> None:
        while not self.enough.is_set():
            try:
                self._ask()
            except Exception as error:
                self.failure = error
                return
            self.num_answers += 1

    def _ask(self) -> None:
        if self._streams:
            answer = Stream(self._http_port)
            answer.run()
            answer.require_whole()
            return
        (whole,) = completion(self._http_port, MAX_TOKENS, stream=False)
        assert whole["choices"][0]["finish_reason"] == "length"
        assert whole["usage"]["completion_tokens"] == MAX_TOKENS

    def stop(self) -> None:
        self.enough.set()


def service_of(address: str, model: str, http: int, grpc: int, folder: Path) -> dict[str, Any]:
    """One worker of each role; the decode pool may have two. It answers a load within seconds."""
    return {
        "model": model,
        "served_model_name": "tiny",
        "host": "127.0.0.1",
        "model_cache_dir": str(folder),
        "engine": {
            "device": "cpu",
            "dtype": "float32",
            "num_pages": 256,
            "max_batch_tokens": 64,
            "max_batch_size": BATCH,
        },
        "prefill": {"num_cpus": CPU_EACH, "resources": {"prefill": 1}},
        "decode": {"num_cpus": CPU_EACH, "resources": {"decode": 1}, "max_replicas": 2},
        "ray": {"address": address},
        "router": {"costs_file": None},
        "planner": {
            "demand_window_s": 2.0,
            # All clients at once are a surge and one alone is none, however many other things this machine does.
            "scaling": {
                "upscale_utilisation": 0.5,
                "downscale_utilisation": 0.4,
                "upscale_delay_s": 1.0,
                "start_s": 0.0,
                "conversion_wait_s": 0.0,
                "downscale_delay_s": 3.0,
                "start_price": 0.0,
            },
        },
        "http": {"port": http},
        "grpc": {"port": grpc},
    }


@pytest.mark.timeout(300)
def test_a_surge_gets_a_machine_and_its_end_gives_it_back_under_load(
    machine: Machine, autoscaling_ray: str, model: str, ports: list[int], tmp_path: Path
) -> None:
    http, grpc = ports[4], ports[5]
    config = service_of(autoscaling_ray, model, http, grpc, tmp_path / "models")
    (tmp_path / "service.yaml").write_text(yaml.safe_dump(config))
    environment = machine.environment()
    serve = [sys.executable, "-m", "cluster", "serve", str(tmp_path / "service.yaml")]
    machine.start("service", serve, environment)
    machine.start("watch", [sys.executable, "-m", "tests.deploy.ray_watch", autoscaling_ray], environment)
    machine.wait_for("service", "prfaas: ready: ", START_S)

    def ray() -> Mapping[str, Any]:
        lines = machine.log("watch").split("\n")[:-1]
        found: Mapping[str, Any] = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
        return found

    def status() -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{http}/status", timeout=START_S) as answer:
            return json.load(answer)

    def decode_pool() -> Any:
        (pool,) = status()["plan"]["pools"]
        return pool

    def until(fits: Callable[[], bool]) -> None:
        machine.until(fits, START_S)

    until(lambda: ray()["free"] == {"CPU": 2 - 2 * CPU_EACH, "decode": 0, "prefill": 0})
    assert (ray()["nodes"], ray()["pending"]) == ({"ray.head.default": 1}, [])
    clients = [Client(http, streams=index == 0) for index in range(4 * BATCH)]
    for client in clients:
        client.start()
    until(lambda: decode_pool()["desired"] == 2)
    until(lambda: {"CPU": CPU_EACH, "decode": 1} in map(_without_bundle_marks, ray()["pending"]))
    assert decode_pool()["pending"][0] | {"age_s": 0} == {"worker_id": "decode-1", "state": "placing", "age_s": 0}
    until(lambda: decode_pool()["ready_decode"] == 2)
    assert ray()["nodes"] == {"ray.head.default": 1, "decode": 1}
    until(lambda: next(w for w in status()["workers"] if w["worker_id"] == "decode-1")["generated_tokens"] > 0)

    steady, *others = clients
    for client in others:
        client.stop()
    until(lambda: decode_pool()["desired"] == 1)
    num_before = steady.num_answers
    until(lambda: decode_pool()["ended"].get("drained") == 1)
    until(lambda: steady.num_answers > num_before + 1)
    steady.stop()
    for client in clients:
        client.join(START_S)
        assert client.failure is None, client.failure
    left = {w["worker_id"] for w in status()["workers"]}
    assert left == {"prefill-0", "decode-0"}, "who goes is who leaves a machine empty"
    until(lambda: all(w["pages_free"] == w["pages_total"] for w in status()["workers"]))
    until(lambda: ray()["nodes"] == {"ray.head.default": 1})
    assert (ray()["free"], ray()["pending"]) == ({"CPU": 2 - 2 * CPU_EACH, "decode": 0, "prefill": 0}, [])
    after = status()
    assert after["num_resumes"] == 0, "nobody's answer had to be continued elsewhere"
    assert decode_pool()["ended"] == {"started": 1, "drained": 1}
    assert decode_pool()["start_s"] > 0

    assert machine.terminate("service") == 0
    until(lambda: ray()["free"] == {"CPU": 2, "decode": 1, "prefill": 1})
    machine.wait_until_no_worker_is_left("head")


def _without_bundle_marks(bundle: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in bundle.items() if not name.startswith("bundle")}
