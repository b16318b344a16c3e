"""Who uses what a lease has, and what one that cannot be repaired stops."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.disks import disk_image
from tests.support.journal import attach_row, device_record
from tests.support.locked_memory import locked_memory
from tests.support.lonely_host import LonelyHost
from tests.support.pci_tree import PciTree
from vmplug import DeviceInfo, DevType, Setup
from vmplug.address import Bdf
from vmplug.errors import AttributeReadError
from vmplug.host.kind import DeviceType
from vmplug.host.pci.vfio_use import is_open
from vmplug.host.use.silent import answer_within
from vmplug.journal.journal import Journal
from vmplug.journal.records import VmRecord
from vmplug.leases import life
from vmplug.leases.lease import lease
from vmplug.leases.life import leases_of, record_lease
from vmplug.leases.users import find_users
from vmplug.manager.binding.users import find_users as find_users_of_function
from vmplug.manager.reconcile import RepairOutcome
from vmplug.vms import reconcile

FUNCTION = "0000:3b:00.0"
UUID = "7a3b1c52-0d52-4c8f-9a57-3b6f0e5d2c11"


@pytest.mark.parametrize("name", [FUNCTION, UUID], ids=["function", "mediated"])
def test_who_has_a_function_or_a_mediated_device_open_uses_it(tmp_path: Path, name: str) -> None:
    tree = PciTree(tmp_path / "host").pci_function(FUNCTION, driver="vfio-pci", group=2)
    tree.mdev_type(FUNCTION, "type-1").mdev(UUID, FUNCTION, "type-1", group=3)
    node = "/dev/vfio/2" if name == FUNCTION else "/dev/vfio/3"
    with Journal.open(tmp_path / "state") as journal:
        journal.add_vm(record := record_lease("job", journal))
        attach_row(
            journal,
            device_record(
                f"vfio:{name}", node, DeviceType.VFIO, vm="lease:job", functions=(name,)
            ),
        )
        assert list(find_users(record, journal, tree.root)) == []
        tree.process(77, "qemu", node)
        (user,) = find_users(record, journal, tree.root)
        assert str(user) == "process 77 (qemu)"


@pytest.mark.parametrize(
    ("driver", "enable", "references", "is_used"),
    [
        ("vfio-pci", 1, 1, True),
        ("vfio-pci", 1, None, True),  # a driver that is no module
        ("vfio-pci", 0, 1, False),
        ("vfio-pci", 1, 0, False),  # left so by a driver before
        ("nvme", 1, 1, False),
    ],
)
def test_a_function_that_the_kernel_has_open_is_used(
    tmp_path: Path, driver: str, enable: int, references: int | None, *, is_used: bool
) -> None:
    """No process shows it: it may be mapped, or sent and not received."""
    tree = PciTree(tmp_path / "host").pci_function(FUNCTION, driver=driver, group=2)
    function = tree.path / "sys/bus/pci/devices" / FUNCTION
    (function / "enable").write_text(f"{enable}\n")
    if references is not None:
        module = (function / "driver").resolve() / "module"
        module.mkdir()
        (module / "refcnt").write_text(f"{references}\n")
    assert is_open(FUNCTION, tree.root) is is_used
    with Journal.open(tmp_path / "state") as journal:
        journal.add_vm(record := record_lease("job", journal))
        lent = ("/dev/vfio/2", DeviceType.VFIO)
        row = device_record(f"vfio:{FUNCTION}", *lent, vm="lease:job", functions=(FUNCTION,))
        attach_row(journal, row)
        users = [str(user) for user in find_users(record, journal, tree.root)]
        assert users == (["a process that vmplug cannot name"] if is_used else [])
    told = find_users_of_function(Bdf.parse(FUNCTION), None, tree.root)
    assert (told is not None) is is_used


def test_a_lease_that_cannot_be_repaired_stops_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(host=LonelyHost(), state_dir=tmp_path / "state")
    with Journal.open(setup.state_dir) as journal:
        for number, name in enumerate(("bad", "good")):
            ended = replace(record_lease(name, journal), starting_by=None, pid=1, started_at=1)
            journal.add_vm(ended)
            path = disk_image(tmp_path / f"{name}.img", 1, name)
            attach_row(journal, device_record(f"file:{path}", str(path), vm=ended.name))
            assert len(leases_of(journal)) == number + 1
    forget = life.forget

    def fail(record: VmRecord, journal: Journal) -> list[object]:
        if record.name == "lease:bad":
            raise AttributeReadError("/proc/1/stat", why="it has no start time")
        return [*forget(record, journal)]

    monkeypatch.setattr(life, "forget", fail)
    info = DeviceInfo(
        container_path="/dev/x", dev_type=DevType.BLOCK, host_path=str(tmp_path / "good.img")
    )
    with lease([info], owner="next", setup=setup) as made:
        assert made.id == "next"
    done = reconcile.reconcile_host(setup=setup)
    assert [failure.vm for failure in done.failures] == ["lease:bad"]


def test_a_process_that_was_never_noted_has_no_number_in_any_sentence(tmp_path: Path) -> None:
    setup = Setup(host=LonelyHost(), state_dir=tmp_path / "state")
    with Journal.open(setup.state_dir) as journal:
        ended = replace(record_lease("job", journal), starting_by=None)
        journal.add_vm(ended)
        path = disk_image(tmp_path / "a.img", 1, "a")
        attach_row(journal, device_record(f"file:{path}", str(path), vm=ended.name))
    (repair,) = reconcile.reconcile_host(setup=setup).require().repairs
    assert repair.repair.reason == "its process has ended"


@pytest.mark.root
def test_a_lease_is_kept_while_a_process_cannot_be_asked_for_its_file(tmp_path: Path) -> None:
    setup = Setup(host=LonelyHost(), state_dir=tmp_path / "state")
    with Journal.open(setup.state_dir) as journal:
        ended = replace(record_lease("job", journal), starting_by=None, pid=1, started_at=1)
        journal.add_vm(ended)
        path = disk_image(tmp_path / "a.img", 1, "a")
        attach_row(journal, device_record(f"file:{path}", str(path), vm=ended.name))
    with locked_memory(tmp_path) as pid:
        done = answer_within(60, lambda: reconcile.reconcile_host(setup=setup))
        assert done, "it waits"
        (failure,) = done.failures
        assert f"/proc/{pid}/map_files" in failure.error.message
        assert "the process does not answer" in failure.error.message
        assert not done.repairs
    (repair,) = reconcile.reconcile_host(setup=setup).require().repairs
    assert repair.repair.outcome is RepairOutcome.FORGOTTEN
