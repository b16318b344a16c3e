"""A scheduler, and two nodes whose plugins offer disks that they have."""

import asyncio
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.kubernetes.plugin import RESOURCE, DevicePlugin
from tests.support.disks import disk_image, loop_device
from tests.support.kubernetes.cluster import Cluster, running_cluster
from tests.support.kubernetes.node import find_missing, wait_until

pytestmark = pytest.mark.root

DISKS = {"node1": ("vmplug-a", "vmplug-b"), "node2": ("vmplug-c", "vmplug-d")}
PODS = tuple(f"p{number}" for number in range(6))
BUSYBOX = "/bin/busybox"


@dataclass(frozen=True, slots=True)
class World:
    """Two nodes; the plugin of each offers two disks."""

    cluster: Cluster
    plugins: dict[str, DevicePlugin]

    def wait_for(self, node: str, count: int) -> None:
        self.cluster.wait_allocatable(node, RESOURCE, count)

    def create(self, *pods: str, count: int = 1, on: str | None = None) -> None:
        for pod in pods:
            self.cluster.create(pod, RESOURCE, count, on=on)

    def read(self, pod: str) -> str:
        """What a pod that runs reads from the start of the only disk that it has."""
        kubelet = self.cluster.kubelets[self.cluster.running()[pod]]
        name = kubelet.run_in(pod, BUSYBOX, "ls", "/dev/disk/by-id").strip()
        text = kubelet.run_in(pod, BUSYBOX, "head", "-c", "8", f"/dev/disk/by-id/{name}")
        assert text == name
        return text

    @contextmanager
    def used(self, node: str, name: str) -> Iterator[None]:
        """A process of a node that has a disk open for writing."""
        plugin = self.plugins[node]
        is_open = plugin.directory / "is-open"
        words = (
            "sh",
            "-c",
            'exec 3<>"$0"; touch "$1"; exec sleep 1000',
            plugin.disks[name],
            is_open,
        )
        user = self.cluster.kubelets[node].node.start("user", *words)
        try:
            wait_until(is_open.exists, lambda: "it does not open it")
            yield
        finally:
            user.end()

    def end(self) -> None:
        """Delete all pods, and end all plugins."""
        self.cluster.delete(*self.cluster.pods())
        for plugin in self.plugins.values():
            plugin.end(signal.SIGTERM)
        for node in self.plugins:
            self.wait_for(node, 0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    programs = ("kubelet", "kube-apiserver", "kube-scheduler")
    if missing := find_missing(*programs, tools=("etcd", "openssl")):
        pytest.skip(missing)
    with (
        tempfile.TemporaryDirectory(prefix="k-", dir="/tmp") as directory,
        running_cluster(Path(directory), *DISKS) as cluster,
    ):
        for kubelet in cluster.kubelets.values():
            asyncio.run(kubelet.start())
        yield cluster


@pytest.fixture
def world(cluster: Cluster, tmp_path: Path) -> Iterator[World]:
    with ExitStack() as made:
        disks = {
            name: made.enter_context(loop_device(disk_image(tmp_path / name, 8, name)))
            for names in DISKS.values()
            for name in names
        }
        world = World(cluster, {})
        made.callback(world.end)
        for node, names in DISKS.items():
            world.plugins[node] = DevicePlugin(
                cluster.kubelets[node].node, tmp_path / node, {name: disks[name] for name in names}
            )
            world.plugins[node].start()
        for node in DISKS:
            world.wait_for(node, 2)
        yield world


def test_more_pods_than_disks(world: World) -> None:
    cluster = world.cluster
    world.create(*PODS)
    wait_until(lambda: len(cluster.running()) == 4, lambda: str(cluster.running()))
    running = cluster.running()
    had = {pod: world.read(pod) for pod in running}
    assert {*had.values()} == {name for names in DISKS.values() for name in names}
    assert all(had[pod] in DISKS[node] for pod, node in running.items())
    waiting = {*PODS} - {*running}
    for pod in waiting:
        why = cluster.wait_event(pod, "FailedScheduling")
        assert why == f"0/2 nodes are available: 2 Insufficient {RESOURCE}."
    ended = min(running)
    cluster.delete(ended)
    wait_until(lambda: len(cluster.running()) == 4, lambda: str(cluster.running()))
    (next_one,) = {*cluster.running()} - {*running}
    assert next_one in waiting
    assert cluster.running()[next_one] == running[ended]
    assert world.read(next_one) == had[ended]


def test_a_node_whose_plugin_was_killed_comes_back(world: World) -> None:
    cluster = world.cluster
    world.create("p0", on="node1")
    cluster.wait_running("p0")
    had = world.read("p0")
    world.plugins["node1"].end(signal.SIGKILL)
    world.wait_for("node1", 0)
    assert world.read("p0") == had
    world.create("p1", on="node1")
    assert f"1 Insufficient {RESOURCE}" in cluster.wait_event("p1", "FailedScheduling")
    world.create("p2")
    cluster.wait_running("p2")
    assert cluster.running()["p2"] == "node2"
    world.plugins["node1"].start()
    world.wait_for("node1", 2)
    cluster.wait_running("p0", "p1")
    assert {world.read("p0"), world.read("p1")} == {*DISKS["node1"]}
    assert world.read("p0") == had


def test_what_a_process_of_the_node_has_is_not_offered(world: World) -> None:
    with world.used("node1", "vmplug-a"):
        world.wait_for("node1", 1)
        world.create("p0", "p1", on="node1")
        wait_until(lambda: bool(world.cluster.running()), lambda: str(world.cluster.pods()))
        (first,) = world.cluster.running()
        assert world.read(first) == "vmplug-b"
        (waiting,) = {"p0", "p1"} - {first}
        world.cluster.wait_event(waiting, "FailedScheduling")
    world.cluster.wait_running("p0", "p1")
    assert world.read(waiting) == "vmplug-a"


def test_the_event_of_a_refused_pod_names_the_process(world: World) -> None:
    """Of a process that opens a disk after the plugin has looked, and kubelet has chosen."""
    plugin, node = world.plugins["node1"], world.cluster.kubelets["node1"].node
    plugin.send(signal.SIGSTOP)
    with world.used("node1", "vmplug-a"):
        world.create("p0", count=2, on="node1")
        chosen = f'Needs to allocate 2 "{RESOURCE}" for pod'
        wait_until(lambda: chosen in node.log("kubelet"), lambda: node.log("kubelet")[-4000:])
        plugin.send(signal.SIGCONT)
        why = world.cluster.wait_event("p0", "UnexpectedAdmissionError")
        prefix = f"rpc error: code = FailedPrecondition desc = {RESOURCE}=vmplug-a cannot be given"
        assert prefix in why
        assert f"{plugin.disks['vmplug-a']} is open for writing in process " in why
        assert "(sleep)" in why
        world.wait_for("node1", 1)
    world.wait_for("node1", 2)
    world.create("p1", count=2, on="node1")
    world.cluster.wait_running("p1")
