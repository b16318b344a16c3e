"""An IOMMU that does not remap interrupts: `check` says what the kernel would."""

import subprocess
import sys
from pathlib import Path

import pytest

from lab import topology
from tests.lab.nested import paused_vm
from tests.support.raw_qmp import QmpError
from vmplug import Code, DeviceManager, HostRoot, InUse, Qemu, VfioInfo

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
    with (
        paused_vm(tmp_path) as vm,
        DeviceManager.open(
            vm="sb1",
            host=HostRoot(),
            hypervisor=Qemu.connect(str(vm.qmp_path)),
            state_dir=tmp_path / "state",
        ) as devices,
    ):
        with pytest.raises(InUse) as refusal:
            devices.attach(EDU)
        assert refusal.value.codes == (Code.NO_INTERRUPT_REMAPPING,)
        with pytest.raises(QmpError, match="Operation not permitted"):
            vm.oracle.execute(
                "device_add", driver="vfio-pci", id="raw", host=topology.EDU, bus="rp0"
            )
        UNSAFE.write_text("Y")
        (examined,) = devices.check([EDU])
        assert [(f.code, f.severity) for f in examined.findings if f.code != Code.NO_RESET] == [
            (Code.NO_INTERRUPT_REMAPPING, "warning")
        ]
        devices.attach(EDU)
        vm.kill()


def bind_by_hand() -> None:
    base = Path(f"/sys/bus/pci/devices/{topology.EDU}")
    (base / "driver_override").write_text("vfio-pci")
    Path("/sys/bus/pci/drivers_probe").write_text(topology.EDU)
