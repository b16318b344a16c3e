"""A damaged journal below a VM that runs: told, set aside, and the guest's disk is left alone."""

import sqlite3
from pathlib import Path

import pytest

from tests.cli.command import Vmplug
from tests.cli.monitors import MemoryVm
from tests.support.disks import disk_image

STATE = 6


@pytest.fixture
def vm(vmplug: Vmplug) -> MemoryVm:
    vmplug.state_dir.parent.mkdir(exist_ok=True)
    return MemoryVm(vmplug.state_dir.parent / "qmp.sock")


def test_a_damaged_journal_is_told_by_every_verb_and_set_aside_by_one(
    vmplug: Vmplug, vm: MemoryVm, tmp_path: Path
) -> None:
    image = disk_image(tmp_path / "a.img", 1, "a")
    attach = ("attach", "--device", f"file:{image}", "--vm", "sb1", "--owner", "c1")
    journal = vmplug.state_dir / "journal.db"
    with vm:
        vmplug("vm", "adopt", "sb1", "--qmp", vm.socket_path).answer()
        vmplug(*attach).answer()
        names = vm.names()
        journal.write_bytes(damaged := b"scribble" * 4096)
        for words in (("list",), attach, ("reconcile",), ("vm", "list")):
            done = vmplug(*words)
            assert done.status == STATE
            assert "is damaged: file is not a database" in done.stderr
            assert "hint: vmplug reconcile --set-aside keeps it" in done.stderr
            assert journal.read_bytes() == damaged

        told = vmplug("reconcile", "--set-aside", "--json").json()
        assert Path(told["salvage"]["kept_as"]).read_bytes() == damaged
        assert told["salvage"]["carried"] == {}
        assert told["salvage"]["lost"]
        assert (told["repairs"], told["errors"]) == ([], [])
        assert vm.names() == names

        vmplug("vm", "adopt", "sb1", "--qmp", vm.socket_path).answer()
        assert vm.names() == names
        (repair,) = vmplug("reconcile", "--json").json()["repairs"]
        assert repair["outcome"] == "another journal"
        assert vm.names() == names
        (repair,) = vmplug("reconcile", "--take-over", "--json").json()["repairs"]
        assert repair["outcome"] == "removed"
        assert vmplug(*attach).status == 0


def test_what_was_carried_over_goes_on_and_what_was_not_is_left_for_the_next(
    vmplug: Vmplug, vm: MemoryVm, tmp_path: Path
) -> None:
    images = [disk_image(tmp_path / name, 1, name) for name in ("a.img", "b.img")]
    with vm:
        vmplug("vm", "adopt", "sb1", "--qmp", vm.socket_path).answer()
        for image in images:
            vmplug("attach", "-d", f"file:{image}", "--vm", "sb1", "--owner", "c1").answer()
        names = vm.names()
        with sqlite3.connect(vmplug.state_dir / "journal.db") as db:
            db.execute("UPDATE device SET state = 'flying' WHERE host_path = ?", [str(images[1])])
        db.close()
        assert vmplug("list").status == STATE

        said = vmplug("reconcile", "--set-aside").answer()
        assert "the journal was damaged ('flying' is not a valid State)" in said
        assert "carried over: 1 of vm, 1 of device, 1 of attachment" in said
        assert "another journal" in said
        assert vm.names() == names
        (hold,) = vmplug("list", "--json").json()["attachments"]
        assert hold["host_path"] == str(images[0])

        (repair,) = vmplug("reconcile", "--take-over", "--json").json()["repairs"]
        assert repair["outcome"] == "removed"
        vmplug("detach", hold["id"]).answer()
        assert vmplug("reconcile", "--set-aside").answer() == "the journal and the VMs agree\n"
