"""A real loop device, its partition and file, as the running kernel shows them."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.daemons import VIRTIOFSD
from tests.support.disks import add_partition, detach_loop, disk_image, loop_device
from vmplug.drivers.plug import VirtiofsdSpec
from vmplug.host.file_id import file_id
from vmplug.host.finding import Code, Severity
from vmplug.host.thing.thing import Relation, Thing, ThingKind
from vmplug.host.vhost_user.virtiofsd import ask_options
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner
from vmplug.manager.host_listing import show_thing
from vmplug.manager.setup import Setup

pytestmark = pytest.mark.root


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return disk_image(tmp_path / "a b.img", 8, "x")


@pytest.fixture
def disk(image: Path) -> Iterator[Path]:
    """A loop device on the image, with a partition that has a file system."""
    losetup = ["losetup", "--find", "--show", "--partscan", str(image)]
    node = subprocess.run(losetup, capture_output=True, check=True, text=True).stdout.strip()
    try:
        add_partition(node, start_bytes=1 << 20, length_bytes=4 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", f"{node}p1"], check=True)
        yield Path(node)
    finally:
        detach_loop(Path(node))


@pytest.fixture
def show(tmp_path: Path) -> Callable[[object], Thing]:
    (tmp_path / "state").mkdir(mode=0o700)
    setup = Setup(state_dir=str(tmp_path / "state"))
    return lambda name: show_thing(str(name), setup=setup)


def codes(thing: Thing) -> dict[str, list[Code]]:
    return {part.name: [use.code for use in part.uses] for part in thing.walk()}


def test_a_mounted_partition_is_in_the_trees_of_its_disk_and_of_the_file(
    disk: Path, image: Path, tmp_path: Path, show: Callable[[object], Thing]
) -> None:
    part, directory = f"{disk}p1", tmp_path / "mnt"
    before = os.stat(image)
    assert codes(show(disk)) == {str(disk): [], part: [], str(image): []}
    assert codes(show(image))[str(image)] == [Code.HAS_HOLDERS]  # an idle loop device
    directory.mkdir()
    subprocess.run(["mount", part, str(directory)], check=True)
    try:
        of_disk, of_part, of_image = show(disk), show(part), show(image)
    finally:
        subprocess.run(["umount", str(directory)], check=True)
    for thing in (of_disk, of_part, of_image):
        (use,) = next(each for each in thing.walk() if each.name == part).uses
        assert (use.code, use.where) == (Code.MOUNTED_ON_HOST, str(directory))
    assert [(each.relation, each.name) for each in of_part.walk()][1:] == [
        (Relation.DISK, str(disk)),
        (Relation.FILE, str(image)),
    ]
    assert codes(show(disk)) == {str(disk): [], part: [], str(image): []}
    assert os.stat(image).st_ino == before.st_ino


def test_another_name_of_a_thing_is_the_same_thing(
    disk: Path, image: Path, tmp_path: Path, show: Callable[[object], Thing]
) -> None:
    (tmp_path / "link").symlink_to(disk)
    os.link(image, tmp_path / "hard.img")
    number = Path(f"/sys/class/block/{disk.name}/dev").read_text().strip()
    names = (tmp_path / "link", f"b:{number}", number, disk.name)
    assert {show(name).identity for name in names} == {show(disk).identity}
    assert show(tmp_path / "hard.img").identity == show(image).identity
    assert [part.name for part in show(tmp_path / "hard.img").walk()][1] == str(disk)


def test_who_holds_a_disk_exclusively_is_a_use(
    image: Path, show: Callable[[object], Thing]
) -> None:
    with loop_device(image) as node:
        holder = os.open(node, os.O_RDONLY | os.O_EXCL)
        try:
            thing, file = show(node), show(image)
        finally:
            os.close(holder)
    assert codes(thing)[str(node)] == [Code.OPEN_EXCLUSIVELY]
    assert codes(file) == {
        str(image): [Code.HAS_HOLDERS],
        str(node): [Code.OPEN_EXCLUSIVELY],
    }
    assert thing.kind is ThingKind.LOOP


def test_a_file_and_a_directory_have_an_identity_that_a_name_cannot_fake(
    tmp_path: Path, show: Callable[[object], Thing]
) -> None:
    path = disk_image(tmp_path / "c.img", 1, "x")
    first = show(path).identity
    path.rename(tmp_path / "d.img")
    disk_image(path, 1, "y")
    assert first == show(tmp_path / "d.img").identity != show(path).identity
    assert (show(tmp_path).kind, show(tmp_path).uses) == (ThingKind.DIRECTORY, ())
    assert show(tmp_path).identity


@pytest.mark.skipif(not VIRTIOFSD.exists(), reason="needs a virtiofsd")
def test_a_directory_that_somebody_else_shares_says_so(
    tmp_path: Path, show: Callable[[object], Thing]
) -> None:
    """Also another vmplug, whose journal nobody reads here."""
    directory = tmp_path / "shared"
    directory.mkdir()
    daemon = VirtiofsdSpec(
        program=str(VIRTIOFSD),
        options=ask_options(str(VIRTIOFSD)),
        directory=str(directory),
        cache="auto",
        read_only=False,
        file_id=file_id(directory.stat()),
    )
    others, device_id = HostVirtiofsdRunner(f"{tmp_path}/other/qmp.sock"), "0123456789abcdef"
    try:
        with others.start(daemon, device_id):
            uses = show(directory).uses
            assert {use.code for use in uses} == {Code.OPEN_BY_PROCESS}
            assert any("(virtiofsd)" in use.who for use in uses), uses
            assert {use.severity for use in uses} == {Severity.WARNING}
    finally:
        others.end([device_id])
    assert show(directory).uses == ()
    assert any("NFS" in unknown for unknown in show(directory).unknown)


def test_the_name_of_a_loop_devices_file_is_not_taken_for_the_file(
    image: Path, tmp_path: Path, show: Callable[[object], Thing]
) -> None:
    with loop_device(image) as node:
        (file,) = show(node).made_of
        assert (file.identity, file.unknown) == (show(image).identity, ())
        other = disk_image(tmp_path / "other.img", 1, "y")
        subprocess.run(["mount", "--bind", str(other), str(image)], check=True)
        try:
            (file,), mounted = show(node).made_of, show(image)
        finally:
            subprocess.run(["umount", str(image)], check=True)
    assert (file.name, file.identity, file.size_bytes) == (str(image), None, None)
    assert "no name that vmplug can see leads to it" in file.unknown[0]
    assert (mounted.made_of, mounted.size_bytes) == ((), 1 << 20)


def test_a_file_below_dev_is_a_file(show: Callable[[object], Thing]) -> None:
    with TemporaryDirectory(dir="/dev/shm") as directory:
        path = disk_image(Path(directory) / "a.img", 1, "x")
        assert (show(path).kind, show(path).name) == (ThingKind.FILE, str(path))
