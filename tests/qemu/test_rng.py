"""Random numbers for the guest, and character devices that are only counted."""

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.contract.world import Recorder
from tests.qemu.conftest import OpenLab, leave_missing
from vmplug.devnum import DevNum
from vmplug.errors import InUse, NoSuchDevice, SpecError, StateError
from vmplug.host.file_id import file_id, has_open
from vmplug.host.finding import Code
from vmplug.host.kind import DeviceType
from vmplug.hypervisor.qmp.monitor import Monitor
from vmplug.journal.state import State
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import RngInfo
from vmplug.oci.spec import parse_config

pytestmark = pytest.mark.qemu

AVAILABLE = "/sys/class/misc/hw_random/rng_available"
NULL, ZERO = DevNum(1, 3), DevNum(1, 5)


def read_numbers(lab: OpenLab) -> str:
    lab.guest_vm.console.wait_until(f"grep virtio_rng {AVAILABLE}")
    return lab.guest("head -c 32 /dev/hwrng | base64")


def wait_gone(lab: OpenLab) -> None:
    lab.guest_vm.console.wait_until(f"! grep virtio_rng {AVAILABLE}")


def reads(lab: OpenLab, source: str) -> bool:
    """Whether QEMU has the device open; it gets a descriptor, and no name."""
    return has_open(lab.guest_vm.pid, file_id(os.stat(source))) is True


def test_a_guest_gets_random_numbers(life: OpenLab) -> None:
    before = life.picture()
    attachment = life.devices.attach(RngInfo())
    assert (attachment.name, attachment.container_path) == ("rng:rng0", None)
    assert attachment.kind is DeviceType.VIRTIO_RNG
    assert attachment.host_path == "/dev/urandom"
    assert reads(life, "/dev/urandom")

    assert read_numbers(life) != read_numbers(life)
    assert attachment.guest_address
    path = life.pci_path_of_driver("virtio_rng")
    assert path == str(attachment.guest_address.pci_path)
    assert path == life.pci_path_in_qemu(f"vmplug-{attachment.device_id}")
    assert life.property_of(attachment, "max-bytes") > 1 << 40  # no limit
    assert life.devices.reconcile() == []

    life.devices.detach(attachment.id)
    wait_gone(life)
    assert life.picture() == before


def test_a_limit_is_set_in_qemu(open_lab: OpenLab) -> None:
    for options, period in (
        ({"max-bytes": "64K", "period": "250"}, 250),
        ({"max-bytes": "64K"}, 1000),
    ):
        attachment = open_lab.devices.attach(RngInfo(driver_options=options))
        assert open_lab.property_of(attachment, "max-bytes") == 64 << 10
        assert open_lab.property_of(attachment, "period") == period
        assert read_numbers(open_lab)
        open_lab.devices.detach(attachment.id)
    wait_gone(open_lab)


def test_the_last_of_two_owners_takes_it_away(life: OpenLab) -> None:
    before = life.picture()
    first = life.devices.attach(RngInfo(), owner="c1")
    second = life.devices.attach(RngInfo(label="other"), owner="c2")
    assert first.device_id == second.device_id
    life.devices.detach_owner("c1")
    assert read_numbers(life)
    life.devices.detach_owner("c2")
    wait_gone(life)
    assert life.picture() == before


def test_what_a_bundle_says_is_done(life: OpenLab) -> None:
    config = b"""{"ociVersion": "1", "annotations": {
        "org.vmplug.rng.hw": "{\\"source\\": \\"/dev/random\\", \\"max-bytes\\": 512}"
    }}"""
    before = life.picture()
    (info,) = parse_config(config, name="c1").annotated
    assert not reads(life, "/dev/random")
    attachment = life.devices.attach(info)
    assert attachment.name == "rng:hw"
    assert reads(life, "/dev/random")
    assert life.property_of(attachment, "max-bytes") == 512
    life.devices.detach(attachment.id)
    assert life.picture() == before


@pytest.mark.root
def test_the_name_of_a_source_is_only_a_name(open_lab: OpenLab, tmp_path: Path) -> None:
    node = tmp_path / "a,filename='zero' \"Grüße\" 日本\tx=%41"
    os.mknod(node, 0o600 | stat.S_IFCHR, os.makedev(1, 9))
    attachment = open_lab.devices.attach(RngInfo(source=str(node)))
    assert reads(open_lab, str(node))
    assert read_numbers(open_lab)
    open_lab.devices.detach(attachment.id)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (Path.mkdir, "directory"),
        (Path.touch, "regular file"),
        (os.mkfifo, "FIFO"),
        (leave_missing, "nothing"),
    ],
    ids=["a directory", "a file", "a FIFO", "missing"],
)
def test_what_gives_no_random_numbers_is_refused(
    open_lab: OpenLab, tmp_path: Path, make: Callable[[Path], None], found: str
) -> None:
    path = tmp_path / "source"
    make(path)
    before = open_lab.picture()
    with pytest.raises(NoSuchDevice, match=found) as caught:
        open_lab.devices.attach(RngInfo(source=str(path)))
    assert str(path) in caught.value.message
    assert caught.value.hint
    assert open_lab.picture() == before


