"""HostPathCache: the live answers for one system call, and never a stale one."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.tree import HostTree
from vmplug.devnum import DevNum
from vmplug.errors import AttributeReadError, NoSuchDevice
from vmplug.host.host_path import HostPathCache, get_host_path
from vmplug.host.root import HostRoot
from vmplug.oci.info import DeviceInfo, DevType

LOOP_CTL_ADD, LOOP_CTL_REMOVE = 0x4C80, 0x4C81
"""Source: include/uapi/linux/loop.h."""


class SpareLoop:
    """A loop device of a number that nobody else uses, which comes and goes."""

    def __init__(self, number: int) -> None:
        self.number = number

    @property
    def info(self) -> DeviceInfo:
        return want("b", f"7:{self.number}")

    def add(self) -> None:
        self._control(LOOP_CTL_ADD)

    def remove(self) -> None:
        self._control(LOOP_CTL_REMOVE)

    def _control(self, request: int) -> None:
        with open("/dev/loop-control", "rb") as control:
            fcntl.ioctl(control, request, self.number)


@pytest.fixture
def spare_loop() -> Iterator[SpareLoop]:
    """Added; taken away at the end unless the test did so."""
    for number in range(1000 + os.getpid() % 1000 * 100, MINORS):
        loop = SpareLoop(number)
        try:
            loop.add()
        except FileExistsError:
            continue
        break
    yield loop
    if os.path.exists(f"/sys/block/loop{loop.number}"):
        loop.remove()


MINORS = 1 << 20


class CountingRoot(HostRoot):
    """This host, with its doors counted."""

    def __init__(self) -> None:
        super().__init__("/")
        self.reads = 0
        self.rereads = 0

    def read_attribute(self, path: str) -> bytes | None:
        self.reads += 1
        return super().read_attribute(path)

    def reread_attribute(self, descriptor: int) -> bytes | None:
        self.rereads += 1
        return super().reread_attribute(descriptor)


def want(dev_type: str, number: str | None, path: str = "/dev/no-such-name") -> DeviceInfo:
    devnum = DevNum.parse(number) if number else None
    return DeviceInfo(container_path=path, dev_type=DevType(dev_type), devnum=devnum)


def some_devices() -> list[DeviceInfo]:
    """A dozen character devices that every Linux host has; read the kernel's own way."""
    numbers = sorted(os.listdir("/sys/dev/char"))[:40]
    named = [n for n in numbers if "DEVNAME=" in Path(f"/sys/dev/char/{n}/uevent").read_text()]
    assert len(named) >= 12
    return [want("c", number) for number in named[:12]]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_it_answers_as_the_live_lookup_does_again_and_again() -> None:
    devices = some_devices()
    with HostPathCache(HostRoot()) as cache:
        for _ in range(3):
            for info in devices:
                assert cache.get_host_path(info) == get_host_path(info, HostRoot())


def test_a_second_lookup_is_one_question_to_the_kernel() -> None:
    root = CountingRoot()
    with HostPathCache(root) as cache:
        first = cache.get_host_path(want("c", "1:3"))
        root.reads = root.rereads = 0
        assert cache.get_host_path(want("c", "1:3", "/dev/another-name")) == first == "/dev/null"
        assert (root.reads, root.rereads) == (0, 1)


def test_a_number_is_not_confused_with_the_same_one_of_another_kind() -> None:
    with HostPathCache(HostRoot()) as cache:
        assert cache.get_host_path(want("c", "1:3")) == "/dev/null"
        with pytest.raises(NoSuchDevice, match="block device 1:3"):
            cache.get_host_path(want("b", "1:3"))
        assert cache.get_host_path(want("u", "1:3")) == "/dev/null"


def test_it_holds_no_more_descriptors_than_its_limit_and_gives_all_back() -> None:
    before = open_descriptors()
    with HostPathCache(HostRoot(), limit=3) as cache:
        for info in some_devices() * 2:
            assert cache.get_host_path(info) == get_host_path(info, HostRoot())
            assert open_descriptors() <= before + 3
        assert open_descriptors() == before + 3
    assert open_descriptors() == before


def test_a_closed_cache_may_be_used_again() -> None:
    before = open_descriptors()
    cache = HostPathCache(HostRoot())
    for _ in range(2):
        assert cache.get_host_path(want("c", "1:3")) == "/dev/null"
        cache.close()
        cache.close()
        assert open_descriptors() == before


