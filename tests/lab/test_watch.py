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

from lab import topology
from tests.cli.command import Vmplug
from tests.lab.blocks import MIB, load, load_with, number, run
from tests.support.disks import disk_image
from tests.support.journal import attach_row, device_record, vm_record
from tests.support.lab import OuterQemu, namespace_of, wait_until
from vmplug import DeviceType, HostRoot, Watch, What
from vmplug.host.events import EventsLost, HostEvents
from vmplug.manager.store import Store

DEADLINE_S = 120.0
"""The lab's clock may run several times as fast as ours."""
QUIET_S = 3.0


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "state") as store:
        store.add_vm(vm_record())
        yield store


@pytest.fixture
def watching(tmp_path: Path) -> Iterator[Watch]:
    """With a journal of its own connection, as another process has it."""
    events = HostEvents()
    journal = Store.open(tmp_path / "state")
    with Watch(journal, events, host=HostRoot(), timeout_s=DEADLINE_S) as notices:
        yield notices


def begin(watching: Watch) -> None:
    """All that is attached has been looked at once, and nothing was wrong."""
    watching._look([])
    assert not watching._waiting


def mark_of(vmplug: Vmplug, attachment: str) -> str:
    listed = vmplug("list", "--json").json()["attachments"]
    (hold,) = (hold for hold in listed if hold["id"] == attachment)
    return str(hold["host"]["state"])


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
        if Path(f"/sys/block/{node.name}/loop").exists():
            run("losetup", "--detach", node)


def block(node: Path, journal: Store) -> str:
    return attach_row(journal, device_record(f"block:{number(node)}", str(node))).id


def test_a_disk_is_pulled(
    scsi_disk: Path, journal: Store, watching: Watch, vmplug: Vmplug
) -> None:
    attachment = block(scsi_disk, journal)
    other = block(Path("/dev/vda"), journal) if Path("/dev/vda").exists() else None
    begin(watching)
    assert mark_of(vmplug, attachment) == "present"
    Path(f"/sys/block/{scsi_disk.name}/device/delete").write_text("1")
    told = next(watching)
    assert (told.what, told.vm) == (What.GONE, "sb1")
    assert told.attachment
    assert (told.attachment.id, told.attachment.owner) == (attachment, "c1")
    assert str(scsi_disk) in told.message
    assert attachment in told.hint
    assert mark_of(vmplug, attachment) == "gone"
    assert other is None or mark_of(vmplug, other) == "present"


def test_an_nvme_is_pulled_with_its_namespace(journal: Store, watching: Watch) -> None:
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
        begin(watching)
        outer.remove(nvme)
    told = next(watching)
    assert told.what is What.GONE
    assert told.attachment
    assert told.attachment.id == attachment
    assert told.message.startswith(str(path))


def test_a_function_goes_to_another_driver_and_comes_back(
    journal: Store, watching: Watch, vmplug: Vmplug
) -> None:
    load("vfio-pci", "e1000e")
    bdf = topology.NIC
    base = Path(f"/sys/bus/pci/devices/{bdf}")
    given = vmplug("bind", bdf).answer()
    assert bdf in given
    group = (base / "iommu_group").resolve().name
    record = device_record(f"vfio:{bdf}", f"/dev/vfio/{group}", DeviceType.VFIO, functions=(bdf,))
    attachment = attach_row(journal, record).id
    begin(watching)
    assert mark_of(vmplug, attachment) == "present"

    (base / "driver_override").write_text("e1000e")
    (base / "driver/unbind").write_text(bdf)
    Path("/sys/bus/pci/drivers_probe").write_text(bdf)
    told = next(watching)
    assert told.what is What.OTHER_DRIVER
    assert bdf in told.message
    while "e1000e" not in mark_detail(vmplug, attachment):
        next(watching)
    assert mark_of(vmplug, attachment) == "other-driver"

    (base / "driver_override").write_text("vfio-pci")
    (base / "driver/unbind").write_text(bdf)
    Path("/sys/bus/pci/drivers_probe").write_text(bdf)
    assert next(watching).what is What.BACK
    # Unbound and bound again between two looks: only the event tells.
    (base / "driver/unbind").write_text(bdf)
    Path("/sys/bus/pci/drivers_probe").write_text(bdf)
    assert next(watching).what is What.REPLACED
    (base / "driver_override").write_text("\n")
    (base / "driver/unbind").write_text(bdf)
    Path("/sys/bus/pci/drivers_probe").write_text(bdf)


