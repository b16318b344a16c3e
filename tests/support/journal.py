"""A journal, and rows in it as an attach leaves them, for tests of what is done afterwards."""

import sqlite3
import tempfile
from collections.abc import Mapping
from contextlib import closing
from functools import cache
from pathlib import Path

from msgspec.structs import replace

from vmplug.address import PciPath, new_id
from vmplug.drivers.place import GuestAddress, GuestFunction
from vmplug.host.kind import DeviceType, Identity
from vmplug.journal import journal_path
from vmplug.journal.journal import Journal
from vmplug.journal.records import Attachment, DeviceRecord, VmRecord
from vmplug.journal.state import State

GUEST = GuestAddress(pci_path=PciPath.parse("04/00"))


JOURNAL_ID = "012345"


def lay_journal(state_dir: Path) -> None:
    """An empty journal, if there is none; a copy of one, as making its tables takes longer.

    All of them have the id JOURNAL_ID.
    """
    path = Path(journal_path(state_dir))
    if not path.exists():
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(_empty_journal())


@cache
def _empty_journal() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        Journal.open(directory).close()
        with closing(sqlite3.connect(path := journal_path(directory))) as db, db:
            db.execute("UPDATE journal SET id = ?", [JOURNAL_ID])
        return Path(path).read_bytes()


def vm_record(
    name: str = "sb1", pid: int | None = None, started_at: int | None = None
) -> VmRecord:
    return VmRecord(
        name=name,
        qmp_socket=f"/run/{name}/qmp.sock",
        pid=pid,
        started_at=started_at,
        is_ours=False,
    )


def device_record(
    identity: str,
    host_path: str,
    kind: DeviceType = DeviceType.BLOCK,
    *,
    vm: str = "sb1",
    state: State = State.ATTACHED,
    options: Mapping[str, str] | None = None,
    functions: tuple[str, ...] = (),
) -> DeviceRecord:
    """A device in a VM; `functions` are the BDFs of a group on the host."""
    id_ = new_id()
    guest = replace(GUEST, functions=tuple(GuestFunction(bdf, None) for bdf in functions))
    return DeviceRecord(
        id=id_,
        vm=vm,
        identity=Identity.parse(identity),
        kind=kind,
        host_path=host_path,
        state=state,
        read_only=False,
        share_rw=False,
        options=options or {},
        place=f"rp0/{id_}",
        guest_address=None if kind is DeviceType.GENERIC else guest,
    )


def hold_on(device: DeviceRecord, owner: str = "c1") -> Attachment:
    return Attachment(
        id=new_id(),
        vm=device.vm,
        owner=owner,
        name="/dev/xvda",
        host_path=device.host_path,
        kind=device.kind,
        read_only=False,
        count=1,
        state=device.state,
        guest_address=device.guest_address,
        device_id=device.id,
        options=device.options,
    )


def in_progress(device: DeviceRecord, journal: Journal) -> DeviceRecord:
    """The device as it comes out of the journal while this process has it in progress."""
    return replace(device, in_progress_by=journal.worker)


def attach_row(journal: Journal, device: DeviceRecord, *, owner: str | None = None) -> Attachment:
    """The device in the journal, on the way that every device takes, with one hold on it."""
    wanted = hold_on(device)
    wanted = replace(wanted, owner=owner or wanted.owner)
    (hold,) = journal.add_devices([replace(device, state=State.PLUGGING)], [wanted]) or []
    journal.set_state([device.id], State.ATTACHED)
    return hold
