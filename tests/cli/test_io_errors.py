"""A guest that fills the file system below its disk: who says so, and how the VM runs again."""

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import Vmplug
from tests.cli.started import StartedVm, booted, started
from vmplug import Setup, StateError, resume_vm, watch
from vmplug.manager.watching.notice import EventKind
from vmplug.vms import io_errors

pytestmark = [pytest.mark.root, pytest.mark.qemu]

MIB, PATIENCE_S = 1 << 20, 600.0
SCSI = "block-driver=virtio-scsi"
VIRTIO = "block-driver=virtio-blk"


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    directory = tmp_path / "full"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", directory], check=True)
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True)


def make_room(directory: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", directory], check=True)


def sparse(directory: Path, name: str = "a.img") -> Path:
    image = directory / name
    image.touch()
    os.truncate(image, 16 * MIB)
    return image


@contextmanager
def writing(vm: StartedVm) -> Iterator[dict[str, str]]:
    """A guest that writes 8 MiB to its disk; what it said of that, at the end."""
    said = dict[str, str]()
    with booted(vm) as console:
        console.wait_for_disks(1)
        name = console.disks()[0].name
        line = f"dd if=/dev/zero of=/dev/{name} bs=1M count=8 oflag=direct 2>/dev/null; echo $?"

        def write() -> None:
            said["rc"] = console.run(line, PATIENCE_S).strip()  # the VM stands still meanwhile

        thread = threading.Thread(target=write)
        thread.start()
        yield said
        thread.join()


def listed(vmplug: Vmplug) -> dict[str, Any]:
    (vm,) = vmplug("vm", "list", "--json").json()["vms"]
    return dict(vm)


@pytest.mark.parametrize(("driver", "is_cold"), [(VIRTIO, False), (SCSI, True)])
def test_a_full_disk_is_named_and_its_vm_runs_again(
    vmplug: Vmplug,
    full: Path,
    monkeypatch: pytest.MonkeyPatch,
    driver: str,
    *,
    is_cold: bool,
) -> None:
    image = sparse(full)
    disk = ("--device", f"file:{image}", "-o", driver)
    cold = (*disk, "--owner", "ctr1") if is_cold else ()
    setup = Setup(state_dir=vmplug.state_dir)
    with ExitStack() as stack:
        vm = stack.enter_context(started(vmplug, "sb1", *cold, flavour="cloud"))
        if not is_cold:
            vm.attached(*disk)
        events = stack.enter_context(watch(timeout_s=PATIENCE_S, setup=setup))
        said = stack.enter_context(writing(vm))
        stopped = next(events)
        assert stopped.what is EventKind.VM_STOPPED
        assert f"no space left for writes to {image}" in stopped.message
        assert "vmplug vm resume sb1" in stopped.hint
        failed = [{"file": str(image), "error": "nospace"}]
        assert (listed(vmplug)["state"], listed(vmplug)["failed_disks"]) == ("io-error", failed)
        assert vmplug("list", "--json").json()["stopped_vms"] == {"sb1": failed}
        for verb in (("list",), ("vm", "list")):
            assert f"VM sb1: no space left for writes to {image}" in vmplug(*verb).answer()
        with monkeypatch.context() as patient:
            patient.setattr(io_errors, "_WATCHED_S", PATIENCE_S)
            refused = vmplug("vm", "resume", "sb1", "--json")
        assert refused.status == 6
        assert (
            f"stopped it again: no space left for writes to {image}" in refused.error()["message"]
        )
        assert listed(vmplug)["state"] == "io-error"
        make_room(full)
        assert vmplug("vm", "resume", "sb1").answer() == f"VM sb1 runs again, with {image}\n"
        assert (listed(vmplug)["state"], listed(vmplug)["failed_disks"]) == ("running", [])
        assert vmplug("list", "--json").json()["stopped_vms"] == {}
        assert next(events).what is EventKind.VM_RESUMED
    assert said == {"rc": "0"}


@pytest.mark.parametrize(("driver", "is_cold"), [(VIRTIO, True), (SCSI, False)])
def test_a_disk_that_reports_errors_does_not_stop_its_vm(
    vmplug: Vmplug, full: Path, driver: str, *, is_cold: bool
) -> None:
    options = ("-o", driver, "-o", "werror=report", "-o", "rerror=stop")
    disk = ("--device", f"file:{sparse(full)}", *options)
    cold = (*disk, "--owner", "ctr1") if is_cold else ()
    with started(vmplug, "sb1", *cold, flavour="cloud") as vm:
        attached = vm.attachments["/dev/a.img"] if is_cold else vm.attached(*disk)
        names = vm.vmplugs_devices()
        assert len(names) == 1
        assert vm.properties_of(names.pop(), "werror", "rerror") == ("report", "stop")
        with writing(vm) as said:
            pass
        assert said == {"rc": "1"}
        assert listed(vmplug)["state"] == "running"
        assert attached["state"] == "attached"


def test_only_a_vm_that_an_error_has_stopped_is_resumed(vmplug: Vmplug) -> None:
    setup = Setup(state_dir=vmplug.state_dir)
    with started(vmplug, "sb1") as vm:  # paused by its -S
        with pytest.raises(StateError, match="no error on a disk has stopped VM sb1") as caught:
            resume_vm("sb1", setup=setup)
        assert caught.value.state in {"paused", "prelaunch"}
        vm.oracle.execute("cont")
        with pytest.raises(StateError, match="it is running"):
            resume_vm("sb1", setup=setup)
        assert listed(vmplug)["state"] == "running"
    with pytest.raises(StateError, match="sb2"):
        resume_vm("sb2", setup=setup)
