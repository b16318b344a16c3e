"""The disks of which an error has stopped a VM.

`query-block` has `io-status` for the disks of blockdev-add and device_add too. It looks at the
size of every file, so that one that hangs would stop the guest: it is asked only of a guest that
stands still. Source: measured on QEMU 7.2 and 10.
"""

from collections.abc import Callable

from vmplug.address import PERIPHERAL
from vmplug.drivers.ports import Command, DiskError, FailedDisk
from vmplug.hypervisor.qmp.monitor import Monitor

IO_ERROR = "io-error"
"""The run state of a VM that an error on a disk has stopped. Source: QEMU qapi/run-state.json."""


def find_failed_disks(
    monitor: Monitor, find_owner: Callable[[str], str | None]
) -> list[FailedDisk]:
    """The disks that have stopped the VM; none in any other run state.

    `find_owner` gives the device that owns a name in QEMU.
    """
    if monitor.execute(Command("query-status", {}))["status"] != IO_ERROR:
        return []
    return [
        FailedDisk(
            file=drive.get("inserted", {}).get("file", ""),
            error=DiskError(drive["io-status"]),
            device_id=find_owner(_name_of(drive.get("qdev", ""))),
        )
        for drive in monitor.execute(Command("query-block", {}))
        if drive.get("io-status", "ok") != "ok"
    ]


def _name_of(qdev: str) -> str:
    """The name of a disk's device: its id, or that in the path of a virtio backend."""
    return qdev.removeprefix(f"{PERIPHERAL}/").partition("/")[0]