def test_a_limit_of_nothing_keeps_nothing() -> None:
    before = open_descriptors()
    with HostPathCache(HostRoot(), limit=0) as cache:
        assert cache.get_host_path(want("c", "1:3")) == "/dev/null"
        assert open_descriptors() == before


def test_below_another_root_nothing_is_kept(tree: HostTree) -> None:
    tree.char_device("10:7", "one")
    before = open_descriptors()
    with HostPathCache(tree.root) as cache:
        assert cache.get_host_path(want("c", "10:7")) == "/dev/one"
        assert open_descriptors() == before
        tree.file("/sys/dev/char/10:7/uevent", "DEVNAME=two\n")
        assert cache.get_host_path(want("c", "10:7")) == "/dev/two"
        (tree.path / "sys/dev/char/10:7").unlink()
        with pytest.raises(NoSuchDevice):
            cache.get_host_path(want("c", "10:7"))


def test_files_and_fifos_are_looked_up_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a path made of an absent directory and an absent number would lead to.
    for name in ("NoneNone", "None"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "uevent").symlink_to("uevent")
    monkeypatch.chdir(tmp_path)
    image, pipe = tmp_path / "a.img", tmp_path / "pipe"
    image.touch()
    os.mkfifo(pipe)
    disk = DeviceInfo(container_path="/dev/vda", dev_type=DevType.BLOCK, host_path=str(image))
    before = open_descriptors()
    with HostPathCache(HostRoot()) as cache:
        for _ in range(2):
            assert cache.get_host_path(disk) == str(image)
            assert cache.get_host_path(want("p", None, str(pipe))) == str(pipe)
        assert open_descriptors() == before
        image.unlink()
        with pytest.raises(NoSuchDevice):
            cache.get_host_path(disk)


def test_an_absent_device_is_asked_for_anew_each_time(tmp_path: Path) -> None:
    before = open_descriptors()
    with HostPathCache(HostRoot()) as cache:
        for _ in range(2):
            with pytest.raises(NoSuchDevice):
                cache.get_host_path(want("c", "4095:1048575", str(tmp_path / "absent")))
        assert open_descriptors() == before


class VanishingRoot(HostRoot):
    """This host, whose devices go between being looked up and being looked at again."""

    def reread_attribute(self, descriptor: int) -> bytes | None:  # noqa: ARG002
        return None


class RenamingRoot(HostRoot):
    """This host, whose devices change their name in that moment."""

    def reread_attribute(self, descriptor: int) -> bytes | None:  # noqa: ARG002
        return b"DEVNAME=other\n"


@pytest.mark.parametrize("root", [VanishingRoot(), RenamingRoot()])
def test_a_device_that_changes_in_the_moment_of_lookup_is_answered_and_not_kept(
    root: HostRoot,
) -> None:
    before = open_descriptors()
    with HostPathCache(root) as cache:
        assert cache.get_host_path(want("c", "1:3")) == "/dev/null"
        assert open_descriptors() == before


@pytest.mark.root
def test_a_removed_device_is_noticed(spare_loop: SpareLoop) -> None:
    before = open_descriptors()
    with HostPathCache(HostRoot()) as cache:
        for _ in range(2):
            assert cache.get_host_path(spare_loop.info) == f"/dev/loop{spare_loop.number}"
        spare_loop.remove()
        for _ in range(2):
            with pytest.raises(NoSuchDevice):
                cache.get_host_path(spare_loop.info)
        assert open_descriptors() == before


@pytest.mark.root
def test_another_device_of_the_same_number_is_looked_up_anew(spare_loop: SpareLoop) -> None:
    root = CountingRoot()
    with HostPathCache(root) as cache:
        cache.get_host_path(spare_loop.info)
        spare_loop.remove()
        spare_loop.add()
        root.reads = 0
        assert cache.get_host_path(spare_loop.info) == f"/dev/loop{spare_loop.number}"
        assert root.reads == 1
        assert cache.get_host_path(spare_loop.info) == f"/dev/loop{spare_loop.number}"
        assert root.reads == 1


def test_an_unreadable_answer_is_passed_on(tree: HostTree) -> None:
    tree.file("/sys/dev/char/10:7/uevent", "MAJOR=10\n")
    with HostPathCache(tree.root) as cache, pytest.raises(AttributeReadError, match="no DEVNAME"):
        cache.get_host_path(want("c", "10:7"))
