"""An IOMMU that does not remap interrupts: `check` says what the kernel would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab import topology
from tests.lab.nested import paused_vm
from tests.support.raw_qmp import QmpError
from tests.support.vm import QEMU, GuestVm
from vmplug import (
    Code,
    DeviceInfo,
    DeviceManager,
    DevNum,
    DevType,
    HostRoot,
    InUse,
    Qemu,
    VfioInfo,
)
from vmplug.host.pci.iommu import IOMMU_NODE
from vmplug.hypervisor.qemu.abilities import of_program

VMPLUG = Path(sys.executable).with_name("vmplug")
UNSAFE = Path("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts")
EDU = VfioInfo(label="edu", device=topology.EDU)


def test_it_is_refused_before_anything_is_touched_and_qemu_would_have_failed(
    tmp_path: Path,
) -> None:
    state = ("--state-dir", tmp_path / "state")
    subprocess.run(["modprobe", "vfio-pci"], check=True)
    refused = subprocess.run([VMPLUG, "bind", topology.EDU, *state], check=False)
    assert refused.returncode == 4
    assert not Path(f"/sys/bus/pci/devices/{topology.EDU}/driver").exists()
    bind_by_hand()
    with paused_vm(tmp_path) as vm, manager_of(vm, tmp_path) as devices:
        with pytest.raises(InUse) as refusal:
            devices.attach(EDU)
        assert refusal.value.codes == (Code.NO_INTERRUPT_REMAPPING,)
        with pytest.raises(QmpError, match="Operation not permitted"):
            vm.oracle.execute(
                "device_add", driver="vfio-pci", id="raw", host=topology.EDU, bus="rp0"
            )
        allow_by_remedy(refusal.value)
        assert UNSAFE.read_text() == "Y\n"
        (examined,) = devices.check([EDU])
        assert [(f.code, f.severity) for f in examined.findings if f.code != Code.NO_RESET] == [
            (Code.NO_INTERRUPT_REMAPPING, "warning")
        ]
        devices.attach(EDU)
        vm.kill()


def test_the_module_that_takes_the_device_is_the_one_that_must_be_told(tmp_path: Path) -> None:
    """iommufd for a device by its own node, if the kernel and QEMU have it; else the group's."""
    subprocess.run(["modprobe", "iommufd"], check=False)  # absent before Linux 6.2
    subprocess.run(["modprobe", "vfio-pci"], check=True)
    bind_by_hand()
    is_own = Path(IOMMU_NODE).exists() and of_program(QEMU).iommufd
    asked, module = (own_node(), "iommufd") if is_own else (EDU, "vfio_iommu_type1")
    for name in ("iommufd", "vfio_iommu_type1"):
        if (file := Path(f"/sys/module/{name}/parameters/allow_unsafe_interrupts")).exists():
            file.write_text("N" if name == module else "Y")
    with paused_vm(tmp_path) as vm, manager_of(vm, tmp_path) as devices:
        with pytest.raises(InUse) as refusal:
            devices.attach(asked)
        assert refusal.value.codes == (Code.NO_INTERRUPT_REMAPPING,)
        allow_by_remedy(refusal.value)
        devices.attach(asked)
        vm.kill()


def manager_of(vm: GuestVm, tmp_path: Path) -> DeviceManager:
    return DeviceManager.open(
        vm="sb1",
        host=HostRoot(),
        hypervisor=Qemu.connect(str(vm.qmp_path)),
        state_dir=tmp_path / "state",
    )


def own_node() -> DeviceInfo:
    (directory,) = Path(f"/sys/bus/pci/devices/{topology.EDU}/vfio-dev").iterdir()
    node = f"/dev/vfio/devices/{directory.name}"
    number = os.stat(node).st_rdev
    devnum = DevNum(os.major(number), os.minor(number))
    return DeviceInfo(container_path=node, dev_type=DevType.CHAR, devnum=devnum)


def allow_by_remedy(refusal: InUse) -> None:
    remedy = (refusal.hint or "").partition("that you trust, ")[2].partition("; or accept")[0]
    subprocess.run(["sh", "-ec", remedy], check=True)


def bind_by_hand() -> None:
    base = Path(f"/sys/bus/pci/devices/{topology.EDU}")
    (base / "driver_override").write_text("vfio-pci")
    Path("/sys/bus/pci/drivers_probe").write_text(topology.EDU)
