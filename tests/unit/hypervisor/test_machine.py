"""The machines that vmplug starts: which, and the devices of their own."""

from collections.abc import Iterator
from itertools import pairwise

import pytest

from vmplug.hypervisor.qemu.start.machine import Machine, VmSpec, command_line

SCSI = "virtio-scsi-pci,id=scsi0,bus=pcie.0,addr=0x2"


def devices(spec: VmSpec) -> Iterator[str]:
    """The machine's own devices, as QEMU gets them."""
    return (value for option, value in pairwise(command_line(spec, 5, 6)) if option == "-device")


@pytest.mark.parametrize("machine", ["virt", "pseries", "pc", ""])
def test_vmplug_starts_no_other_machine(machine: str) -> None:
    with pytest.raises(ValueError, match="is not a valid Machine"):
        Machine(machine)


def test_each_root_port_has_a_chassis_and_a_slot_of_its_own_and_bridges_follow() -> None:
    assert list(devices(VmSpec(name="sb1", ports=2, bridges=2, windows=(16 << 30,)))) == [
        "pcie-root-port,id=rp0,bus=pcie.0,addr=0x4,pref64-reserve=17179869184,chassis=1,slot=1",
        "pcie-root-port,id=rp1,bus=pcie.0,addr=0x5,chassis=2,slot=2",
        "pcie-pci-bridge,id=br0,bus=pcie.0,addr=0x6",
        "pcie-pci-bridge,id=br1,bus=pcie.0,addr=0x7",
        SCSI,
    ]


@pytest.mark.parametrize(
    ("machine", "own"),
    [
        (Machine.Q35, [SCSI]),
        (Machine.MICROVM, []),
        (
            Machine.S390,
            ["sclpconsole,chardev=console", "virtio-scsi-ccw,id=scsi0,devno=fe.0.fffe"],
        ),
    ],
)
def test_a_machine_has_a_scsi_controller_unless_it_is_a_microvm(
    machine: Machine, own: list[str]
) -> None:
    assert list(devices(VmSpec(name="sb1", machine=machine, ports=0))) == own
