"""What a crowd holds by its own account, by the journal and by QEMU; read with SQLite and QMP."""

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from sqlite3 import connect

from tests.contract.world import qemu_parts
from tests.support.vm import GuestVm
from tests.system.concurrency.crowd import Account

Holds = Counter[tuple[str, str, str]]
"""How often an owner holds an image in a VM: by VM, image and owner."""


def audit(vms: Mapping[str, GuestVm], state_dir: Path, accounts: Iterable[Account]) -> None:
    """All three agree: nothing is lost, and nothing is given away twice."""
    holds = holds_by_account(accounts)
    assert holds_in_journal(state_dir) == holds
    devices = devices_in_journal(state_dir)
    images = [image for _, image, _ in devices.values()]
    assert len(set(images)) == len(images), "an image is in two VMs"
    assert {(vm, image) for vm, image, _ in devices.values()} == {key[:2] for key in holds}
    for name, vm in vms.items():
        mine = {i: place for i, (where, _, place) in devices.items() if where == name}
        assert places_in_qemu(vm) == {f"vmplug-{i}": place for i, place in mine.items()}
        assert qemu_parts(vm).vmplugs() == {f"vmplug-{i}" for i in mine}
        assert len(set(mine.values())) == len(mine), "a place is given to two devices"


def holds_by_account(accounts: Iterable[Account]) -> Holds:
    """What the members say."""
    return +Counter(
        {
            (vm, image, account.owner): count
            for account in accounts
            for (vm, image), count in account.held.items()
        }
    )


def holds_in_journal(state_dir: Path) -> Holds:
    """What the journal says."""
    query = "SELECT vm, host_path, owner, count FROM attachment JOIN device ON device = device.id"
    with closing(connect(state_dir / "journal.db")) as db:
        return Counter({(vm, path, owner): n for vm, path, owner, n in db.execute(query)})


def devices_in_journal(state_dir: Path) -> Mapping[str, tuple[str, str, str]]:
    """VM, image and place by device id; every one is attached."""
    with closing(connect(state_dir / "journal.db")) as db:
        rows = db.execute("SELECT id, vm, host_path, place, state FROM device").fetchall()
    assert {row[4] for row in rows} <= {"attached"}
    return {row[0]: (row[1], row[2], row[3]) for row in rows}


def places_in_qemu(vm: GuestVm) -> Mapping[str, str]:
    """Where QEMU has each SCSI disk of vmplug's, in the journal's words."""
    found = {}
    for entry in vm.oracle.execute("qom-list", path="/machine/peripheral"):
        if (name := entry["name"]).startswith("vmplug-"):
            path = f"/machine/peripheral/{name}"
            target = vm.oracle.execute("qom-get", path=path, property="scsi-id")
            lun = vm.oracle.execute("qom-get", path=path, property="lun")
            found[name] = f"scsi0.0/{target}:{lun}"
    return found
