"""The journal: devices and VMs, in one SQLite file.

Everything that is allocated is written here first.
"""

import os
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Self, TypeVar

from msgspec.structs import replace

from vmplug.address import journal_id_of
from vmplug.errors import StoreError
from vmplug.host.kind import Identity
from vmplug.host.permissions import is_absent
from vmplug.host.root import THIS_HOST, HostRoot
from vmplug.host.use.claim import Claim, VmProcess, is_lease
from vmplug.journal import DEFAULT_STATE_DIR, StateDir
from vmplug.journal.bindings import Bindings
from vmplug.journal.database import (
    JOURNAL_ERRORS,
    Opened,
    Transaction,
    check_version,
    migrate,
    not_text,
    open_database,
    open_existing,
    read_journal_id,
    store_error,
)
from vmplug.journal.images import ImageClaims, find_things
from vmplug.journal.lease_rows import NOTHING, LeaseRows, Taken, take_over
from vmplug.journal.lock import JournalLock
from vmplug.journal.pod_devices import PodDevices
from vmplug.journal.process import ProcessIdentity
from vmplug.journal.records import (
    LISTED,
    SET_STATE,
    Attachment,
    DeviceRecord,
    VmRecord,
    add_holds,
    has_ended,
    has_more,
    insert_device,
    list_texts,
    read_attachment,
    read_claim,
    read_device,
    read_vm,
    spoken_process,
    state_without_holds,
)
from vmplug.journal.state import (
    ON_ITS_WAY,
    State,
    check_step,
    known_already,
    not_in_journal,
    on_its_way,
    only_leased,
    unknown_vm,
)
from vmplug.journal.vf_tokens import VfTokens

T = TypeVar("T")

_THIS_BOOTS = "device WHERE vm NOT IN (SELECT name FROM vm WHERE boot_id <> ?)"
_OF_THIS_BOOT = f"SELECT * FROM {_THIS_BOOTS}"  # noqa: S608
_HELD = f"SELECT vm, identity FROM {_THIS_BOOTS}"  # noqa: S608
_HOLD = """
SELECT a.device, a.count, d.vm, d.host_path, d.state, d.place,
       (SELECT count(*) FROM attachment b WHERE b.device = a.device) AS holds
FROM attachment a JOIN device d ON a.device = d.id WHERE a.id = ?
"""
_DROP_FORMER = """
DELETE FROM attachment
WHERE device = (SELECT id FROM device WHERE id = ? AND state = 'retained')
"""
"""A retained device keeps its last hold so that it is listed; the next hold replaces it."""
_CLOSE_TIMEOUT_S = 5.0
"""A thread that is held up by the kernel loses the journal all the same."""
_GIVE_UP = "UPDATE device SET worker = NULL WHERE id = ? AND worker = ?"
_RELEASE_ONE = "UPDATE attachment SET count = count - 1 WHERE id = ?"


