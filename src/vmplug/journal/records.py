"""The contents of the journal as values: VMs, devices, and owners' holds on devices."""

import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import msgspec
from msgspec import structs

from vmplug.address import CcwDevNo, PciPath, ScsiAddress
from vmplug.drivers.place import UNPLUGGED_NEVER, GuestAddress, GuestFunction
from vmplug.drivers.ports import Endpoint
from vmplug.errors import StateError
from vmplug.host.kind import DeviceType, Identity, is_other_thing
from vmplug.host.process import is_running
from vmplug.host.root import HostRoot
from vmplug.host.use.claim import Claim, is_lease
from vmplug.journal.names import is_vm_name
from vmplug.journal.process import ProcessIdentity, read_pid_namespace
from vmplug.journal.state import FOLLOWS, State, replaced, unidentified

_LEASE_COLONS = 2


class VmRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A VM that vmplug knows; `is_ours`: `vm start` started it.

    `pid` and `started_at` (clock ticks after boot) distinguish the process from a later one with
    its number; both are None where the process is unknown. When `is_of_earlier_boot` the host has
    booted since, and the process with its number is another one. `starting_by` is the process that
    is still starting it, or has died meanwhile; None once it runs.
    """

    name: str
    qmp_socket: str
    pid: int | None
    started_at: int | None
    is_ours: bool
    is_of_earlier_boot: bool = False
    starting_by: ProcessIdentity | None = None

    @property
    def is_lease(self) -> bool:
        """Whether it is a lease: a process, and what it holds (see `vmplug.leases`)."""
        return is_lease(self.name)


class HeldFile(msgspec.Struct, frozen=True):
    """Another file or device that an image makes QEMU open, which so the VM has too.

    `thing` is what it was then, whatever has its name now; None where that is unknown.
    """

    identity: Identity
    thing: str | None
    only_read: bool


class DeviceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A device as the journal knows it; without `place` and `guest_address` it is only counted.

    `in_progress_by` is the process that has it in progress, None for none. `parts` are its names
    in QEMU when another program plugged it, and empty when vmplug did. `thing` is what was
    plugged, whatever has its name now (see `vmplug.host.check.thing`); None where that is unknown.
    `files` are the other files of an image; None where nobody wrote them down, as another program
    or an earlier vmplug plugged it.
    """

    id: str
    vm: str
    identity: Identity
    kind: DeviceType
    host_path: str
    state: State
    read_only: bool
    share_rw: bool
    options: Mapping[str, str]
    place: str | None
    guest_address: GuestAddress | None
    in_progress_by: ProcessIdentity | None = None
    parts: tuple[str, ...] = ()
    thing: str | None = None
    files: tuple[HeldFile, ...] | None = None

    def is_other(self, thing: str | None) -> bool:
        """Whether what has its name now is surely not what was plugged."""
        return is_other_thing(self.thing, thing)

    def why_not(self, thing: str | None) -> StateError | None:
        """Why what has its name now may not be taken for what was plugged; None when it may.

        A kind that has no identity besides its name has None for both.
        """
        if self.follows_its_path:
            return None
        if self.is_other(thing):
            return replaced(self.host_path, self.vm)
        if (self.thing is None) is not (thing is None):
            return unidentified(self.host_path, self.vm)
        return None

    @property
    def follows_its_path(self) -> bool:
        """Whether QEMU reconnects to what serves the path of its socket, whatever that is."""
        can = self.kind in {DeviceType.VHOST_USER_BLK, DeviceType.VHOST_USER_NET}
        return can and int(self.options.get("reconnect", "1")) > 0

    @property
    def can_be_unplugged(self) -> bool:
        """Whether the VM can release it: QEMU cannot unplug NVDIMMs and virtio-mmio devices."""
        return state_without_holds(self.place) is State.DETACHING


