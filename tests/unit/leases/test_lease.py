"""Leases of files to processes, through the library."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import vmplug
from tests.support.disks import disk_image
from tests.support.lonely_host import FamilyHost
from vmplug import DeviceInfo, DevNum, DevType, InUse, LeaseLock, LeaseTerms, RngInfo, Setup
from vmplug.errors import DeviceError, StateError
from vmplug.host.use.qemu_lock import is_locked
from vmplug.journal.journal import Journal
from vmplug.leases import state

SLEEP = ["sleep", "infinity"]


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(host=FamilyHost(), state_dir=tmp_path / "state")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return disk_image(tmp_path / "a.img", 1, "a")


def disk(path: Path, *, read_only: bool = False, share_rw: bool = False) -> DeviceInfo:
    return DeviceInfo(
        container_path=f"/dev/{path.stem}",
        dev_type=DevType.BLOCK,
        host_path=str(path),
        read_only=read_only,
        driver_options={"share-rw": "on"} if share_rw else {},
    )


@contextmanager
def process(*pass_fds: int, command: Sequence[str] = SLEEP) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, pass_fds=pass_fds) as started:
        try:
            yield started
        finally:
            started.kill()


def rows(setup: Setup) -> int:
    with Journal.open(setup.state_dir) as journal:
        return len(journal.all_holders()) + len(journal.device_ids())


def test_a_lease_ends_with_the_process_that_it_is_given_to(setup: Setup, image: Path) -> None:
    with vmplug.lease([disk(image)], owner="job", setup=setup) as lease:
        (device,) = lease.devices
        assert (device.host_path, device.size_bytes) == (str(image), 1 << 20)
        assert device.descriptor in lease.descriptors
        with process(*lease.descriptors) as vmm:
            lease.give_to(vmm.pid)
            assert lease.descriptors == ()
            (status,) = vmplug.list_leases(setup=setup)
            assert (status.id, status.state, status.process) == ("job", "held", vmm.pid)
            assert status.program == "sleep"
            assert not lease.wait(0)
            vmm.kill()
            assert lease.wait(60)
    assert rows(setup) == 0


def test_leaving_the_with_block_while_the_process_runs_changes_nothing(
    setup: Setup, image: Path
) -> None:
    with process() as vmm:
        with vmplug.lease([disk(image)], owner="job", setup=setup) as lease:
            lease.give_to(vmm.pid)
        with pytest.raises(InUse, match=rf"held by lease job, process {vmm.pid} \(sleep\)"):
            vmplug.lease([disk(image)], setup=setup)
    with vmplug.lease([disk(image)], owner="job", setup=setup) as again:  # it has ended
        assert again.id == "job"


def test_what_was_given_to_nobody_is_given_back(setup: Setup, image: Path) -> None:
    with vmplug.lease([disk(image)], setup=setup) as lease:
        (number,) = lease.descriptors
    assert rows(setup) == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_what_was_given_to_nobody_is_left_to_a_child_that_has_it(
    setup: Setup, image: Path
) -> None:
    with vmplug.lease([disk(image)], owner="job", setup=setup) as lease:
        child = subprocess.Popen(SLEEP, pass_fds=lease.descriptors)
    (status,) = vmplug.list_leases(setup=setup)
    assert (status.process, status.state) == (child.pid, "held")
    child.kill()
    child.wait()
    (repair,) = vmplug.reconcile_host(setup=setup).repairs
    assert repair.repair.outcome == "forgotten"
    assert rows(setup) == 0


def test_all_devices_are_leased_or_none(setup: Setup, image: Path, tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(DeviceError):
        vmplug.lease([disk(image), disk(tmp_path / "absent.img")], setup=setup)
    assert rows(setup) == 0
    assert set(os.listdir("/proc/self/fd")) == before


WITHOUT_ITS_FIRST_THREAD = """
import ctypes, os, sys, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
os.write(1, b"\\n")
ctypes.CDLL(None).syscall(60, 0)  # exit(2), of this thread alone
"""


def test_a_process_lives_as_long_as_one_of_its_threads(setup: Setup, image: Path) -> None:
    """Without its first thread it is a zombie, whose files only the others show."""
    words = [sys.executable, "-c", WITHOUT_ITS_FIRST_THREAD]
    with vmplug.lease([disk(image)], owner="job", setup=setup) as lease, process() as vmm:
        passed = lease.descriptors
        with subprocess.Popen(words, pass_fds=passed, stdout=subprocess.PIPE) as child:
            stat = Path(f"/proc/{child.pid}/stat")
            try:
                while stat.read_text().rpartition(")")[2].split()[0] != "Z":
                    time.sleep(0.01)
                lease.give_to(vmm.pid)
                vmm.kill()
                vmm.wait()
                assert f"process {child.pid} (" in str(lease.settle())
                assert not lease.wait(0.1)
                (status,) = vmplug.list_leases(setup=setup)
                assert (status.process, status.state) == (child.pid, "held")
            finally:
                child.kill()
        assert lease.wait()
    assert rows(setup) == 0


def test_an_ended_process_is_given_nothing(setup: Setup, image: Path) -> None:
    with (
        vmplug.lease([disk(image)], setup=setup) as lease,
        subprocess.Popen(["true"]) as ended,
    ):
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie
        with pytest.raises(StateError, match="has ended"):
            lease.give_to(ended.pid)
        assert lease.process is None
    assert rows(setup) == 0


def test_a_process_that_has_a_disk_open_inherits_the_lease(setup: Setup, image: Path) -> None:
    with process() as vmm, vmplug.lease([disk(image)], owner="job", setup=setup) as lease:
        with process(*lease.descriptors) as child:
            lease.give_to(vmm.pid)
            vmm.kill()
            vmm.wait()
            assert f"process {child.pid} (sleep)" in str(lease.settle())
            (status,) = vmplug.list_leases(setup=setup)
            assert (status.process, status.state) == (child.pid, "held")
            with pytest.raises(StateError, match=rf"process {child.pid} \(sleep\) has .* open"):
                lease.release()
        assert lease.settle() is None
    assert rows(setup) == 0


def test_a_wait_is_for_whoever_has_the_devices(setup: Setup, image: Path) -> None:
    with vmplug.lease([disk(image)], owner="job", setup=setup) as lease, process() as vmm:
        with process(*lease.descriptors) as child:
            lease.give_to(vmm.pid)
            vmm.kill()
            assert lease.wait(0.1) is False
            assert lease.process == child.pid
            assert rows(setup) != 0
        assert lease.wait() is True
        assert rows(setup) == 0
        assert lease.wait() is True


def test_a_disk_is_in_use_whatever_has_its_name_by_now(setup: Setup, image: Path) -> None:
    with vmplug.lease([disk(image)], owner="job", setup=setup) as lease, process() as vmm:
        with process(*lease.descriptors) as child:
            lease.give_to(vmm.pid)
            image.rename(image.with_name("old.img"))
            disk_image(image, 1, "another")
            vmm.kill()
            vmm.wait()
            assert f"process {child.pid} (sleep)" in str(lease.settle())
        assert lease.settle() is None
    assert rows(setup) == 0


def test_a_process_that_shares_a_disk_by_a_lease_of_its_own_inherits_none(
    setup: Setup, image: Path, tmp_path: Path
) -> None:
    """The other disk of the lease would be its too, for as long as it runs."""
    shared, own = disk(image, share_rw=True), disk(disk_image(tmp_path / "b.img", 1, "b"))
    with (
        vmplug.lease([shared, own], owner="one", setup=setup) as one,
        vmplug.lease([shared], owner="two", setup=setup) as two,
        process(*one.descriptors) as first,
        process(*two.descriptors) as second,
    ):
        one.give_to(first.pid)
        two.give_to(second.pid)
        first.kill()
        first.wait()
        assert one.settle() is None
        assert [lease.id for lease in vmplug.list_leases(setup=setup)] == ["two"]
        vmplug.lease([own], owner="one", setup=setup).release()
        with pytest.raises(StateError, match=rf"process {second.pid} \(sleep\) has .* open"):
            two.release()


def test_a_mapped_file_is_in_use(setup: Setup, image: Path) -> None:
    mapper = (
        "import mmap, os, sys, signal\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "held = mmap.mmap(fd, 4096)\n"
        "os.close(fd)\n"
        "print('mapped', flush=True)\n"
        "signal.pause()\n"
    )
    with vmplug.lease([disk(image)], owner="job", setup=setup) as lease, process() as vmm:
        lease.give_to(vmm.pid)
        words = ["python3", "-c", mapper, str(image)]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as child:
            assert child.stdout
            assert child.stdout.readline() == b"mapped\n"
            vmm.kill()
            vmm.wait()
            assert f"process {child.pid} " in str(lease.settle())
            child.kill()
        assert lease.settle() is None
    assert rows(setup) == 0


def test_the_locks_last_as_long_as_the_process(setup: Setup, image: Path) -> None:
    terms = LeaseTerms(lock=LeaseLock.FULL)
    with vmplug.lease([disk(image)], owner="job", terms=terms, setup=setup) as lease:
        with process(*lease.descriptors) as vmm:
            lease.give_to(vmm.pid)
            assert locks(image) == (True, True)
        assert locks(image) == (False, False)


def test_without_locks_of_its_own_a_lease_shuts_no_vmm_out(setup: Setup, image: Path) -> None:
    with vmplug.lease([disk(image)], setup=setup):
        assert locks(image) == (False, False)


def test_a_file_that_another_program_locked_is_refused(setup: Setup, image: Path) -> None:
    with image.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with pytest.raises(InUse, match="is locked by another program"):
            vmplug.lease([disk(image)], terms=LeaseTerms(lock=LeaseLock.FLOCK), setup=setup)
    assert rows(setup) == 0


def test_readers_share_a_file(setup: Setup, image: Path) -> None:
    terms, asked = LeaseTerms(lock=LeaseLock.FULL), [disk(image, read_only=True)]
    with (
        vmplug.lease(asked, owner="job", terms=terms, setup=setup) as one,
        vmplug.lease(asked, owner="job", terms=terms, setup=setup) as two,
    ):
        assert (one.id, two.id) == ("job", "job.2")
    assert rows(setup) == 0


def locks(path: Path) -> tuple[bool, bool]:
    """Whether a QEMU, and a program that takes flock(2), is kept from writing to it."""
    with path.open("rb") as file:
        is_qemu = is_locked(file.fileno(), read_only=False)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return is_qemu, True
        return is_qemu, False


def test_random_numbers_and_a_character_device_are_passed_open(setup: Setup) -> None:
    null = DeviceInfo(container_path="/dev/null", dev_type=DevType.CHAR, devnum=DevNum(1, 3))
    with vmplug.lease([RngInfo(), null], setup=setup) as lease:
        rng, char = lease.devices
        assert rng.descriptor is not None
        assert len(os.read(rng.descriptor, 8)) == 8
        assert char.descriptor is not None
        assert os.fstat(char.descriptor).st_rdev == os.stat("/dev/null").st_rdev
        assert lease.render("{name}={host_path}") == [
            "rng:rng0=/dev/urandom",
            "/dev/null=/dev/null",
        ]
        assert lease.render("{descriptor}", kind="rng") == [str(rng.descriptor)]


def test_an_ended_lease_cannot_be_given(setup: Setup, image: Path) -> None:
    lease = vmplug.lease([disk(image)], setup=setup)
    lease.release()
    lease.release()
    with process() as vmm, pytest.raises(StateError, match="has ended"):
        lease.give_to(vmm.pid)
    with pytest.raises(vmplug.NotAttached):
        vmplug.end_lease(lease.id, setup=setup)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_of_fork_does_not_end_the_lease_of_its_parent(setup: Setup, image: Path) -> None:
    read_only = disk(image, read_only=True)  # whoever has it open for reading does not count
    with vmplug.lease([read_only], owner="job", setup=setup) as lease:
        pid = os.fork()
        if pid == 0:
            with suppress(BaseException):
                lease.__exit__()
                lease.release()
            with suppress(StateError):
                lease.give_to(os.getpid())
            os._exit(0)
        os.waitpid(pid, 0)
        (status,) = vmplug.list_leases(setup=setup)
        assert (status.state, status.process) == ("made", os.getpid())
    assert rows(setup) == 0


@pytest.mark.root
def test_a_lease_ends_with_the_pid_namespace_of_its_process(
    setup: Setup, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody could say more of it, and its devices would be held until the host boots."""
    own = os.stat("/proc/self/ns/pid").st_ino
    monkeypatch.setattr(state, "_INITIAL_NAMESPACE", own)  # the tests may run in a container
    with vmplug.lease([disk(image)], owner="job", setup=setup) as lease, process() as outside:
        lease.give_to(outside.pid)
        words = ["unshare", "--pid", "--fork", "--kill-child", *SLEEP]
        with process(command=words) as inside, Journal.open(setup.state_dir) as journal:
            children = Path(f"/proc/{inside.pid}/task/{inside.pid}/children")
            while not (child := children.read_text().strip()):
                time.sleep(0.01)
            # Before that it would outlive unshare: it asks for its end only after the fork.
            while Path(f"/proc/{child}/comm").read_text() != "sleep\n":
                time.sleep(0.01)
            number = Path(f"/proc/{child}/ns/pid").stat().st_ino
            (record,) = journal.all_holders()
            away = record.qmp_socket.replace(f":{own}:", f":{number}:")
            journal._db.execute("UPDATE vm SET qmp_socket = ?, pid = 1", [away])
            assert [one.state for one in vmplug.list_leases(setup=setup)] == ["unknown"]
        deadline = time.monotonic() + 60
        while vmplug.list_leases(setup=setup)[0].state == "unknown":
            assert time.monotonic() < deadline
            time.sleep(0.01)
    (repair,) = vmplug.reconcile_host(setup=setup).repairs
    assert repair.repair.outcome == "forgotten"
    assert rows(setup) == 0