class Journal:
    """The journal of one host, open in this process.

    Every method is one transaction. Raises StoreError for a file that is not a journal, comes from
    a newer version, or stays locked for 10 seconds. The processes and boots in the journal are
    those of `host`; a device that this process has in progress says `in_progress_by`. `id` is what
    the ids of its new devices begin with; no other journal has it.
    """

    def __init__(
        self, connection: sqlite3.Connection, lock: JournalLock, path: str, host: HostRoot
    ) -> None:
        self._db = connection
        self._lock = lock
        self.path, self.host = path, host
        self.id = ""
        self.worker = ProcessIdentity.own(host)
        self._worker_text = str(self.worker)
        self.bindings = Bindings(connection, self._lock, path)
        self.leases = LeaseRows(connection, self._lock, path)
        self.vf_tokens = VfTokens(connection, self._lock, path, self.worker.boot_id)
        self.pod_devices = PodDevices(connection, self._lock, path)
        self._image_claims = ImageClaims(host)
        self._works = 0
        self._work_ended = threading.Condition()

    @classmethod
    def open(cls, state_dir: StateDir = DEFAULT_STATE_DIR, *, host: HostRoot = THIS_HOST) -> Self:
        """The journal below `state_dir`, created if absent."""
        return cls._complete(open_database(state_dir), host)

    @classmethod
    def open_existing(
        cls, state_dir: StateDir = DEFAULT_STATE_DIR, *, host: HostRoot = THIS_HOST
    ) -> Self:
        """The journal below `state_dir`, or an empty one in memory: nothing is created.

        Raises StoreError for a missing directory, unless it is the default one.
        """
        return cls._complete(open_existing(state_dir), host)

    def renewed(self) -> Self:
        """This journal; the one in its place if this is in memory, and there is one by now."""
        if self._lock.has_file or is_absent(self.path):
            return self
        self.close()
        return self.open(os.path.dirname(self.path), host=self.host)

    @classmethod
    def _complete(cls, opened: Opened, host: HostRoot) -> Self:
        connection, lock, path = opened
        try:
            journal = cls(connection, lock, path, host)
            with lock, journal._errors():
                version = migrate(connection, path)
            check_version(version, path)
            with lock, journal._errors():
                journal.id = read_journal_id(connection)
        except BaseException:
            with lock.closing():
                connection.close()
            raise
        return journal

    def close(self) -> None:
        """Close the file, unless it is that of a parent process.

        A thread that has devices in progress gives them up first, as its VM has just been closed.
        SQLite crashes if another thread is using it meanwhile: hence the lock.
        """
        if self._lock.is_ours:
            with self._work_ended:
                self._work_ended.wait_for(lambda: not self._works, _CLOSE_TIMEOUT_S)
            with self._lock.closing():
                self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except UnicodeEncodeError as error:
            raise not_text(error) from error
        except JOURNAL_ERRORS as error:
            raise store_error(self.path, error) from error

    def _read(self, parse: Callable[[sqlite3.Row], T], query: str, *values: object) -> list[T]:
        """Every row as a value; StoreError for a malformed one."""
        with self._lock, self._errors():
            return [parse(row) for row in self._db.execute(query, values)]

    @property
    def _boot_id(self) -> str | None:
        return self.worker.boot_id or None

    # VMs

    def add_vm(self, vm: VmRecord, taken: Taken = NOTHING) -> None:
        """Add a VM, with what it takes from leases. StateError when name or socket is known."""
        with Transaction(self._db, self._lock, self.path) as db:
            known = db.execute(
                "SELECT name FROM vm WHERE name = ? OR qmp_socket = ?", (vm.name, vm.qmp_socket)
            ).fetchone()
            if known:
                raise known_already(
                    known["name"], vm.qmp_socket if known["name"] != vm.name else None
                )
            self._insert_vm(db, vm)
            take_over(db, vm.name, taken)

    def replace_vm(self, vm: VmRecord) -> None:
        """Add a VM in place of the former one of its name, whose devices are forgotten."""
        with Transaction(self._db, self._lock, self.path) as db:
            _forget_vm(db, vm.name)
            self._insert_vm(db, vm)

    def _insert_vm(self, db: sqlite3.Connection, vm: VmRecord) -> None:
        worker = str(vm.starting_by) if vm.starting_by else None
        row = (vm.name, vm.qmp_socket, vm.pid, vm.started_at, vm.is_ours, self._boot_id, worker)
        db.execute("INSERT INTO vm VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def set_process(self, name: str, pid: int, started_at: int | None) -> None:
        """Record the process of a known VM."""
        with Transaction(self._db, self._lock, self.path) as db:
            db.execute(
                "UPDATE vm SET pid = ?, started_at = ? WHERE name = ?", (pid, started_at, name)
            )

    def finish_start(self, name: str) -> None:
        """Record that a VM runs, which this process has started."""
        with Transaction(self._db, self._lock, self.path) as db:
            db.execute("UPDATE vm SET worker = NULL WHERE name = ?", (name,))

    def forget_vm(self, name: str) -> None:
        """Forget a VM and every device it held."""
        with Transaction(self._db, self._lock, self.path) as db:
            _forget_vm(db, name)

    def all_holders(self) -> list[VmRecord]:
        """Every known VM and lease, by name."""
        parse = partial(read_vm, boot_id=self.worker.boot_id)
        return self._read(parse, "SELECT * FROM vm ORDER BY name")

    def vms(self) -> list[VmRecord]:
        """Every known VM, by name."""
        return [record for record in self.all_holders() if not record.is_lease]

    def vm_processes(self, host: HostRoot) -> dict[int, VmProcess]:
        """The processes of the VMs that run now, by pid, with what they hold."""
        held: dict[str, set[str]] = {}
        for vm, identity in self._read(tuple, _HELD, self._boot_id):
            held.setdefault(vm, set()).add(identity)
        for claim in self._claims_of_images():
            held.setdefault(claim.vm, set()).add(str(claim.identity))
        running = (vm for vm in self.vms() if not (vm.is_of_earlier_boot or has_ended(vm, host)))
        return {
            vm.pid: VmProcess(vm=vm.name, holds=frozenset(held.get(vm.name, ())))
            for vm in running
            if vm.pid
        }

    def find_vm(self, name: str) -> VmRecord | None:
        """The VM or lease of that name; None when it is not known."""
        return next((vm for vm in self.all_holders() if vm.name == name), None)

    # devices

    def require_vm(self, name: str) -> VmRecord:
        """Return the VM of that name. Raises StateError for another one, and for a lease."""
        record = self.find_vm(name)
        if record is None:
            raise unknown_vm(name)
        if record.is_lease:
            raise only_leased(name)
        return record

    def holders(self) -> dict[Identity, str]:
        """Return the VMs by the identities of what they hold, each function of a group too."""
        held = dict[Identity, str]()
        for vm in self.all_holders():
            for device in self.devices(vm.name):
                functions = device.guest_address.functions if device.guest_address else ()
                members = (Identity.of_vfio(function.host) for function in functions)
                held |= dict.fromkeys((device.identity, *members), vm.name)
        return held

    def version(self) -> int:
        """A number that changes when another process or manager has written to the journal."""
        with self._lock, self._errors():
            return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def add_devices(
        self,
        devices: Iterable[DeviceRecord],
        holds: Iterable[Attachment],
        *,
        known: Collection[str] | None = None,
        about: Collection[Identity] | None = None,
    ) -> list[Attachment] | None:
        """Record devices that are about to be plugged, or that the VM has, and the holds on them.

        Returns None, and writes nothing, when the journal has devices besides the `known` ids: a
        decision without them, such as that no VM holds the device, may be wrong; see `has_more`.
        Devices that have left the journal or changed state do not matter for a new one.
        """
        devices = list(devices)
        with Transaction(self._db, self._lock, self.path) as db:
            if known is not None and has_more(db, known, {d.vm for d in devices}, about):
                return None
            for device in devices:
                check_step(device.host_path, None, device.state)
                worker = self.worker if device.state in ON_ITS_WAY else None
                insert_device(db, replace(device, in_progress_by=worker))
            return add_holds(db, holds)

    def set_state(
        self, device_ids: Sequence[str], state: State, holds: Sequence[Attachment] = ()
    ) -> list[Attachment]:
        """Move devices on to `state`, and add holds on devices in that state.

        Devices in transition are then in progress in this process. Raises StateError when the
        table forbids it for one of them, or a device for a new hold is gone; then nothing is
        changed.
        """
        worker = self._worker_in(state)
        with Transaction(self._db, self._lock, self.path) as db:
            if holds and state is State.ATTACHED:
                db.executemany(_DROP_FORMER, [(hold.device_id,) for hold in holds])
            for device_id in device_ids:
                done = db.execute(SET_STATE[state], (worker, device_id))
                if done.rowcount == 0:
                    check_step(device_id, _state(db, device_id), state)
                    raise not_in_journal(device_id)
            for hold in holds:
                _check_still(db, hold, state)
            return add_holds(db, holds)

    def _worker_in(self, state: State) -> str | None:
        return self._worker_text if state in ON_ITS_WAY else None

    @contextmanager
    def in_progress(self, device_ids: Sequence[str]) -> Iterator[None]:
        """Mark these devices as in progress here; any process may finish them after a crash."""
        with self._work_ended:
            self._works += 1
        try:
            yield
        except BaseException:
            with suppress(StoreError):
                self.give_up(device_ids)
            raise
        finally:
            with self._work_ended:
                self._works -= 1
                self._work_ended.notify_all()

    def give_up(self, device_ids: Collection[str]) -> None:
        """Mark these devices as no longer in progress here: any process may finish them."""
        if not device_ids:
            return
        with Transaction(self._db, self._lock, self.path) as db:
            db.executemany(_GIVE_UP, [(i, self._worker_text) for i in device_ids])

    def forget_devices(self, device_ids: Sequence[str]) -> None:
        """Forget devices that the VM no longer holds, their places and their holds."""
        with Transaction(self._db, self._lock, self.path) as db:
            for device_id in device_ids:
                if state := _state(db, device_id):  # another thread may have been faster
                    check_step(device_id, state, None)
                    db.execute("DELETE FROM device WHERE id = ?", (device_id,))

    def release(self, attachment_ids: Sequence[str], *, whole: bool) -> list[str]:
        """Release holds: one count of each, or the `whole` of it.

        A device's last hold stays until the device is gone, so that it is listed and can be
        detached again. The device is then detaching, and accepts no new holds; or it is retained,
        if it cannot be unplugged. Returns the ids of the devices to unplug. Raises StateError, and
        releases nothing, for a device whose attach was interrupted.
        """
        last = []
        with Transaction(self._db, self._lock, self.path) as db:
            for attachment_id in attachment_ids:
                row = db.execute(_HOLD, (attachment_id,)).fetchone()
                if row is None:
                    continue
                if row["state"] == State.PLUGGING:
                    raise on_its_way(row["vm"], row["host_path"], State.PLUGGING)
                if row["state"] == State.RETAINED:
                    continue  # nobody holds it
                if row["state"] == State.DETACHING or (
                    row["holds"] == 1 and (whole or row["count"] == 1)
                ):
                    state = state_without_holds(row["place"])
                    db.execute(SET_STATE[state], (self._worker_in(state), row["device"]))
                    last += [row["device"]] if state is State.DETACHING else []
                elif row["count"] > 1 and not whole:
                    db.execute(_RELEASE_ONE, (attachment_id,))
                else:
                    db.execute("DELETE FROM attachment WHERE id = ?", (attachment_id,))
        return last

    def devices(self, vm: str) -> list[DeviceRecord]:
        """Every device of a VM, in the order of plugging."""
        return self._read(read_device, "SELECT * FROM device WHERE vm = ? ORDER BY rowid", vm)

    def devices_for(self, vm: str, identities: Iterable[Identity]) -> list[DeviceRecord]:
        """Those devices of a VM that matter for a plan of these: the same, and tagged shares."""
        matters = f"(guest LIKE '%mount_tag%' OR identity IN {LISTED})"
        query = f"SELECT * FROM device WHERE vm = ? AND {matters} ORDER BY rowid"  # noqa: S608
        return self._read(read_device, query, vm, list_texts(map(str, identities)))

    def has_device(self, vm: str, identity: Identity) -> bool:
        """Whether a VM has that device, without reading all that it has."""
        query = "SELECT id FROM device WHERE vm = ? AND identity = ?"
        return bool(self._read(tuple, query, vm, str(identity)))

    def places(self, vm: str) -> dict[str, str]:
        """The places in a VM of its devices, by their ids."""
        query = "SELECT id, place FROM device WHERE vm = ? AND place IS NOT NULL"
        return dict(self._read(lambda row: (str(row["id"]), str(row["place"])), query, vm))

    def device_ids(self) -> set[str]:
        """The ids of the devices of all VMs."""
        return set(self._read(lambda row: str(row["id"]), "SELECT id FROM device"))

    def find_foreign(self, device_ids: Iterable[str]) -> set[str]:
        """The ids that are not this journal's: it has no row of them, and did not draw them.

        They are another journal's, a lost one's or an earlier vmplug's.
        """
        drawn_elsewhere = {i for i in device_ids if journal_id_of(i) != self.id}
        return drawn_elsewhere - self.device_ids() if drawn_elsewhere else set()

    def find_claims(
        self, vm: str | None, own: Identity, identities: Iterable[Identity]
    ) -> list[Claim]:
        """The claims of VMs of this boot and of pods on `identities`, but not of `vm` on `own`.

        A file is known under each of its names; who has an image has all files that it named.
        """
        asked = (own, *identities)
        wanted, things = [str(identity) for identity in asked], find_things(asked, self.host)
        with self._lock:
            claims = self._read(
                read_claim,
                f"{_OF_THIS_BOOT} AND (identity IN {LISTED} OR thing IN {LISTED})"
                " AND NOT (identity = ? AND vm IS ?) ORDER BY rowid",
                *(self._boot_id, list_texts(wanted), list_texts(things), str(own), vm),
            )
            others = [one for one in self._images() if (one.vm, one.identity) != (vm, own)]
            of_pods = self.pod_devices.claims(self._boot_id)
        claims += [claim for claim in of_pods if str(claim.identity) in wanted]
        for record in others:
            claims += self._image_claims.on(record, wanted, things)
        return [self._with_process(claim) if is_lease(claim.vm) else claim for claim in claims]

    def _images(self) -> list[DeviceRecord]:
        """The devices of this boot that are images, of which the header may name other files."""
        query = f"{_OF_THIS_BOOT} AND options LIKE '%qcow2%' ORDER BY rowid"
        return self._read(read_device, query, self._boot_id)

    def _with_process(self, claim: Claim) -> Claim:
        record = self.find_vm(claim.vm)
        return replace(claim, process=spoken_process(record, self.host)) if record else claim

    def claims(self) -> list[Claim]:
        """The claims of all VMs of this boot, on whatever they have."""
        claims = self._read(read_claim, f"{_OF_THIS_BOOT} ORDER BY rowid", self._boot_id)
        return [*claims, *self._claims_of_images()]

    def _claims_of_images(self) -> Iterator[Claim]:
        return (claim for record in self._images() for claim in self._image_claims.of(record))

    def attachments(self, vm: str | None = None) -> list[Attachment]:
        """Every hold on a device of `vm`, or of all VMs."""
        return self._read(
            read_attachment,
            "SELECT a.*, d.vm, d.host_path, d.kind, d.state, d.guest, d.options"
            " FROM attachment a JOIN device d ON a.device = d.id"
            " WHERE d.vm = coalesce(?, d.vm) ORDER BY a.rowid",
            vm,
        )


def _forget_vm(db: sqlite3.Connection, name: str) -> None:
    db.execute("DELETE FROM device WHERE vm = ?", (name,))
    db.execute("DELETE FROM vm WHERE name = ?", (name,))


def _state(db: sqlite3.Connection, device_id: str) -> State | None:
    row = db.execute("SELECT state FROM device WHERE id = ?", (device_id,)).fetchone()
    return State(row[0]) if row else None


def _check_still(db: sqlite3.Connection, hold: Attachment, state: State) -> None:
    """StateError when the device of a hold is no longer in `state`."""
    now = _state(db, hold.device_id)
    if now is None:
        raise not_in_journal(hold.device_id)
    if now is not state:
        raise on_its_way(hold.vm, hold.host_path, now)
