"""What Kata plugged, taken over: real QEMUs in which the tests plug as Kata does."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import Vmplug
from tests.contract.world import journal_rows
from tests.qemu.conftest import Lab
from tests.support.disks import disk_image, loop_device
from tests.support.kata import DISK_ID, block, device, plug_commands, vfio, write_sandbox
from tests.support.vm import GuestVm, root_ports, scsi_controller, start_vm
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.journal.journal import Journal
from vmplug.journal.records import Attachment
from vmplug.manager.kata.adopt import adopt
from vmplug.manager.kata.saved_state import read_kata

pytestmark = pytest.mark.qemu

FRONT, NODE = f"virtio-drive-{DISK_ID}", f"drive-{DISK_ID}"
SCSI = {"driver": "scsi-hd", "bus": "scsi0.0", "scsi-id": 1, "lun": 2}


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[GuestVm]:
    devices = [*root_ports(2), *scsi_controller()]
    with start_vm(tmp_path, devices=devices, guest=False, paused=True) as started:
        yield started


@pytest.fixture
def vmplug(tmp_path: Path) -> Vmplug:
    return Vmplug(tmp_path / "state")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return disk_image(tmp_path / "a.img", 1, "katas")


def plug(vm: GuestVm, image: Path, front: Mapping[str, Any], *, device_id: str = DISK_ID) -> None:
    for command, arguments in plug_commands(str(image), front, device_id=device_id):
        vm.oracle.execute(command, arguments)


def names_in(vm: GuestVm) -> set[str]:
    nodes = vm.oracle.execute("query-named-block-nodes", flat=True)
    entries = vm.oracle.execute("qom-list", path="/machine/peripheral")
    return {node["node-name"] for node in nodes} | {entry["name"] for entry in entries}


def import_words(vm: GuestVm, state: Path) -> tuple[str, ...]:
    return ("import-kata", str(state), "--vm", "sb1", "--qmp", str(vm.qmp_path), "--json")


def test_a_disk_of_katas_is_taken_over_and_can_be_detached(
    vm: GuestVm, vmplug: Vmplug, image: Path, tmp_path: Path
) -> None:
    before = names_in(vm)
    plug(vm, image, SCSI)
    holds = {"ctr1": [(DISK_ID, "/dev/xvda")], "ctr2": [(DISK_ID, "/dev/xvdb")]}
    state = write_sandbox(tmp_path / "5a1f", block(str(image), SCSIAddr="1:2"), holds=holds)
    plugged = names_in(vm)

    told = vmplug(*import_words(vm, state)).json()
    assert (told["vm"], told["sandbox"]) == ("sb1", "5a1f")
    (one,) = told["devices"]
    assert (one["kata_device"], one["outcome"]) == (DISK_ID, "imported")
    assert names_in(vm) == plugged

    listed = vmplug("list", "--json").json()["attachments"]
    assert [(h["owner"], h["container_path"]) for h in listed] == [
        ("ctr1", "/dev/xvda"),
        ("ctr2", "/dev/xvdb"),
    ]
    assert {(h["state"], h["count"], h["host_path"]) for h in listed} == {
        ("attached", 1, str(image))
    }
    guest = listed[0]["guest"]
    assert (guest["pci_path"], guest["scsi_address"]) == ("08", "1:2")
    assert vmplug("reconcile").answer() == "the journal and the VMs agree\n"

    assert "in-use-by-vm" in vmplug("check", "-d", f"file:{image}", "--json").stdout
    vmplug("detach", "--owner", "ctr1").answer()
    assert names_in(vm) == plugged
    vmplug("detach", "--owner", "ctr2").answer()
    assert names_in(vm) == before
    assert vmplug("list").answer() == "nothing is attached\n"
    assert vmplug("check", "-d", f"file:{image}").status == 0


def state_of(vmplug: Vmplug) -> str | None:
    """What `list` says of the only hold's device on the host."""
    (hold,) = vmplug("list", "--json").json()["attachments"]
    return str(hold["host"]["state"]) if hold["host"] else None


@pytest.mark.parametrize("is_device", [False, True], ids=["file", "loop"])
def test_what_qemu_has_open_is_counted_for_one_more_owner(
    vm: GuestVm, vmplug: Vmplug, image: Path, tmp_path: Path, *, is_device: bool
) -> None:
    with loop_device(image) if is_device else nullcontext(image) as disk:
        plug(vm, disk, SCSI)
        plugged = names_in(vm)
        number = disk.stat().st_rdev
        words = f"{os.major(number)}:{os.minor(number)}" if number else "-1:0"
        state = write_sandbox(tmp_path / "5a1f", block(str(disk), number=words))
        vmplug(*import_words(vm, state)).json()
        assert state_of(vmplug) == "present"
        asked = ("-d", f"b:{words}" if number else f"file:{disk}")
        vmplug("attach", "--vm", "sb1", "--owner", "ours", *asked).answer()
        held = vmplug("list", "--json").json()["attachments"]
        assert {hold["owner"] for hold in held} == {"5a1f", "ours"}
        assert names_in(vm) == plugged
        for owner in ("5a1f", "ours"):
            vmplug("detach", "--owner", owner).answer()
        assert vmplug("list").answer() == "nothing is attached\n"


