"""A VM in memory with its manager, and what was said to it, in the words of Kata's receiver."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from tests.conformance.vector import Case, Facts
from tests.support.tree import HostTree
from vmplug.address import QEMU_ID_PREFIX, ScsiAddress
from vmplug.cli.output import attachment_json
from vmplug.drivers.base import Command, Offer
from vmplug.host.safety import Code
from vmplug.host.vhost_user import VhostUserStore
from vmplug.hypervisor.memory import MemoryMonitor
from vmplug.hypervisor.qemu import Qemu
from vmplug.hypervisor.topology import PERIPHERAL
from vmplug.manager.manager import DeviceManager
from vmplug.manager.store import Attachment, DeviceRecord, Store
from vmplug.oci.info import DeviceInfo

VM = "sandbox"
_FIRST_PORT_DEVFN = 0x80
"""Ports go on slots 10, 10.1, ... of the root bus, where there is room for 128."""
_LETTERS = {"blockdev-add": "B", "device_add": "A", "device_del": "D", "blockdev-del": "R"}
"""The commands that change a VM; every other is a question."""


class _Vm(Qemu):
    """A VM whose SCSI controller has its first addresses in use."""

    def __init__(self, monitor: MemoryMonitor, *, used_scsi: int) -> None:
        super().__init__(monitor)
        self._used = frozenset(map(ScsiAddress.from_index, range(used_scsi)))

    def offer(self) -> Offer:
        offer = super().offer()
        controllers = tuple(replace(c, used=c.used | self._used) for c in offer.controllers)
        return replace(offer, controllers=controllers)


class Machine:
    """A VM with `ports` root ports, the first `used_ports` and `used_scsi` addresses in use."""

    def __init__(
        self,
        case: Case,
        tree: HostTree,
        *,
        ports: int = 4,
        used_ports: int = 0,
        used_scsi: int = 0,
        scsi: bool = True,
        store: VhostUserStore | None = None,
    ) -> None:
        self.tree = tree
        self.monitor = memory_monitor(ports=ports, used_ports=used_ports, scsi=scsi)
        self._used_scsi = used_scsi
        self._store = store
        self._restored = case.restored
        self._state_dir = case.path / "state"
        self._manager = self._open()
        self._index_of: dict[str, int] = {}

    def _open(self) -> DeviceManager:
        return DeviceManager.open(
            vm=VM,
            host=self.tree.root,
            hypervisor=_Vm(self.monitor, used_scsi=self._used_scsi),
            state_dir=self._state_dir,
            store=self._store,
        )

    @property
    def manager(self) -> DeviceManager:
        """The manager for the next step; in a restored life a new one for each."""
        if self._restored:
            self.restart()
        return self._manager

    def restart(self) -> None:
        """Nothing stays but the journal, the host and the VM."""
        self._manager.close()
        self._manager = self._open()

    def attach(
        self, info: DeviceInfo, *, owner: str | None = None, allow: Iterable[Code] = ()
    ) -> Attachment:
        return self.manager.attach(info, owner=owner, allow=allow)

    def detach(self, attachment: Attachment, *, timeout_s: float = 0.01) -> None:
        self.manager.detach(attachment.id, timeout_s=timeout_s)

    def records(self) -> list[DeviceRecord]:
        """The devices of the VM as they are saved."""
        journal = Store.open(self._state_dir)
        try:
            return journal.devices(VM)
        finally:
            journal.close()

    def count(self) -> int:
        """How often all devices together are attached."""
        return sum(hold.count for hold in self.manager.attachments())

    def sent(self) -> list[Command]:
        """The commands that change the VM, since it was last asked."""
        commands = [command for command in self.monitor.sent if command.execute in _LETTERS]
        self.monitor.sent.clear()
        return commands

    def calls(self) -> list[str]:
        """The same as plugs and unplugs, each whole, with the index of the place."""
        commands = self.sent()
        letters = "".join(_LETTERS[command.execute] for command in commands)
        words = []
        for match in re.finditer("BAR|BA|DR|D|.", letters):
            command = commands[match.start() + match[0].startswith("B")]
            if command.execute == "device_add":
                self._index_of[command.arguments["id"]] = index_of(command)
            index = self._index_of[command.arguments["id"]]
            words.append(f"{_CALLS[match[0]]} {index}")
        return words

    def drive(self, attachment: Attachment) -> dict[str, Any]:
        """The drive of the plug just done, in the fields of Kata's BlockDrive."""
        node, front = (command.arguments for command in self.sent())
        is_scsi = front["driver"] == "scsi-hd"
        return {
            "File": node["file"]["filename"],
            "Format": node["driver"],
            "ID": _own_id(node["node-name"], QEMU_ID_PREFIX, attachment.device_id),
            "Index": index_of(Command("device_add", front)),
            "ReadOnly": node["read-only"],
            "ShareRW": front["share-rw"],
            "DiscardUnmap": node["discard"] == "unmap",
            "SCSIAddr": f"{front['scsi-id']}:{front['lun']}" if is_scsi else "",
            "VirtPath": agent_record(attachment)["vm_path"],
        }


