"""The devices of a QEMU before its start: the same steps as hot plug, as arguments.

They are JSON where QEMU accepts it. For -chardev and -fsdev it does not: their paths use -set,
which takes the rest of its argument as it is, so that names need no quoting.
Source: QEMU softmmu/vl.c, qemu_set_option; measured on QEMU 7.2.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Self

from msgspec.structs import replace

from vmplug.address import qemu_id
from vmplug.drivers.place import MemorySlot, Place
from vmplug.drivers.plug import BlockDrive, Plug, SharedFS, VFIODevices, VhostUserDevice
from vmplug.drivers.ports import START_DAEMON, Command, Step
from vmplug.errors import CommandError
from vmplug.host.file_id import pinned
from vmplug.host.pci.iommu import IOMMU_NODE
from vmplug.host.root import HostRoot
from vmplug.hypervisor.qemu.abilities import RECONNECT, RECONNECT_MS, Abilities
from vmplug.hypervisor.qemu.connection import connected, takes_connection
from vmplug.hypervisor.qemu.iommufd import IOMMUFD, iommufd_steps, needs_iommufd
from vmplug.hypervisor.qemu.nvdimm_lock import locked
from vmplug.hypervisor.qemu.start.machine import option_text
from vmplug.hypervisor.qemu.steps import vfio
from vmplug.hypervisor.qemu.steps.plug import check_file, plug_steps
from vmplug.hypervisor.qemu.steps.vhost_user import LINK
from vmplug.hypervisor.virtiofsd import VirtiofsdProcess, VirtiofsdRunner

_JSON_OPTIONS = {
    "blockdev-add": "-blockdev",
    "object-add": "-object",
    "netdev_add": "-netdev",
    "device_add": "-device",
}
_NOT_WRITTEN = frozenset({START_DAEMON, "getfd"})
"""A daemon runs before QEMU does, and QEMU inherits the connection to it, and any open file."""


class ColdDevices:
    """The devices that a QEMU will have from its start, and the open files that it inherits.

    A context manager: daemons of shares run from `plug` on, and end with it unless QEMU was
    started meanwhile (`started`).
    """

    def __init__(self, abilities: Abilities, daemons: VirtiofsdRunner, host: HostRoot) -> None:
        self.abilities = abilities
        self._daemons = daemons
        self._host = host
        self._steps: dict[str, tuple[Step, ...]] = {}
        self._connections: dict[str, int] = {}
        self._running: dict[str, VirtiofsdProcess] = {}
        self._nodes: dict[str, ExitStack] = {}
        self._plugs: dict[str, tuple[Plug, Place]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close_nodes()
        for started in self._running.values():
            started.close()
        if self._running:
            self._daemons.end(self._running)

    def started(self) -> None:
        """Note that QEMU has the connections and nodes: now the daemons end with QEMU."""
        self._close_nodes()
        for started in self._running.values():
            started.close()
        self._running.clear()

    def steps(self, plug: Plug, place: Place) -> tuple[Step, ...]:
        """The arguments of `plug` on the command line."""
        steps = plug_steps(plug, place, self.abilities)
        if needs_iommufd(plug) and not self._shares_iommufd:
            return (*iommufd_steps(), *steps)
        return steps

    def plug(self, plug: Plug, place: Place) -> None:
        """Add it to the command line, and start its daemon."""
        check_file(plug, place)
        if isinstance(plug, VhostUserDevice):
            plug = self._connect(plug)
        if needs_iommufd(plug):
            assert isinstance(plug, VFIODevices)
            plug = self._open_nodes(plug)
        if isinstance(plug, SharedFS) and plug.file_id and self._host.is_live:
            plug = self._open_directory(plug, plug.file_id)
        if isinstance(plug, BlockDrive) and isinstance(place, MemorySlot) and plug.file_id:
            plug = self._lock(plug)
        self._set(plug, place)

    def _connect(self, plug: VhostUserDevice) -> VhostUserDevice:
        """With a connection for QEMU, unless QEMU must be able to connect again by itself."""
        if plug.daemon:
            started = self._daemons.start(plug.daemon, plug.id)
            self._running[plug.id] = started
            plug = replace(plug, daemon=None, descriptor=started.descriptor)
        elif plug.socket_path and plug.file_id and self._can_connect(plug):
            with pinned(plug.socket_path, plug.file_id) as pin, ExitStack() as stack:
                descriptor = stack.enter_context(connected(plug.socket_path, pin))
                self._nodes[plug.id] = stack.pop_all()
            plug = replace(plug, descriptor=descriptor)
        if plug.descriptor is not None:
            self._connections[qemu_id(plug.id, LINK)] = plug.descriptor
        return plug

    def _can_connect(self, plug: VhostUserDevice) -> bool:
        """Whether vmplug connects for QEMU; in the picture of a host nobody can."""
        return takes_connection(plug) and self._host.is_live

    def _set(self, plug: Plug, place: Place) -> None:
        self._steps[plug.id] = plug_steps(self._named(plug), place, self.abilities)
        self._plugs[plug.id] = plug, place

    def _named(self, plug: Plug) -> Plug:
        """The plug with the names by which QEMU opens its files: their own."""
        return plug

    @property
    def _shares_iommufd(self) -> bool:
        """Whether an open /dev/iommu is there for QEMU, for all of the VM's devices."""
        return IOMMUFD in self._nodes

    def _open_nodes(self, plug: VFIODevices) -> VFIODevices:
        """The group with its nodes open, until QEMU has them or it is left out."""
        from vmplug.host.pci.vfio import open_nodes  # noqa: PLC0415  3 ms

        with ExitStack() as stack:
            files = stack.enter_context(open_nodes(vfio.nodes(plug), self._host))
            if not self._shares_iommufd:
                shared = ExitStack()
                opened = shared.enter_context(open_nodes({IOMMUFD: IOMMU_NODE}, self._host))
                self._nodes[IOMMUFD] = shared
                self._connections |= opened
            self._nodes[plug.id] = stack.pop_all()
        return vfio.opened(plug, files)

    def _open_directory(self, plug: SharedFS, checked: str) -> SharedFS:
        """The share of the directory that was checked, which QEMU inherits, by no name."""
        with ExitStack() as stack:
            descriptor = stack.enter_context(pinned(plug.directory, checked))
            self._nodes[plug.id] = stack.pop_all()
        self._connections[qemu_id(plug.id, LINK)] = descriptor
        return replace(plug, directory=f"/proc/self/fd/{descriptor}")

    def _lock(self, plug: BlockDrive) -> BlockDrive:
        """The memory with its file locked, until QEMU has the lock or it is left out."""
        with ExitStack() as stack:
            held = stack.enter_context(locked(plug))
            self._nodes[plug.id] = stack.pop_all()
        return held

    def _close_nodes(self) -> None:
        for opened in self._nodes.values():
            opened.close()
        self._nodes.clear()

    def arguments(self) -> list[str]:
        """Everything that was plugged, for the command line."""
        shared = iommufd_steps() if self._shares_iommufd else ()
        steps = [step for steps in self._steps.values() for step in steps]
        return arguments([*shared, *steps], self._connections)

    def descriptors(self) -> list[int]:
        """The descriptors that QEMU inherits."""
        commands = [step.do for steps in self._steps.values() for step in steps]
        given = [c.descriptor for c in commands if c.descriptor is not None]
        return list({*self._connections.values(), *given})

    def request_unplug(self, device_ids: Sequence[str]) -> dict[str, CommandError]:
        """Remove them from the command line."""
        for device_id in device_ids:
            self._remove(device_id)
        return {}

    def _remove(self, device_id: str) -> None:
        self._steps.pop(device_id, None)
        self._plugs.pop(device_id, None)
        self._connections.pop(qemu_id(device_id, LINK), None)
        if opened := self._nodes.pop(device_id, None):
            opened.close()
        if started := self._running.pop(device_id, None):
            started.close()
            self._daemons.end([device_id])


