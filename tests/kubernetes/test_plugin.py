"""`vmplug device-plugin` and a real kubelet, whose containers read the disks that they got."""

import asyncio
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.kubernetes.plugin import RESOURCE, DevicePlugin
from tests.support.disks import disk_image, loop_device
from tests.support.kubelet import AdmissionError
from tests.support.kubernetes.kubelet import RealKubelet, real_kubelet
from tests.support.kubernetes.node import find_missing, wait_until

from vmplug.kubernetes import device_plugin_pb2 as api

pytestmark = pytest.mark.root

NAMES = ("vmplug-a", "vmplug-b")
BUSYBOX = "/bin/busybox"


@dataclass(frozen=True, slots=True)
class World:
    """A kubelet whose plugin offers two disks."""

    kubelet: RealKubelet
    plugin: DevicePlugin

    def admit(self, pod: str, count: int = 1) -> api.ContainerAllocateResponse:
        return asyncio.run(self.kubelet.admit(pod, RESOURCE, count))

    def wait_for(self, healthy: int) -> None:
        asyncio.run(self.kubelet.wait_for(RESOURCE, allocatable=healthy))

    def device_of(self, pod: str) -> str:
        """The one that podresources says that a pod has."""
        named = f"default/{pod}-{self.kubelet.node.name}"
        (found,) = [name for name, said in self.plugin.status().items() if named in said["pods"]]
        return found

    def read(self, pod: str, name: str) -> str:
        """What a pod reads from the start of a disk."""
        path = f"/dev/disk/by-id/{name}"
        return self.kubelet.run_in(pod, BUSYBOX, "head", "-c", "8", path)


@pytest.fixture(scope="module")
def kubelet() -> Iterator[RealKubelet]:
    if missing := find_missing("kubelet"):
        pytest.skip(missing)
    with (
        tempfile.TemporaryDirectory(prefix="k-", dir="/tmp") as directory,
        real_kubelet(Path(directory) / "n") as kubelet,
    ):
        asyncio.run(kubelet.start())
        yield kubelet


@pytest.fixture
def world(kubelet: RealKubelet, tmp_path: Path) -> Iterator[World]:
    with ExitStack() as made:
        disks = {
            name: made.enter_context(loop_device(disk_image(tmp_path / name, 8, name)))
            for name in NAMES
        }
        plugin = DevicePlugin(kubelet.node, tmp_path / "plugin", disks)
        made.callback(lambda: asyncio.run(kubelet.__aexit__()))
        plugin.start()
        made.callback(lambda: asyncio.run(kubelet.wait_gone(RESOURCE)))
        made.callback(plugin.end, signal.SIGTERM)
        found = World(kubelet, plugin)
        found.wait_for(2)
        yield found


def test_a_pod_reads_the_disks_that_it_was_given(world: World) -> None:
    given = world.admit("p1", 2)
    assert sorted(node.host_path for node in given.devices) == sorted(
        map(str, world.plugin.disks.values())
    )
    assert [world.read("p1", name) for name in NAMES] == [*NAMES]
    world.plugin.wait_for("vmplug-a", state="assigned", pods=["default/p1-node1"])


def test_one_that_is_used_is_refused_with_its_user(world: World) -> None:
    node = world.plugin.disks["vmplug-a"]
    subprocess.run(["mkfs.ext4", "-q", node], check=True)
    mounted = world.plugin.directory / "mounted"
    mounted.mkdir()
    world.kubelet.node.run("mount", node, mounted)
    try:
        with pytest.raises(AdmissionError) as caught:
            world.admit("p1", 2)
        # It is listed as healthy for some seconds.
        words = str(caught.value)
        assert f"{node} is mounted" in words or "Requested: 2, Available: 1" in words
        world.wait_for(1)
        world.admit("p2")
        assert world.device_of("p2") == "vmplug-b"
    finally:
        world.kubelet.node.run("umount", mounted)
    world.wait_for(2)
    world.admit("p3")
    assert world.device_of("p3") == "vmplug-a"


def test_a_kubelet_that_starts_again_gets_all_of_it_again(world: World) -> None:
    world.admit("p1")
    had = world.device_of("p1")
    asyncio.run(world.kubelet.restart())
    world.wait_for(2)
    assert world.device_of("p1") == had
    assert world.read("p1", had) == had
    world.admit("p2")
    assert world.device_of("p2") != had


def test_a_plugin_that_is_killed_knows_the_pods_when_it_starts_again(world: World) -> None:
    world.admit("p1")
    had = world.device_of("p1")
    world.plugin.end(signal.SIGKILL)
    asyncio.run(world.kubelet.wait_gone(RESOURCE))
    assert world.read("p1", had) == had
    world.plugin.start()
    world.wait_for(2)
    world.plugin.wait_for(had, state="assigned", pods=["default/p1-node1"])
    world.admit("p2")
    assert world.device_of("p2") != had


def test_a_pod_that_is_deleted_gives_its_disk_back(world: World) -> None:
    world.admit("p1", 2)
    keep_open = f"{BUSYBOX} sleep 1000 <>/dev/disk/by-id/vmplug-a >/dev/null 2>&1 &"
    world.kubelet.run_in("p1", BUSYBOX, "sh", "-c", keep_open)
    world.plugin.wait_for("vmplug-a", state="assigned", healthy=True)
    world.kubelet.delete("p1")
    for name in NAMES:
        world.plugin.wait_for(name, state="free", pods=[])
    wait_until(lambda: not world.plugin.status()["vmplug-a"]["pods"], world.plugin.log)
    world.admit("p2", 2)


def test_no_list_is_sent_at_the_end(world: World) -> None:
    world.admit("p1")
    had = world.device_of("p1")
    world.plugin.end(signal.SIGTERM)
    asyncio.run(world.kubelet.wait_gone(RESOURCE))
    assert world.read("p1", had) == had
    assert "p1" not in world.kubelet.killed