def _parse(text: str) -> Any:
    """JSON of the journal; ValueError for anything else."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:  # or a name that is not UTF-8, which only the module json reads
        import json  # noqa: PLC0415  1.4 ms

        return json.loads(text)


def _write(value: object) -> str:
    import json  # noqa: PLC0415  1.4 ms, and what only reads writes nothing

    return json.dumps(value)


def foreign_names(devices: Iterable[DeviceRecord]) -> dict[str, str]:
    """The names in QEMU assigned by others, mapped to the owning device ids."""
    return {name: device.id for device in devices for name in device.parts}


class Attachment(msgspec.Struct, frozen=True, kw_only=True):
    """One owner's hold on a device; `count` is how often it attached it.

    `name` is the name of the request: a path in the container, or `net:eth0`, `share:work`.
    `guest_address` is where the guest sees it, None for a device that is only counted.
    `options` are those that it is plugged with.
    """

    id: str
    vm: str
    owner: str
    name: str
    host_path: str
    kind: DeviceType
    read_only: bool
    count: int
    state: State
    guest_address: GuestAddress | None
    device_id: str
    options: Mapping[str, str]

    @property
    def container_path(self) -> str | None:
        """The path in the container; None for a device without one."""
        return self.name if self.name.startswith("/") else None


def state_without_holds(place: str | None) -> State:
    """The state of a device at that place after its last owner has released it."""
    return State.RETAINED if (place or "").startswith(UNPLUGGED_NEVER) else State.DETACHING


def read_vm(row: sqlite3.Row, boot_id: str) -> VmRecord:
    """A row of the table `vm`, as of that boot; an older vmplug did not record the boot."""
    if is_lease(row["name"]) and row["qmp_socket"].count(":") != _LEASE_COLONS:
        raise ValueError(f"{row['qmp_socket']!r} is not lease:NAMESPACE:KEY")
    # Its directory is removed with the VM, so a damaged path must not name another one.
    is_own = is_vm_name(row["name"]) and row["qmp_socket"].endswith(f"/vm/{row['name']}/qmp.sock")
    if row["is_ours"] and not is_own:
        raise ValueError(f"{row['qmp_socket']!r} is not the socket of a VM that vmplug started")
    return VmRecord(
        name=row["name"],
        qmp_socket=row["qmp_socket"],
        pid=row["pid"],
        started_at=row["started_at"],
        is_ours=bool(row["is_ours"]),
        is_of_earlier_boot=bool(boot_id and row["boot_id"]) and row["boot_id"] != boot_id,
        starting_by=_process(row["worker"]),
    )


def _process(text: str | None) -> ProcessIdentity | None:
    return ProcessIdentity.parse(text) if text else None


def read_device(row: sqlite3.Row) -> DeviceRecord:
    """A row of the table `device`."""
    return DeviceRecord(
        id=row["id"],
        vm=row["vm"],
        identity=Identity.parse(row["identity"]),
        kind=DeviceType(row["kind"]),
        host_path=row["host_path"],
        state=State(row["state"]),
        read_only=bool(row["read_only"]),
        share_rw=bool(row["share_rw"]),
        options=_options(row["options"]),
        place=row["place"],
        guest_address=_guest_address(row),
        in_progress_by=_process(row["worker"]),
        parts=tuple(_parse(row["parts"])) if row["parts"] else (),
        thing=row["thing"],
        files=_read_files(row["files"]),
    )


def _read_files(text: str | None) -> tuple[HeldFile, ...] | None:
    if text is None:
        return None
    return tuple(
        HeldFile(Identity.parse(identity), thing, bool(only_read))
        for identity, thing, only_read in _parse(text)
    )


def _files_text(files: Iterable[HeldFile] | None) -> str | None:
    if files is None:
        return None
    return _write([[str(file.identity), file.thing, file.only_read] for file in files])


def has_more(
    db: sqlite3.Connection,
    known: Collection[str],
    vms: Collection[str],
    about: Collection[Identity] | None,
) -> bool:
    """Whether there is a device, besides the known ids, that a decision for these VMs must know.

    One of another VM matters only if it, or a file of it, is one of `about`, None for all.
    """
    names = None if about is None else {str(identity) for identity in about}
    return any(
        device_id not in known
        and (names is None or vm in vms or not names.isdisjoint(_names(identity, files)))
        for device_id, vm, identity, files in db.execute(
            "SELECT id, vm, identity, files FROM device"
        )
    )


LISTED = "(SELECT value FROM json_each(?))"
"""Behind IN for texts of `list_texts`; SQLite uses no index for an empty `IN ()`."""


def list_texts(texts: Iterable[str]) -> str:
    """One value of a statement for many. What is not text stays such, and SQLite refuses it."""
    import json  # noqa: PLC0415  as above

    return json.dumps([*texts], ensure_ascii=False)


def _names(identity: str, files: str | None) -> list[str]:
    """The identities of all that a row's device is made of."""
    return [identity, *(str(file.identity) for file in _read_files(files) or ())]


def _step_statement(state: State) -> str:
    """SQL that moves one device to `state` if the table lets it."""
    before = " OR ".join(f"state = '{s}'" for s, nexts in FOLLOWS.items() if s and state in nexts)
    before = before or "FALSE"
    change = f"state = '{state}', worker = ?"
    return f"UPDATE device SET {change} WHERE id = ? AND ({before})"  # noqa: S608


SET_STATE = {state: _step_statement(state) for state in State}
"""The statement for each state; its values are the worker and the device."""


def insert_device(db: sqlite3.Connection, device: DeviceRecord) -> None:
    """A new row of the table `device`."""
    db.execute(
        "INSERT INTO device VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            device.id,
            device.vm,
            str(device.identity),
            device.kind,
            device.host_path,
            device.state,
            device.read_only,
            device.share_rw,
            _write(dict(device.options)),
            device.place,
            guest_text(device.guest_address),
            str(device.in_progress_by) if device.in_progress_by else None,
            _write(device.parts) if device.parts else None,
            device.thing,
            _files_text(device.files),
        ),
    )


