"""Qemu: the Hypervisor port on a QMP conversation."""

import logging
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Self

from vmplug.address import PERIPHERAL, device_id_of, qemu_id
from vmplug.drivers.place import Offer, Place
from vmplug.drivers.plug import Plug, VFIODevices, VhostUserDevice, VirtiofsdSpec
from vmplug.drivers.ports import Command, Endpoint, Step
from vmplug.errors import (
    BackendError,
    BackendTimeout,
    CommandError,
    HostError,
    HypervisorError,
    UnplugTimeout,
)
from vmplug.host.file_id import check_path, file_replaced, has_open, has_thread, pinned
from vmplug.host.pci.vfio import open_nodes
from vmplug.host.process import is_running
from vmplug.host.root import THIS_HOST, HostRoot
from vmplug.hypervisor.qemu.abilities import Abilities, QueriedAbilities
from vmplug.hypervisor.qemu.iommufd import make_iommufd, missing_steps
from vmplug.hypervisor.qemu.steps import vfio
from vmplug.hypervisor.qemu.steps.plug import check_hot, opened_file, plug_steps
from vmplug.hypervisor.qemu.steps.vhost_user import LINK, NETDEV
from vmplug.hypervisor.qemu.topology import qom_get, qom_list, read_offer, read_place
from vmplug.hypervisor.qemu.unplug_waiter import UnplugWaiter
from vmplug.hypervisor.qmp.monitor import COMMAND_TIMEOUT_S, Monitor
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner, VirtiofsdRunner

log = logging.getLogger(__name__)

_NOT_THERE = ("Failed to find node", "not found")
_STILL_HELD = ("is in use", "is busy", "which is mapped", "with active references")
"""The last two are those of QEMU 11 for object-del."""
_LOOK_AGAIN_S = 0.02
_NO_SANDBOX = ("mount(/, MS_REC|MS_SLAVE)", "CleanMount")
"""What the virtiofsd in C and the one in Rust say when they cannot make / private or leave it."""
_UNPLUGGING = "in the process of unplug"
"""QEMU's word when device_del is repeated; the request stands."""
_READ_ATTEMPTS = 10
"""What a device is made of is free a moment after the tree has forgotten it: 50 ms on QEMU 7.2."""


