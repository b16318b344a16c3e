"""Which disks have stopped a VM, from QEMU's own words."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from vmplug.drivers.ports import Command, DiskError, FailedDisk
from vmplug.errors import CommandError
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qmp.monitor import EventReceiver, Monitor

ID = "0123456789abcdef"


class Answers(Monitor):
    """Answers each command with what it was made with, and keeps what it was asked."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self._answers = answers
        self.asked = list[str]()

    def attempt(self, commands: Sequence[Command]) -> tuple[list[Any], CommandError | None]:
        """See Monitor."""
        self.asked += [command.execute for command in commands]
        return [self._answers[command.execute] for command in commands], None

    def listen(self, receive: EventReceiver) -> None:
        """See Monitor."""

    def close(self) -> None:
        """See Monitor."""


def drive(qdev: str, status: str, file: str = "/srv/a") -> dict[str, Any]:
    """A drive as QEMU 7.2 and 10 list one; the node that it has is named, the drive is not."""
    more = {"device": "", "locked": False, "removable": False, "type": "unknown"}
    return {**more, "qdev": qdev, "io-status": status, "inserted": {"file": file, "drv": "raw"}}


@pytest.mark.parametrize(
    ("qdev", "device_id"),
    [
        (f"/machine/peripheral/vmplug-{ID}/virtio-backend", ID),
        (f"vmplug-{ID}", ID),
        ("/machine/peripheral/boot/virtio-backend", None),
        ("scsi3", None),
    ],
)
def test_the_disk_that_has_stopped_the_vm_is_known_by_its_device(
    qdev: str, device_id: str | None
) -> None:
    drives = [drive(qdev, "nospace"), drive("other", "ok"), {"device": "cd0", "qdev": "cd0"}]
    drives.append(drive("broken", "failed", "/dev/sdb"))
    qemu = Qemu(Answers({"query-status": {"status": "io-error"}, "query-block": drives}))
    assert qemu.find_failed_disks() == [
        FailedDisk(file="/srv/a", error=DiskError.NO_SPACE, device_id=device_id),
        FailedDisk(file="/dev/sdb", error=DiskError.FAILED, device_id=None),
    ]


@pytest.mark.parametrize("status", ["running", "paused", "prelaunch"])
def test_no_disk_is_looked_at_unless_an_error_has_stopped_the_vm(status: str) -> None:
    """The query looks at every file, and one that hangs would stop a guest that runs."""
    monitor = Answers({"query-status": {"status": status}})
    assert Qemu(monitor).find_failed_disks() == []
    assert monitor.asked == ["query-status"]
