"""A tree or a record is the picture of a host: it may be looked at, and nothing is done for it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contract.sandbox import Sandbox
from tests.support.pci_tree import PciTree
from tests.support.tree import HostTree
from vmplug.address import Bdf
from vmplug.devnum import DevNum
from vmplug.drivers.ports import Endpoint
from vmplug.errors import BindError, DeviceError, PolicyError
from vmplug.host.pci.sriov import VfSettings
from vmplug.host.root import THIS_HOST, HostRoot
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qemu.start.machine import VmSpec
from vmplug.manager.binding.groups import bind_device
from vmplug.manager.binding.mediated import create_mediated_device
from vmplug.manager.binding.virtual_functions import (
    configure_virtual_function,
    set_virtual_function_count,
)
from vmplug.manager.manager import DeviceManager
from vmplug.manager.setup import Setup
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.vms.start import start_vm

DISK = DeviceInfo(container_path="/dev/vda", dev_type=DevType.BLOCK, devnum=DevNum(8, 0))
FUNCTION = "0000:01:00.0"
SAYS = "is a picture of a host: vmplug c"


def manager(directory: Path, host: HostRoot, endpoint: Endpoint | None) -> DeviceManager:
    sandbox = Sandbox(directory / "sandbox")
    hypervisor = Qemu(sandbox.memory.monitor(), endpoint=endpoint)
    return DeviceManager.open(
        vm="sb1", host=host, hypervisor=hypervisor, state_dir=directory / "state"
    )


@pytest.fixture
def tree(tmp_path: Path) -> HostTree:
    return HostTree(tmp_path / "host").block_device("8:0", "sda")


@pytest.fixture
def reachable(tmp_path: Path, tree: HostTree) -> Iterator[DeviceManager]:
    endpoint = Endpoint(qmp_socket=str(tmp_path / "qmp"), pid=None)
    with manager(tmp_path, tree.root, endpoint) as devices:
        yield devices


def test_a_vm_gets_none_of_this_machines_devices_for_those_of_a_picture(
    reachable: DeviceManager, tree: HostTree
) -> None:
    assert not reachable.check_places([DISK])[0].findings
    assert reachable.plan([DISK])
    with pytest.raises(PolicyError, match=SAYS) as caught:
        reachable.attach_all([DISK], owner="c1")
    assert caught.value.message.startswith(str(tree.path))
    assert caught.value.hint == "leave --root out; vmplug check and plan work with it"
    assert reachable.attachments() == []


def test_no_disk_is_resized_by_a_picture(reachable: DeviceManager) -> None:
    with pytest.raises(PolicyError, match=SAYS):
        reachable.resize("vd0")


def test_a_vm_in_memory_may_have_what_a_picture_has(tmp_path: Path, tree: HostTree) -> None:
    with manager(tmp_path, tree.root, None) as devices:
        assert devices.attach(DISK, owner="c1").host_path == "/dev/sda"


def test_no_vm_is_started_with_devices_of_a_picture(tmp_path: Path, tree: HostTree) -> None:
    setup = Setup(host=tree.root, state_dir=tmp_path / "state")
    with pytest.raises(PolicyError, match=SAYS):
        start_vm(VmSpec(name="sb1"), [DISK], owner="c1", setup=setup)
    assert not (tmp_path / "state").exists()


def texts(directory: Path) -> dict[str, bytes | str]:
    found = dict[str, bytes | str]()
    for above, _, files in os.walk(directory):
        for path in (os.path.join(above, name) for name in files):
            found[path] = os.readlink(path) if os.path.islink(path) else Path(path).read_bytes()
    return found


@pytest.fixture
def host(tmp_path: Path) -> PciTree:
    tree = PciTree(tmp_path / "pci")
    tree.file("/proc/interrupts", "  0:  21  IR-IO-APIC    2-edge      timer\n")
    tree.pci_function(FUNCTION, driver="nvme", group=2, driver_override="(null)\n")
    tree.pci_driver("vfio-pci").file("/sys/bus/pci/drivers_probe")
    tree.pci_function("0000:02:00.0", class_code=0x020000, driver="igb", group=3)
    tree.sriov("0000:02:00.0").network("0000:02:00.0", "eth0")
    tree.mdev_type(FUNCTION, "half", available=1)
    return tree.file("/proc/sys/kernel/random/boot_id", "11111111-2222-3333-4444-555555555555\n")


@pytest.mark.parametrize(
    "act",
    [
        lambda setup: bind_device(FUNCTION, setup=setup),
        lambda setup: set_virtual_function_count(Bdf.parse("0000:02:00.0"), 2, setup=setup),
        lambda setup: create_mediated_device(FUNCTION, "half", setup=setup),
        lambda setup: configure_virtual_function(
            Bdf.parse("0000:02:00.0"), 0, VfSettings(vlan=1), setup=setup
        ),
    ],
    ids=["bind", "sriov", "mdev", "sriov-vf"],
)
def test_nothing_is_written_to_a_picture(
    tmp_path: Path, host: PciTree, act: Callable[[Setup], object]
) -> None:
    before = texts(host.path)
    with pytest.raises(DeviceError, match=SAYS):
        act(Setup(host=host.root, state_dir=tmp_path / "state"))
    assert texts(host.path) == before


def test_the_running_host_is_acted_on() -> None:
    THIS_HOST.require_live("attach devices")
    assert THIS_HOST.write_attribute("/sys/vmplug-has-no-such-file", "1") is not None


def test_a_file_of_a_picture_stays_as_it_is(tree: HostTree) -> None:
    tree.file("/sys/x/reset", "0\n")
    with pytest.raises(BindError, match=SAYS):
        tree.root.write_attribute("/sys/x/reset", "1")
    assert (tree.path / "sys/x/reset").read_text() == "0\n"