def guest_text(address: GuestAddress | None) -> str | None:
    """A guest address as saved: a JSON object of its known parts."""
    if address is None:
        return None
    known = structs.asdict(address)
    saved = {name: _saved(value) for name, value in known.items() if value not in {None, ()}}
    return _write(saved)


def _saved(value: object) -> object:
    match value:
        case int():
            return value
        case tuple():
            return [_saved(part) for part in value]
        case GuestFunction(host=host, pci_path=path):
            return [host, _saved(path)]
        case None:
            return None
        case _:
            return str(value)


def _functions(saved: list[list[str | None]]) -> tuple[GuestFunction, ...]:
    return tuple(
        GuestFunction(str(host), PciPath.parse(path) if path else None) for host, path in saved
    )


_PARSE: Mapping[str, Callable[[Any], Any]] = {
    "pci_path": PciPath.parse,
    "scsi_address": ScsiAddress.parse,
    "ccw_devno": CcwDevNo.parse,
    "nvdimm_id": int,
    "nvdimm_handle": int,
    "functions": _functions,
    "ap_queues": tuple,
}


def _guest_address(row: sqlite3.Row) -> GuestAddress | None:
    if row["guest"] is None:
        return None
    saved = _parse(row["guest"])
    try:
        parsed = {name: _PARSE.get(name, str)(value) for name, value in saved.items()}
        return GuestAddress(**parsed)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{row['guest']!r} is not a guest address") from error


def _options(text: str) -> Mapping[str, str]:
    options = _parse(text)
    if not isinstance(options, dict) or not all(isinstance(v, str) for v in options.values()):
        raise ValueError(f"{text!r} is not a set of options")
    return options


def read_attachment(row: sqlite3.Row) -> Attachment:
    """A row of the table `attachment` joined to its device."""
    return Attachment(
        id=row["id"],
        vm=row["vm"],
        owner=row["owner"],
        name=row["name"],
        host_path=row["host_path"],
        kind=DeviceType(row["kind"]),
        read_only=bool(row["read_only"]),
        count=row["count"],
        state=State(row["state"]),
        guest_address=_guest_address(row),
        device_id=row["device"],
        options=_options(row["options"]),
    )


def read_claim(row: sqlite3.Row) -> Claim:
    """A row of the table `device`, as a claim of a VM."""
    return Claim(
        vm=row["vm"],
        identity=Identity.parse(row["identity"]),
        read_only=bool(row["read_only"]),
        share_rw=bool(row["share_rw"]),
    )


def has_ended(vm: VmRecord, host: HostRoot) -> bool:
    """Whether the process of a VM has surely ended; False where it was never known."""
    if vm.pid is None or is_elsewhere(vm, host):
        return False
    return not is_running(vm.pid, vm.started_at, host)


def is_elsewhere(vm: VmRecord, host: HostRoot) -> bool:
    """Whether it is a lease whose process has its number in another PID namespace than ours.

    A lease has that namespace in place of a QMP socket.
    """
    return vm.is_lease and namespace_of(vm) != str(read_pid_namespace(host))


def namespace_of(lease: VmRecord) -> str:
    """The PID namespace in which the process of a lease has its number."""
    return lease.qmp_socket.split(":")[1]


def spoken_process(vm: VmRecord, host: HostRoot) -> str:
    """The process that has it, in words: `process 4711 (cloud-hypervisor)`, where it is known."""
    pid = vm.pid or (vm.starting_by.pid if vm.starting_by else None)
    if pid is None:
        return "its process"
    name = (host.read_text(f"/proc/{pid}/comm") or "").strip()
    return f"process {pid} ({name or 'ended'})"


def record_vm(name: str, endpoint: Endpoint) -> VmRecord:
    """A VM that another program started."""
    return VmRecord(
        name=name,
        qmp_socket=endpoint.qmp_socket,
        pid=endpoint.pid,
        started_at=endpoint.started_at,
        is_ours=False,
    )


def add_holds(db: sqlite3.Connection, holds: Iterable[Attachment]) -> list[Attachment]:
    """Add and return holds; an owner that already holds a device keeps the older id."""
    added = []
    for hold in holds:
        row = db.execute(
            "INSERT INTO attachment VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (device, owner, name) DO UPDATE"
            " SET count = count + 1, read_only = read_only AND excluded.read_only"
            " RETURNING id, count, read_only",
            (hold.id, hold.device_id, hold.owner, hold.name, hold.read_only, hold.count),
        ).fetchone()
        read_only = bool(row["read_only"])
        added.append(structs.replace(hold, id=row["id"], count=row["count"], read_only=read_only))
    return added
