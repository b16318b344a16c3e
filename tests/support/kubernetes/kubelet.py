"""A real kubelet with a real containerd, asked as the stand-in is: `tests/support/kubelet.py`.

It has no API server: its pods are files, as those of a control plane are. Each has one container,
of a busybox that sleeps, in the network of its node.
"""

import asyncio
import base64
import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from tests.support.kubelet import AdmissionError, StartError
from tests.support.kubernetes.node import (
    IMAGE,
    POLL_S,
    PROGRAMS,
    TIMEOUT_S,
    Node,
    Program,
    ask,
    wait_until,
)
from vmplug.kubernetes import device_plugin_pb2 as plugin_api

_READ_PORT = 10255
_CLOCK_S = 0.01
"""So much may the time that a file was written lie before the kernel's clock."""
_SLEEP = ("/bin/busybox", "sh", "-c", "trap exit TERM; while :; do sleep 1; done")


def make_pod(
    name: str, resources: Mapping[str, int], *, container: str = "main", namespace: str = "default"
) -> dict[str, Any]:
    """A pod whose container asks for so many devices of each resource."""
    limits = {resource: str(count) for resource, count in resources.items()}
    main = {"name": container, "image": IMAGE, "imagePullPolicy": "Never", "command": _SLEEP}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "uid": str(uuid.uuid4())},
        "spec": {
            "hostNetwork": True,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "tolerations": [{"operator": "Exists"}],
            "containers": [{**main, "resources": {"limits": limits}}],
        },
    }


