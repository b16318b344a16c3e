"""A VM in memory with its manager, and what was said to it, in the words of Kata's receiver."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from msgspec import structs

from tests.kata.vector import Case, Facts, Refusal, attempt, error_of
from tests.support.journal import lay_journal
from tests.support.scsi import first_addresses
from tests.support.tree import HostTree
from vmplug.address import PERIPHERAL, qemu_id
from vmplug.cli.render.attachments import attachment_json
from vmplug.drivers.place import Offer
from vmplug.drivers.ports import Command
from vmplug.host.finding import Code
from vmplug.host.vhost_user.store import VhostUserStore
from vmplug.hypervisor.fake.monitor import FakeMonitor
from vmplug.hypervisor.qemu.abilities import RECONNECT
from vmplug.hypervisor.qemu.running import NO_PLACES, Qemu
from vmplug.journal.journal import Journal
from vmplug.journal.records import Attachment, DeviceRecord
from vmplug.manager.manager import DeviceManager
from vmplug.oci.requests import Request

VM = "sandbox"
UNKNOWN = "0123456789abcdef"
"""An id of nothing; ids are drawn, and this one is not."""
_TIMEOUT_S = 0.01
_FIRST_PORT_DEVFN = 0x80
"""Ports go on slots 10, 10.1, ... of the root bus, where there is room for 128."""
_LETTERS = {
    "object-add": "O",
    "blockdev-add": "B",
    "device_add": "A",
    "device_del": "D",
    "blockdev-del": "R",
    "object-del": "P",
    "chardev-add": "C",
    "chardev-remove": "K",
    "netdev_add": "N",
    "netdev_del": "E",
}
"""The commands that change a VM; every other is a question."""


class _Vm(Qemu):
    """As FakeHypervisor, on a monitor that outlives it, with SCSI addresses in use."""

    def __init__(self, monitor: FakeMonitor, *, used_scsi: int) -> None:
        super().__init__(monitor)
        self._used = first_addresses(used_scsi)

    def offer(self) -> Offer:
        offer = super().offer()
        if not self._used:
            return offer
        controllers = tuple(
            structs.replace(c, used=c.used | self._used) for c in offer.controllers
        )
        return structs.replace(offer, controllers=controllers)

    def places(self, known: Mapping[str, str] = NO_PLACES) -> Offer:  # noqa: ARG002
        return self.offer()


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
        lay_journal(self._state_dir)
        self._manager = self._open()
        case.at_end.callback(self.close)

    def _open(self) -> DeviceManager:
        return DeviceManager.open(
            vm=VM,
            host=self.tree.root,
            hypervisor=_Vm(self.monitor, used_scsi=self._used_scsi),
            state_dir=self._state_dir,
            vhost_user_store=self._store,
        )

    @property
    def manager(self) -> DeviceManager:
        """The manager for the next step; in a restored life a new one for each."""
        if self._restored:
            self.restart()
        return self._manager

    def close(self) -> None:
        """The journal and the VM stay."""
        self._manager.close()

    def restart(self) -> None:
        """Nothing stays but the journal, the host and the VM."""
        self.close()
        self._manager = self._open()

    def attach(self, info: Request, *, owner: str | None = None) -> Attachment:
        return self.manager.attach(info, owner=owner)

    def try_attach(self, info: Request, *, allow: Iterable[Code] = ()) -> Attachment | Refusal:
        return attempt(lambda: self.manager.attach(info, allow=allow))

    def try_detach(self, hold: Attachment | str, *, whole: bool = False) -> Refusal | None:
        """Let go of a hold, or of what is held at a container path: of nothing if nothing is."""
        if isinstance(hold, str):
            held = {hold.container_path: hold.id for hold in self.manager.attachments()}
            hold_id = held.get(hold, UNKNOWN)
        else:
            hold_id = hold.id
        answer = attempt(lambda: self.manager.detach(hold_id, timeout_s=_TIMEOUT_S, whole=whole))
        return error_of(answer)

    def records(self) -> list[DeviceRecord]:
        """The devices of the VM as they are saved."""
        journal = Journal.open(self._state_dir)
        try:
            return journal.devices(VM)
        finally:
            journal.close()

    def count(self) -> int:
        """How often all devices together are attached."""
        return sum(hold.count for hold in self.manager.attachments())

    @property
    def changes(self) -> list[Command]:
        """The commands so far that change the VM."""
        return [command for command in self.monitor.sent if command.execute in _LETTERS]

    def calls(self) -> list[str]:
        """The same as plugs and unplugs, each whole, with the index of the place."""
        commands = self.changes
        letters = "".join(_LETTERS[command.execute] for command in commands)
        words, index_of_id = [], {}
        for match in re.finditer("BAR|BA|DR|D|.", letters):
            command = commands[match.start() + match[0].startswith("B")]
            qdev_id = command.arguments["id"]
            if command.execute == "device_add":
                index_of_id[qdev_id] = index_of(command)
            words.append(f"{_CALLS[match[0]]} {index_of_id[qdev_id]}")
        return words

    def drive(self, attachment: Attachment) -> dict[str, Any]:
        """The drive of a disk as it was plugged, in the fields of Kata's BlockDrive."""
        name = qemu_id(attachment.device_id)
        (node,) = (c.arguments for c in self.changes if c.arguments.get("node-name") == name)
        plugs = [command for command in self.changes if command.execute == "device_add"]
        (front,) = (command for command in plugs if command.arguments["id"] == name)
        is_scsi = front.arguments["driver"] == "scsi-hd"
        return {
            "File": node["file"]["filename"],
            "Format": node["driver"],
            "ID": "its own" if front.arguments["drive"] == name else front.arguments["drive"],
            "Index": index_of(front),
            "ReadOnly": node["read-only"],
            "ShareRW": front.arguments["share-rw"],
            "DiscardUnmap": node["discard"] == "unmap",
            "SCSIAddr": "{scsi-id}:{lun}".format(**front.arguments) if is_scsi else "",
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


def memory_monitor(*, ports: int, used_ports: int = 0, scsi: bool = True) -> FakeMonitor:
    """A VM in memory with any number of ports, as old as the QEMUs of Kata."""
    monitor = FakeMonitor(root_ports=0, scsi=scsi, reconnect=RECONNECT)
    for index in range(ports):
        add_port(monitor, f"rp{index}", _FIRST_PORT_DEVFN + index)
    for index in range(used_ports):
        monitor.devices[f"other{index}"] = replace(
            _PORT,
            driver="virtio-rng-pci",
            bus=f"{PERIPHERAL}/rp{index}/rp{index}",
            properties={"addr": 0},
        )
    return monitor


def add_port(monitor: FakeMonitor, name: str, devfn: int) -> None:
    """A root port at any place of the root bus."""
    properties = {**_PORT.properties, "addr": devfn}
    monitor.devices[name] = replace(_PORT, properties=properties)


def add_bridge(
    monitor: FakeMonitor, slot: int, *, name: str = "pci-bridge-0", parent: str | None = None
) -> None:
    """A PCI bridge on the root bus or behind a port."""
    add_behind(monitor, parent, name, "pci-bridge", slot << 3)


def add_behind(
    monitor: FakeMonitor, parent: str | None, name: str, driver: str, devfn: int
) -> None:
    """A port, switch or bridge behind another one; on the root bus where `parent` is None."""
    bus = f"{PERIPHERAL}/{parent}/{parent}" if parent else _PORT.bus
    properties = {"addr": devfn, "hotplug": True}
    monitor.devices[name] = replace(_PORT, driver=driver, bus=bus, properties=properties)


_PORT = FakeMonitor(root_ports=1).devices["rp0"]


def agent_record(attachment: Attachment) -> dict[str, Any]:
    """What the agent in the guest is told of it."""
    guest = attachment_json(attachment)["guest"]
    assert guest
    record: dict[str, Any] = guest["agent"]
    return record


def our_drive(file: str, index: int, **changes: object) -> dict[str, Any]:
    """What `Machine.drive` is to give of an ordinary disk."""
    return {
        "File": file,
        "Format": "raw",
        "ID": "its own",
        "Index": index,
        "ReadOnly": False,
        "ShareRW": False,
        "DiscardUnmap": False,
        "SCSIAddr": "",
        "VirtPath": "",
        **changes,
    }


def katas_drive(drive: Facts | None, device_id: str) -> dict[str, Any] | None:
    """Kata's BlockDrive in the fields of `Machine.drive`."""
    if drive is None:
        return None
    drive.skip("whether it is memory says its driver; swap is the guest's", "Pmem", "Swap")
    fields = {key: drive[key] for key in drive if key not in {"Pmem", "Swap"}}
    own = device_id and drive["ID"] == f"drive-{device_id}"
    return {**fields, "ID": "its own" if own else drive["ID"]}


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
            case _:
                words.append(call)
    return words