def test_a_name_that_leads_elsewhere_by_now_proves_nothing(
    vm: GuestVm, vmplug: Vmplug, image: Path, tmp_path: Path
) -> None:
    plug(vm, image, SCSI)
    image.rename(tmp_path / "first.img")
    disk_image(image, 1, "another")
    vmplug(*import_words(vm, write_sandbox(tmp_path / "5a1f", block(str(image))))).json()
    assert state_of(vmplug) == "unidentified"
    words = ("attach", "--vm", "sb1", "--owner", "ours", "-d", f"file:{image}", "--json")
    assert "unidentified" in vmplug(*words).stderr


def test_a_file_with_the_name_of_another_disk_proves_neither(
    vm: GuestVm, vmplug: Vmplug, image: Path, tmp_path: Path
) -> None:
    other = disk_image(tmp_path / "b.img", 1, "other")
    plug(vm, image, SCSI)
    plug(vm, other, {**SCSI, "scsi-id": 3}, device_id="other-disk")
    other.rename(image)
    other.hardlink_to(image)
    devices = block(str(image)), block(str(other), name="other-disk")
    vmplug(*import_words(vm, write_sandbox(tmp_path / "5a1f", *devices))).json()
    held = vmplug("list", "--json").json()["attachments"]
    assert [hold["host"]["state"] for hold in held] == ["replaced", "unidentified"]


def test_importing_twice_changes_nothing(
    vm: GuestVm, vmplug: Vmplug, image: Path, tmp_path: Path
) -> None:
    plug(vm, image, SCSI)
    state = write_sandbox(tmp_path / "5a1f", block(str(image)), device("generic"))
    vmplug(*import_words(vm, state)).json()
    rows = journal_rows(vmplug.state_dir)
    assert len(rows["device"]) == 2
    again = vmplug(*import_words(vm, state)).json()["devices"]
    assert [one["outcome"] for one in again] == ["known already"] * 2
    assert journal_rows(vmplug.state_dir) == rows


def test_what_the_vm_does_not_hold_is_left_out_and_said(
    vm: GuestVm, vmplug: Vmplug, image: Path, tmp_path: Path
) -> None:
    idle = {**block("/dev/sdz", name="idle"), "AttachCount": 0}
    devices = (block(str(image)), idle, device("of-tomorrow"), device("virtio-net-pci"))
    state = write_sandbox(tmp_path / "5a1f", *devices)
    told = vmplug(*import_words(vm, state)).json()["devices"]
    assert [one["outcome"] for one in told] == ["left out"] * 4
    reasons = [one["reason"] for one in told]
    assert reasons[0] == f"the VM does not hold {FRONT}"
    assert reasons[1] == "Kata did not attach it"
    assert "not a kind of device that vmplug supports" in reasons[2]
    assert "no name in QEMU" in reasons[3]
    assert journal_rows(vmplug.state_dir)["device"] == []
    table = vmplug(*import_words(vm, state)[:-1]).answer()
    assert "left out" in table


def test_a_place_that_kata_took_is_given_to_nobody_else(
    vm: GuestVm, vmplug: Vmplug, image: Path, tmp_path: Path
) -> None:
    front = {"driver": "virtio-blk-pci", "bus": "rp0", "addr": "00"}
    plug(vm, image, front)
    state = write_sandbox(tmp_path / "5a1f", block(str(image), driver="virtio-blk"))
    vmplug(*import_words(vm, state)).json()
    (hold,) = vmplug("list", "--json").json()["attachments"]
    assert hold["guest"]["pci_path"] == "10/00"
    assert (hold["owner"], hold["count"]) == ("5a1f", 1)
    ours = disk_image(tmp_path / "b.img", 1, "ours")
    attach = ("attach", "-d", f"file:{ours}", "--vm", "sb1", "--owner", "c1", "--json")
    assert vmplug(*attach).json()["attachments"][0]["guest"]["pci_path"] == "11/00"


def test_a_group_of_katas_is_known_by_all_of_its_functions(
    vm: GuestVm, vmplug: Vmplug, tmp_path: Path
) -> None:
    """QEMU has other devices under the names here; what a name is of is not looked at."""
    for index in range(2):
        front = {"driver": "virtio-rng-pci", "bus": f"rp{index}"}
        vm.oracle.execute("device_add", id=f"vfio-a{index}", **front)
    members = [vfio(f"vfio-a{index}", BDF=f"0000:3b:00.{index}") for index in range(2)]
    state = write_sandbox(tmp_path / "5a1f", device("vfio", VFIODevs=members))
    vmplug(*import_words(vm, state)).json()
    (hold,) = vmplug("list", "--json").json()["attachments"]
    assert (hold["kind"], hold["host_path"]) == ("vfio", "0000:3b:00.0")
    assert hold["guest"]["functions"] == [
        {"host": "0000:3b:00.0", "pci_path": "10/00"},
        {"host": "0000:3b:00.1", "pci_path": "11/00"},
    ]
    assert vmplug("reconcile").answer() == "the journal and the VMs agree\n"


