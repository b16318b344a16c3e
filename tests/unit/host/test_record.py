"""Records of hosts: written whole, read back as the same host, and nothing else let in."""

import gzip
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from tests.support.pci_tree import CONFIG_CUT, CONFIG_PCIE, FLAGS_MEM64, PciTree
from tests.support.tree import GIB
from vmplug.devnum import DevNum
from vmplug.errors import AttributeReadError, DeviceError, SpecError
from vmplug.host.block.usage import read_usage
from vmplug.host.check.device import check_device
from vmplug.host.finding import Access, Code, Finding
from vmplug.host.inventory import HostFunction, Inventory, read_inventory, with_reset_methods
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.host.record import read
from vmplug.host.record.read import LIMITS, Limits, read_record
from vmplug.host.record.write import write_record
from vmplug.host.resolve import resolve
from vmplug.host.root import HostRoot, node_number
from vmplug.oci.info import DeviceInfo, DevType

NVME, NIC, GPU = "0000:3b:00.0", "0000:3c:00.0", "0000:00:02.0"
NOBODY = 65534
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    return PciTree(tmp_path / "host")


@pytest.fixture
def host(tree: PciTree) -> PciTree:
    """A host with something of every kind."""
    tree.pci_function("0000:00:1c.0", class_code=0x060400, driver="pcieport", group=1)
    bars = {0: (1 << 40, 16 * GIB, FLAGS_MEM64)}
    tree.pci_function(NVME, below="0000:00:1c.0", driver="nvme", group=26, bars=bars, numa_node=1)
    tree.pci_disk(NVME, "259:0", "nvme0n1", partitions={"259:1": "nvme0n1p1"})
    tree.mount("/dev/nvme0n1p1", r"/srv/my\040disk", "259:1").swap("/dev/sda")
    tree.mount("/dev/nvme0n1p1", "/two", "259:1", pid=77, namespace="mnt:[4026532000]")
    tree.pci_function(NIC, class_code=0x020000, driver="ixgbe", group=27, config=CONFIG_CUT)
    tree.sriov(NIC, "0000:3c:10.0", group=28).network(NIC, "eth0", uppers=("eth0.7",))
    tree.route("eth0").route6("eth0").address6("eth0", "2001" + "0" * 28, scope=0)
    tree.pci_function(GPU, class_code=0x030000, driver="i915", group=0, boot_vga="1\n")
    tree.mdev_type(GPU, "i915-1", title="GVTg").mdev(UUID, GPU, "i915-1", group=40)
    tree.vfio_group(26).vfio_cdev(NVME, 0).pmem("namespace0.0")
    tree.block_device("8:0", "sda", partitions={"8:1": "sda1"}).hold("sda1", "dm-0")
    tree.block_device("254:0", "dm-0").char_device("10:229", "fuse")
    tree.block_device("8:16", "sdb").file("/sys/power/resume", "8:16\n")
    tree.block_device("8:32", "sdc").file("/sys/class/block/sdc/bcache/set/stop")
    tree.file("/sys/fs/bcache/register")
    loop = {"backing_file": "/images/a.img\n", "offset": "0\n", "sizelimit": "0\n"}
    return tree.block_device("7:0", "loop0", loop=loop)


def look(root: HostRoot) -> Inventory:
    inventory = read_inventory(root)
    return structs.replace(
        inventory, pci=tuple(with_reset_methods(entry, root) for entry in inventory.pci)
    )


Answers = list[list[Finding] | str]


def check_all(root: HostRoot) -> Answers:
    """What speaks against every function and disk."""
    usage, wish = read_usage(root), Access(read_only=False)
    devices = [find_vfio_device(str(e.function.bdf), root) for e in read_inventory(root).pci]
    answers: Answers = []
    answers += [check_device(device, wish, usage=usage, root=root) for device in devices]
    for kind, directory in ((DevType.BLOCK, "block"), (DevType.CHAR, "char")):
        for number in root.list_dir(f"/sys/dev/{directory}"):
            info = DeviceInfo(container_path="/dev/x", dev_type=kind, devnum=DevNum.parse(number))
            try:
                answers.append(check_device(resolve(info, root), wish, usage=usage, root=root))
            except DeviceError as error:
                answers.append(error.message)
    return answers