_CALLS = {
    "BA": "plug at",
    "BAR": "refused at",
    "DR": "unplug from",
    "D": "stays at",
}


def index_of(device_add: Command) -> int:
    """The place of a disk as a number, lowest first."""
    arguments = device_add.arguments
    if arguments["driver"] == "scsi-hd":
        return int(arguments["scsi-id"]) << 8 | int(arguments["lun"])
    return int(arguments["bus"].removeprefix("rp"))


def memory_monitor(*, ports: int, used_ports: int = 0, scsi: bool = True) -> MemoryMonitor:
    """A VM in memory with any number of ports."""
    monitor = MemoryMonitor(root_ports=1, scsi=scsi)
    port = monitor.devices.pop("rp0")
    for index in range(ports):
        properties = {**port.properties, "addr": _FIRST_PORT_DEVFN + index}
        monitor.devices[f"rp{index}"] = replace(port, properties=properties)
    for index in range(used_ports):
        monitor.devices[f"other{index}"] = replace(
            port,
            driver="virtio-rng-pci",
            bus=f"{PERIPHERAL}/rp{index}/rp{index}",
            properties={"addr": 0},
        )
    return monitor


def agent_record(attachment: Attachment) -> dict[str, Any]:
    """What the agent in the guest is told of it."""
    guest = attachment_json(attachment)["guest"]
    assert guest
    record: dict[str, Any] = guest["agent"]
    return record


def katas_drive(drive: Facts | None, device_id: str) -> dict[str, Any] | None:
    """Kata's BlockDrive in the fields of `Machine.drive`."""
    if drive is None:
        return None
    drive.skip("pmem and swap are no disks of this stage", "Pmem", "Swap")
    fields = {key: drive[key] for key in drive if key not in {"Pmem", "Swap"}}
    return {**fields, "ID": _own_id(drive["ID"], "drive-", device_id)}


def katas_calls(calls: Sequence[str]) -> list[str]:
    """Kata's calls of its receiver in the words of `Machine.calls`.

    A plug that succeeds keeps its index, one that fails gives it back.
    """
    words: list[str] = []
    index = "-1"
    rest = list(calls)
    while rest:
        call = rest.pop(0)
        match call.removesuffix(", error").split(" -> "):
            case ["GetAndSetSandboxBlockIndex", index]:
                if index == "-1":
                    words.append("no index")
            case ["HotplugAddDevice(block)"]:
                words.append(f"plug at {index}")
            case ["HotplugAddDevice(block)", "boom"]:
                assert rest.pop(0) == f"UnsetSandboxBlockIndex({index})"
                words.append(f"refused at {index}")
            case ["HotplugRemoveDevice(block)"]:
                freed = re.fullmatch(r"UnsetSandboxBlockIndex\((\d+)\)", rest.pop(0))
                assert freed
                words.append(f"unplug from {freed[1]}")
            case ["HotplugRemoveDevice(block)", "boom"]:
                words.append(f"stays at {index}")
            case [other]:
                words.append(other)
    return words


def _own_id(name: str, prefix: str, device_id: str) -> str:
    """Whether a name in QEMU is made of the device's own id."""
    return "its own" if name == f"{prefix}{device_id}" else name