def test_persistent_memory_of_katas_stays_until_its_vm_ends(
    vmplug: Vmplug, image: Path, tmp_path: Path
) -> None:
    (tmp_path / "pmem").mkdir()
    memory = {"machine": "q35,nvdimm=on", "memory": "256M,slots=2,maxmem=1G"}
    with start_vm(tmp_path / "pmem", guest=False, paused=True, **memory) as vm:  # type: ignore[arg-type]
        backend = {"qom-type": "memory-backend-file", "mem-path": str(image), "size": 1 << 20}
        vm.oracle.execute("object-add", {**backend, "id": f"nvdimmbackmem{NODE}", "share": True})
        nvdimm = {"driver": "nvdimm", "memdev": f"nvdimmbackmem{NODE}"}
        vm.oracle.execute("device_add", id=f"nvdimm{NODE}", **nvdimm)
        plugged = names_in(vm)
        saved = block(str(image), Pmem=True, NvdimmID="1")
        state = write_sandbox(tmp_path / "5a1f", saved)
        vmplug(*import_words(vm, state)).json()
        (hold,) = vmplug("list", "--json").json()["attachments"]
        assert (hold["guest"]["nvdimm_id"], hold["guest"]["nvdimm_handle"]) == ("1", 1)
        assert "stays in VM sb1 until that ends" in vmplug("detach", hold["id"]).answer()
        assert names_in(vm) == plugged
        assert vmplug("reconcile").answer() == "the journal and the VMs agree\n"


def test_what_is_gone_from_the_vm_is_forgotten_with_its_remains(
    vm: GuestVm, vmplug: Vmplug, image: Path, tmp_path: Path
) -> None:
    before = names_in(vm)
    plug(vm, image, SCSI)
    state = write_sandbox(tmp_path / "5a1f", block(str(image)))
    vmplug(*import_words(vm, state)).json()
    vm.oracle.execute("device_del", id=FRONT)
    assert NODE in names_in(vm)
    (repair,) = vmplug("reconcile", "--json").json()["repairs"]
    assert (repair["outcome"], repair["host_path"]) == ("forgotten", str(image))
    assert names_in(vm) == before


def test_the_vm_must_be_the_one_of_the_name(
    vm: GuestVm, vmplug: Vmplug, image: Path, tmp_path: Path
) -> None:
    state = write_sandbox(tmp_path / "5a1f", block(str(image)))
    unknown = vmplug("import-kata", str(state), "--vm", "sb1")
    assert (unknown.status, "no VM 'sb1' is known" in unknown.stderr) == (6, True)
    vmplug("vm", "adopt", "sb1", "--qmp", vm.qmp_path).answer()
    (tmp_path / "other").mkdir()
    with start_vm(tmp_path / "other", guest=False, paused=True) as other:
        error = vmplug(*import_words(other, state)).error()
    assert "is known at" in error["message"]
    malformed = tmp_path / "malformed.json"
    malformed.write_text(json.dumps({"Devices": [{"ID": 1}]}))
    error = vmplug("import-kata", malformed, "--vm", "sb1", "--json").error()
    assert (error["code"], error["facts"]["where"]) == (
        "bad-request",
        f"{malformed}: $.Devices[0].ID",
    )


def test_a_guest_lets_go_of_a_disk_that_kata_plugged(lab: Lab, tmp_path: Path) -> None:
    before = lab.picture()
    image = disk_image(tmp_path / "k.img", 8, "katas")
    plug(lab.guest_vm, image, {"driver": "virtio-blk-pci", "bus": "rp3", "addr": "00"})
    state = write_sandbox(tmp_path / "5a1f", block(str(image), driver="virtio-blk"))
    lab.close()
    with (
        closing(Qemu.connect(str(lab.guest_vm.qmp_path))) as qemu,
        Journal.open(lab.state_dir) as journal,
    ):
        (told,) = adopt(read_kata(str(state)), lab.vm, journal, qemu)
    (hold,) = lab.devices.attachments()
    assert hold.device_id == told.device_id
    (disk,) = lab.guest_vm.console.wait_for_disks(1)
    assert (disk.marker, disk.pci_path) == ("katas", pci_path(hold))
    lab.devices.detach(hold.id)
    assert lab.guest_vm.console.wait_for_disks(0) == []
    assert lab.picture() == before


def pci_path(hold: Attachment) -> str:
    assert hold.guest_address
    return str(hold.guest_address.pci_path)