def found_in(answers: Answers) -> list[Finding]:
    return [finding for each in answers if isinstance(each, list) for finding in each]


def known(answers: Answers) -> Answers:
    """The answers without what a record does not hold: the open files of processes."""
    return [
        [finding for finding in each if finding.code is not Code.UNKNOWN_USE]
        if isinstance(each, list)
        else each
        for each in answers
    ]


def record(tree: PciTree, name: str = "r.tar") -> Path:
    path = tree.path.parent / name
    write_record(str(path), tree.root)
    return path


def names_in(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


@pytest.mark.parametrize("name", ["r.tar", "r.tar.gz", "r.tgz"])
def test_what_is_read_out_of_a_record_is_what_the_host_says(host: PciTree, name: str) -> None:
    path = record(host, name)
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == (name != "r.tar")
    root = read_record(str(path))
    assert not root.is_live
    assert look(root) == look(host.root)
    found = check_all(root)
    assert known(found) == check_all(host.root)
    unknown = [f for f in found_in(found) if f.code is Code.UNKNOWN_USE]
    assert unknown
    assert all("(no /proc/PID/fd)" in f.message for f in unknown)


def test_an_empty_host_has_a_record(tree: PciTree) -> None:
    root = read_record(str(record(tree)))
    assert look(root) == Inventory()


def without_uses(inventory: Inventory) -> list[HostFunction]:
    """The PCI functions without what may begin and end between two looks."""
    return [structs.replace(function, uses=()) for function in inventory.pci]


def test_this_hosts_record_is_this_host(tmp_path: Path) -> None:
    """It is made again when disks have come or gone in between, as somebody's loop device."""
    live = HostRoot()
    for _ in range(20):
        write_record(str(tmp_path / "r.tar"), live, replace=True)
        found, expected = (look(root) for root in (read_record(str(tmp_path / "r.tar")), live))
        disks, their_disks = ([disk.name for disk in one.block] for one in (found, expected))
        if disks == their_disks:
            break
    assert disks == their_disks
    assert without_uses(found) == without_uses(expected)
    listed = subprocess.run(
        ["tar", "--list", "--file", tmp_path / "r.tar"], capture_output=True, check=True
    )
    names = [name.rstrip("/") for name in listed.stdout.decode().splitlines()]
    assert names == names_in(tmp_path / "r.tar")


# what is in it


def test_only_what_vmplug_reads_is_in_it(host: PciTree) -> None:
    host.file("/etc/shadow", "secret").file("/images/a.img", "secret").file("/proc/cmdline", "s")
    host.file("/proc/1/environ", "TOKEN=secret").file("/dev/shm/state", "secret")
    host.process(5, "qemu", "/images/a.img").link("/dev/vfio/9", "/etc/shadow")
    host.file("/sys/devices/pci0000:00/secret", "secret").file("/sys/kernel/notes", "secret")
    path = record(host)
    assert b"secret" not in path.read_bytes()
    assert b"shadow" not in path.read_bytes()
    tops = {name.partition("/")[0] for name in names_in(path)}
    assert tops == {"dev", "sys", "proc", "vmplug-record"}
    in_proc = {name for name in names_in(path) if name.startswith("proc/")}
    assert in_proc == {
        "proc/1/mountinfo",
        "proc/1/ns/mnt",
        "proc/77/mountinfo",
        "proc/77/ns/mnt",
        "proc/net/if_inet6",
        "proc/net/ipv6_route",
        "proc/net/route",
        "proc/swaps",
    }


def test_a_configuration_space_is_as_long_as_on_the_host(host: PciTree) -> None:
    root = read_record(str(record(host)))
    for bdf, length in ((NVME, CONFIG_PCIE), (NIC, CONFIG_CUT)):
        assert root.size(f"/sys/bus/pci/devices/{bdf}/config") == length


def test_a_second_process_of_a_mount_namespace_is_left_out(host: PciTree) -> None:
    host.mount("/dev/sda", "/three", "8:0", pid=78, namespace="mnt:[4026532000]")
    assert [name for name in names_in(record(host)) if name.startswith("proc/78")] == []


@pytest.mark.root
def test_nodes_are_facts(host: PciTree) -> None:
    host.node("/dev/sda", "b", "8:0").node("/dev/vfio/26", "c", "243:26")
    path = record(host)
    with tarfile.open(path) as tar:
        assert tar.getmember("dev/sda").isblk()
        assert tar.getmember("dev/vfio/26").ischr()
    root = read_record(str(path))
    status = root.stat("/dev/sda")
    assert status
    assert node_number(status) == DevNum(8, 0)
    assert root.stat_or_none("/dev/sda") == status
    assert root.read_at("/dev/sda", 0, 512) == b""
    assert known(check_all(root)) == check_all(host.root)


@pytest.mark.root
def test_files_that_cannot_be_read_are_told_and_stay_unreadable() -> None:
    """What another user than root may not read; the tree is where that user can reach it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        tree = PciTree(Path(directory) / "host")
        tree.pci_function(GPU, driver="i915").pci_function(NVME, driver="nvme")
        path = f"{tree.real(GPU)}/resource"
        (tree.path / path[1:]).chmod(0)
        os.chmod(directory, 0o777)
        answer = Path(directory) / "answer"
        child = os.fork()
        if not child:
            status = 1
            try:
                os.setresuid(NOBODY, NOBODY, NOBODY)
                done = write_record(f"{directory}/r.tar", tree.root)
                answer.write_text(repr((look(tree.root), done.unreadable)))
                status = 0
            finally:
                os._exit(status)  # it must never go on with the tests
        assert os.waitpid(child, 0)[1] == 0
        assert "resource" not in repr(look(tree.root))
        root = read_record(f"{directory}/r.tar")
        sentence = f"{path}: Permission denied"
        assert repr((look(root), (sentence,))) == answer.read_text()
        good, bad = sorted(read_inventory(root).pci, key=lambda e: e.function.unreadable)
        assert (good.function.driver, bad.function.driver) == ("nvme", "i915")
        assert bad.function.unreadable[0].endswith("resource: Permission denied")
        with pytest.raises(AttributeReadError, match="Permission denied"):
            root.read_attribute(path)


# writing


def test_a_file_that_is_there_is_not_replaced_unasked(host: PciTree, tmp_path: Path) -> None:
    path = tmp_path / "mine.tar"
    path.write_text("mine")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SpecError, match="already exists") as refused:
        write_record(str(path), host.root)
    assert refused.value.hint
    assert (path.read_text(), sorted(tmp_path.iterdir())) == ("mine", before)
    write_record(str(path), host.root, replace=True)
    assert sorted(tmp_path.iterdir()) == before
    assert path.stat().st_mode & 0o777 == 0o600
    root = read_record(str(path))
    assert look(root) == look(host.root)


def test_a_link_that_leads_nowhere_is_there_too(host: PciTree, tmp_path: Path) -> None:
    (tmp_path / "mine.tar").symlink_to("elsewhere")
    with pytest.raises(SpecError, match="already exists"):
        write_record(str(tmp_path / "mine.tar"), host.root)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["nowhere/r.tar", "host/sys/class/block/sda/dev/r.tar"])
def test_a_place_that_cannot_be_written_is_told(host: PciTree, tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match="the record cannot be written: No"):
        write_record(str(tmp_path / name), host.root)


# files from anybody

Make = Callable[[tarfile.TarFile], None]


def member(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **more: Any) -> Make:
    def add(tar: tarfile.TarFile) -> None:
        header = tarfile.TarInfo(name)
        header.type, header.size = kind, len(data)
        for key, value in more.items():
            setattr(header, key, value)
        tar.addfile(header, io.BytesIO(data))

    return add


def link(name: str, target: str) -> Make:
    return member(name, tarfile.SYMTYPE, linkname=target)


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., str]:
    def make(*members: Make, format: int = tarfile.PAX_FORMAT) -> str:  # noqa: A002
        path = tmp_path / "made.tar"
        with tarfile.open(path, "w", format=format) as tar:
            for add in members:
                add(tar)
        return str(path)

    return make


@pytest.fixture(autouse=True)
def _leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a directory for temporary files that no other test has."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    yield
    assert list(directory.iterdir()) == []


def refused(path: str, limits: Limits = LIMITS) -> str:
    with pytest.raises(SpecError) as error:
        read_record(path, limits)
    assert error.value.hint
    return error.value.message


def test_a_tar_file_by_tar_itself_is_a_host_too(host: PciTree, tmp_path: Path) -> None:
    for names in (["."], ["sys", "proc"]):
        options = ["--create", "--file", str(tmp_path / "t.tar"), "--directory", str(host.path)]
        subprocess.run(["tar", *options, *names], check=True)
        root = read_record(str(tmp_path / "t.tar"))
        assert look(root) == look(host.root)


@pytest.mark.parametrize("name", ["../evil", "sys/../../evil", "/etc/evil", "sys/..", ".."])
def test_a_name_that_leaves_the_directory_is_refused(made: Callable[..., str], name: str) -> None:
    message = refused(made(member("sys/good"), member(name, data=b"x")))
    assert f"member {name!r} would leave the directory" in message


def test_a_fifo_is_no_record_and_nobody_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "cannot be read as a tar file" in refused(str(tmp_path / "fifo"))


def extension(kind: bytes, data: bytes, *, size: int | None = None) -> bytes:
    """A header that says something of the one behind it."""
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, len(data) if size is None else size
    return header.tobuf(tarfile.USTAR_FORMAT) + data.ljust(-(-len(data) // 512) * 512, b"\0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (extension(tarfile.XHDTYPE, b"8 a=bcd\n") * 3000, "more than 8 extensions"),
        (extension(tarfile.GNUTYPE_LONGNAME, b"a") * 3000, "more than 8 extensions"),
        (extension(tarfile.XHDTYPE, b"22 GNU.sparse.map=1,a\n"), "is not a file, a link"),
        (extension(tarfile.XHDTYPE, b"99 path=a\n"), "no pax header"),
        (extension(tarfile.XHDTYPE, b"12 size=1x8\n"), "invalid literal"),
        (extension(tarfile.XHDTYPE, b"11 size=-1\n"), "is larger than"),
        (
            extension(tarfile.XHDTYPE, b"x", size=1 << 17),
            "131072 bytes are announced for one member",
        ),
        (extension(tarfile.GNUTYPE_LONGNAME, b"x", size=1 << 32), "are announced for one member"),
    ],
)
def test_headers_that_make_no_sense_are_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "r.tar"
    path.write_bytes(content + extension(tarfile.REGTYPE, b""))
    assert message in refused(str(path))


@pytest.mark.parametrize(
    "links",
    [
        [("sys/x", "/etc/passwd")],
        [("sys/x", "../../etc/passwd")],
        [("sys/x", "..//./../etc")],
        [("x", "..")],
        [("sys/a/b/up", "../../.."), ("sys/x", "a/b/up/../etc")],
        [("sys/x", "y/../.."), ("sys/y", "../sys")],
        [("sys/x", "y"), ("sys/y", "/etc")],
        [("sys/x", "")],
    ],
)
def test_a_link_that_leads_out_is_refused(
    made: Callable[..., str], links: list[tuple[str, str]]
) -> None:
    assert "leads out of the record" in refused(made(*(link(*each) for each in links)))


@pytest.mark.parametrize(
    "target", ["a/b", "../sys/a", "../sys/../sys/a/b", "nowhere", "x", "../proc/none/x"]
)
def test_a_link_that_stays_inside_is_made(made: Callable[..., str], target: str) -> None:
    path = made(member("sys/a/b", data=b"1\n"), member("proc/z"), link("sys/x", target))
    root = read_record(path)
    assert root.read_link("/sys/x") == target


def test_nothing_is_written_through_a_link(made: Callable[..., str], tmp_path: Path) -> None:
    through = (link("sys/x", str(tmp_path)), member("sys/x/evil", data=b"x"))
    for members in (through, through[::-1]):
        refused(made(*members))
    assert not (tmp_path / "evil").exists()
    twice = (link("sys/x", "y"), member("sys/x", data=b"x"))
    for members in (twice, twice[::-1]):
        assert "appears twice" in refused(made(*members))


def test_a_member_that_is_a_directory_and_a_file_is_refused(made: Callable[..., str]) -> None:
    assert "something else" in refused(made(member("sys/a"), member("sys/a/b")))
    assert "appears twice" in refused(made(member("sys/a/b"), member("sys/a")))


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE])
def test_other_kinds_of_members_are_refused(made: Callable[..., str], kind: bytes) -> None:
    good = member("sys/good", data=b"1")
    message = refused(made(good, member("sys/x", kind, linkname="sys/good")))
    assert "is not a file, a link or a device node" in message


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(GIB)
    command = ["tar", "--create", "--sparse", "--file", "t.tar", "holes"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "t.tar").stat().st_size < 1 << 20
    refused(str(tmp_path / "t.tar"))


def test_a_device_node_is_only_known(made: Callable[..., str]) -> None:
    null = member("dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
    root = read_record(made(null))
    status = root.stat("/dev/null")
    assert status
    assert node_number(status) == DevNum(1, 3)


@pytest.mark.parametrize("numbers", [(4096, 0), (0, 1 << 20), (1 << 40, 0), (-1, 0)])
def test_a_device_number_that_no_kernel_has_is_refused(
    made: Callable[..., str], numbers: tuple[int, int]
) -> None:
    major, minor = numbers
    made_by_hand = member("dev/x", tarfile.BLKTYPE, devmajor=major, devminor=minor)
    path = made(made_by_hand, format=tarfile.GNU_FORMAT)
    assert "has no device number" in refused(path)


def test_what_lies_too_deep_is_refused(made: Callable[..., str]) -> None:
    root = read_record(made(member("sys/" + "a/" * 60 + "b", data=b"1\n")))
    assert root.read_attribute("/sys" + "/a" * 60 + "/b") == b"1\n"
    for depth in (64, 2000, 30_000):
        assert "is nested deeper" in refused(made(member("sys/" + "a/" * depth + "b")))
    assert "File name too long" in refused(made(member("sys/" + "a" * 300)))


def test_a_nul_in_a_name_or_a_link_is_refused(made: Callable[..., str]) -> None:
    name = member("sys/x", pax_headers={"path": "sys/a\0b"})
    assert "would leave" in refused(made(name))
    target = member("sys/x", tarfile.SYMTYPE, pax_headers={"linkpath": "a\0b"})
    assert "leads out" in refused(made(target))


def test_what_is_too_large_or_too_many_is_refused(made: Callable[..., str]) -> None:
    path = made(member("sys/a", data=b"x" * 100), member("sys/b", data=b"y"))
    enough = Limits(members=2, file_bytes=100, whole_bytes=1 << 20)
    root = read_record(path, enough)
    assert root.read_attribute("/sys/b") == b"y"
    assert "holds more than 1 members" in refused(path, structs.replace(enough, members=1))
    assert "is larger than 99 bytes" in refused(path, structs.replace(enough, file_bytes=99))
    assert "unpacks to more than 1000 bytes" in refused(
        path, structs.replace(enough, whole_bytes=1000)
    )


def test_a_small_member_that_names_many_directories_is_counted_with_all_of_them(
    made: Callable[..., str],
) -> None:
    path = made(*(member(f"{i}/" + "long/" * 60 + "x") for i in range(4)))
    enough = Limits(path_bytes=4 * 61 * 60 * 5)
    assert read_record(path, enough).list_dir("/") == ["0", "1", "2", "3"]
    half = structs.replace(enough, path_bytes=enough.path_bytes // 4)
    assert "has paths of more than" in refused(path, half)


def test_a_link_that_leads_through_a_crowd_of_names_is_not_followed(
    made: Callable[..., str],
) -> None:
    """Each of a million links could lead through forty of them."""
    assert read_record(made(member("sys/a"), link("sys/x", "./" * 200 + "a"))).stat("/sys/x")
    chain = [link(f"sys/{i}", "./" * 200 + str(i + 1)) for i in range(10)]
    assert "leads through too many directories" in refused(made(*chain))


def test_a_small_file_that_unpacks_to_a_lot_is_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("sys/a")
    header.size = 8 << 20
    with gzip.open(tmp_path / "bomb.tgz", "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT) + bytes(8 << 20))
    message = refused(str(tmp_path / "bomb.tgz"), Limits(file_bytes=8 << 20, whole_bytes=4 << 20))
    assert "unpacks to more than" in message


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"x" * 5000, b"\x1f\x8b", b"\x1f\x8bjunk" * 100, b"{}\n" * 1000],
)
def test_what_is_no_tar_file_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    assert "cannot be read as a tar file" in refused(str(tmp_path / "x.tar"))


@pytest.mark.parametrize("name", ["r.tar", "r.tgz"])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.9])
def test_a_record_that_is_cut_short_is_told(host: PciTree, name: str, part: float) -> None:
    path = record(host, name)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    refused(str(path))


def test_a_record_cut_between_two_members_is_told(host: PciTree) -> None:
    path = record(host)
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[20].offset
    path.write_bytes(path.read_bytes()[:offset])
    assert "is truncated: it has 19 of" in refused(str(path))


def test_a_record_of_a_later_format_is_told(made: Callable[..., str]) -> None:
    assert "is a record of format '2'" in refused(made(member(read.NOTE, data=b"format 2\n")))
    read_record(made(member(read.NOTE, data=b"format 1\nmore words\n")))


@pytest.mark.parametrize("number", ["", "x", "-1", "99999"])
def test_an_error_that_is_none_is_refused(made: Callable[..., str], number: str) -> None:
    headers = {read.ERRNO_KEYWORD: number or " "}
    assert "has the error" in refused(made(member("sys/x", pax_headers=headers)))


def test_names_that_are_not_utf8_are_kept(made: Callable[..., str]) -> None:
    root = read_record(made(member("sys/caf\udce9", data=b"1\n")))
    assert root.read_attribute("/sys/caf\udce9") == b"1\n"
    assert root.list_dir("/sys") == ["caf\udce9"]


def test_a_file_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    assert "No such file" in refused(str(tmp_path / "none.tar"))


def test_a_function_costs_few_looks_at_links(tmp_path: Path) -> None:
    """Paths to it lead through the same directories again and again."""

    def links_read(count: int) -> int:
        tree = PciTree(tmp_path / str(count))
        for number in range(count):
            tree.pci_function(f"0000:3b:{number:02x}.0", driver="nvme", group=number)
        calls = Counter[bool]()
        sys.setprofile(lambda _frame, _event, what: calls.update([what is os.readlink]))
        try:
            record(tree, f"{count}.tar")
        finally:
            sys.setprofile(None)
        return calls[True]  # as each call begins, and as it ends

    assert (links_read(12) - links_read(2)) / 10 < 2 * 40
