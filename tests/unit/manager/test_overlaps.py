"""Devices of one request that are parts of each other: said as that, in whatever order."""

import sys
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest

from tests.support.pci_tree import PciTree
from tests.support.tree import HostTree
from vmplug.devnum import DevNum
from vmplug.host.finding import Finding
from vmplug.manager.examine import examine
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import Request, VfioInfo

NVME, GROUP = "0000:01:00.0", 11


@pytest.fixture
def tree(tmp_path: Path) -> HostTree:
    made = HostTree(tmp_path).file("/srv/a.img", b"\0" * 4096)
    made.block_device("8:0", "sda", partitions={"8:1": "sda1", "8:2": "sda2"})
    made.block_device("7:0", "loop0", loop={"backing_file": "/srv/a.img\n"})
    made.block_device("253:0", "dm-0").hold("sda2", "dm-0")
    return made.link("/sys/devices/virtual/block/dm-0/slaves/sda2", "../../sda/sda2")


def disk(number: str, at: str, *, ro: bool = False, share: bool = False) -> DeviceInfo:
    return DeviceInfo(
        container_path=at,
        dev_type=DevType.BLOCK,
        devnum=DevNum.parse(number),
        read_only=ro,
        driver_options={"share-rw": "on"} if share else {},
    )


def image(at: str = "/dev/i", path: str = "/srv/a.img", *, ro: bool = False) -> DeviceInfo:
    return DeviceInfo(container_path=at, dev_type=DevType.BLOCK, host_path=path, read_only=ro)


def overlaps(tree: HostTree, *requests: Request, managed: bool = False) -> list[Finding]:
    """What the last of them is refused for because of the others."""
    *_, last = examine(requests, tree.root, managed=managed)
    return [finding for finding in last.findings if "this request" in finding.message]


WHOLE, PART, OTHER_PART = disk("8:0", "/dev/a"), disk("8:1", "/dev/b"), disk("8:2", "/dev/c")
LOOP, MAPPED = disk("7:0", "/dev/l"), disk("253:0", "/dev/m")


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (WHOLE, PART, "/dev/sda1 is a partition of /dev/sda, which"),
        (PART, WHOLE, "/dev/sda has the partition /dev/sda1, which"),
        (image(), LOOP, "/dev/loop0 is a loop device over /srv/a.img, which"),
        (LOOP, image(), "/srv/a.img is behind /dev/loop0, which"),
        (OTHER_PART, MAPPED, "/dev/dm-0 is built on /dev/sda2, which"),
        (MAPPED, OTHER_PART, "/dev/sda2 is part of /dev/dm-0, which"),
        (WHOLE, MAPPED, "/dev/dm-0 is built on /dev/sda, which"),
        (MAPPED, WHOLE, "/dev/sda is part of /dev/dm-0, which"),
    ],
)
def test_a_part_and_its_whole_are_said_to_be_that(
    tree: HostTree, first: DeviceInfo, second: DeviceInfo, says: str
) -> None:
    (finding,) = overlaps(tree, first, second)
    assert finding.message.startswith(says)
    assert finding.message.endswith(f"this request asks for too as {first.name}")
    assert finding.hint == "request only one of them, or both read-only"
    assert not overlaps(tree, first)
    assert not overlaps(tree, second)


@pytest.mark.parametrize("pair", list(permutations([PART, OTHER_PART])))
def test_two_partitions_of_one_disk_are_two_devices(
    tree: HostTree, pair: tuple[DeviceInfo, DeviceInfo]
) -> None:
    assert not overlaps(tree, *pair)


@pytest.mark.parametrize("pair", list(permutations([PART, MAPPED])))
def test_what_is_built_on_one_partition_leaves_the_others(
    tree: HostTree, pair: tuple[DeviceInfo, DeviceInfo]
) -> None:
    assert not overlaps(tree, *pair)


def test_one_device_under_two_paths_is_one_device(tree: HostTree) -> None:
    assert not overlaps(tree, WHOLE, disk("8:0", "/dev/again"))


def test_another_name_of_a_file_is_no_other_file(tree: HostTree) -> None:
    (tree.path / "srv/b.img").hardlink_to(tree.path / "srv/a.img")
    tree.file("/srv/c.img", bytes(4096))
    names = ("/srv/a.img", "/srv/b.img")
    for one, other in permutations(names):
        (found,) = overlaps(tree, image("/dev/x", one), image("/dev/y", other))
        assert found.message.startswith(f"{other} is another name of {one}, which this request")
        readers = (image("/dev/x", one, ro=True), image("/dev/y", other, ro=True))
        assert overlaps(tree, *readers) == []
        assert overlaps(tree, image("/dev/x", one), image("/dev/y", "/srv/c.img")) == []


def test_a_loop_device_is_over_every_name_of_its_file(tree: HostTree) -> None:
    (tree.path / "srv/b.img").hardlink_to(tree.path / "srv/a.img")
    tree.block_device("7:1", "loop1", loop={"backing_file": "/dev/loop0\n"})
    for pair in permutations((image("/dev/x", "/srv/b.img"), disk("7:1", "/dev/y"))):
        assert len(overlaps(tree, *pair)) == 1