@pytest.mark.root
@pytest.mark.parametrize("number", [(1, 11), (1, 3), (10, 130)], ids=["kmsg", "null", "watchdog"])
def test_a_device_that_gives_no_random_numbers_is_refused(
    open_lab: OpenLab, tmp_path: Path, number: tuple[int, int]
) -> None:
    path = tmp_path / "urandom"
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(*number))
    before, asked = open_lab.picture(), RngInfo(source=str(path))
    (checked,) = open_lab.devices.check_places([asked], allow=Code)
    with pytest.raises(InUse) as caught:
        open_lab.devices.attach(asked, allow=Code)
    assert caught.value.codes == (Code.NOT_RANDOM,)
    assert [finding.code for finding in checked.findings] == [Code.NOT_RANDOM]
    assert open_lab.picture() == before


@pytest.mark.parametrize(
    "options",
    [{"period": "1000"}, {"max-bytes": "0"}, {"max-bytes": "-1"}, {"rate": "1"}],
    ids=str,
)
def test_options_that_mean_nothing_are_refused(
    open_lab: OpenLab, options: Mapping[str, str]
) -> None:
    before = open_lab.picture()
    with pytest.raises(SpecError, match=next(iter(options))):
        open_lab.devices.attach(RngInfo(driver_options=options))
    assert open_lab.picture() == before


def test_another_limit_is_not_given_to_the_second(life: OpenLab) -> None:
    attachment = life.devices.attach(RngInfo(driver_options={"max-bytes": "1K"}))
    before = life.picture()
    with pytest.raises(StateError, match="other options"):
        life.devices.attach(RngInfo(driver_options={"max-bytes": "2K"}))
    assert life.picture() == before
    life.devices.detach(attachment.id)


# character devices


def character(devnum: DevNum, options: Mapping[str, str] | None = None) -> DeviceInfo:
    return DeviceInfo(
        container_path=f"/dev/c{devnum.minor}",
        dev_type=DevType.CHAR,
        devnum=devnum,
        driver_options=options or {},
    )


def test_a_character_device_is_counted_and_never_sent(life: OpenLab) -> None:
    before = life.picture()
    recorders: list[Recorder] = []

    def record(monitor: Monitor) -> Monitor:
        recorders.append(Recorder(monitor))
        return recorders[-1]

    life.talk_through(record)
    first, other = life.devices.attach_all([character(NULL), character(ZERO)], owner="c1")
    second = life.devices.attach(character(NULL), owner="c2")
    again = life.devices.attach(character(NULL), owner="c2")
    assert (first.kind, first.host_path) == (DeviceType.GENERIC, "/dev/null")
    assert (other.kind, other.host_path) == (DeviceType.GENERIC, "/dev/zero")
    assert first.guest_address is None
    assert first.device_id == second.device_id != other.device_id
    assert (second.id, again.count) == (again.id, 2)
    assert {a.state for a in life.holds()} == {State.ATTACHED}
    assert life.side.parts() == before.parts
    assert life.devices.reconcile() == []

    life.devices.detach_owner("c1")
    assert [a.owner for a in life.holds()] == ["c2"]
    life.devices.detach(again.id)
    life.devices.detach(again.id)
    life.talk_plainly()
    sent = {command.execute for recorder in recorders for command in recorder.sent}
    asked = {"qom-list", "query-blockstats", "query-chardev", "query-fdsets"}  # by reconcile
    assert sent <= asked
    assert life.picture() == before


def test_a_character_device_goes_with_a_disk(life: OpenLab) -> None:
    before = life.picture()
    disk, counted = life.devices.attach_all([life.disk(), character(NULL)])
    life.seen(disk)
    assert counted.guest_address is None
    life.devices.detach_owner("open")
    life.guest_vm.console.wait_for_disks(0)
    assert life.picture() == before


def test_a_fifo_is_counted(life: OpenLab, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    before = life.picture()
    attachment = life.devices.attach(DeviceInfo(container_path=str(path), dev_type=DevType.FIFO))
    assert (attachment.kind, attachment.guest_address) == (DeviceType.GENERIC, None)
    assert life.side.parts() == before.parts
    life.devices.detach(attachment.id)
    assert life.picture() == before


def test_a_character_device_has_no_options(open_lab: OpenLab) -> None:
    before = open_lab.picture()
    with pytest.raises(SpecError, match="cache"):
        open_lab.devices.attach(character(NULL, {"cache": "none"}))
    assert open_lab.picture() == before


def test_a_character_device_that_is_missing_is_told(open_lab: OpenLab) -> None:
    before = open_lab.picture()
    with pytest.raises(NoSuchDevice, match="4095:77"):
        open_lab.devices.attach(character(DevNum(4095, 77)))
    assert open_lab.picture() == before
