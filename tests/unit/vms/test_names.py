"""What cannot be the name of a VM or of an owner is refused, by whatever call it comes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.disks import disk_image
from tests.support.kata import write_sandbox
from vmplug.errors import SpecError
from vmplug.host.root import HostRoot
from vmplug.hypervisor.fake.monitor import FakeHypervisor
from vmplug.hypervisor.qemu.start.machine import VmSpec
from vmplug.manager.manager import DeviceManager
from vmplug.manager.setup import Setup
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.vms.adopt import adopt_vm
from vmplug.vms.import_kata import import_kata
from vmplug.vms.start import start_vm


def open_manager(name: str, setup: Setup) -> DeviceManager:
    return DeviceManager.open(
        vm=name,
        host=HostRoot("/"),
        hypervisor=FakeHypervisor(),
        state_dir=setup.state_dir,
    )


CALLS: dict[str, Callable[[str, Setup], object]] = {
    "start_vm": lambda name, setup: start_vm(VmSpec(name=name), setup=setup),
    "adopt_vm": lambda name, setup: adopt_vm(name, "/run/none.sock", setup=setup),
    "import_kata": lambda name, setup: import_kata(
        str(write_sandbox(Path(f"{setup.state_dir}-kata"))), name, qmp_socket="/x", setup=setup
    ),
    "DeviceManager.open": open_manager,
}


@pytest.mark.parametrize("name", ["", "a b", "../a", "a/b", "a\n", "-a", "ä", "\udcff", "a" * 64])
@pytest.mark.parametrize("call", CALLS)
def test_a_name_of_a_vm(call: str, name: str, tmp_path: Path) -> None:
    setup = Setup(state_dir=tmp_path / "state")
    with pytest.raises(SpecError, match=r"VM name .* is made of letters|not UTF-8"):
        CALLS[call](name, setup)
    assert not [path.name for path in (tmp_path / "state").glob("vm/*")]


@pytest.mark.parametrize("owner", ["", "a" * 256, "\udcff"])
def test_a_name_of_an_owner(owner: str, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 1, "a")
    disk = DeviceInfo(container_path="/dev/a", dev_type=DevType.BLOCK, host_path=str(image))
    with open_manager("sb1", Setup(state_dir=tmp_path / "state")) as devices:
        with pytest.raises(SpecError, match=r"owner: |not UTF-8"):
            devices.attach(disk, owner=owner)
        assert devices.attachments() == []
