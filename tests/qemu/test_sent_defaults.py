"""What vmplug does not send is QEMU's default: QEMU has what the steps state."""

from contextlib import closing
from itertools import product
from pathlib import Path

import pytest

from tests.support.vm import root_ports, scsi_controller, start_vm
from vmplug.address import PciPath, PciSlot, ScsiAddress, qemu_id
from vmplug.drivers.place import PciPlace, ScsiPlace
from vmplug.drivers.plug import BlockDrive, Cache, DiskFrontend
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qmp.defaults import sent_arguments

pytestmark = pytest.mark.qemu

BLOCK = "logical_block_size"
VARIANTS = list(product(Cache, (False, True), (False, True), (False, True)))


def places(index: int) -> tuple[PciPlace, ScsiPlace]:
    """A port, and an address of the controller; nothing is ever unplugged."""
    path = PciPath.parse("10/00")  # as if: only the guest needs the real one
    return (
        PciPlace(bus=f"rp{index}", slot=PciSlot(0), path=path),
        ScsiPlace(bus="scsi0.0", address=ScsiAddress(0, index), path=path),
    )


GLOBALS = [
    word
    for driver, name in product(("virtio-blk-device", "scsi-hd"), ("share-rw=on", f"{BLOCK}=4096"))
    for word in ("-global", f"{driver}.{name}")
]
"""Another default of a QEMU that others have started, for what data depends on."""


NAMES = {"drive", "driver", "id", "bus", "addr", "write-cache"}
"""Not properties to read back; the cache is read from the nodes."""


def test_qemu_has_every_option_that_was_not_sent(tmp_path: Path) -> None:
    devices = [*root_ports(len(VARIANTS)), *scsi_controller()]
    left_out = set[str]()
    with (
        start_vm(tmp_path, devices=devices, extra=GLOBALS, guest=False, paused=True) as vm,
        closing(Qemu.connect(str(vm.qmp_path))) as qemu,
    ):
        plugs = (
            (place, variant) for index, variant in enumerate(VARIANTS) for place in places(index)
        )
        for number, (place, (cache, read_only, discard, share)) in enumerate(plugs):
            image = tmp_path / f"{number}.img"
            image.write_bytes(bytes(1 << 16))
            drive = BlockDrive(
                id=f"{number:016x}",
                file=str(image),
                is_device=False,
                driver=DiskFrontend.VIRTIO_BLOCK,
                read_only=read_only,
                share_rw=share,
                cache=cache,
                discard=discard,
            )
            qemu.plug(drive, place)
            node, device = (step.do for step in qemu.steps(drive, place))
            name = qemu_id(drive.id)
            listed = vm.oracle.execute("query-named-block-nodes", {"flat": True})
            nodes = {
                "file" if found["drv"] == "file" else found["node-name"]: found
                for found in listed
                if found["node-name"] == name or found["file"] == str(image)
            }
            assert nodes.keys() == {name, "file"}
            for found in nodes.values():
                assert found["ro"] == read_only
                assert found["cache"] == {
                    **node.arguments["cache"],
                    "writeback": found["cache"]["writeback"],
                }
            (drive_of_it,) = [
                found
                for found in vm.oracle.execute("query-block")
                if f"/{name}" in f"/{found['qdev']}/" or found["qdev"] == name
            ]
            assert drive_of_it["inserted"]["cache"]["writeback"] == cache.write_cache
            for key, stated in device.arguments.items():
                if key not in NAMES:
                    found = vm.oracle.execute(
                        "qom-get", path=f"/machine/peripheral/{name}", property=key
                    )
                    assert found == stated, key
            left_out |= device.arguments.keys() - sent_arguments(device).keys()
            left_out |= node.arguments.keys() - sent_arguments(node).keys()
    assert left_out == {
        "cache",
        "channel",
        "discard",
        "physical_block_size",
        "read-only",
    }
