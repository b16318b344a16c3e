"""The machine that `vm start` would start, before any QEMU runs."""

import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.pci_tree import FLAGS_MEM64, PciTree
from tests.support.tree import GIB
from vmplug.address import Bdf
from vmplug.errors import SpecError, StateError, StoreError
from vmplug.journal.journal import Journal
from vmplug.journal.records import VmRecord
from vmplug.manager.setup import Setup
from vmplug.vms.connect import connect_vm
from vmplug.vms.reconcile import reconcile_host
from vmplug.vms.start import VmSpec, _complete, start_vm
from vmplug.vms.status import list_vms
from vmplug.vms.stop import stop_vm

GPUS = tuple(Bdf.parse(f"0000:{0x17 + number:02x}:00.0") for number in range(5))
CPU = "processor\t: 0\naddress sizes\t: {bits} bits physical, 57 bits virtual\n"


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    """A host with graphics cards, each with a BAR of 128 GiB."""
    tree = PciTree(tmp_path / "host")
    for number, bdf in enumerate(GPUS):
        bars = {2: (0x210000000000 + (number << 40), 128 * GIB, FLAGS_MEM64)}
        tree.pci_function(str(bdf), class_code=0x030200, group=25 + number, bars=bars)
    return tree


def test_room_for_more_than_the_guest_has_addresses_is_refused_and_nothing_is_left(
    tree: PciTree, tmp_path: Path
) -> None:
    spec = VmSpec(name="big", accel="tcg", room_for=GPUS)
    setup = Setup(host=tree.root, state_dir=str(tmp_path / "state"))
    with pytest.raises(SpecError, match=r"need 1280 GiB .* has 955 GiB \(40 bits\)"):
        start_vm(spec, setup=setup)
    assert not (tmp_path / "state/vm/big").exists()


def test_room_for_fewer_is_made(tree: PciTree) -> None:
    spec = VmSpec(name="big", accel="tcg", room_for=GPUS[:3])
    assert _complete(spec, tree.root).windows == (256 * GIB,) * 3


@pytest.mark.parametrize(("bits", "is_enough"), [(39, False), (46, True), (52, True)])
def test_with_kvm_the_guest_has_the_hosts_bits(
    tree: PciTree, bits: int, *, is_enough: bool
) -> None:
    spec = VmSpec(name="big", accel="kvm", room_for=GPUS)
    assert len(_complete(spec, tree.root).windows) == len(GPUS)
    tree.file("/proc/cpuinfo", CPU.format(bits=bits))
    if is_enough:
        assert len(_complete(spec, tree.root).windows) == len(GPUS)
        return
    with pytest.raises(SpecError, match=f"{bits} bits"):
        _complete(spec, tree.root)


@pytest.mark.parametrize("has_directory", [False, True])
def test_a_start_that_died_before_there_was_a_qemu_is_undone(
    tmp_path: Path, *, has_directory: bool
) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    directory = tmp_path / "vm" / "sb1"
    with Journal.open(tmp_path) as journal:
        record = VmRecord(
            name="sb1",
            qmp_socket=str(directory / "qmp.sock"),
            pid=None,
            started_at=None,
            is_ours=True,
            starting_by=replace(journal.worker, pid=process.pid),
        )
        journal.add_vm(record)
    if has_directory:
        directory.mkdir(parents=True)
    setup = Setup(state_dir=tmp_path)
    assert [vm.state for vm in list_vms(setup=setup)] == ["interrupted"]
    with pytest.raises(StateError, match="interrupted start"):
        connect_vm("sb1", setup=setup)
    assert reconcile_host(setup=setup).failures == ()
    assert (list_vms(setup=setup), directory.exists()) == ([], False)


def test_a_start_in_progress_is_left_to_its_process(tmp_path: Path) -> None:
    setup = Setup(state_dir=tmp_path)
    with Journal.open(tmp_path) as journal:
        record = VmRecord(
            name="sb1",
            qmp_socket=str(tmp_path / "vm/sb1/qmp.sock"),
            pid=None,
            started_at=None,
            is_ours=True,
            starting_by=journal.worker,
        )
        journal.add_vm(record)
    assert reconcile_host(setup=setup).failures == ()
    with pytest.raises(StateError, match="is starting it"):
        stop_vm("sb1", setup=setup)
    assert [vm.state for vm in list_vms(setup=setup)] == ["starting"]


@pytest.mark.parametrize("name", ["sb1", ".."])
def test_a_damaged_path_of_a_vm_removes_no_other_directory(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "theirs/vm" / "sb1" if name == ".." else tmp_path / "theirs"
    directory.mkdir(parents=True)
    (directory / "file").touch()
    setup = Setup(state_dir=tmp_path / "state")
    with Journal.open(setup.state_dir) as journal:
        socket = str(tmp_path / "state/vm/sb1/qmp.sock")
        record = VmRecord(name="sb1", qmp_socket=socket, pid=1, started_at=1, is_ours=True)
        journal.add_vm(record)
        with journal._db as db:
            path = directory / (".." if name == ".." else "") / "qmp.sock"
            db.execute("UPDATE vm SET name = ?, qmp_socket = ?", (name, str(path)))
    with pytest.raises(StoreError, match="damaged"):
        reconcile_host(setup=setup)
    assert (directory / "file").exists()
