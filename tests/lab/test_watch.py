"""Real uevents: devices are pulled, detached, rebound and resized under attachments.

The journal's rows are made by hand: most of what is done here a VM that has the device open would
keep the kernel from finishing. What the VM itself adds, tests/cli/test_watch.py has.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from lab.topology import FREE_PORT, device_behind
from msgspec import structs

from lab import topology
from tests.cli.command import Vmplug
from tests.cli.watching import watching
from tests.lab.blocks import MIB, load, load_with, number, run
from tests.lab.nested import paused_vm
from tests.support.disks import detach_loop, disk_image
from tests.support.journal import attach_row, device_record, vm_record
from tests.support.lab import OuterQemu, namespace_of, wait_until
from vmplug import (
    Attachment,
    DeviceManager,
    DeviceType,
    EventKind,
    HostRoot,
    Qemu,
    VfioInfo,
    Watch,
)
from vmplug.devnum import DevNum
from vmplug.host.check.thing import identify, identify_block
from vmplug.host.events import EventsLost, HostEvents
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.journal.journal import Journal
from vmplug.journal.records import DeviceRecord
from vmplug.manager.watching.health import DeviceHealth, HostSnapshot, HostState

DEADLINE_S = 120.0
"""The lab's clock may run several times as fast as ours."""
QUIET_S = 3.0


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal.open(tmp_path / "state") as store:
        store.add_vm(vm_record())
        yield store


@pytest.fixture
def notices(tmp_path: Path) -> Iterator[Watch]:
    """With a journal of its own connection, as another process has it."""
    events = HostEvents()
    journal = Journal.open(tmp_path / "state")
    with Watch(journal, events, host=HostRoot(), timeout_s=DEADLINE_S) as notices:
        yield notices


def begin(notices: Watch) -> None:
    """All that is attached has been looked at once, and nothing was wrong."""
    notices._look([])
    assert not notices._waiting


def bind(bdf: str, driver: str) -> None:
    """By hand, as no user of vmplug would."""
    base = Path(f"/sys/bus/pci/devices/{bdf}")
    (base / "driver_override").write_text(driver or "\n")
    (base / "driver/unbind").write_text(bdf)
    Path("/sys/bus/pci/drivers_probe").write_text(bdf)


def look(journal: Journal, attachment: Attachment) -> DeviceHealth:
    """What `list` looks at."""
    (record,) = (r for r in journal.devices("sb1") if r.id == attachment.device_id)
    seen = HostSnapshot(HostRoot(), journal.vms()).of(record)
    assert seen
    return seen


@pytest.fixture
def vmplug(tmp_path: Path) -> Vmplug:
    return Vmplug(tmp_path / "state")


@pytest.fixture
def scsi_disk() -> Iterator[Path]:
    load("sd_mod")
    load_with("scsi_debug", dev_size_mb=16)
    pattern = "adapter*/host*/target*/*/block/sd*"
    adapters = Path("/sys/bus/pseudo/drivers/scsi_debug")
    wait_until(lambda: any(adapters.glob(pattern)), "disk of scsi_debug")
    (disk,) = adapters.glob(pattern)
    yield Path("/dev") / disk.name
    run("modprobe", "--remove", "scsi_debug")


@contextmanager
def loop_on(image: Path) -> Iterator[Path]:
    """A loop device, which a test may detach itself."""
    load("loop")
    node = Path(run("losetup", "--find", "--show", image).strip())
    try:
        yield node
    finally:
        detach_loop(node)


def disk_record(node: Path) -> DeviceRecord:
    devnum, host = number(node), HostRoot()
    thing = identify_block(DevNum.parse(devnum), host.real_path(f"/sys/dev/block/{devnum}"), host)
    return structs.replace(device_record(f"block:{devnum}", str(node)), thing=thing)


def function_record(bdf: str, node: str) -> DeviceRecord:
    record = device_record(f"vfio:{bdf}", node, DeviceType.VFIO, functions=(bdf,))
    thing = identify(find_vfio_device(bdf, HostRoot()), HostRoot())
    return structs.replace(record, thing=thing)


def block(node: Path, journal: Journal) -> Attachment:
    return attach_row(journal, disk_record(node))


def test_a_disk_is_pulled(scsi_disk: Path, journal: Journal, notices: Watch) -> None:
    attachment = block(scsi_disk, journal)
    begin(notices)
    assert look(journal, attachment).state is HostState.PRESENT
    Path(f"/sys/block/{scsi_disk.name}/device/delete").write_text("1")
    told = next(notices)
    assert (told.what, told.vm, told.attachment) == (EventKind.GONE, "sb1", attachment)
    assert str(scsi_disk) in told.message
    assert attachment.id in told.hint
    assert look(journal, attachment).state is HostState.GONE


def test_an_nvme_is_pulled_with_its_namespace(journal: Journal, notices: Watch) -> None:
    load("nvme")
    properties = {"serial": "PULLED", "drive": "pulled-disk"}
    nvme = replace(device_behind(FREE_PORT, "nvme", qdev_id="pulled"), properties=properties)
    node = {"driver": "null-co", "node-name": "pulled-disk", "size": 8 * MIB}
    with OuterQemu.connect() as outer:
        outer.execute("blockdev-add", **node)
        outer.add(nvme)
        namespaces = Path(f"/sys/bus/pci/devices/{nvme.bdf}/nvme")
        wait_until(lambda: any(namespaces.glob("nvme*/nvme*n1")), "namespace")
        path = namespace_of(nvme.bdf)
        attachment = block(path, journal)
        begin(notices)
        outer.remove(nvme)
    told = next(notices)
    assert (told.what, told.attachment) == (EventKind.GONE, attachment)
    assert told.message.startswith(str(path))