def test_readers_share_a_disk_and_so_do_writers_who_say_so(tree: HostTree) -> None:
    both = [disk("8:0", "/dev/a", ro=True), disk("8:1", "/dev/b", ro=True)]
    assert not overlaps(tree, *both)
    assert overlaps(tree, WHOLE, both[1])
    assert overlaps(tree, both[0], PART)
    said = [disk("8:0", "/dev/a", share=True), disk("8:1", "/dev/b", share=True)]
    assert not overlaps(tree, *said)
    assert overlaps(tree, said[0], PART)


@pytest.fixture
def drive(tmp_path: Path) -> PciTree:
    made = PciTree(tmp_path).pci_function(NVME, group=GROUP, driver="nvme")
    return made.pci_disk(NVME, "259:0", "nvme0n1", partitions={"259:1": "nvme0n1p1"})


CONTROLLER = VfioInfo(label="drive", device=NVME)


@pytest.mark.parametrize("number", ["259:0", "259:1"])
@pytest.mark.parametrize("ro", [False, True])
def test_a_drive_and_its_controller_are_refused_in_both_orders(
    drive: PciTree, number: str, *, ro: bool
) -> None:
    wanted = disk(number, "/dev/n", ro=ro)
    (after,) = overlaps(drive, CONTROLLER, wanted)
    (before,) = overlaps(drive, wanted, CONTROLLER)
    node = "/dev/nvme0n1" + ("p1" if number == "259:1" else "")
    assert after.message.startswith(f"{node} belongs to /dev/vfio/{GROUP}, which this request")
    assert before.message.startswith(f"/dev/vfio/{GROUP} has {node}, which this request")
    assert after.hint == before.hint == "request only one of them"


PHYSFN, VIRTFN = "0000:02:00.0", "0000:02:10.0"


def test_a_physical_function_and_its_virtual_one_are_refused_with_the_way_to_get_both(
    tmp_path: Path,
) -> None:
    tree = PciTree(tmp_path).pci_function(PHYSFN, group=12, driver="vfio-pci", class_code=0x020000)
    tree.sriov(PHYSFN, VIRTFN, group=13, driver="vfio-pci")
    both = VfioInfo(label="pf", device=PHYSFN), VfioInfo(label="vf", device=VIRTFN)
    for managed in (False, True):
        (after,) = overlaps(tree, *both, managed=managed)
        (before,) = overlaps(tree, *reversed(both), managed=managed)
        assert after.message.startswith("/dev/vfio/13 has a virtual function of /dev/vfio/12")
        assert before.message.startswith("/dev/vfio/12 makes the functions of /dev/vfio/13")
        assert after.hint == before.hint
        assert after.hint.startswith(
            f"request only {VIRTFN}: it disappears when VFIO gets {PHYSFN}"
        )
        assert f"attach {PHYSFN} first and {VIRTFN} after it" in after.hint


def test_a_mediated_device_and_its_parent_are_refused_in_both_orders(tmp_path: Path) -> None:
    uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
    tree = PciTree(tmp_path).pci_function(PHYSFN, group=12, driver="i915", class_code=0x030000)
    tree.mdev_type(PHYSFN, "i915-1").mdev(uuid, PHYSFN, "i915-1", group=13)
    both = VfioInfo(label="gpu", device=PHYSFN), VfioInfo(label="part", device=uuid)
    (after,) = overlaps(tree, *both)
    (before,) = overlaps(tree, *reversed(both))
    assert after.message.startswith("/dev/vfio/13 is a mediated device of /dev/vfio/12")
    assert before.message.startswith("/dev/vfio/12 is the parent of /dev/vfio/13")
    assert after.hint == before.hint
    assert after.hint == f"request only one of them: {uuid} disappears when VFIO gets {PHYSFN}"


def test_another_drive_goes_with_the_controller(drive: PciTree) -> None:
    drive.block_device("8:0", "sda")
    assert not overlaps(drive, CONTROLLER, WHOLE)
    assert not overlaps(drive, WHOLE, CONTROLLER)


@pytest.mark.slow
def test_the_work_does_not_grow_with_the_square_of_the_request(tmp_path: Path) -> None:
    """Four times as many devices take four times as many calls; a square would take sixteen."""
    tree = HostTree(tmp_path)
    parts = {f"259:{number}": f"sda{number}" for number in range(1, 5)}
    tree.block_device("8:0", "sda", partitions=parts)

    def calls(count: int) -> int:
        requests = [disk(f"259:{1 + number % 4}", f"/dev/d{number}") for number in range(count)]
        made = Counter[str]()
        sys.setprofile(lambda _frame, event, _what: made.update([event]))
        try:
            examine(requests, tree.root)
        finally:
            sys.setprofile(None)
        return made["call"] + made["c_call"]

    calls(1)  # the first one imports modules
    assert calls(200) < 4 * 1.3 * calls(50)