def arguments(steps: Iterable[Step], descriptors: Mapping[str, int]) -> list[str]:
    """The steps as command line; `descriptors` are those that QEMU inherits, by `getfd`'s names.

    A `getfd` with its own descriptor is for the device after it: the next one reuses the name.
    """
    written, named = [], dict(descriptors)
    for command in (step.do for step in steps):
        if command.execute == "getfd" and command.descriptor is not None:
            named[command.arguments["fdname"]] = command.descriptor
        written += _arguments(command, named)
    return written


def _arguments(command: Command, descriptors: Mapping[str, int]) -> list[str]:
    if command.execute in _NOT_WRITTEN:
        return []
    if command.execute in _JSON_OPTIONS:
        said = dict(command.arguments)
        if said.get("fd") in descriptors:
            said["fd"] = str(descriptors[said["fd"]])
        return [_JSON_OPTIONS[command.execute], json.dumps(said)]
    name = command.arguments["id"]
    match command.execute:
        case "chardev-add":
            data = command.arguments["backend"]["data"]
            address = data["addr"]
            options = {"id": name}
            options |= {key: data[key] for key in (RECONNECT, RECONNECT_MS) if key in data}
            if address["type"] == "fd":
                return ["-chardev", option_text("socket", options | {"fd": descriptors[name]})]
            path = address["data"]["path"]
            return [
                "-chardev",
                option_text("socket", options),
                "-set",
                f"chardev.{name}.path={path}",
            ]
        case "fsdev":
            options = {key: value for key, value in command.arguments.items() if key != "path"}
            path = command.arguments["path"]
            return ["-fsdev", option_text("local", options), "-set", f"fsdev.{name}.path={path}"]
        case _:
            raise AssertionError(f"{command.execute} is not for the command line")
