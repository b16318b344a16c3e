"""On a kernel with iommufd: devices of VFIO by themselves, with nodes of their own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import topology
from tests.lab.nested import paused_vm
from vmplug import DeviceInfo, DeviceManager, DevNum, DevType, HostRoot, Qemu, VfioGroup, resolve
from vmplug.host.vfio import open_nodes
from vmplug.hypervisor.qemu.vfio import IOMMU_NODE

VMPLUG = Path(sys.executable).with_name("vmplug")
MULTI = (topology.MULTI_NVME, topology.MULTI_EDU, topology.MULTI_NIC)


@pytest.fixture
def bound(tmp_path: Path) -> Iterator[Path]:
    """The group of three in the hands of VFIO; gives the state directory."""
    for module in ("iommufd", "vfio-pci", "nvme", "e1000e"):
        subprocess.run(["modprobe", module], check=True)
    state = ("--state-dir", tmp_path / "state")
    subprocess.run([VMPLUG, "bind", MULTI[0], *state], check=True, timeout=60)
    yield tmp_path / "state"
    subprocess.run([VMPLUG, "unbind", MULTI[0], *state], check=True, timeout=60)


def cdev_of(bdf: str) -> tuple[str, DevNum]:
    """The node of a function and its number, as the kernel says."""
    (directory,) = Path(f"/sys/bus/pci/devices/{bdf}/vfio-dev").iterdir()
    number = DevNum.parse((directory / "dev").read_text().strip())
    return f"/dev/vfio/devices/{directory.name}", number


def ask(bdf: str) -> DeviceInfo:
    """What a container asks for that names the function by its own node."""
    node, number = cdev_of(bdf)
    return DeviceInfo(container_path=node, dev_type=DevType.CHAR, devnum=number)


def test_a_functions_own_node_names_the_whole_group(bound: Path) -> None:
    group = resolve(ask(MULTI[1]), HostRoot())
    assert isinstance(group, VfioGroup)
    assert group.members == MULTI
    assert dict(group.cdev_nodes) == {bdf: cdev_of(bdf)[0] for bdf in MULTI}
    assert group.host_path == cdev_of(MULTI[1])[0]


def test_nodes_open_as_qemu_gets_them(bound: Path) -> None:
    nodes = {"iommu": IOMMU_NODE, **{bdf: cdev_of(bdf)[0] for bdf in MULTI}}
    with open_nodes(nodes) as files:
        for name, descriptor in files.items():
            assert os.fstat(descriptor).st_rdev == os.stat(nodes[name]).st_rdev


def test_a_qemu_that_knows_no_iommufd_gets_the_group(bound: Path, tmp_path: Path) -> None:
    with (
        paused_vm(tmp_path) as vm,
        DeviceManager.open(
            vm="sb1",
            host=HostRoot(),
            hypervisor=Qemu.connect(str(vm.qmp_path)),
            state_dir=bound,
        ) as devices,
    ):
        held = devices.attach(ask(MULTI[1]))
        assert held.guest_address
        assert [f.host for f in held.guest_address.functions] == list(MULTI)
        vm.kill()
    subprocess.run([VMPLUG, "reconcile", "--state-dir", bound], check=True, timeout=60)


def test_an_open_node_is_told_with_its_process(bound: Path) -> None:
    node, _ = cdev_of(MULTI[0])
    holder = subprocess.Popen(
        ["sh", "-c", f"exec 3<>{node}; echo; exec sleep 100"], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout
        holder.stdout.readline()
        device = ask(MULTI[0])
        words: list[str | Path] = [
            "check",
            "--state-dir",
            bound,
            "--device",
            f"c:{device.devnum}:{node}",
        ]
        told = subprocess.run([VMPLUG, *words], capture_output=True, text=True, check=False)
    finally:
        holder.kill()
        holder.communicate()
    assert (told.returncode, "open-by-process" in told.stdout) == (4, True), told
    assert f"process {holder.pid}" in told.stdout
