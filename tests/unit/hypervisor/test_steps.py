"""The commands that plug each kind, value by value, as QEMU gets them."""

from collections.abc import Mapping
from typing import Any

import pytest

from tests.support.abilities import NEW
from vmplug.address import CcwDevNo, PciPath, PciSlot, ScsiAddress
from vmplug.drivers.place import CcwPlace, MemorySlot, PciPlace, Place, ScsiPlace
from vmplug.drivers.plug import (
    Aio,
    BlockDrive,
    Cache,
    DiskFrontend,
    ErrorAction,
    Plug,
    VhostUserDevice,
)
from vmplug.host.kind import DeviceType
from vmplug.hypervisor.qemu.steps.plug import plug_steps

NAME = "vmplug-0123456789abcdef"
PCI = PciPlace(bus="rp0", slot=PciSlot(0), path=PciPath.parse("04/00"))
CCW = CcwPlace(devno=CcwDevNo(0, 1))
SCSI = ScsiPlace(bus="scsi0.0", address=ScsiAddress(1, 2), path=None)
MEMORY = MemorySlot(slot=2, index=1)


def drive(*, is_device: bool = False, **more: Any) -> BlockDrive:
    options = {"driver": DiskFrontend.VIRTIO_BLOCK, "file": "/srv/a", "size_bytes": 4 << 20}
    return BlockDrive(id="0123456789abcdef", is_device=is_device, **{**options, **more})


def backend(kind: DeviceType, **more: Any) -> VhostUserDevice:
    path = "/run/a.sock"
    return VhostUserDevice(id="0123456789abcdef", type=kind, socket_path=path, **more)


def sent(plug: Plug, place: Place) -> list[tuple[str, Mapping[str, Any]]]:
    """What QEMU is sent."""
    return [(step.do.execute, step.do.arguments) for step in plug_steps(plug, place, NEW)]


@pytest.mark.parametrize(
    ("plug", "driver", "aio", "direct", "no_flush", "discard", "read_only"),
    [
        (drive(), "file", "threads", False, False, "ignore", False),
        (drive(is_device=True), "host_device", "threads", False, False, "ignore", False),
        (drive(read_only=True), "file", "threads", False, False, "ignore", True),
        (drive(discard=True), "file", "threads", False, False, "unmap", False),
        (drive(cache=Cache.UNSAFE), "file", "threads", False, True, "ignore", False),
        (
            drive(cache=Cache.NONE, aio=Aio.NATIVE),
            *("file", "native", True, False, "ignore", False),
        ),
        (
            drive(is_device=True, cache=Cache.DIRECTSYNC, aio=Aio.IO_URING),
            *("host_device", "io_uring", True, False, "ignore", False),
        ),
    ],
)
def test_both_layers_of_a_disk_state_cache_discard_and_read_only(
    plug: BlockDrive,
    driver: str,
    aio: str,
    *,
    direct: bool,
    no_flush: bool,
    discard: str,
    read_only: bool,
) -> None:
    (command, node), _ = sent(plug, PCI)
    both = {
        "read-only": read_only,
        "cache": {"direct": direct, "no-flush": no_flush},
        "discard": discard,
    }
    file = {"driver": driver, "filename": "/srv/a", "aio": aio, **both}
    assert command == "blockdev-add"
    assert node == {"node-name": NAME, "driver": "raw", **both, "file": file}


@pytest.mark.parametrize("place", [PCI, CCW], ids=str)
@pytest.mark.parametrize("cache", Cache)
def test_a_virtio_disk_states_every_property(place: Place, cache: Cache) -> None:
    plug = drive(cache=cache, serial="a b", share_rw=True, discard=True, sector_bytes=4096)
    (command, device) = sent(plug, place)[-1]
    assert command == "device_add"
    assert {key: device[key] for key in device if key not in {"bus", "addr", "devno"}} == {
        "driver": "virtio-blk-pci" if place is PCI else "virtio-blk-ccw",
        "id": NAME,
        "drive": NAME,
        "serial": "a b",
        "share-rw": True,
        "discard": True,
        "write-cache": "off" if cache in {Cache.WRITETHROUGH, Cache.DIRECTSYNC} else "on",
        "logical_block_size": 4096,
        "physical_block_size": 4096,
    }