class RealKubelet:
    """That of a node. `directory` is its /var/lib/kubelet, and has its sockets."""

    def __init__(self, node: Node, *options: str | Path) -> None:
        self.node = node
        self.directory = node.directory / "kubelet"
        self.plugins = self.directory / "device-plugins"
        self.socket = self.plugins / "kubelet.sock"
        self.pod_resources = self.directory / "pod-resources/kubelet.sock"
        self._options = options
        self._checkpoint_file = self.plugins / "kubelet_internal_checkpoint"
        self._manifests = node.directory / "pods"
        self._config = node.directory / "kubelet.json"
        self._program: Program | None = None
        self._log_start = 0

    async def __aenter__(self) -> Self:
        if self._program is None:
            await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Its pods are deleted; it goes on."""
        pods = {manifest.stem for manifest in self._manifests.iterdir()}
        for pod in pods:
            self.delete(pod)
        await self._wait(lambda: not pods & {*self._statuses()}, lambda: str(self._statuses()))

    async def start(self) -> None:
        """Start it, and wait until it answers."""
        self._manifests.mkdir(exist_ok=True)
        self._config.write_text(json.dumps(self._settings()))
        with suppress(FileNotFoundError):
            self._log_start = len(self.node.log("kubelet"))
        self._program = self.node.start(
            "kubelet",
            PROGRAMS / "kubelet",
            *("--config", self._config, "--hostname-override", self.node.name, "--v=3"),
            *("--node-ip", self.node.address),
            *("--container-runtime", "remote", "--pod-infra-container-image", IMAGE),
            *("--container-runtime-endpoint", "unix:///run/containerd/containerd.sock"),
            *self._options,
        )
        program = self._program
        await self._wait(lambda: program.has_ended or self._is_ready(), self._log)
        assert not program.has_ended, self._log()[-4000:]

    async def stop(self) -> None:
        """End it: its pods run on."""
        assert self._program
        await asyncio.to_thread(self._program.end)
        self._program = None

    async def restart(self) -> None:
        """Stop and start."""
        await self.stop()
        await self.start()

    async def admit(
        self,
        pod: str,
        resource: str,
        count: int,
        *,
        container: str = "main",
        namespace: str = "default",
    ) -> plugin_api.ContainerAllocateResponse:
        """Run a pod with devices: what the plugin answered for it, from kubelet's checkpoint.

        Raises AdmissionError and StartError, with the text that the Pod has. A pod that was not
        admitted is deleted; one that cannot be started is tried again by kubelet, until it is.
        """
        made = make_pod(pod, {resource: count}, container=container, namespace=namespace)
        written = self._manifests / f".{pod}.json"
        written.write_text(json.dumps(made))
        written.rename(self._manifest(pod))
        try:
            await self._wait(lambda: self._has_come_through(pod), lambda: self._describe(pod))
        except AdmissionError:
            self.delete(pod)
            raise
        uid = made["metadata"]["uid"]
        return next(
            plugin_api.ContainerAllocateResponse.FromString(base64.b64decode(entry["AllocResp"]))
            for entry in self._checkpoint()["PodDeviceEntries"]
            if entry["PodUID"] == uid
        )

    async def start_container(self, pod: str) -> None:
        """Wait until its container runs, which kubelet tries again after some seconds."""
        await self._wait(lambda: self._runs(pod), lambda: self._describe(pod))

    def delete(self, pod: str) -> None:
        """Delete a pod: nothing tells the plugin. Its container ends in the next seconds."""
        self._manifest(pod).unlink()

    def end(self, pod: str) -> None:
        """Let its container end, and wait until kubelet knows it."""
        self.node.ctr("tasks", "kill", "--signal", "KILL", self._container(pod))
        wait_until(lambda: self._status(pod)["phase"] == "Failed", lambda: str(self._status(pod)))

    @property
    def killed(self) -> dict[str, str]:
        """Why it has refused pods, those that have run before a restart among them."""
        statuses = self._statuses().items()
        return {name: status["message"] for name, status in statuses if "reason" in status}

    async def wait_for(self, resource: str, *, allocatable: int | None = None) -> None:
        """Wait until a resource is registered and has sent a list, of so many healthy devices."""

        def is_there() -> bool:
            log, file = self._log_of(resource), self._checkpoint_file
            told_at = _time_of(log, f"State pushed for device plugin {resource}")
            if told_at is None or f"Endpoint ({resource}," in log:
                return False
            if not file.exists() or file.stat().st_mtime < told_at:
                return False
            healthy = self._checkpoint()["RegisteredDevices"].get(resource) or ()
            return allocatable in {None, len(healthy)}

        await self._wait(is_there, self._log)

    async def wait_gone(self, resource: str) -> None:
        """Wait until the stream of a resource is closed, since it was registered last."""
        ended = f"Endpoint ({resource},"
        await self._wait(lambda: ended in self._log_of(resource), self._log)

    def run_in(self, pod: str, *words: str) -> str:
        """What a program prints that runs in the pod's container."""
        executed = f"exec-{next(_NUMBERS)}"
        return self.node.ctr("tasks", "exec", "--exec-id", executed, self._container(pod), *words)

    # what it says

    def _has_come_through(self, pod: str) -> bool:
        status = self._status(pod)
        if "reason" in status:
            raise AdmissionError(status["message"])
        for container in status.get("containerStatuses", ()):
            waits = container["state"].get("waiting", {})
            if waits.get("reason") == "CreateContainerConfigError":
                raise StartError(waits["message"])
        return self._runs(pod)

    def _runs(self, pod: str) -> bool:
        containers = self._status(pod).get("containerStatuses", ())
        return any("running" in container["state"] for container in containers)

    def _describe(self, pod: str) -> str:
        return f"{pod}: {self._status(pod)}\n{self._log()[-3000:]}"

    def _container(self, pod: str) -> str:
        (container,) = self._status(pod)["containerStatuses"]
        return str(container["containerID"]).removeprefix("containerd://")

    def _status(self, pod: str) -> Any:
        return self._statuses().get(pod, {})

    def _statuses(self) -> dict[str, Any]:
        pods = ask(self.node.connect(_READ_PORT), "GET", "/pods")["items"] or ()
        suffix = f"-{self.node.name}"  # of all that have no API server
        return {pod["metadata"]["name"].removesuffix(suffix): pod["status"] for pod in pods}

    def _is_ready(self) -> bool:
        """Whether it has removed the sockets of a former one, and answers."""
        if "Serving device plugin registration server" not in self._log():
            return False
        try:
            self._statuses()
        except OSError:
            return False
        return True

    def _checkpoint(self) -> Any:
        return json.loads(self._checkpoint_file.read_text())["Data"]

    def _log(self) -> str:
        """What it has logged since it was started."""
        return self.node.log("kubelet")[self._log_start :]

    def _log_of(self, resource: str) -> str:
        """What it has logged since the resource was registered last; nothing if it was not."""
        _, found, log = self._log().rpartition(
            f'registration request from device plugin with resource name "{resource}"\n'
        )
        return log if found else ""

    def _manifest(self, pod: str) -> Path:
        return self._manifests / f"{pod}.json"

    async def _wait(self, condition: Callable[[], bool], what: Callable[[], str]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not await asyncio.to_thread(condition):
            assert time.monotonic() < deadline, what()[-4000:]
            await asyncio.sleep(POLL_S)

    def _settings(self) -> dict[str, Any]:
        """All that would change the machine is off. Source: KubeletConfiguration, v1beta1."""
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "staticPodPath": str(self._manifests),
            "address": "127.0.0.1",
            "readOnlyPort": _READ_PORT,
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupRoot": f"/{self.node.cgroup}",
            "cgroupsPerQOS": False,
            "enforceNodeAllocatable": [],
            "makeIPTablesUtilChains": False,
            "failSwapOn": False,
            "oomScoreAdj": 0,
            "evictionHard": {"memory.available": "0%"},
            "imageGCHighThresholdPercent": 100,
            "volumePluginDir": "/var/lib/kubelet/volume-plugins",
            "nodeStatusUpdateFrequency": "1s",
        }


_NUMBERS = itertools.count()


def _time_of(log: str, text: str) -> float | None:
    """When the last line with this text was logged: `I1130 19:36:27.123456 ...`."""
    lines = [line for line in log.splitlines() if line.endswith(text)]
    if not lines:
        return None
    now = datetime.now()  # noqa: DTZ005  the log's is local time, too
    day, clock = lines[-1].split()[:2]
    logged = datetime.strptime(f"{now.year}{day[1:]} {clock}", "%Y%m%d %H:%M:%S.%f")  # noqa: DTZ007
    return logged.timestamp() - _CLOCK_S


@contextmanager
def real_kubelet(directory: Path) -> Iterator[RealKubelet]:
    """One that is started when it is first entered, and ends with all of its pods."""
    with Node(directory, "node1").running() as node:
        yield RealKubelet(node)
