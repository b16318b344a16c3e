"""A journal on a disk that outlives the host's boot: its claims do not."""

import fcntl
import os
import sqlite3
import struct
from pathlib import Path

import pytest

from tests.cli.command import Vmplug
from tests.cli.monitors import MemoryVm
from tests.contract.world import journal_rows
from tests.support.disks import disk_image


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return disk_image(tmp_path / "a.img", 1, "a")


def boot_again(vmplug: Vmplug) -> None:
    """What the journal says is of the boot before this one; the pid in it is one of now."""
    with sqlite3.connect(vmplug.state_dir / "journal.db") as db:
        db.execute("UPDATE vm SET boot_id = 'an earlier boot'")
    db.close()


@pytest.fixture
def rebooted(vmplug: Vmplug, image: Path) -> Vmplug:
    """A host that has booted since a VM was given a disk."""
    vmplug.state_dir.parent.mkdir(exist_ok=True)
    with MemoryVm(vmplug.state_dir.parent / "qmp.sock") as vm:
        vmplug("vm", "adopt", "sb1", "--qmp", vm.socket_path).answer()
        vmplug("attach", "-d", f"file:{image}", "--vm", "sb1", "--owner", "c1").answer()
        assert vmplug("check", "-d", f"file:{image}").status == 4
    boot_again(vmplug)
    return vmplug


def test_a_claim_of_an_earlier_boot_hinders_nobody(rebooted: Vmplug, image: Path) -> None:
    assert rebooted("check", "-d", f"file:{image}").status == 0
    (vm,) = rebooted("vm", "list", "--json").json()["vms"]
    assert vm["state"] == "gone"
    assert rebooted("list", "--json").json()["ended_vms"] == ["sb1"]
    (repair,) = rebooted("reconcile", "--json").json()["repairs"]
    assert (repair["outcome"], repair["reason"]) == ("forgotten", "the host has booted since")
    assert not any(journal_rows(rebooted.state_dir).values())


def test_what_an_earlier_vmplug_attached_is_reported_never_acted_on_and_given_back(
    vmplug: Vmplug, image: Path
) -> None:
    vmplug.state_dir.parent.mkdir(exist_ok=True)
    with MemoryVm(vmplug.state_dir.parent / "qmp.sock") as vm:
        vmplug("vm", "adopt", "sb1", "--qmp", vm.socket_path).answer()
        asked = ("-d", f"file:{image}:/dev/data", "--vm", "sb1")
        vmplug("attach", *asked, "--owner", "c1").answer()
        with sqlite3.connect(vmplug.state_dir / "journal.db") as db:
            db.execute("UPDATE device SET thing = NULL")  # as a journal before version 5 had it
        db.close()
        (hold,) = vmplug("list", "--json").json()["attachments"]
        assert hold["host"]["state"] == "unidentified"
        watched = vmplug("watch", "--timeout", "0", "--json")
        assert watched.json()["event"] == "unidentified"
        checked = vmplug("check", *asked, "--json")
        assert checked.status == 4
        assert [p["code"] for p in checked.json()["problems"]] == ["unidentified"]
        before, names = journal_rows(vmplug.state_dir), vm.names()
        for verb in (("attach", *asked, "--owner", "c2"), ("resize", hold["id"])):
            refused = vmplug(*verb)
            assert refused.status == 6
            assert f"does not know whether {image} is still what VM sb1 has" in refused.stderr
        assert (journal_rows(vmplug.state_dir), vm.names()) == (before, names)
        vmplug("detach", hold["id"]).answer()  # the remedy
        assert not any(name.startswith("vmplug-") for name in vm.names())
        vmplug("attach", *asked, "--owner", "c2").answer()
        (again,) = vmplug("list", "--json").json()["attachments"]
        assert again["host"]["state"] == "present"


def test_check_says_that_the_vm_has_it_and_what_is_only_counted(
    vmplug: Vmplug, image: Path
) -> None:
    vmplug.state_dir.parent.mkdir(exist_ok=True)
    with MemoryVm(vmplug.state_dir.parent / "qmp.sock") as vm, image.open("rb+") as file:
        vmplug("vm", "adopt", "sb1", "--qmp", vm.socket_path).answer()
        asked = ("-d", f"file:{image}:/dev/data", "--vm", "sb1")
        assert vmplug("check", *asked, "--json").json()["counted"] == []
        vmplug("attach", *asked, "--owner", "c1").answer()
        lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 201, 1, 0)
        fcntl.fcntl(file, 37, lock)  # F_OFD_SETLK, as the VM's QEMU holds it
        assert "image-locked" not in vmplug("check", *asked).answer()
        document = vmplug("check", *asked, "--json").json()
        assert document == {"ok": True, "problems": [], "counted": ["/dev/data"]}
        assert vmplug("check", *asked).answer() == (
            f"/dev/data: ok, the VM has {image} already: attach only counts it\n"
        )
        (hold,) = vmplug("attach", *asked, "--owner", "c2", "--json").json()["attachments"]
        assert hold["host_path"] == str(image)


@pytest.mark.parametrize("name", ["sb1", "sb2"])
def test_a_vm_may_have_the_name_or_the_socket_of_one_of_an_earlier_boot(
    rebooted: Vmplug, image: Path, name: str
) -> None:
    socket = rebooted.state_dir.parent / "qmp.sock"
    socket.unlink()
    with MemoryVm(socket):
        rebooted("vm", "adopt", name, "--qmp", socket).answer()
        assert rebooted("list").answer() == "nothing is attached\n"
        attach = ("attach", "-d", f"file:{image}", "--vm", name, "--owner", "c1", "--json")
        (hold,) = rebooted(*attach).json()["attachments"]
        assert hold["count"] == 1


def test_an_attach_to_a_vm_that_is_up_again_after_a_boot_plugs_anew(
    rebooted: Vmplug, image: Path
) -> None:
    socket = rebooted.state_dir.parent / "qmp.sock"
    socket.unlink()
    with MemoryVm(socket) as vm:
        attach = ("attach", "-d", f"file:{image}", "--vm", "sb1", "--owner", "c1", "--json")
        (hold,) = rebooted(*attach).json()["attachments"]
        assert hold["count"] == 1
        assert any(name.startswith("vmplug-") for name in vm.names())
        assert rebooted("list", "--json").json()["ended_vms"] == []