def test_a_function_goes_to_another_driver_and_comes_back(
    journal: Journal, notices: Watch
) -> None:
    load("vfio-pci", "e1000e")
    bdf = topology.NIC
    group = Path(f"/sys/bus/pci/devices/{bdf}/iommu_group").resolve().name
    bind(bdf, "vfio-pci")
    try:
        attachment = attach_row(journal, function_record(bdf, f"/dev/vfio/{group}"))
        begin(notices)
        assert look(journal, attachment) == DeviceHealth(HostState.PRESENT)
        bind(bdf, "e1000e")
        told = next(notices)
        assert told.what is EventKind.OTHER_DRIVER
        assert bdf in told.message
        assert look(journal, attachment) == DeviceHealth(
            HostState.OTHER_DRIVER, f"{bdf} is bound to the driver e1000e, not to VFIO's"
        )
        bind(bdf, "vfio-pci")
        assert next(notices).what is EventKind.BACK
        # Unbound and bound again between two looks: only the events tell.
        bind(bdf, "vfio-pci")
        assert next(notices).what is EventKind.REPLACED
    finally:
        bind(bdf, "")


def test_a_function_is_pulled(journal: Journal, notices: Watch) -> None:
    device = device_behind(FREE_PORT, "edu", qdev_id="pulled-edu")
    with OuterQemu.connect() as outer:
        outer.add(device)
        attach_row(journal, function_record(device.bdf, "/dev/vfio/99"))
        first = next(notices)
        assert first.what is EventKind.OTHER_DRIVER
        assert "no driver" in first.message
        outer.remove(device)
    assert next(notices).what is EventKind.GONE


def test_a_loop_device_grows_loses_its_file_and_is_detached(
    journal: Journal, notices: Watch, tmp_path: Path
) -> None:
    image = disk_image(tmp_path / "disk.img", 8, "loop")
    with loop_on(image) as node:
        attachment = block(node, journal)
        begin(notices)
        os.truncate(image, 16 * MIB)
        run("losetup", "--set-capacity", node)
        told = next(notices)
        assert told.what is EventKind.RESIZED
        assert (told.old_size_bytes, told.size_bytes) == (8 * MIB, 16 * MIB)
        assert f"vmplug resize {attachment.id}" in told.hint
        image.unlink()
        assert next(notices).what is EventKind.DELETED
        assert look(journal, attachment).state is HostState.DELETED
        run("losetup", "--detach", node)
        assert next(notices).what is EventKind.GONE
        assert look(journal, attachment).state is HostState.GONE


def test_what_is_detached_by_vmplug_itself_is_no_news(
    journal: Journal, notices: Watch, tmp_path: Path
) -> None:
    with loop_on(disk_image(tmp_path / "disk.img", 8, "loop")) as node:
        attach_row(journal, record := disk_record(node))
        begin(notices)
        journal.forget_devices([record.id])
        run("losetup", "--detach", node)
        notices._look(notices._events.wait(QUIET_S))
        notices._look([])
        assert not notices._waiting


def test_events_that_the_kernel_could_not_keep_are_told(tmp_path: Path, journal: Journal) -> None:
    with loop_on(disk_image(tmp_path / "disk.img", 8, "loop")) as node:
        uevent = Path(f"/sys/block/{node.name}/uevent")
        events = HostEvents(buffer_bytes=4096)
        other = Journal.open(tmp_path / "state")
        with Watch(other, events, host=HostRoot(), timeout_s=DEADLINE_S) as notices:
            block(node, journal)
            begin(notices)
            for _ in range(500):
                uevent.write_text("change")
            run("losetup", "--detach", node)
            assert next(notices).what is EventKind.EVENTS_LOST
            assert next(notices).what is EventKind.GONE
            # It is told once, and the next event is received again.
            while any(isinstance(event, EventsLost) for event in events.wait(0)):
                pass
            uevent.write_text("change")
            (event,) = events.wait(DEADLINE_S)
            assert not isinstance(event, EventsLost)


def test_what_vmplug_itself_binds_and_gives_back_is_no_news(
    vmplug: Vmplug, tmp_path: Path
) -> None:
    """A real VM is given a function, and dies; only that is told."""
    load("vfio-pci", "nvme")
    driver = Path(f"/sys/bus/pci/devices/{topology.NVME}/driver")
    request = VfioInfo(label="nvme", device=topology.NVME)
    with watching(vmplug) as watch, paused_vm(tmp_path) as vm:
        with DeviceManager.open(
            vm="sb1",
            host=HostRoot(),
            hypervisor=Qemu.connect(str(vm.qmp_path)),
            state_dir=vmplug.state_dir,
        ) as devices:
            devices.attach(request, managed=True)
        watch.catch_up(vmplug)
        assert driver.resolve().name == "vfio-pci"
        vm.kill()
        assert watch.events(1) == [("vm-ended", None)]
        vmplug("reconcile").answer()
        assert driver.resolve().name == "nvme"
        watch.catch_up(vmplug)


def test_the_verb_tells_at_once(scsi_disk: Path, journal: Journal, vmplug: Vmplug) -> None:
    attachment = block(scsi_disk, journal)
    with watching(vmplug) as watch:
        Path(f"/sys/block/{scsi_disk.name}/device/delete").write_text("1")
        assert watch.events(1) == [("gone", attachment.id)]
    (listed,) = vmplug("list", "--json").json()["attachments"]
    assert listed["host"]["state"] == "gone"
