"""The chart's pods as processes of this machine: commands, environment and files are those of the manifests.

What Kubernetes and the operator of KubeRay do beside the manifests is done here, and nothing else:

    mounted ConfigMaps and   their files lie in folders, whose names stand for the mounts' paths in commands and in
    Secrets                  ConfigMaps; what is in the Secrets, the test says
    names of Services        no DNS: addresses of this machine stand in their place
    the head comes first     the operator's init containers wait for it; here the test does
    `ray start`              the operator makes the command of rayStartParams (kuberay's pod.go: defaults that are not
                             given, then every option as --KEY=VALUE, `true` as a flag)
    RAY_AUTH_*               the operator's, in its pods; a Secret's value in the gateway's

All processes are on one host and one network, which pods are not: ports that would collide are given as values.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import psutil

from tests.deploy.chart import ROOT, Rendered

TOKEN = "0123456789abcdef0123456789abcdef"
_STOP_S = 20.0
_TEST_S = 60.0
_END_CHARS = 3000


def ray_start(group: Mapping[str, Any], *, head: bool, address: str) -> str:
    """The command that the operator gives the Ray container of a group."""
    defaults = {"dashboard-agent-listen-port": "52365", "metrics-export-port": "8080", "block": "true"}
    if head:
        defaults["dashboard-host"] = "0.0.0.0"
    else:
        defaults["address"] = address
    given = {**defaults, **group["rayStartParams"]}
    options = [f"--{name}" if value == "true" else f"--{name}={value}" for name, value in sorted(given.items())]
    return " ".join(["ray start", *(["--head"] if head else []), *options])


@dataclass
class Machine:
    """The processes of one release, and the environment in which they find each other."""

    folder: Path  # for logs and mounted files
    address: str  # of Ray's head, host:port
    ray_tmp: Path  # short: Unix sockets are below it
    secrets: dict[str, Mapping[str, str]] = field(default_factory=dict)  # name |-> file |-> content
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def environment(self, container: Mapping[str, Any] | None = None) -> dict[str, str]:
        """What a process sees: this one's environment, Ray's token, and what the container says."""
        tools = (Path(sys.executable).parent, Path(str(distribution("ray").locate_file("../../../bin"))).resolve())
        base = {
            **os.environ,
            "PATH": os.pathsep.join([*map(str, tools), os.environ.get("PATH", "")]),
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(self.ray_tmp),
            "RAY_USAGE_STATS_ENABLED": "0",  # as the image has it, and the next
            "RAY_worker_niceness": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
        }
        said = {e["name"]: e["value"] for e in (container or {}).get("env", ()) if "value" in e}
        return base | said

    def start_ray(self, name: str, group: Mapping[str, Any], *, head: bool = False) -> None:
        """The Ray container of a group's pod."""
        container = group["template"]["spec"]["containers"][0]
        command = ray_start(group, head=head, address=self.address)
        self.start(name, ["/bin/bash", "-c", f"exec {command}"], self.environment(container))

    def start_gateway(self, rendered: Rendered) -> None:
        """The container of the Deployment."""
        pod = rendered.one("Deployment")["spec"]["template"]["spec"]
        environment = self.environment(pod["containers"][0]) | {"RAY_HEAD_ADDRESS": self.address}
        self.start("gateway", self._command(pod, rendered), environment)

    def run_helm_test(self, rendered: Rendered) -> str:
        """What the container of the pod of `helm test` says; ``CalledProcessError`` if it fails."""
        pod = rendered.one("Pod")["spec"]
        service = rendered.one("Service")["metadata"]["name"]
        words = [word.replace(f"{service}:", "127.0.0.1:") for word in self._command(pod, rendered)]
        done = subprocess.run(
            words,
            env=self.environment(pod["containers"][0]),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
            timeout=_TEST_S,
        )
        return done.stdout

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def wait_for(self, name: str, line: str, timeout_s: float) -> None:
        """Until a process has said ``line``; ``AssertionError`` with its log if it ends or that takes too long."""
        give_up_at = time.monotonic() + timeout_s
        while line not in self.log(name):
            for each, process in self.processes.items():
                assert process.poll() is None, f"{each} ended with {process.returncode}:\n{self.log(each)}"
            assert time.monotonic() < give_up_at, f"{name} has not said {line!r}:\n{self.log(name)}"
            time.sleep(0.1)

    def terminate(self, name: str) -> int:
        """SIGTERM, as kubelet does; the exit code."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(_STOP_S)

    def workers_in(self, name: str) -> int:
        """Worker processes of ours in the Ray node of a group's pod."""
        below = psutil.Process(self.processes[name].pid).children(recursive=True)
        return sum("WorkerActor" in " ".join(_command_line(process)) for process in below)

    def wait_until_no_worker_is_left(self, *names: str) -> None:
        """Ray ends a worker that was killed soon, not at once; ``AssertionError`` if it does not."""
        give_up_at = time.monotonic() + _STOP_S
        while any(self.workers_in(name) for name in names):
            assert time.monotonic() < give_up_at, {name: self.workers_in(name) for name in names}
            time.sleep(0.1)

    def stop(self) -> None:
        """End everything, Ray's own processes too."""
        family = [process for process in psutil.process_iter() if self._is_ours(process)]
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=_STOP_S)
        for child in self.processes.values():
            child.wait(_STOP_S)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("RAY_TMPDIR") == str(self.ray_tmp)
        except psutil.Error:
            return False

    def until(self, fits: Callable[[], bool], timeout_s: float) -> None:
        """Until it is so; ``AssertionError`` with the end of every log if a process ends or that takes too long."""
        give_up_at = time.monotonic() + timeout_s
        while not fits():
            ended = [name for name, process in self.processes.items() if process.poll() is not None]
            if ended or time.monotonic() > give_up_at:
                raise AssertionError(f"it did not come; ended: {ended}\n{self._ends_of_logs()}")
            time.sleep(0.1)

    def _ends_of_logs(self) -> str:
        """Those of our processes and of Ray's autoscaler."""
        logs = [*self.folder.glob("*.log"), *self.ray_tmp.glob("ray/session_latest/logs/monitor*.log")]
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-_END_CHARS:]}" for log in logs)

    def start(self, name: str, command: list[str], environment: Mapping[str, str]) -> None:
        """Any command, known by ``name``, its output kept."""
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )

    def _command(self, pod: Any, rendered: Rendered) -> list[str]:
        """A container's command, its mounts being folders here, which are made."""
        (container,) = pod["containers"]
        folders: dict[str, Path] = {}  # a mount's path |-> here
        contents: dict[Path, Mapping[str, str]] = {}
        volumes = {volume["name"]: volume for volume in pod.get("volumes", ())}
        for mount in container.get("volumeMounts", ()):
            volume = volumes[mount["name"]]
            if "configMap" in volume:
                content = rendered.one("ConfigMap", volume["configMap"]["name"])["data"]
            elif "secret" in volume:
                content = self.secrets[volume["secret"]["secretName"]]
            else:
                continue
            folders[mount["mountPath"]] = folder = self.folder / mount["name"]
            contents[folder] = content

        def here(text: str) -> str:
            for path, folder in folders.items():
                text = text.replace(path, str(folder))
            return text

        for folder, content in contents.items():
            folder.mkdir(exist_ok=True)
            for file, text in content.items():
                (folder / file).write_text(here(text))
        return [here(word) for word in (*container.get("command", ()), *container["args"])]


def _command_line(process: psutil.Process) -> list[str]:
    """Empty for one that has just ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []
