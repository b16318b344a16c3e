"""Qemu: the Hypervisor port on a QMP connection."""

import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Self

from msgspec.structs import replace

from vmplug.address import PERIPHERAL, device_id_of, qemu_id
from vmplug.drivers.place import MemorySlot, Offer, Place, Places
from vmplug.drivers.plug import Aio, BlockDrive, Plug, VFIODevices, VhostUserDevice
from vmplug.drivers.ports import Choose, Command, Endpoint, FailedDisk, Step, UnplugFailure
from vmplug.errors import BackendTimeout, CommandError, UnplugTimeout
from vmplug.host.file_id import CheckedFile, pinned, shows_open
from vmplug.host.process import find_guest_process, is_running, read_start_time
from vmplug.host.root import THIS_HOST, HostRoot
from vmplug.hypervisor.qemu.abilities import Abilities, QueriedAbilities
from vmplug.hypervisor.qemu.connection import (
    CheckedSocket,
    connect_by_name,
    connected,
    takes_connection,
)
from vmplug.hypervisor.qemu.failed_disks import IO_ERROR, find_failed_disks
from vmplug.hypervisor.qemu.fd_sets import close_sets
from vmplug.hypervisor.qemu.graph import check_graph
from vmplug.hypervisor.qemu.handover import (
    NO_DESCRIPTOR,
    Handover,
    RunState,
    Way,
    find_way,
    held_open,
    plug_opened,
    take_back_all,
)
from vmplug.hypervisor.qemu.iommufd import make_iommufd, missing_steps
from vmplug.hypervisor.qemu.nvdimm_lock import locked
from vmplug.hypervisor.qemu.qom import children, qom_get, qom_list, steadily
from vmplug.hypervisor.qemu.steps import nvdimm, vfio
from vmplug.hypervisor.qemu.steps.plug import check_hot, opened_files, plug_steps
from vmplug.hypervisor.qemu.steps.vhost_user import LINK, NETDEV
from vmplug.hypervisor.qemu.topology import Topology, read_offer, read_place
from vmplug.hypervisor.qemu.transaction import NOT_THERE, do_all, transaction
from vmplug.hypervisor.qemu.unplug_waiter import UnplugWaiter
from vmplug.hypervisor.qmp.client import QmpMonitor
from vmplug.hypervisor.qmp.monitor import COMMAND_TIMEOUT_S, Monitor
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner, VirtiofsdRunner, daemon_failed
from vmplug.log import Log

log = Log(__name__)

_STILL_HELD = ("is in use", "is busy", "which is mapped", "with active references")
"""The last two are those of QEMU 11 for object-del."""
_LOOK_AGAIN_S = 0.02
NO_AIO = "Unable to use native AIO"
"""QEMU 7.2's error when the host has no AIO context left; QEMU 10 uses threads by itself."""
_UNPLUGGING = "in the process of unplug"
"""QEMU's error when device_del is repeated; the request stands."""
NO_PLACES: Mapping[str, str] = MappingProxyType({})


class Qemu:
    """A running QEMU to plug into. Thread-safe; see `vmplug.drivers.ports.Hypervisor`.

    `undo_timeout_s` is how long the guest may take to release half a group, `release_timeout_s`
    how long QEMU may hold what a device was made of. `host` has the nodes that QEMU gets open, by
    default the running host.
    """

    def __init__(
        self,
        monitor: Monitor,
        endpoint: Endpoint | None = None,
        daemons: VirtiofsdRunner | None = None,
        host: HostRoot = THIS_HOST,
    ) -> None:
        self._monitor = monitor
        self._host = host
        self.undo_timeout_s = 5.0
        self.release_timeout_s = 5.0
        self._endpoint = endpoint
        vm = endpoint.qmp_socket if endpoint else f"process {os.getpid()}"
        self._daemons = daemons or HostVirtiofsdRunner(vm)
        self._foreign: Mapping[str, str] = {}
        self._with_daemon: set[str] = set()
        self._unplug_waiter = UnplugWaiter(self._owner)
        self.abilities: Abilities = QueriedAbilities(monitor.execute)
        monitor.listen(self._unplug_waiter.receive)
        self._run_state = RunState(monitor)

    @classmethod
    def connect(
        cls,
        socket: str,
        *,
        timeout_s: float = 10.0,
        command_timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> Self:
        """Connect to the QEMU behind the QMP socket at path `socket`.

        Raises ConnectError when no process answers within `timeout_s`, also later: others use the
        socket in between. Each answer may take `command_timeout_s`.
        """
        monitor = QmpMonitor.connect(
            socket, timeout_s=timeout_s, command_timeout_s=command_timeout_s
        )
        return cls(monitor, Endpoint(os.path.realpath(socket), None))

    @property
    def endpoint(self) -> Endpoint | None:
        """The socket of this VM, and QEMU's process, or that of the QEMU that now has the socket.

        vmplug connects again to the process that answers on the socket.
        """
        known = self._endpoint
        if known and not (known.pid and is_running(known.pid, known.started_at, THIS_HOST)):
            cpus = self._monitor.execute(Command("query-cpus-fast", {}))
            threads = {cpu["thread-id"] for cpu in cpus if "thread-id" in cpu}
            pid = find_guest_process(threads, self._monitor.peer_pid, THIS_HOST)
            started_at = read_start_time(pid, THIS_HOST) if pid else None
            self._endpoint = replace(known, pid=pid, started_at=started_at)
        return self._endpoint

    @property
    def takes_vf_token(self) -> bool:
        """Whether QEMU itself says so."""
        return self.abilities.vf_token

    def places(self, known: Mapping[str, str] = NO_PLACES) -> Places:
        """The places of the VM, each asked for when it is first used: see Topology."""

        def find_known(name: str) -> str | None:
            return known.get(self._owner(name) or "")

        return Topology(self._monitor, self.abilities, find_known)

    def offer(self) -> Offer:
        """All places that the VM offers now."""
        return steadily(lambda: read_offer(Topology(self._monitor, self.abilities)))

    def claim_foreign_names(self, names: Mapping[str, str]) -> None:
        """Set the names assigned by others, mapped to the owning device ids."""
        self._foreign = {**self._foreign, **names}

    def find_place(self, name: str) -> Place | None:
        """The place of the device with that name in QEMU; None when there is none."""
        return read_place(self._monitor, name)

    def _owner(self, name: str) -> str | None:
        """The id of the device that owns a name in QEMU; None for names of others."""
        return self._foreign.get(name) or device_id_of(name)

    def steps(self, plug: Plug, place: Place) -> tuple[Step, ...]:
        """The exact steps of `plug`; only queries QEMU."""
        missing = missing_steps(plug, self._monitor)
        return (*missing, *plug_steps(plug, place, self.abilities))

    def plug(self, plug: Plug, place: Place) -> None:
        """Plug all of it or none: a failure undoes the steps before it.

        Only after a ProtocolError or ConnectError is it unknown what was done.
        """
        check_hot(plug, place)
        if isinstance(plug, VFIODevices):
            self._plug_group(plug, place)
            return
        if isinstance(plug, VhostUserDevice) and plug.socket_path:
            self._plug_socket(plug, plug.socket_path, place)
            return
        if not (isinstance(plug, VhostUserDevice) and plug.daemon):
            self._plug_plain(plug, place)
            return
        with self._daemons.start(plug.daemon, plug.id) as started:
            connected = replace(plug, daemon=None, descriptor=started.descriptor)
            try:
                do_all(self._monitor, self.steps(connected, place))
            except CommandError as error:
                self._daemons.end([plug.id])
                raise daemon_failed(plug.daemon, error, started.stderr_tail()) from error
            except BackendTimeout as error:
                self._daemons.end([plug.id])  # then QEMU continues
                self._remove_remains({plug.id})
                raise daemon_failed(plug.daemon, error, started.stderr_tail()) from error

    def _plug_socket(self, plug: VhostUserDevice, path: str, place: Place) -> None:
        """Connect QEMU to the socket that was checked: see `vmplug.hypervisor.qemu.connection`."""
        checked = plug.file_id if self._endpoint else None
        if checked is None:
            do_all(self._monitor, self.steps(plug, place))
            return
        with pinned(path, checked) as pin:
            if takes_connection(plug) and self._hand_connection(plug, path, pin, place):
                return
            socket = CheckedSocket(path, checked, pin)
            connect = partial(connect_by_name, socket, self._guest_pid())
            do_all(self._monitor, self.steps(plug, place), begin=connect)

    def _hand_connection(self, plug: VhostUserDevice, path: str, pin: int, place: Place) -> bool:
        """Plug it with a connection of vmplug's; False where a proxy passes none on to QEMU."""
        with connected(path, pin) as descriptor:
            try:
                do_all(self._monitor, self.steps(replace(plug, descriptor=descriptor), place))
            except CommandError as error:
                if NO_DESCRIPTOR not in error.desc:
                    raise
                return False
        return True

    def _plug_plain(self, plug: Plug, place: Place) -> None:
        """A disk that QEMU refuses only for the `aio` that vmplug chose is plugged with threads.

        QEMU 7.2 refuses a native one without a context left; QEMU 10 then uses threads by itself.
        """
        try:
            self._plug_files(plug, place)
        except CommandError as error:
            is_choice = isinstance(plug, BlockDrive) and plug.aio_is_choice
            if NO_AIO not in error.desc or not is_choice:
                raise
            assert isinstance(plug, BlockDrive)
            facts = {"device_id": plug.id}
            log.warning("device %s: vmplug uses aio=threads", plug.id, extra=facts)
            self._plug_files(replace(plug, aio=Aio.THREADS), place)

    def _plug_files(self, plug: Plug, place: Place) -> None:
        files = opened_files(plug) if self._endpoint else ()
        if isinstance(plug, BlockDrive) and isinstance(place, MemorySlot):
            self._plug_memory(plug, place, files)
        else:
            self._hand_over(plug, place, files)

    def _plug_memory(
        self, drive: BlockDrive, slot: MemorySlot, files: Sequence[CheckedFile]
    ) -> None:
        """Lock its file, except behind a proxy that passes no descriptors on."""
        if files:
            with locked(drive) as held:
                try:
                    self._hand_over(held, slot, files)
                except CommandError as error:
                    if NO_DESCRIPTOR not in error.desc:
                        raise
                    facts = {"device_id": drive.id}
                    log.warning("device %s is plugged without a lock", drive.id, extra=facts)
                else:
                    return
        self._hand_over(replace(drive, file_id=None), slot, files)

    def _hand_over(self, plug: Plug, place: Place, files: Sequence[CheckedFile]) -> None:
        """By descriptor, or by path where a proxy at the socket passes no descriptors on."""
        if not files:
            steps = self.steps(plug, place)  # may ask QEMU
            self._monitor.converse(transaction(steps, verify=check_graph(plug)))
            return

        with held_open(files) as opened:
            pid = self._guest_pid()
            running = None if isinstance(place, MemorySlot) else self._run_state

            def hand_over(way: Way) -> None:
                given = Handover(plug.id, pid, running, way)
                self._monitor.converse(plug_opened(plug, place, opened, given, self.abilities))

            find_way(hand_over, takes_sets=running is not None)

    def check_graph(self, plug: Plug) -> None:
        """NoSuchDevice unless its node opened exactly the files that were checked."""
        self._monitor.converse(check_graph(plug))

    def _guest_pid(self) -> int | None:
        """QEMU's process, if its files can be read."""
        pid = endpoint.pid if (endpoint := self.endpoint) else None  # may ask QEMU
        return pid if pid is not None and shows_open(pid) else None

    def _plug_group(self, plug: VFIODevices, place: Place) -> None:
        """The guest must release the functions that were plugged before a refused one.

        UnplugTimeout when it does not: half of the group stays in the VM.
        """
        with vfio.open_nodes(plug, self._host) as files:
            if files:
                vfio.check_free(place, self.places())
                make_iommufd(self._monitor, self._host)
            try:
                do_all(self._monitor, plug_steps(vfio.opened(plug, files), place, self.abilities))
            except CommandError as error:
                left = self.wait_unplugged([plug.id], self.undo_timeout_s)
                if left:
                    raise UnplugTimeout(
                        (plug.id,),
                        f"{error.message}; functions of {plug.node} plugged before it are still "
                        f"in the VM after {self.undo_timeout_s:g} s",
                        hint="vmplug reconcile unplugs them once the guest answers",
                    ) from error
                raise

    def request_unplug(self, device_ids: Sequence[str]) -> dict[str, CommandError]:
        """See Hypervisor. After a refusal a group is not asked for its other functions."""
        refused = dict[str, CommandError]()
        turns = {device_id: turn for turn, device_id in enumerate(device_ids)}
        found = ((self._owner(name) or "", name) for name in self._present(turns.keys()))
        for device_id, name in sorted(found, key=lambda one: (turns[one[0]], one[1])):
            if device_id in refused:
                continue
            self._unplug_waiter.expect(name)
            try:
                self._monitor.execute(Command("device_del", {"id": name}))
            except CommandError as error:
                if _UNPLUGGING in error.desc:
                    continue
                self._unplug_waiter.forget(name)
                if error.error_class != "DeviceNotFound":
                    refused[device_id] = error
        return refused

    def wait_unplugged(
        self, device_ids: Sequence[str], timeout_s: float
    ) -> dict[str, UnplugFailure]:
        """Wait for the guest, then remove what is left of the devices.

        A guest that boots loses a request, so it is repeated. Returns the reason for each device
        that is still there. Others can use the QMP socket meanwhile.
        """
        wanted = set(device_ids)
        look = partial(self._present, wanted)
        with self._monitor.hear_events():
            names = self._unplug_waiter.wait(wanted, look, self._ask_again, timeout_s)
        left = {self._owner(name) or "": why for name, why in names.items()}
        self._remove_remains(wanted - left.keys())
        return left | dict.fromkeys(self._lost(left), UnplugFailure.LOST)

    def _ask_again(self, names: Iterable[str]) -> None:
        """Repeat requests that may be lost. QEMU refuses those that are in progress."""
        for name in names:
            try:
                self._monitor.execute(Command("device_del", {"id": name}))
            except CommandError as error:
                log.debug("device_del %s: %s", name, error.desc)

    def close_files(self, device_ids: Iterable[str]) -> None:
        """Close files that an interrupted attach passed to QEMU and that it does not use yet."""
        for device_id in device_ids:
            link, node = qemu_id(device_id, LINK), vfio.open_node_name(device_id)
            for name in (link, node, nvdimm.lock_name(device_id)):
                self._remove(Command("closefd", {"fdname": name}))
            take_back_all(self._monitor, device_id)

    def close_left_files(self, choose: Choose) -> None:
        """Close files that QEMU was given for devices, and that a paused QEMU 7.2 has kept."""
        close_sets(self._monitor, choose)

    def resize(self, device_id: str, size_bytes: int) -> None:
        """Report a disk's new size to the guest; a regular file is resized."""
        name = next(iter(self._present({device_id})), qemu_id(device_id))
        node = self._monitor.execute(qom_get(f"{PERIPHERAL}/{name}", "drive"))
        self._monitor.execute(Command("block_resize", {"node-name": node, "size": size_bytes}))

    def find_devices(self) -> dict[str, bool]:
        """The ids of all devices of which the VM has any part; True where the guest sees it."""
        drivers = self.find_drivers()
        parts = (*self._nodes(), *self._names_in("/objects"), *self._chardevs())
        ids = [self._owner(name) for name in parts]
        self._with_daemon = set(self._daemons.find())
        found = {device_id: False for device_id in (*ids, *self._with_daemon) if device_id}
        return found | dict.fromkeys(drivers, True)

    def find_drivers(self) -> dict[str, str]:
        """The drivers of the devices that the guest sees, by id."""
        entries = self._monitor.execute(qom_list(PERIPHERAL))
        return {i: driver for name, driver in children(entries) if (i := self._owner(name))}

    def find_lost(self) -> set[str]:
        """The ids of devices whose vhost-user backend is gone: the guest waits for its I/O."""
        names = {i for name in self._names_in(PERIPHERAL) if (i := self._owner(name))}
        return self._lost(names)

    def status(self) -> str:
        """QEMU's run state: `running`, `paused`, `prelaunch`, ..."""
        return str(self._monitor.execute(Command("query-status", {}))["status"])

    def find_failed_disks(self) -> list[FailedDisk]:
        """The disks of which an error has stopped the VM; none in any other run state."""
        return find_failed_disks(self._monitor, self._owner)

    def power_down(self) -> None:
        """Press the power button; the guest may shut down."""
        self._monitor.execute(Command("system_powerdown", {}))

    def resume(self) -> None:
        """Resume a stopped VM."""
        self._monitor.execute(Command("cont", {}))

    def keeps_running(self, watched_s: float) -> bool:
        """Whether the VM, which was just resumed, is not stopped again by an error in that time.

        Requests that failed are repeated at once: QEMU 7.2 and 10 stopped again after 2 to 10 ms.
        """
        deadline = time.monotonic() + watched_s
        while self.status() != IO_ERROR:
            left = deadline - time.monotonic()
            if left <= 0:
                return True
            self._unplug_waiter.pause(min(left, _LOOK_AGAIN_S))
        return False

    def quit(self) -> None:
        """End QEMU at once."""
        self._monitor.execute(Command("quit", {}))

    def close(self) -> None:
        """Close the connection; the VM keeps running."""
        self._monitor.close()

    def _names_in(self, path: str) -> list[str]:
        return [entry["name"] for entry in self._monitor.execute(qom_list(path))]

    def _nodes(self) -> list[str]:
        # Not query-named-block-nodes, which asks the storage of every file for its size: while one
        # does not answer, QEMU's main thread stands still, and with it the guest.
        nodes = self._monitor.execute(Command("query-blockstats", {"query-nodes": True}))
        return [node["node-name"] for node in nodes]

    def _chardevs(self) -> dict[str, str]:
        """The chardevs with their peers, in QEMU's words."""
        found = self._monitor.execute(Command("query-chardev", {}))
        return {chardev["label"]: chardev["filename"] for chardev in found}

    def _lost(self, device_ids: Iterable[str]) -> set[str]:
        """The devices whose backend has disconnected. Source: `query-chardev` on QEMU 7.2."""
        wanted = set(device_ids)
        chardevs = self._chardevs() if wanted else {}
        return {
            owner
            for label, connection in chardevs.items()
            if (owner := self._owner(label)) in wanted and owner
            if connection.startswith("disconnected:")
        }

    def _present(self, device_ids: Collection[str]) -> set[str]:
        """The names of the devices' parts that exist; a group has one for each function."""
        return {name for name in self._names_in(PERIPHERAL) if self._owner(name) in device_ids}

    def _remove_remains(self, device_ids: set[str]) -> None:
        """Delete what is left of devices that are gone: filters before their nodes, daemons last.

        Never for a device that still exists: QEMU would delete its netdev, and abort.
        """
        if not device_ids:
            return
        nodes = [name for name in self._nodes() if self._owner(name) in device_ids]
        for name in sorted(nodes, key=len, reverse=True):
            self._remove(Command("blockdev-del", {"node-name": name}))
        linked = [name for name in self._chardevs() if self._owner(name) in device_ids]
        for name in linked:
            device_id = self._owner(name) or ""
            self._remove(Command("netdev_del", {"id": qemu_id(device_id, NETDEV)}))
            self._remove(Command("chardev-remove", {"id": name}))
        for name in self._names_in("/objects"):
            if (owner := self._owner(name)) in device_ids and owner:
                self._remove(Command("object-del", {"id": name}))
                if name == qemu_id(owner, nvdimm.MEMORY):
                    self._remove(Command("closefd", {"fdname": nvdimm.lock_name(owner)}))
        for device_id in device_ids & self._with_daemon:
            # QEMU does not list a connection that it got and does not use yet.
            self._remove(Command("closefd", {"fdname": qemu_id(device_id, LINK)}))
        if linked or device_ids & self._with_daemon:  # looking for one reads all of /proc
            self._daemons.end(device_ids)

    def _remove(self, command: Command) -> None:
        """Delete a part that another thread may have deleted meanwhile.

        A device leaves the tree a moment before QEMU releases its parts; the event for that may
        have gone to an earlier connection.
        """
        deadline = time.monotonic() + self.release_timeout_s
        while True:
            try:
                self._monitor.execute(command)
            except CommandError as error:
                if any(words in error.desc for words in NOT_THERE):
                    return
                is_held = any(words in error.desc for words in _STILL_HELD)
                if not is_held or time.monotonic() >= deadline:
                    raise
            else:
                return
            self._unplug_waiter.pause(_LOOK_AGAIN_S)