def test_a_scsi_disk_states_every_property_and_its_address() -> None:
    (_, device) = sent(drive(driver=DiskFrontend.VIRTIO_SCSI, serial="s"), SCSI)[-1]
    assert device == {
        "driver": "scsi-hd",
        "id": NAME,
        "bus": "scsi0.0",
        "channel": 0,
        "scsi-id": 1,
        "lun": 2,
        "drive": NAME,
        "serial": "s",
        "share-rw": False,
        "write-cache": "on",
        "logical_block_size": 512,
        "physical_block_size": 512,
    }


@pytest.mark.parametrize("place", [PCI, CCW, SCSI], ids=str)
def test_a_disk_states_what_happens_on_an_error_only_if_asked(place: Place) -> None:
    (_, plain) = sent(drive(), place)[-1]
    (_, device) = sent(drive(werror=ErrorAction.STOP, rerror=ErrorAction.REPORT), place)[-1]
    assert device == {**plain, "werror": "stop", "rerror": "report"}


def test_a_disk_gets_a_thread_of_its_own() -> None:
    (thread, node, device) = sent(drive(iothread=True), PCI)
    assert thread == ("object-add", {"qom-type": "iothread", "id": f"{NAME}-thread"})
    assert node[0] == "blockdev-add"
    assert device[1]["iothread"] == f"{NAME}-thread"


@pytest.mark.parametrize("read_only", [False, True])
def test_an_nvdimm_writes_to_its_file_and_promises_no_persistence(*, read_only: bool) -> None:
    """`pmem=on` would say that the host's file lies on persistent memory."""
    (memory, module) = sent(drive(driver=DiskFrontend.NVDIMM, read_only=read_only), MEMORY)
    assert memory == (
        "object-add",
        {
            "qom-type": "memory-backend-file",
            "id": f"{NAME}-memory",
            "mem-path": "/srv/a",
            "size": 4 << 20,
            "share": True,
            "readonly": read_only,
        },
    )
    where = {"driver": "nvdimm", "id": NAME, "memdev": f"{NAME}-memory", "slot": 2}
    assert module == ("device_add", {**where, "unarmed": read_only})


@pytest.mark.parametrize(("reconnect_s", "stated"), [(0, {}), (1, {"reconnect-ms": 1000})])
def test_qemu_connects_to_a_backend_and_does_not_wait_for_one(
    reconnect_s: int, stated: dict[str, int]
) -> None:
    (chardev, device) = sent(
        backend(DeviceType.VHOST_USER_BLK, queues=2, reconnect_s=reconnect_s), PCI
    )
    address = {"type": "unix", "data": {"path": "/run/a.sock"}}
    data = {"addr": address, "server": False, **stated}
    assert chardev == (
        "chardev-add",
        {"id": f"{NAME}-link", "backend": {"type": "socket", "data": data}},
    )
    assert device == (
        "device_add",
        {
            "driver": "vhost-user-blk-pci",
            "id": NAME,
            "bus": "rp0",
            "addr": "0x0",
            "chardev": f"{NAME}-link",
            "num-queues": 2,
        },
    )


@pytest.mark.parametrize(
    ("queues", "msix", "stated"),
    [
        (1, True, {"mq": False}),
        (1, False, {"mq": False, "vectors": 0}),
        (2, True, {"mq": True, "vectors": 6}),
        (2, False, {"mq": True, "vectors": 0}),
    ],
)
def test_a_network_states_queues_and_message_interrupts(
    queues: int, *, msix: bool, stated: dict[str, Any]
) -> None:
    plug = backend(
        DeviceType.VHOST_USER_NET, queues=queues, msix=msix, mac_address="52:54:00:00:00:01"
    )
    (_, net, device) = sent(plug, PCI)
    link = {"type": "vhost-user", "id": f"{NAME}-net", "chardev": f"{NAME}-link"}
    assert net == ("netdev_add", {**link, "queues": queues})
    assert device == (
        "device_add",
        {
            "driver": "virtio-net-pci",
            "id": NAME,
            "bus": "rp0",
            "addr": "0x0",
            "netdev": f"{NAME}-net",
            "mac": "52:54:00:00:00:01",
            **stated,
        },
    )
