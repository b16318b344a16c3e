"""Nodes of one cluster: etcd, API server and scheduler on the first, a kubelet on each.

Nobody proves who they are: one word opens all of it, and the network is the nodes' alone.
"""

import json
import ssl
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.support.kubernetes.kubelet import RealKubelet, make_pod
from tests.support.kubernetes.node import PROGRAMS, Node, ask, wait_until

_DEFAULT = "/api/v1/namespaces/default"
_PODS = f"{_DEFAULT}/pods"
_PORT = 6443
_TOKEN = "open"
_ETCD = "http://127.0.0.1:2379"


class Cluster:
    """What an API server has; its kubelets, by the names of their nodes."""

    def __init__(self, kubelets: Sequence[RealKubelet]) -> None:
        self.kubelets = {kubelet.node.name: kubelet for kubelet in kubelets}
        self._node = kubelets[0].node

    def create(self, pod: str, resource: str, count: int, *, on: str | None = None) -> None:
        """Make a pod that wants devices, on this node if one is named."""
        made = make_pod(pod, {resource: count})
        if on:
            made["spec"]["nodeSelector"] = {"kubernetes.io/hostname": on}
        self._ask("POST", _PODS, made)

    def delete(self, *pods: str) -> None:
        """Delete pods, and wait until their nodes have ended them: ten seconds and more."""
        for pod in pods:
            self._ask("DELETE", f"{_PODS}/{pod}")
        wait_until(lambda: not {*pods} & {*self.pods()}, self._describe)

    def pods(self) -> dict[str, Any]:
        """Its pods, by their names."""
        return {pod["metadata"]["name"]: pod for pod in self._ask("GET", _PODS)["items"]}

    def running(self) -> dict[str, str]:
        """The node of each pod that runs."""
        return {
            name: pod["spec"]["nodeName"]
            for name, pod in self.pods().items()
            if pod["status"]["phase"] == "Running"
        }

    def wait_running(self, *pods: str) -> None:
        """Wait until these run."""
        wait_until(lambda: {*pods} <= {*self.running()}, self._describe)

    def wait_event(self, pod: str, reason: str) -> str:
        """Wait until this has happened to a pod; what its event says."""
        wait_until(lambda: reason in self._events(pod), self._describe)
        return self._events(pod)[reason]

    def wait_allocatable(self, node: str, resource: str, count: int) -> None:
        """Wait until a node says that it has so many: a second after its kubelet knows."""
        wait_until(
            lambda: self._allocatable(node, resource) == count,
            lambda: f"{node} has {self._allocatable(node, resource)} of {resource}",
        )

    def start(self) -> None:
        """Start its programs, and wait for the API server."""
        directory = self._node.directory
        key = directory / "key.pem"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        tokens = directory / "tokens.csv"
        tokens.write_text(f"{_TOKEN},admin,admin,system:masters\n")
        self._node.start("etcd", "etcd", "--data-dir", "/run/etcd")
        self._node.start(
            "kube-apiserver",
            PROGRAMS / "kube-apiserver",
            *("--etcd-servers", _ETCD, "--secure-port", str(_PORT), "--cert-dir", "/run/certs"),
            *("--advertise-address", self._node.address),
            *("--service-cluster-ip-range", "10.2.0.0/24"),
            *("--token-auth-file", tokens, "--authorization-mode", "AlwaysAllow"),
            *("--service-account-issuer", "https://localhost"),
            *("--service-account-signing-key-file", key, "--service-account-key-file", key),
            # What these ask for is made by a controller, which there is not.
            *("--disable-admission-plugins", "ServiceAccount,TaintNodesByCondition"),
        )
        wait_until(self._is_ready, lambda: self._node.log("kube-apiserver")[-4000:])
        self._node.start(
            "kube-scheduler",
            PROGRAMS / "kube-scheduler",
            *("--kubeconfig", _write_access(directory, self._node), "--leader-elect=false"),
        )

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        """What the API server answers. Raises OSError."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = context.wrap_socket(self._node.connect(_PORT))
        return ask(connection, method, path, body, _TOKEN)

    def _events(self, pod: str) -> dict[str, str]:
        """What has happened to a pod: what was said last of each reason."""
        return {
            event["reason"]: event["message"]
            for event in self._ask("GET", f"{_DEFAULT}/events")["items"]
            if event["involvedObject"]["name"] == pod
        }

    def _allocatable(self, node: str, resource: str) -> int:
        """How many healthy devices a node says that it has."""
        nodes = {
            one["metadata"]["name"]: one for one in self._ask("GET", "/api/v1/nodes")["items"]
        }
        status = nodes[node]["status"] if node in nodes else {}
        return int(status.get("allocatable", {}).get(resource, 0))

    def _describe(self) -> str:
        return "\n".join(
            f"{name}: {pod['status']} {self._events(name)}" for name, pod in self.pods().items()
        )

    def _is_ready(self) -> bool:
        try:
            self._ask("GET", _DEFAULT)
        except OSError:
            return False
        return True


def _write_access(directory: Path, server: Node) -> Path:
    """What a program reads to find the API server."""
    path = directory / "access.json"
    cluster = {"server": f"https://{server.address}:{_PORT}", "insecure-skip-tls-verify": True}
    access = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "c", "user": {"token": _TOKEN}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
    }
    path.write_text(json.dumps(access))
    return path


@contextmanager
def running_cluster(directory: Path, *names: str) -> Iterator[Cluster]:
    """One of nodes with these names, whose kubelets are still to be started."""
    with ExitStack() as running:
        nodes = [Node(directory / name, name, number) for number, name in enumerate(names, 1)]
        for node in nodes:
            running.enter_context(node.running())
            if node is not nodes[0]:
                node.join(nodes[0])
        access = [_write_access(node.directory, nodes[0]) for node in nodes]
        pairs = zip(nodes, access, strict=True)
        made = Cluster([RealKubelet(node, "--kubeconfig", path) for node, path in pairs])
        made.start()
        yield made
