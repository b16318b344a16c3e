"""The vhost-user store: right answers at once, while nodes come, go and change places."""

import os
import random
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmplug.devnum import DevNum
from vmplug.errors import AttributeReadError, NoSuchDevice
from vmplug.host.kind import DeviceType
from vmplug.host.resolve import resolve_all
from vmplug.host.root import THIS_HOST, HostRoot
from vmplug.host.vhost_user.device import VhostUserSocket
from vmplug.host.vhost_user.store import VhostUserStore
from vmplug.oci.info import DeviceInfo, DevType

TICK_NS = 30_000_000
"""Longer than the clock that stamps directories takes to move on."""


class StoreDirectory:
    """A store as a storage daemon fills it; a socket is only a node here, nobody listens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.devices = path / "block/devices"
        self.sockets = path / "block/sockets"
        self.devices.mkdir(parents=True)
        self.sockets.mkdir()

    def open(self, root: HostRoot = THIS_HOST) -> VhostUserStore:
        return VhostUserStore(str(self.path), root=root)

    def add(self, name: str, number: str, *, kind: int = stat.S_IFBLK) -> None:
        """A node and its socket."""
        major, minor = map(int, number.split(":"))
        os.mknod(self.devices / name, kind | 0o600, os.makedev(major, minor))
        self.serve(name)

    def serve(self, name: str) -> None:
        if not (self.sockets / name).exists():
            os.mknod(self.sockets / name, stat.S_IFSOCK | 0o600)

    def replace(self, name: str, number: str) -> None:
        """Another number under the same name, in one rename."""
        major, minor = map(int, number.split(":"))
        os.mknod(self.path / "new", stat.S_IFBLK | 0o600, os.makedev(major, minor))
        (self.path / "new").rename(self.devices / name)

    def settle(self) -> None:
        """Let the clock move on, so that the next change bears another time."""
        changed_ns = self.devices.stat().st_ctime_ns
        while time.time_ns() - changed_ns < TICK_NS:
            pass

    def socket(self, name: str) -> str:
        return str(self.sockets / name)

    def found(self, name: str, number: DevNum) -> VhostUserSocket:
        """The socket of a disk as the store gives it."""
        status = (self.sockets / name).stat()
        return VhostUserSocket(
            kind=DeviceType.VHOST_USER_BLK,
            socket_path=self.socket(name),
            devnum=number,
            file_id=f"inode {status.st_dev}:{status.st_ino}",
        )


@pytest.fixture(params=["disk", "tmpfs"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreDirectory]:
    if request.param == "disk":
        yield StoreDirectory(tmp_path / "store")
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield StoreDirectory(Path(directory) / "store")


def ask(store: VhostUserStore, number: str) -> str | None:
    """The name of the socket; None when there is no node of that number."""
    try:
        return store.find_socket(DevNum.parse(number)).rpartition("/")[2]
    except NoSuchDevice as error:
        if "has no block device node" not in error.message:
            raise
        return None


# What it finds


@pytest.mark.root
@pytest.mark.parametrize("number", ["241:0", "242:0", "241:300", "242:1048575"])
def test_a_node_of_either_major_means_the_socket_of_its_name(
    store: StoreDirectory, number: str
) -> None:
    store.add("disk", number)
    assert store.open().find_socket(DevNum.parse(number)) == store.socket("disk")


@pytest.mark.parametrize(
    ("number", "owned"), [("241:0", True), ("242:9", True), ("240:0", False), ("8:0", False)]
)
def test_two_majors_belong_to_the_store(number: str, *, owned: bool) -> None:
    assert VhostUserStore("/store").owns(DevNum.parse(number)) is owned


@pytest.mark.root
def test_both_majors_may_be_others(store: StoreDirectory) -> None:
    store.add("disk", "60:1")
    other = VhostUserStore(str(store.path), blk_major=60, scsi_major=61)
    assert other.find_socket(DevNum(60, 1)) == store.socket("disk")
    assert other.owns(DevNum(61, 0))
    assert not other.owns(DevNum(241, 0))


@pytest.mark.root
def test_the_same_minor_of_two_majors_is_two_devices(store: StoreDirectory) -> None:
    store.add("a", "242:5")
    store.add("b", "241:5")
    opened = store.open()
    assert (ask(opened, "241:5"), ask(opened, "242:5")) == ("b", "a")


@pytest.mark.root
def test_minors_are_not_cut_to_a_byte(store: StoreDirectory) -> None:
    store.add("big", "241:300")
    assert ask(store.open(), "241:44") is None


@pytest.mark.root
def test_the_first_name_wins_when_two_nodes_have_one_number(store: StoreDirectory) -> None:
    store.add("b", "241:0")
    opened = store.open()
    assert ask(opened, "241:0") == "b"
    store.add("a", "241:0")
    assert ask(opened, "241:0") == "a"


@pytest.mark.root
def test_a_store_below_another_root_is_answered_in_that_roots_paths(tmp_path: Path) -> None:
    store = StoreDirectory(tmp_path / "host/run/store")
    store.add("disk", "241:0")
    opened = VhostUserStore("/run/store", root=HostRoot(tmp_path / "host"))
    assert opened.find_socket(DevNum(241, 0)) == "/run/store/block/sockets/disk"


# Broken neighbours


@pytest.mark.root
def test_broken_neighbours_do_not_matter(store: StoreDirectory) -> None:
    (store.devices / "0-dangling").symlink_to("nowhere")
    (store.devices / "1-circle").symlink_to("1-circle")
    (store.devices / "2-through-a-file").symlink_to("3-file/x")
    (store.devices / "3-file").touch()
    (store.devices / "4-directory").mkdir()
    store.add("5-char", "241:0", kind=stat.S_IFCHR)
    store.add("6-disk", "241:0")
    opened = store.open()
    assert ask(opened, "241:0") == "6-disk"
    assert ask(opened, "241:1") is None
    assert opened.find_sockets([DevNum(241, 0)]) == {
        DevNum(241, 0): store.found("6-disk", DevNum(241, 0))
    }


@pytest.mark.root
def test_a_char_node_of_the_number_is_no_answer(store: StoreDirectory) -> None:
    store.add("char", "241:0", kind=stat.S_IFCHR)
    assert ask(store.open(), "241:0") is None


@pytest.mark.root
def test_a_link_to_a_node_counts_and_is_followed_anew_each_time(store: StoreDirectory) -> None:
    for name, number in (("x", "241:1"), ("y", "241:2")):
        major, minor = map(int, number.split(":"))
        os.mknod(store.path / name, stat.S_IFBLK | 0o600, os.makedev(major, minor))
    (store.path / "current").symlink_to("x")
    (store.devices / "disk").symlink_to("../../current")
    store.serve("disk")
    store.settle()
    opened = store.open()
    assert (ask(opened, "241:1"), ask(opened, "241:2")) == ("disk", None)
    # Turned outside the directory, whose time says nothing of it.
    (store.path / "other").symlink_to("y")
    (store.path / "other").rename(store.path / "current")
    assert ask(opened, "241:2") == "disk"
    (store.path / "third").symlink_to("x")
    (store.path / "third").rename(store.path / "current")
    assert (ask(opened, "241:2"), ask(opened, "241:1")) == (None, "disk")


# The socket


@pytest.mark.root
@pytest.mark.parametrize("kind", ["nothing", "directory", "regular file", "FIFO", "dangling link"])
def test_a_socket_that_is_none_is_named_for_what_it_is(store: StoreDirectory, kind: str) -> None:
    store.add("disk", "241:0")
    socket = store.sockets / "disk"
    socket.unlink()
    found = "nothing" if kind in {"nothing", "dangling link"} else f"a {kind}"
    if kind == "directory":
        socket.mkdir()
    elif kind == "regular file":
        socket.touch()
    elif kind == "FIFO":
        os.mkfifo(socket)
    elif kind == "dangling link":
        socket.symlink_to("gone")
    opened = store.open()
    with pytest.raises(NoSuchDevice) as caught:
        opened.find_socket(DevNum(241, 0))
    assert caught.value.found == found
    assert str(socket) in caught.value.message
    # And once the daemon is there, it is found.
    if kind != "nothing":
        socket.rmdir() if kind == "directory" else socket.unlink()
    store.serve("disk")
    assert ask(opened, "241:0") == "disk"


@pytest.mark.root
def test_a_link_to_a_socket_is_a_socket(store: StoreDirectory) -> None:
    store.add("disk", "241:0")
    (store.sockets / "disk").rename(store.path / "real")
    (store.sockets / "disk").symlink_to("../../real")
    assert ask(store.open(), "241:0") == "disk"


@pytest.mark.root
def test_a_socket_in_a_circle_of_links_cannot_be_looked_at(store: StoreDirectory) -> None:
    store.add("disk", "241:0")
    (store.sockets / "disk").unlink()
    (store.sockets / "disk").symlink_to("disk")
    with pytest.raises(AttributeReadError, match="Too many levels"):
        store.open().find_socket(DevNum(241, 0))


@pytest.mark.root
def test_in_a_batch_each_device_has_its_own_error(store: StoreDirectory) -> None:
    store.add("good", "241:0")
    store.add("deaf", "242:0")
    store.add("circle", "242:1")
    (store.sockets / "deaf").unlink()
    (store.sockets / "circle").unlink()
    (store.sockets / "circle").symlink_to("circle")
    numbers = [DevNum(241, 0), DevNum(242, 0), DevNum(242, 1), DevNum(241, 9)]
    answers = store.open().find_sockets(numbers)
    assert list(answers) == numbers
    assert answers[numbers[0]] == store.found("good", numbers[0])
    errors = [type(answers[number]) for number in numbers[1:]]
    assert errors == [NoSuchDevice, AttributeReadError, NoSuchDevice]


# The store itself


def test_a_store_that_is_not_there_is_said_with_a_remedy(tmp_path: Path) -> None:
    store = VhostUserStore(str(tmp_path / "absent"))
    for lookup in (lambda: store.find_socket(DevNum(241, 0)), lambda: store.find_sockets([])):
        with pytest.raises(NoSuchDevice, match="does not exist") as caught:
            lookup()
        assert caught.value.wanted == str(tmp_path / "absent")
        assert "--vhost-user-store" in (caught.value.hint or "")


def test_an_empty_store_has_no_nodes(store: StoreDirectory) -> None:
    assert ask(store.open(), "241:0") is None


def test_a_file_in_place_of_the_store_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "store").touch()
    with pytest.raises(NoSuchDevice, match="does not exist"):
        VhostUserStore(str(tmp_path / "store")).find_socket(DevNum(241, 0))


@pytest.mark.root
def test_a_store_may_come_and_go(store: StoreDirectory) -> None:
    store.add("disk", "241:0")
    opened = store.open()
    assert ask(opened, "241:0") == "disk"
    store.path.rename(store.path.with_name("away"))
    with pytest.raises(NoSuchDevice, match="does not exist"):
        opened.find_socket(DevNum(241, 0))
    store.path.with_name("away").rename(store.path)
    assert ask(opened, "241:0") == "disk"


# Changes


@pytest.mark.root
@pytest.mark.parametrize("settled", [True, False], ids=["a settled store", "a racing store"])
def test_every_kind_of_change_is_seen_by_the_next_question(
    store: StoreDirectory, *, settled: bool
) -> None:
    store.add("a", "241:1")
    opened = store.open()

    def both() -> tuple[str | None, str | None]:
        answers = ask(opened, "241:1"), ask(opened, "241:2")
        if settled:
            store.settle()
            assert (ask(opened, "241:1"), ask(opened, "241:2")) == answers
        return answers

    assert both() == ("a", None)
    store.add("b", "241:2")
    assert both() == ("a", "b")
    store.replace("a", "241:9")
    assert both() == (None, "b")
    store.replace("b", "241:1")
    assert both() == ("b", None)
    store.serve("z")
    (store.devices / "b").rename(store.devices / "z")
    assert both() == ("z", None)
    (store.devices / "z").unlink()
    assert both() == (None, None)
    store.add("z", "241:2")
    assert both() == (None, "z")


@pytest.mark.root
def test_hundreds_of_immediate_changes_never_bring_a_wrong_answer(store: StoreDirectory) -> None:
    names, numbers = ("a", "b", "c"), ("241:1", "241:2", "242:1")
    chance = random.Random(20200501)
    opened = store.open()
    nodes: dict[str, str] = {}
    for name in names:
        store.serve(name)
    for change in range(400):
        if change % 20 == 0:
            store.settle()
        name, number = chance.choice(names), chance.choice(numbers)
        if name not in nodes:
            store.add(name, number)
            nodes[name] = number
        elif chance.random() < 0.5:
            (store.devices / name).unlink()
            del nodes[name]
        else:
            store.replace(name, number)
            nodes[name] = number
        for asked in numbers:
            right = min((name for name, has in nodes.items() if has == asked), default=None)
            assert ask(opened, asked) == right, f"change {change}: {nodes}, asked {asked}"


@pytest.mark.root
def test_a_time_that_was_set_back_hides_no_change(store: StoreDirectory) -> None:
    store.add("a", "241:1")
    store.settle()
    opened = store.open()
    assert ask(opened, "241:2") is None
    before = store.devices.stat()
    store.add("b", "241:2")
    os.utime(store.devices, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert store.devices.stat().st_mtime_ns == before.st_mtime_ns
    assert ask(opened, "241:2") == "b"


@pytest.mark.root
def test_another_directory_of_the_same_time_in_its_place_is_seen(store: StoreDirectory) -> None:
    store.add("a", "241:1")
    other = StoreDirectory(store.path.with_name("other"))
    other.add("b", "241:2")
    store.settle()
    opened = store.open()
    assert ask(opened, "241:2") is None
    before = store.devices.stat()
    os.utime(other.devices, ns=(before.st_atime_ns, before.st_mtime_ns))
    store.serve("b")
    store.devices.rename(store.path / "old")
    other.devices.rename(store.devices)
    assert (ask(opened, "241:1"), ask(opened, "241:2")) == (None, "b")


@pytest.mark.root
def test_a_link_that_is_turned_to_a_directory_of_the_same_age_is_seen(
    store: StoreDirectory,
) -> None:
    other = StoreDirectory(store.path.with_name("other"))
    store.serve("b")
    store.devices.rename(store.path / "first")
    store.devices.symlink_to("../first")
    # One right after the other: on tmpfs, both directories then bear the same time.
    os.mknod(store.path / "a", stat.S_IFBLK | 0o600, os.makedev(241, 1))
    os.mknod(store.path / "b", stat.S_IFBLK | 0o600, os.makedev(241, 2))
    (store.path / "a").rename(store.path / "first/a")
    (store.path / "b").rename(other.devices / "b")
    store.serve("a")
    store.settle()
    opened = store.open()
    assert (ask(opened, "241:1"), ask(opened, "241:2")) == ("a", None)
    store.devices.unlink()
    store.devices.symlink_to(other.devices)
    assert (ask(opened, "241:2"), ask(opened, "241:1")) == ("b", None)


# The cost


class CountingRoot(HostRoot):
    """This host, with its doors counted."""

    def __init__(self) -> None:
        super().__init__("/")
        self.stats = 0
        self.scans = 0

    def stat(self, path: str) -> os.stat_result | None:
        self.stats += 1
        return super().stat(path)

    def stat_or_none(self, path: str, *, follow_symlinks: bool = True) -> os.stat_result | None:
        self.stats += 1
        return super().stat_or_none(path, follow_symlinks=follow_symlinks)

    def list_dir(self, path: str) -> list[str]:
        self.scans += 1
        return super().list_dir(path)


@pytest.mark.root
@pytest.mark.parametrize("size", [1, 200])
def test_a_warm_lookup_costs_three_stats_however_large_the_store(
    store: StoreDirectory, size: int
) -> None:
    for minor in range(size):
        store.add(f"disk{minor}", f"241:{minor}")
    store.settle()
    root = CountingRoot()
    opened = store.open(root)
    ask(opened, "241:0")
    root.stats = root.scans = 0
    assert ask(opened, f"241:{size - 1}") == f"disk{size - 1}"
    assert (root.stats, root.scans) == (3, 0)
    assert ask(opened, "242:0") is None
    assert (root.stats, root.scans) == (4, 0)


@pytest.mark.root
def test_a_batch_costs_one_scan(store: StoreDirectory) -> None:
    for minor in range(50):
        store.add(f"disk{minor}", f"241:{minor}")
    root = CountingRoot()
    numbers = [DevNum(241, minor) for minor in range(50)]
    requests = [
        DeviceInfo(container_path=f"/dev/vd{number.minor}", dev_type=DevType.BLOCK, devnum=number)
        for number in numbers
    ]
    answers = resolve_all(requests, root, store.open(root))
    assert root.scans == 1
    assert root.stats == 101  # the directory, each node and each socket
    assert answers == [store.found(f"disk{number.minor}", number) for number in numbers]
