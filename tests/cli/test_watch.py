"""`vmplug watch` and the marks of `list`, with real backends, real files and real QEMUs."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.command import Vmplug
from tests.cli.monitors import MemoryVm
from tests.cli.started import started
from tests.cli.watching import DEADLINE_S, watching
from tests.contract.world import journal_rows
from tests.support.daemons import storage_daemon
from tests.support.disks import disk_image, own_loop_device
from tests.support.journal import attach_row, device_record, vm_record
from vmplug import EventKind, Setup, Watch, watch
from vmplug.host.events import HostEvents, ProcessEnded
from vmplug.journal.journal import Journal
from vmplug.journal.state import State

MIB = 1 << 20


def marks(vmplug: Vmplug) -> dict[str, str]:
    """What `list` says of the host device, by the attachment's name."""
    listed = vmplug("list", "--json").json()["attachments"]
    return {hold["name"]: hold["host"]["state"] for hold in listed if "host" in hold}


def attached(vmplug: Vmplug, vm: str, *words: str | Path) -> list[str]:
    told = vmplug("attach", *words, "--vm", vm, "--owner", "ctr1", "--json").json()
    return [hold["id"] for hold in told["attachments"]]


@pytest.fixture
def memory_vm(vmplug: Vmplug, tmp_path: Path) -> Iterator[MemoryVm]:
    with MemoryVm(vmplug.state_dir.with_name("qmp.sock")) as vm:
        vmplug("vm", "adopt", "sb1", "--qmp", vm.socket_path).answer()
        yield vm


@pytest.mark.qemu
@pytest.mark.root
def test_a_vm_with_everything_loses_it_piece_by_piece(vmplug: Vmplug, tmp_path: Path) -> None:
    """A real QEMU and a real backend, which it finds again by itself."""
    image = disk_image(tmp_path / "a.img", 8, "a")
    store = tmp_path / "store/block"
    for name in ("devices", "sockets"):
        (store / name).mkdir(parents=True)
    os.mknod(store / "devices/d0", 0o600 | 0o060000, os.makedev(241, 0))
    served = disk_image(tmp_path / "b.img", 8, "b")
    with (
        storage_daemon(served) as backend,
        started(vmplug, "sb1") as vm,
    ):
        (store / "sockets/d0").symlink_to(backend.socket_path)
        words = ["-d", f"file:{image}:/dev/a", "-d", "b:241:0:/dev/b"]
        words += ["--vhost-user-store", str(tmp_path / "store")]
        disk, served_disk = attached(vmplug, "sb1", *words)
        assert marks(vmplug) == {"/dev/a": "present", "/dev/b": "present"}
        rows, names = journal_rows(vmplug.state_dir), vm.names()
        with watching(vmplug) as watch:
            backend.kill()
            assert watch.events(1) == [("gone", served_disk)]
            assert marks(vmplug) == {"/dev/a": "present", "/dev/b": "gone"}
            backend.restart()
            told = watch.next()
            while told["event"] != "back":  # QEMU looks for it once a second
                assert told["event"] == "disconnected"
                told = watch.next()
            assert told["attachment"]["id"] == served_disk
            backend.kill()
            assert watch.events(1) == [("gone", served_disk)]
            os.truncate(image, 16 * MIB)
            resized = watch.next()
            assert (resized["event"], resized["attachment"]["id"]) == ("resized", disk)
            assert (resized["old_size_bytes"], resized["size_bytes"]) == (8 * MIB, 16 * MIB)
            image.unlink()
            assert watch.events(1) == [("deleted", disk)]
            disk_image(image, 8, "another")
            assert watch.events(1) == [("replaced", disk)]
            assert marks(vmplug) == {"/dev/a": "replaced", "/dev/b": "gone"}
            assert (journal_rows(vmplug.state_dir), vm.names()) == (rows, names)
            os.kill(vm.pid, signal.SIGKILL)
            ended = watch.next()
            assert (ended["event"], ended["vm"], ended["attachment"]) == ("vm-ended", "sb1", None)
            assert "vmplug reconcile --vm sb1" in ended["hint"]
            assert journal_rows(vmplug.state_dir) == rows


@pytest.mark.root
def test_a_loop_device_that_was_detached_is_marked(
    vmplug: Vmplug, memory_vm: MemoryVm, tmp_path: Path
) -> None:
    image = disk_image(tmp_path / "a.img", 8, "a")
    with own_loop_device(image) as node:
        number = Path(f"/sys/block/{node.name}/dev").read_text().strip()
        (attachment,) = attached(vmplug, "sb1", "-d", f"b:{number}:/dev/a")
        assert marks(vmplug) == {"/dev/a": "present"}
        with watching(vmplug) as watch:
            subprocess.run(["losetup", "--detach", node], check=True)
            try:
                assert watch.events(1) == [("gone", attachment)]
                assert marks(vmplug) == {"/dev/a": "gone"}
            finally:
                subprocess.run(["losetup", node, image], check=True)  # to be detached as usual
            # The same number and file, and another disk to the kernel.
            assert watch.events(1) == [("replaced", attachment)]
            assert marks(vmplug) == {"/dev/a": "replaced"}


def test_what_is_attached_later_is_followed_and_what_is_detached_no_more(
    vmplug: Vmplug, memory_vm: MemoryVm, tmp_path: Path
) -> None:
    first, second = (disk_image(tmp_path / f"{name}.img", 1, name) for name in "ab")
    with watching(vmplug) as watch:
        words = [w for path in (first, second) for w in ("-d", f"file:{path}")]
        one, two = attached(vmplug, "sb1", *words)
        watch.catch_up(vmplug)
        os.truncate(first, 2 * MIB)
        assert watch.events(1) == [("resized", one)]
        vmplug("detach", one).answer()
        first.unlink()
        second.unlink()
        assert watch.events(1) == [("deleted", two)]