def mark_detail(vmplug: Vmplug, attachment: str) -> str:
    listed = vmplug("list", "--json").json()["attachments"]
    (hold,) = (hold for hold in listed if hold["id"] == attachment)
    return str(hold["host"]["detail"])


def test_a_function_is_pulled(journal: Store, watching: Watch) -> None:
    device = device_behind(FREE_PORT, "edu", qdev_id="pulled-edu")
    with OuterQemu.connect() as outer:
        outer.add(device)
        record = device_record(
            f"vfio:{device.bdf}", "/dev/vfio/99", DeviceType.VFIO, functions=(device.bdf,)
        )
        attach_row(journal, record)
        first = next(watching)
        assert first.what is What.OTHER_DRIVER
        assert "no driver" in first.message
        outer.remove(device)
    assert next(watching).what is What.GONE


def test_a_loop_device_grows_loses_its_file_and_is_detached(
    journal: Store, watching: Watch, vmplug: Vmplug, tmp_path: Path
) -> None:
    image = disk_image(tmp_path / "disk.img", 8, "loop")
    with loop_on(image) as node:
        attachment = block(node, journal)
        begin(watching)
        os.truncate(image, 16 * MIB)
        run("losetup", "--set-capacity", node)
        told = next(watching)
        assert told.what is What.RESIZED
        assert (told.old_size_bytes, told.size_bytes) == (8 * MIB, 16 * MIB)
        assert f"vmplug resize {attachment}" in told.hint
        image.unlink()
        assert next(watching).what is What.DELETED
        assert mark_of(vmplug, attachment) == "deleted"
        run("losetup", "--detach", node)
        assert next(watching).what is What.GONE
        assert mark_of(vmplug, attachment) == "gone"


def test_what_is_detached_by_vmplug_itself_is_no_news(
    journal: Store, watching: Watch, tmp_path: Path
) -> None:
    with loop_on(disk_image(tmp_path / "disk.img", 8, "loop")) as node:
        attach_row(journal, record := device_record(f"block:{number(node)}", str(node)))
        begin(watching)
        journal.forget_devices([record.id])
        run("losetup", "--detach", node)
        watching._look(watching._events.wait(QUIET_S))
        watching._look([])
        assert not watching._waiting


def test_events_that_the_kernel_could_not_keep_are_told(tmp_path: Path, journal: Store) -> None:
    with loop_on(disk_image(tmp_path / "disk.img", 8, "loop")) as node:
        uevent = Path(f"/sys/block/{node.name}/uevent")
        events = HostEvents(buffer_bytes=4096)
        other = Store.open(tmp_path / "state")
        with Watch(other, events, host=HostRoot(), timeout_s=DEADLINE_S) as watching:
            block(node, journal)
            begin(watching)
            for _ in range(500):
                uevent.write_text("change")
            run("losetup", "--detach", node)
            assert next(watching).what is What.EVENTS_LOST
            assert next(watching).what is What.GONE
            # It is told once, and the next event is received again.
            while any(isinstance(event, EventsLost) for event in events.wait(0)):
                pass
            uevent.write_text("change")
            (event,) = events.wait(DEADLINE_S)
            assert not isinstance(event, EventsLost)


def test_the_verb_tells_at_once_in_lines_of_json(
    scsi_disk: Path, journal: Store, vmplug: Vmplug
) -> None:
    attachment = block(scsi_disk, journal)
    process = vmplug.begin("watch", "--json", "--timeout", str(DEADLINE_S))
    try:
        assert process.stdout
        attach_row(journal, device_record("file:/no/such", "/no/such"))
        assert b'"deleted"' in process.stdout.readline()  # it watches
        Path(f"/sys/block/{scsi_disk.name}/device/delete").write_text("1")
        line = process.stdout.readline()
        assert b'"event": "gone"' in line
        assert attachment.encode() in line
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)