class Qemu:
    """A running QEMU to plug into. Thread-safe; see `vmplug.drivers.ports.Hypervisor`.

    `undo_timeout_s` is how long the guest may take to let go of half a group, `release_timeout_s`
    how long QEMU may hold what a device was made of. `host` is where the nodes are that QEMU gets
    open, by default the running host.
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

    @classmethod
    def connect(
        cls,
        socket: str,
        *,
        timeout_s: float = 10.0,
        command_timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> Self:
        """Talk to the QEMU behind the QMP socket at path `socket`.

        Raises ConnectError when nobody answers there within `timeout_s`, also later: the socket is
        left to others in between. Each answer may take `command_timeout_s`.
        """
        from vmplug.hypervisor.qmp.client import QmpMonitor  # noqa: PLC0415  asyncio costs 40 ms

        monitor = QmpMonitor.connect(
            socket, timeout_s=timeout_s, command_timeout_s=command_timeout_s
        )
        return cls(monitor, Endpoint(os.path.realpath(socket), monitor.peer_pid))

    @property
    def endpoint(self) -> Endpoint | None:
        """Where another process finds this VM, and QEMU's process, if that lives: else its heir's.

        The conversation is taken up again with whoever answers at the socket.
        """
        known = self._endpoint
        if known and not (known.pid and is_running(known.pid, None, THIS_HOST)):
            self.status()
            self._endpoint = replace(known, pid=self._monitor.peer_pid)
        return self._endpoint

    def offer(self) -> Offer:
        """What the VM has to plug into now.

        It takes many commands, and a device that was listed may be gone before it is asked for.
        """
        for _ in range(_READ_ATTEMPTS - 1):
            try:
                return read_offer(self._monitor, iommufd=self.abilities.iommufd)
            except CommandError as error:
                if not any(words in error.desc for words in _NOT_THERE):
                    raise
        return read_offer(self._monitor, iommufd=self.abilities.iommufd)

    def claim_foreign_names(self, names: Mapping[str, str]) -> None:
        """Names in QEMU that somebody else gave, each with the id of the device it is of."""
        self._foreign = {**self._foreign, **names}

    def find_place(self, name: str) -> Place | None:
        """Where the device of that name in QEMU sits; None when there is none."""
        return read_place(self._monitor, name)

    def _owner(self, name: str) -> str | None:
        """The id of the device that a name in QEMU is of; None for a stranger's."""
        return self._foreign.get(name) or device_id_of(name)

    def steps(self, plug: Plug, place: Place) -> tuple[Step, ...]:
        """Exactly what `plug` would do; asks at most what QEMU can do and has."""
        missing = missing_steps(plug, self._monitor)
        return (*missing, *plug_steps(plug, place, self.abilities))

    def plug(self, plug: Plug, place: Place) -> None:
        """Plug all of it or none: whatever was done before a failure is undone.

        Only after a ProtocolError or ConnectError does nobody know what was done.
        """
        check_hot(plug, place)
        if isinstance(plug, VFIODevices):
            self._plug_group(plug, place)
            return
        if not (isinstance(plug, VhostUserDevice) and plug.daemon):
            self._do(self.steps(plug, place), opened_file(plug))
            return
        with self._daemons.start(plug.daemon, plug.id) as started:
            connected = replace(plug, daemon=None, descriptor=started.descriptor)
            try:
                self._do(self.steps(connected, place))
            except CommandError as error:
                self._daemons.end([plug.id])
                raise _daemon_failed(plug.daemon, error, started.stderr_tail()) from error
            except BackendTimeout as error:
                self._daemons.end([plug.id])  # which lets QEMU go on
                self._remove_remains({plug.id})
                raise _daemon_failed(plug.daemon, error, started.stderr_tail()) from error

    def _plug_group(self, plug: VFIODevices, place: Place) -> None:
        """Functions that were plugged before one that is refused must leave by the guest's leave.

        UnplugTimeout when they do not: the group is half in the VM.
        """
        with open_nodes(vfio.nodes(plug), self._host) as files:
            if files:
                vfio.check_free(place, self.offer())
                make_iommufd(self._monitor, self._host)
            try:
                self._do(plug_steps(vfio.opened(plug, files), place, self.abilities))
            except CommandError as error:
                left = self.wait_unplugged([plug.id], self.undo_timeout_s)
                if left:
                    raise UnplugTimeout(
                        (plug.id,),
                        f"{error.message}; functions of {plug.node} that were plugged before "
                        f"are still in the VM after {self.undo_timeout_s:g} s",
                        hint="vmplug reconcile takes them out once the guest answers",
                    ) from error
                raise

    def _do(self, steps: Sequence[Step], file: tuple[str, str] | None = None) -> None:
        """All or none; `file` is looked at before the last step, which shows it to the guest."""
        done: list[Step] = []
        process = self._endpoint if file else None
        try:
            if file and process:
                with pinned(*file):
                    self._do_each(steps[:-1], done)
                    self._check_opened(*file, process.pid)
            self._do_each(steps[len(done) :], done)
        except (CommandError, HostError):
            for step in reversed(done):
                self._take_back(step.undo)
            raise

    def _check_opened(self, path: str, checked: str, pid: int | None) -> None:
        """NoSuchDevice unless QEMU has opened the file that was checked.

        Where it cannot be looked into, or is behind a proxy, the path must do.
        """
        check_path(path, checked)
        if pid and has_open(pid, checked) is False and self._is_of_guest(pid):
            raise file_replaced(path, THIS_HOST)

    def _is_of_guest(self, pid: int) -> bool:
        """Whether a process has the guest's CPUs: QEMU 7.2 tells them while it is paused too."""
        cpus = self._monitor.execute(Command("query-cpus-fast", {}))
        return any(has_thread(pid, cpu.get("thread-id", 0)) for cpu in cpus)

    def _do_each(self, steps: Sequence[Step], done: list[Step]) -> None:
        answers, refusal = self._monitor.attempt([step.do for step in steps])
        done += steps[: len(answers)]
        if refusal:
            raise refusal

    def request_unplug(self, device_id: str) -> None:
        """Ask the guest to let go; comes back at once, also when it was asked before."""
        for name in sorted(self._present({device_id})):
            self._unplug_waiter.expect(name)
            try:
                self._monitor.execute(Command("device_del", {"id": name}))
            except CommandError as error:
                if _UNPLUGGING in error.desc:
                    continue
                self._unplug_waiter.forget(name)
                if error.error_class != "DeviceNotFound":
                    raise

    def wait_unplugged(self, device_ids: Sequence[str], timeout_s: float) -> dict[str, str]:
        """Wait for the guest, then take the devices' remains away.

        Gives the reason for each device that is still there. The QMP socket is not held meanwhile.
        """
        wanted = set(device_ids)
        names = self._unplug_waiter.wait(wanted, partial(self._present, wanted), timeout_s)
        left = {self._owner(name) or "": why for name, why in names.items()}
        self._remove_remains(wanted - left.keys())
        return left | dict.fromkeys(self._lost(left), "lost")

    def close_files(self, device_ids: Iterable[str]) -> None:
        """Close what an interrupted attach gave QEMU open, and nothing in the VM uses yet."""
        for device_id in device_ids:
            for name in (qemu_id(device_id, LINK), vfio.open_node_name(device_id)):
                self._remove(Command("closefd", {"fdname": name}))

    def resize(self, device_id: str, size_bytes: int) -> None:
        """Tell the guest a disk's new size; a regular file is made to have it."""
        name = next(iter(self._present({device_id})), qemu_id(device_id))
        node = self._monitor.execute(qom_get(f"{PERIPHERAL}/{name}", "drive"))
        self._monitor.execute(Command("block_resize", {"node-name": node, "size": size_bytes}))

    def find_devices(self) -> dict[str, bool]:
        """The ids of all devices of which the VM holds any part; True where the guest sees it."""
        devices = {name for name in self._names_in(PERIPHERAL) if self._owner(name)}
        parts = (*self._nodes(), *self._names_in("/objects"), *self._chardevs())
        ids = [self._owner(name) for name in parts]
        self._with_daemon = set(self._daemons.find())
        found = {device_id: False for device_id in (*ids, *self._with_daemon) if device_id}
        return found | {name_id: True for name in devices if (name_id := self._owner(name))}

    def find_lost(self) -> set[str]:
        """The ids of devices whose vhost-user backend is gone: the guest waits for its I/O."""
        names = {i for name in self._names_in(PERIPHERAL) if (i := self._owner(name))}
        return self._lost(names)

    def status(self) -> str:
        """QEMU's run state: `running`, `paused`, `prelaunch`, ..."""
        return str(self._monitor.execute(Command("query-status", {}))["status"])

    def power_down(self) -> None:
        """Press the power button; the guest may heed it."""
        self._monitor.execute(Command("system_powerdown", {}))

    def resume(self) -> None:
        """Let a VM that stands still run."""
        self._monitor.execute(Command("cont", {}))

    def quit(self) -> None:
        """End QEMU at once."""
        self._monitor.execute(Command("quit", {}))

    def close(self) -> None:
        """End the conversation; the VM goes on."""
        self._monitor.close()

    def _take_back(self, command: Command | None) -> None:
        """What is not there any more needs no taking back: a netdev takes its chardev along."""
        if command is None:
            return
        try:
            self._monitor.execute(command)
        except CommandError as error:
            if not any(words in error.desc for words in _NOT_THERE):
                log.warning("cannot undo %s: %s, ignoring", command.arguments, error)

    def _names_in(self, path: str) -> list[str]:
        return [entry["name"] for entry in self._monitor.execute(qom_list(path))]

    def _nodes(self) -> list[str]:
        nodes = self._monitor.execute(Command("query-named-block-nodes", {"flat": True}))
        return [node["node-name"] for node in nodes]

    def _chardevs(self) -> dict[str, str]:
        """The chardevs with what they are connected to, in QEMU's words."""
        found = self._monitor.execute(Command("query-chardev", {}))
        return {chardev["label"]: chardev["filename"] for chardev in found}

    def _lost(self, device_ids: Iterable[str]) -> set[str]:
        """Those of the devices whose backend has hung up. Source: `query-chardev` on QEMU 7.2."""
        wanted = set(device_ids)
        chardevs = self._chardevs() if wanted else {}
        return {
            owner
            for label, connection in chardevs.items()
            if (owner := self._owner(label)) in wanted and owner
            if connection.startswith("disconnected:")
        }

    def _present(self, device_ids: Collection[str]) -> set[str]:
        """The names of what is there of the devices; a group has one for each function."""
        return {name for name in self._names_in(PERIPHERAL) if self._owner(name) in device_ids}

    def _remove_remains(self, device_ids: set[str]) -> None:
        """Delete what devices that are gone leave: filters before what they filter, daemons last.

        Never of a device that is there: QEMU lets a netdev go from under it, and aborts.
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
            if self._owner(name) in device_ids:
                self._remove(Command("object-del", {"id": name}))
        for device_id in device_ids & self._with_daemon:
            # QEMU tells nobody of a connection that it was given and that nothing uses yet.
            self._remove(Command("closefd", {"fdname": qemu_id(device_id, LINK)}))
        if linked or device_ids & self._with_daemon:  # looking for one reads all of /proc
            self._daemons.end(device_ids)

    def _remove(self, command: Command) -> None:
        """Delete what another thread may have deleted meanwhile.

        The tree forgets a device a moment before QEMU lets go of its parts; the event that tells
        of it may have gone to a conversation that is over.
        """
        deadline = time.monotonic() + self.release_timeout_s
        while True:
            try:
                self._monitor.execute(command)
            except CommandError as error:
                if any(words in error.desc for words in _NOT_THERE):
                    return
                is_held = any(words in error.desc for words in _STILL_HELD)
                if not is_held or time.monotonic() >= deadline:
                    raise
            else:
                return
            self._unplug_waiter.pause(_LOOK_AGAIN_S)


def _daemon_failed(daemon: VirtiofsdSpec, error: HypervisorError, said: str) -> BackendError:
    words = f"; {daemon.program} says: {said}" if said else ""
    hint = error.hint if isinstance(error, CommandError) else None
    if any(piece in said for piece in _NO_SANDBOX):
        hint = (
            "where vmplug runs, / must be a mount point: mount --bind it on itself before chroot"
        )
    return BackendError(
        daemon.program,
        f"{daemon.directory} cannot be shared: {error}{words}",
        hint=hint
        or "nothing is left of it in the VM; try again, or share it as virtio-9p at the start",
    )
