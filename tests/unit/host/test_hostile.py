"""A tree that somebody else wrote: nobody is waited for, nothing without end is read."""

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from termios import FIONREAD
from types import FrameType

import pytest

from tests.support.tree import HostTree
from vmplug.address import Bdf
from vmplug.devnum import DevNum
from vmplug.errors import AttributeReadError, NoSuchDevice
from vmplug.host.block.usage import read_usage
from vmplug.host.block.volumes import find_volumes
from vmplug.host.check.device import check_device
from vmplug.host.finding import Access, Code
from vmplug.host.host_path import get_host_path
from vmplug.host.pci.sriov import read_sriov
from vmplug.host.process import read_start_time
from vmplug.host.resolve import resolve
from vmplug.host.root import HostRoot
from vmplug.host.use.openers import DeviceNode, Opener, read_open_files, wanted_node
from vmplug.host.vhost_user.sockets import Listener, UnixSockets
from vmplug.oci.info import DeviceInfo, DevType, Mount

UEVENT = "/sys/dev/char/10:7/uevent"


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """A reader that hangs fails."""

    def hang(number: int, frame: FrameType | None) -> None:
        pytest.fail("it hangs")

    former = signal.signal(signal.SIGALRM, hang)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


def want() -> DeviceInfo:
    return DeviceInfo(
        container_path="/dev/wanted", dev_type=DevType.CHAR, devnum=DevNum.parse("10:7")
    )


def test_a_fifo_in_place_of_an_attribute_is_not_waited_for(tree: HostTree) -> None:
    tree.node(UEVENT, "p")
    with pytest.raises(AttributeReadError, match="no DEVNAME"):
        get_host_path(want(), tree.root)


def test_nor_is_one_that_somebody_else_has_open(tree: HostTree) -> None:
    tree.node(UEVENT, "p")
    writer = os.open(tree.path / UEVENT.lstrip("/"), os.O_RDWR)
    try:
        with pytest.raises(AttributeReadError, match="temporarily unavailable"):
            get_host_path(want(), tree.root)
        (tree.path / "proc/swaps").unlink()
        tree.node("/proc/swaps", "p")
        assert read_usage(tree.root).swaps == ()
    finally:
        os.close(writer)


def test_a_socket_in_place_of_an_attribute_is_nothing(tree: HostTree) -> None:
    tree.node(UEVENT, "s")
    with pytest.raises(NoSuchDevice):
        get_host_path(want(), tree.root)


def test_a_directory_in_place_of_an_attribute_is_told(tree: HostTree) -> None:
    tree.file(f"{UEVENT}/x")
    with pytest.raises(AttributeReadError, match="Is a directory"):
        get_host_path(want(), tree.root)


@pytest.mark.parametrize("target", ["/dev/zero", "../" * 30 + "dev/zero"])
def test_an_attribute_is_one_page_wherever_a_link_leads(tree: HostTree, target: str) -> None:
    tree.link(UEVENT, target)
    with pytest.raises(AttributeReadError, match="no DEVNAME"):
        get_host_path(want(), tree.root)


@pytest.mark.parametrize("target", ["/dev/zero", "endless"])
def test_a_table_without_end_is_not_read_to_its_end(tree: HostTree, target: str) -> None:
    (tree.path / "proc/swaps").unlink()
    tree.link("/proc/swaps", target)
    with (tree.path / "proc/endless").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(AttributeReadError, match="longer than 67108864 bytes"):
        assert read_usage(tree.root).swaps


@pytest.mark.parametrize("leads_to", ["/dev/zero", "/dev/ptmx"])
def test_a_disk_that_is_a_link_to_a_character_device_by_now_is_not_opened(
    tmp_path: Path, leads_to: str
) -> None:
    """To open a watchdog starts it, and a tape rewinds."""
    path, root = str(tmp_path / "a.img"), HostRoot()
    os.symlink(leads_to, path)
    assert {root.open_errno(path, flags) for flags in (0, os.O_EXCL)} == {errno.ENXIO}
    assert root.read_at(path, 0, 4) == b""
    assert not root.ask_open(path, lambda _: True)
    assert root.ask_node(path, FIONREAD, 4) is None


