"""What attach and check know of requests before a VM is asked."""

from pathlib import Path

import pytest

from tests.support.tree import HostTree
from vmplug.devnum import DevNum
from vmplug.errors import AttributeReadError, HostError, InUse, NoSuchDevice
from vmplug.manager.examine import CheckedRequest, examine, refuse
from vmplug.oci.info import DeviceInfo, DevType


@pytest.fixture
def tree(tmp_path: Path) -> HostTree:
    return HostTree(tmp_path).block_device("8:0", "sda", partitions={"8:1": "sda1"})


def disk(number: str, path: str) -> DeviceInfo:
    return DeviceInfo(
        container_path=path, dev_type=DevType.BLOCK, devnum=DevNum.parse(number), read_only=False
    )


def codes(examined: list[CheckedRequest]) -> list[list[str]]:
    return [[str(finding.code) for finding in request.findings] for request in examined]


def test_every_request_is_answered_beside_one_that_leads_nowhere(tree: HostTree) -> None:
    examined = examine([disk("8:0", "/dev/a"), disk("8:99", "/dev/b")], tree.root)
    assert codes(examined) == [[], ["no-such-device"]]
    with pytest.raises(NoSuchDevice):
        refuse(examined)


def test_a_disk_and_its_partition_are_not_asked_for_together(tree: HostTree) -> None:
    examined = examine([disk("8:0", "/dev/a"), disk("8:1", "/dev/b")], tree.root)
    assert codes(examined) == [[], ["in-use-by-vm"]]


def test_an_unreadable_host_stops_each_device_and_hides_none(tree: HostTree) -> None:
    """A mount table that makes no sense says nothing of any device's users."""
    tree.file("/proc/1/mountinfo", "nonsense\n").link("/proc/1/ns/mnt", "mnt:[1]")
    examined = examine([disk("8:0", "/dev/a"), disk("8:99", "/dev/b")], tree.root)
    assert codes(examined) == [["unreadable"], ["no-such-device"]]


def test_several_that_do_not_exist_are_no_such_device(tree: HostTree) -> None:
    examined = examine([disk("8:98", "/dev/a"), disk("8:99", "/dev/b")], tree.root)
    with pytest.raises(NoSuchDevice, match=r"/dev/a: .*; /dev/b: ") as caught:
        refuse(examined)
    assert len(caught.value.wanted.split(", ")) == 2
    assert caught.value.hint == "vmplug check shows each finding with its remedy"


def test_what_cannot_be_read_is_not_in_use(tree: HostTree) -> None:
    tree.block_device("8:16", "sdb").file("/sys/devices/virtual/block/sdb/size", "x\n")
    examined = examine([disk("8:99", "/dev/a"), disk("8:16", "/dev/b")], tree.root)
    with pytest.raises(HostError) as caught:
        refuse(examined)
    assert type(caught.value) is HostError


def test_one_error_is_raised_as_it_is_and_several_as_one_report(tree: HostTree) -> None:
    tree.block_device("8:16", "sdb").file("/sys/devices/virtual/block/sdb/size", "x\n")
    examined = examine([disk("8:16", "/dev/b")], tree.root)
    with pytest.raises(AttributeReadError):
        refuse(examined)
    tree.mount("/dev/sda", "/mnt", "8:0")
    examined = examine([disk("8:0", "/dev/a"), disk("8:16", "/dev/b")], tree.root)
    with pytest.raises(InUse) as caught:
        refuse(examined)
    assert caught.value.codes == ("mounted-on-host", "unreadable")
    assert "/dev/a: " in caught.value.message
    assert "/dev/b: " in caught.value.message
    assert caught.value.hint == "vmplug check shows each finding with its remedy"