def test_a_lease_in_another_pid_namespace_is_left_alone(
    setup: Setup, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "_INITIAL_NAMESPACE", 0)  # from here one does not see them all
    with (
        vmplug.lease([disk(image)], owner="job", setup=setup),
        Journal.open(setup.state_dir) as journal,
    ):
        (record,) = journal.all_holders()
        away = record.qmp_socket.replace(record.qmp_socket.split(":")[1], "1")
        journal._db.execute("UPDATE vm SET qmp_socket = ?, pid = 1 << 22", [away])
        (status,) = vmplug.list_leases(setup=setup)
        assert status.state == "unknown"
        (repair,) = vmplug.reconcile_host(setup=setup).repairs
        assert repair.repair.outcome == "in progress"
        with pytest.raises(StateError, match="another PID namespace"):
            vmplug.end_lease("job", setup=setup)
        journal._db.execute("UPDATE vm SET qmp_socket = ?, pid = NULL", [record.qmp_socket])


def test_a_vm_verb_names_the_lease(setup: Setup, image: Path) -> None:
    with vmplug.lease([disk(image)], owner="job", setup=setup):
        (hold,) = vmplug.list_attachments(setup=setup).attachments
        assert (hold.vm, hold.owner) == ("lease:job", "job")
        (checked,) = vmplug.check_requests([disk(image)], setup=setup)
        (finding,) = [f for f in checked.findings if f.used_by]
        assert finding.used_by
        assert finding.used_by.who.startswith(f"lease job, process {os.getpid()} (")
        assert vmplug.list_vms(setup=setup) == []
        with pytest.raises(StateError, match="lease job is not a VM"):
            vmplug.stop_vm("lease:job", setup=setup)
        with pytest.raises(StateError):
            vmplug.detach_owner("job", setup=setup)


def test_a_file_is_leased_as_persistent_memory(setup: Setup, tmp_path: Path) -> None:
    """The VMM decides whether it becomes some."""
    image = disk_image(tmp_path / "n.img", 2, "n")
    asked = DeviceInfo(
        container_path="/dev/pmem0", dev_type=DevType.BLOCK, host_path=str(image), pmem=True
    )
    with vmplug.lease([asked], setup=setup) as lease:
        (device,) = lease.devices
        assert (device.name, device.size_bytes) == ("/dev/pmem0", 2 << 20)