def test_a_backing_file_with_a_nul_in_its_name_is_nowhere(tree: HostTree) -> None:
    tree.block_device("7:0", "loop0", loop={"backing_file": "/a\0b (deleted)\n", "offset": "0\n"})
    info = DeviceInfo(container_path="/dev/x", dev_type=DevType.BLOCK, devnum=DevNum.parse("7:0"))
    device = resolve(info, tree.root)
    usage = read_usage(tree.root)
    assert usage.loops[0].backing.deleted
    check_device(device, Access(read_only=False), usage=usage, root=tree.root)


@pytest.mark.parametrize("name", ["/dev/a\0b", "/dev/../dev/a\0b"])
def test_a_loop_device_on_a_name_with_a_nul_is_on_nothing(tree: HostTree, name: str) -> None:
    tree.block_device("7:0", "loop0", loop={"backing_file": f"{name}\n"})
    tree.file("/sys/kernel/config/nvmet/subsystems/a/namespaces/1/device_path", f"{name}\n")
    tree.file("/sys/kernel/config/nvmet/subsystems/a/namespaces/1/enable", "1\n")
    info = DeviceInfo(container_path="/dev/x", dev_type=DevType.BLOCK, devnum=DevNum.parse("7:0"))
    device, usage = resolve(info, tree.root), read_usage(tree.root)
    found = check_device(device, Access(read_only=False), usage=usage, root=tree.root)
    assert [finding.code for finding in found] == [Code.IS_EXPORTED]


@pytest.mark.parametrize("name", ["/dev/a\0b", r"/dev/a\000b"])
def test_nor_is_what_is_mounted_or_swapped_to(tree: HostTree, name: str) -> None:
    tree.mount(name, "/mnt", "0:44", fs_type="btrfs").swap(name).block_device("8:0", "sda")
    usage = read_usage(tree.root)
    assert (usage.mounts, len(usage.swaps)) == ((), 1)
    info = DeviceInfo(container_path="/dev/x", dev_type=DevType.BLOCK, devnum=DevNum.parse("8:0"))
    check_device(resolve(info, tree.root), Access(read_only=False), usage=usage, root=tree.root)


def test_a_volume_whose_source_has_a_nul_is_none(tree: HostTree) -> None:
    mount = Mount(destination="/data", source="/dev/a\0b", type="bind", read_only=False)
    assert find_volumes([mount], tree.root) == []


@pytest.mark.parametrize("target", ["absent", "../0000:3b:10.8", "x/", ".."])
def test_a_virtual_function_that_is_none_is_told(tree: HostTree, target: str) -> None:
    path = "/sys/bus/pci/devices/0000:3b:00.0"
    tree.file(f"{path}/sriov_totalvfs", "4\n").link(f"{path}/virtfn0", target)
    with pytest.raises(AttributeReadError, match="is not a PCI function"):
        read_sriov(Bdf.parse("0000:3b:00.0"), tree.root)


def test_a_directory_of_proc_with_another_kind_of_digit_is_no_process(tree: HostTree) -> None:
    tree.process(7, "spdk", "socket:[99]").file("/proc/²/comm", "x")
    tree.unix_socket("/run/a.sock", 99)
    assert UnixSockets(tree.root).find_listener("/run/a.sock") == Listener(pid=7, name="spdk")
    tree.process(8, "qemu", "/dev/vfio/26").file("/proc/²/fd/3", "x")
    wanted = wanted_node(DeviceNode.of_char("/dev/vfio/26", tree.root), tree.root)
    opened = read_open_files(tree.root)
    assert opened.find(wanted) == [Opener(pid=8, name="qemu", path="/dev/vfio/26")]
    assert (opened.unlisted, opened.guarded) == ((), ())


@pytest.mark.parametrize("line", ["1: 2 0 x 1 01 99 /run/a.sock", "1: 2 0 1 1 x 99 /run/a.sock"])
def test_a_table_of_sockets_with_words_for_numbers_is_told(tree: HostTree, line: str) -> None:
    tree.file("/proc/net/unix", f"Num\n{line}\n")
    with pytest.raises(AttributeReadError, match="/proc/net/unix: invalid literal"):
        UnixSockets(tree.root).find_listener("/run/a.sock")


@pytest.mark.parametrize("text", ["", "1 (init) S", "1 (x) S " + "x " * 40])
def test_a_process_without_a_start_time_is_told(tree: HostTree, text: str) -> None:
    tree.file("/proc/1/stat", text)
    with pytest.raises(AttributeReadError, match="no start time"):
        read_start_time(1, tree.root)