def test_only_one_vm_is_told_of(vmplug: Vmplug, memory_vm: MemoryVm) -> None:
    with Journal.open(vmplug.state_dir) as journal:
        for vm in ("sb2", "sb1"):
            if vm != "sb1":
                journal.add_vm(vm_record(vm))
            attach_row(journal, device_record("file:/no/such", "/no/such", vm=vm))
    answer = vmplug("watch", "--vm", "sb2", "--timeout", "0", "--json")
    (notice,) = map(json.loads, answer.answer().splitlines())
    assert (notice["vm"], notice["event"]) == ("sb2", "deleted")
    assert vmplug("watch", "--vm", "sb3", "--json").error()["code"] == "wrong-state"


def test_with_no_time_it_tells_what_is_wrong_now_and_ends(vmplug: Vmplug) -> None:
    assert vmplug("watch", "--timeout", "0").answer() == "nothing is attached\n"
    with Journal.open(vmplug.state_dir) as journal:
        journal.add_vm(vm_record())
        hold = attach_row(journal, device_record("file:/no/such\n", "/no/such\n"))
    first, *others = vmplug("watch", "--timeout", "0").answer().splitlines()
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    wanted = (
        rf"{time}  deleted  VM sb1, /dev/xvda of c1, attachment {hold.id}, device {hold.device_id}"
    )
    assert re.fullmatch(wanted, first)
    assert others == [
        "  /no/such\\n has been deleted or moved",
        "  the guest keeps working; its writes are lost when the VM closes the file",
        f"  hint: save the data from inside the guest, then vmplug detach {hold.id}",
    ]


def test_with_nothing_wrong_it_says_what_it_checked(
    vmplug: Vmplug, memory_vm: MemoryVm, tmp_path: Path
) -> None:
    assert vmplug("watch", "--timeout", "0").answer() == (
        "nothing is wrong: 1 VM, 0 devices checked\n"
    )
    image = disk_image(tmp_path / "a.img", 1, "a")
    attached(vmplug, "sb1", "-d", f"file:{image}")
    told = "nothing is wrong: 1 VM, 1 device checked"
    assert vmplug("watch", "--timeout", "0").answer() == f"{told}\n"
    assert vmplug("watch", "--timeout", "0.1").answer() == f"{told}\n"
    assert vmplug("watch", "--timeout", "0", "--json").answer() == ""
    with Journal.open(vmplug.state_dir) as journal:
        journal.add_vm(vm_record("silent"))
        record = device_record("file:/no/such", "/no/such", vm="silent", state=State.PLUGGING)
        journal.add_devices([record], [])
    assert vmplug("watch", "--timeout", "0").answer() == (
        "nothing is wrong: 2 VMs, 1 device checked; the state of 1 device cannot be known; "
        "VM silent did not answer\n"
    )


def test_a_vm_that_had_ended_before_is_told_first_and_its_devices_are_not(vmplug: Vmplug) -> None:
    with Journal.open(vmplug.state_dir) as journal:
        journal.add_vm(vm_record(pid=os.getpid(), started_at=1))  # another process's number now
        attach_row(journal, device_record("file:/no/such", "/no/such"))
    (notice,) = map(json.loads, vmplug("watch", "--timeout", "0", "--json").answer().splitlines())
    assert notice["event"] == "vm-ended"
    assert "1 attachment;" in notice["meaning"]


def test_the_interrupt_key_ends_it_quietly(vmplug: Vmplug) -> None:
    with watching(vmplug) as watch:
        watch.process.send_signal(signal.SIGINT)
        stdout, stderr = watch.process.communicate(timeout=DEADLINE_S)
        assert (stdout, stderr.strip(), watch.process.returncode) == (b"", b"", 130)


def test_a_reader_that_has_gone_ends_it_quietly(vmplug: Vmplug) -> None:
    with Journal.open(vmplug.state_dir) as journal:
        journal.add_vm(vm_record())
        attach_row(journal, device_record("file:/no/such", "/no/such"))
    process = vmplug.begin("watch")
    assert process.stdout
    process.stdout.close()
    process.stdout = None
    _, stderr = process.communicate(timeout=DEADLINE_S)
    assert (stderr, process.returncode) == (b"", 141)


# the library


def test_the_iterator_gives_notices_until_its_time_is_over(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        journal.add_vm(vm_record())
        hold = attach_row(journal, device_record("file:/no/such", "/no/such"))
    with watch(timeout_s=0.1, setup=Setup(state_dir=tmp_path)) as notices:
        (notice,) = notices
        assert (notice.what, notice.attachment) == (EventKind.DELETED, hold)
        assert list(notices) == []


def test_a_closed_iterator_has_ended(tmp_path: Path) -> None:
    notices: Watch = watch(setup=Setup(state_dir=tmp_path))
    descriptors = set(os.listdir("/proc/self/fd"))
    notices.close()
    notices.close()
    assert list(notices) == []
    assert len(os.listdir("/proc/self/fd")) < len(descriptors)


def test_the_end_of_a_process_is_told_once_and_then_it_is_not_followed() -> None:
    with HostEvents() as events, subprocess.Popen(["sleep", "60"]) as child:
        events.follow({child.pid})
        assert events.wait(0) == []
        child.kill()
        assert events.wait(DEADLINE_S) == [ProcessEnded(pid=child.pid)]
        assert events.wait(0) == []
        child.wait()
        events.follow({child.pid})
        assert events.wait(0) == []
