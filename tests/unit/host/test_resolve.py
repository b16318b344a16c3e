"""DeviceInfo -> HostDevice below any root: the kernel's own words, and nothing guessed."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from tests.support.tree import GIB, HostTree
from vmplug.devnum import DevNum
from vmplug.errors import AttributeReadError, HostError, NoSuchDevice
from vmplug.host.block.device import BlockDevice, DiskFile, DiskPart
from vmplug.host.block.volumes import find_volumes
from vmplug.host.device import CharDevice, HostDevice
from vmplug.host.file_id import file_id
from vmplug.host.host_path import HostPathCache, get_host_path
from vmplug.host.kind import DeviceType, FoundBy, Identity
from vmplug.host.resolve import classify, resolve, resolve_all
from vmplug.host.root import HostRoot
from vmplug.host.vhost_user.device import VhostUserSocket
from vmplug.host.vhost_user.store import VhostUserStore
from vmplug.oci.info import DeviceInfo, DevType, Mount


def want(dev_type: str, number: str | None, path: str = "/dev/wanted") -> DeviceInfo:
    devnum = DevNum.parse(number) if number else None
    return DeviceInfo(container_path=path, dev_type=DevType(dev_type), devnum=devnum)


def want_file(path: str) -> DeviceInfo:
    return DeviceInfo(container_path="/dev/vda", dev_type=DevType.BLOCK, host_path=path)


def block(tree: HostTree, number: str = "8:0") -> BlockDevice:
    device = resolve(want("b", number), tree.root)
    assert isinstance(device, BlockDevice)
    return device


# The kernel's name


@pytest.mark.parametrize("dev_type", ["b", "c", "u"])
def test_the_kernels_name_is_taken_whatever_the_container_calls_it(
    tree: HostTree, dev_type: str
) -> None:
    tree.block_device("8:0", "sda").char_device("8:0", "other")
    expected = "/dev/sda" if dev_type == "b" else "/dev/other"
    assert get_host_path(want(dev_type, "8:0", "/dev/elsewhere"), tree.root) == expected


@pytest.mark.parametrize(
    "devname",
    [
        "vfio/12",
        "bus/usb/001/002",
        "a;b",
        "a#b",
        "a b",
        " a",
        "a=b",
        'a"b"',
        "a:b",
        "a\\",
        "%(X)s",
        "[x]",
        "..a",
        "a..b",
        "é",
    ],
)
def test_every_character_of_the_name_is_kept(tree: HostTree, devname: str) -> None:
    tree.file("/sys/dev/char/10:7/uevent", f"MAJOR=10\nMINOR=7\nDEVNAME={devname}\n")
    assert get_host_path(want("c", "10:7"), tree.root) == f"/dev/{devname}"


@pytest.mark.parametrize(
    "uevent",
    [
        "DEVNAME=x\n",
        "DEVNAME=x",
        "MAJOR=10\nDEVNAME=x\nDEVMODE=0666\n",
        "XDEVNAME=y\nDEVNAME=x\nDEVNAMEX=y\n",
        "PRODUCT=a DEVNAME=y\nDEVNAME=x\n",
        "# DEVNAME=y\n[section]\nno delimiter\nDEVNAME=x\n",
    ],
)
def test_the_name_is_one_line_among_others(tree: HostTree, uevent: str) -> None:
    tree.file("/sys/dev/char/10:7/uevent", uevent)
    assert get_host_path(want("c", "10:7"), tree.root) == "/dev/x"


@pytest.mark.parametrize(
    ("uevent", "message"),
    [
        (b"", "it has no DEVNAME"),
        (b"MAJOR=10\nMINOR=7\n", "it has no DEVNAME"),
        (b"devname=x\n DEVNAME=x\n", "it has no DEVNAME"),
        (b"DEVNAME=\n", "is not a name below /dev"),
        (b"DEVNAME=/etc/passwd\n", "is not a name below /dev"),
        (b"DEVNAME=../etc/passwd\n", "is not a name below /dev"),
        (b"DEVNAME=vfio/../../etc/passwd\n", "is not a name below /dev"),
        (b"DEVNAME=vfio/..\n", "is not a name below /dev"),
        (b"DEVNAME=..\n", "is not a name below /dev"),
        (b"DEVNAME=a\0b\n", "is not a name below /dev"),
        (b"DEVNAME=a\rb\n", "is not a name below /dev"),
        (b"DEVNAME=a\xff\n", "is not a name below /dev"),
    ],
)
def test_a_name_that_is_none_is_refused_and_not_guessed_from_the_container_path(
    tree: HostTree, uevent: bytes, message: str
) -> None:
    tree.file("/sys/dev/char/10:7/uevent", uevent)
    with pytest.raises(AttributeReadError, match=message) as caught:
        get_host_path(want("c", "10:7"), tree.root)
    assert caught.value.path == "/sys/dev/char/10:7/uevent"
    assert caught.value.errno is None


def test_an_entry_that_cannot_be_read_is_not_an_absent_one(tree: HostTree) -> None:
    tree.link("/sys/dev/char/10:7", "10:7")
    with pytest.raises(AttributeReadError, match="Too many levels") as caught:
        get_host_path(want("c", "10:7"), tree.root)
    assert caught.value.errno


def test_the_number_of_one_kind_is_not_the_number_of_another(tree: HostTree) -> None:
    tree.char_device("8:0", "other")
    with pytest.raises(NoSuchDevice, match="no block device 8:0 on this host"):
        get_host_path(want("b", "8:0"), tree.root)


# Without an entry in sysfs


def test_nothing_at_all_is_said_with_what_was_looked_for(tree: HostTree) -> None:
    with pytest.raises(NoSuchDevice) as caught:
        get_host_path(want("c", "10:7"), tree.root)
    assert (caught.value.wanted, caught.value.found) == ("char device 10:7", "nothing")
    assert caught.value.hint
    assert "at /dev/wanted there is nothing" in caught.value.message


def test_something_else_at_the_container_path_is_named_and_not_used(tree: HostTree) -> None:
    tree.file("/dev/file").node("/dev/pipe", "p").node("/dev/socket", "s")
    for path, found in (
        ("/dev", "a directory"),
        ("/dev/file", "a regular file"),
        ("/dev/pipe", "a FIFO"),
        ("/dev/socket", "a socket"),
    ):
        with pytest.raises(NoSuchDevice) as caught:
            get_host_path(want("c", "10:7", path), tree.root)
        assert caught.value.found == found


def test_a_fifo_is_found_at_the_container_path(tree: HostTree) -> None:
    tree.node("/dev/pipe", "p").file("/dev/file")
    device = resolve(want("p", None, "/dev/pipe"), tree.root)
    assert isinstance(device, CharDevice)
    assert (device.host_path, device.identity) == ("/dev/pipe", Identity.parse("fifo:/dev/pipe"))
    assert (device.kind, device.found_by) == (DeviceType.GENERIC, FoundBy.CONTAINER_PATH)
    with pytest.raises(NoSuchDevice, match="is a regular file"):
        resolve(want("p", None, "/dev/file"), tree.root)


def test_a_type_without_a_directory_in_sysfs_reads_nothing_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("uevent", "p/uevent", "None/uevent", "sys/dev/None/uevent"):
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("DEVNAME=evil\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoSuchDevice):
        get_host_path(want("p", None, str(tmp_path / "absent")), HostRoot("/"))


@pytest.mark.root
@pytest.mark.parametrize(("dev_type", "node"), [("c", "c"), ("u", "c"), ("b", "b")])
def test_a_node_of_the_very_type_and_number_stands_in_for_sysfs(
    tree: HostTree, dev_type: str, node: str
) -> None:
    tree.node("/dev/wanted", node, "10:300")
    device = resolve(want(dev_type, "10:300"), tree.root)
    assert device.host_path == "/dev/wanted"
    assert device.found_by is FoundBy.CONTAINER_PATH


@pytest.mark.root
def test_a_node_found_without_sysfs_has_no_facts(tree: HostTree) -> None:
    tree.node("/dev/wanted", "b", "8:0")
    assert block(tree).size_bytes is None


@pytest.mark.root
@pytest.mark.parametrize(
    ("dev_type", "node", "number"),
    [("c", "c", "10:44"), ("c", "c", "11:300"), ("c", "b", "10:300"), ("b", "c", "10:300")],
)
def test_a_node_of_another_type_or_number_is_not_used(
    tree: HostTree, dev_type: str, node: str, number: str
) -> None:
    tree.node("/dev/wanted", node, number)
    kind = {"b": "block", "c": "char"}[node]
    with pytest.raises(NoSuchDevice) as caught:
        get_host_path(want(dev_type, "10:300"), tree.root)
    assert caught.value.found == f"{kind} device {number}"


@pytest.mark.root
def test_a_link_is_followed_inside_the_root_only(tree: HostTree) -> None:
    tree.link("/dev/wanted", "/dev/null")
    with pytest.raises(NoSuchDevice):
        get_host_path(want("c", "1:3"), tree.root)
    tree.node("/dev/null", "c", "1:3")
    assert get_host_path(want("c", "1:3"), tree.root) == "/dev/wanted"


# Facts of block devices


def test_a_disk_comes_with_its_facts(tree: HostTree) -> None:
    tree.block_device(
        "8:0",
        "sda",
        size_bytes=3 * GIB,
        removable=True,
        ro=True,
        sector_bytes=4096,
        holders=("dm-1", "dm-0"),
        partitions={"8:1": "sda1", "259:7": "sda2"},
    ).hold("sda2", "md0")
    assert block(tree) == BlockDevice(
        devnum=DevNum(8, 0),
        device_node="/dev/sda",
        found_by=FoundBy.SYSFS,
        sysfs_path="/sys/devices/virtual/block/sda",
        size_bytes=3 * GIB,
        sector_bytes=4096,
        read_only=True,
        removable=True,
        holders=("dm-0", "dm-1"),
        relatives=(
            DiskPart(DevNum(8, 1), "/dev/sda1"),
            DiskPart(DevNum(259, 7), "/dev/sda2", ("md0",)),
        ),
    )


def test_a_partition_knows_its_disk_and_takes_the_disks_facts_from_there(tree: HostTree) -> None:
    tree.block_device(
        "8:0",
        "sda",
        removable=True,
        sector_bytes=4096,
        holders=("dm-0",),
        partitions={"8:1": "sda1", "8:2": "sda2"},
    )
    part = block(tree, "8:1")
    assert part.host_path == "/dev/sda1"
    assert part.sysfs_path == "/sys/devices/virtual/block/sda/sda1"
    assert (part.size_bytes, part.sector_bytes, part.removable) == (GIB // 2, 4096, True)
    assert part.holders == ()
    assert part.relatives == (DiskPart(DevNum(8, 0), "/dev/sda", ("dm-0",)),)


def test_a_disk_of_a_directory_keeps_it_in_the_names_of_its_partitions(tree: HostTree) -> None:
    tree.block_device("104:0", "cciss!c0d0", partitions={"104:1": "cciss!c0d0p1"})
    disk = block(tree, "104:0")
    assert disk.host_path == "/dev/cciss/c0d0"
    assert [part.device_node for part in disk.relatives] == ["/dev/cciss/c0d0p1"]


def test_a_fact_that_a_copy_of_a_host_does_not_have_is_none(tree: HostTree) -> None:
    tree.block_device("8:0", "sda")
    full = block(tree)
    assert (full.sector_bytes, full.read_only, full.removable) == (512, False, False)
    assert full.holders == ()
    for name in ("queue/logical_block_size", "ro", "removable"):
        (tree.path / "sys/block/sda" / name).unlink()
    (tree.path / "sys/block/sda/holders").rmdir()
    cut = block(tree)
    assert cut.size_bytes == full.size_bytes
    assert (cut.sector_bytes, cut.read_only, cut.removable, cut.holders) == (None,) * 4


def copied(tree: HostTree, *lists: str) -> HostTree:
    """Only these lists of the kernel are left, each with directories in place of links."""
    tree.block_device("8:0", "sda", partitions={"8:1": "sda1"})
    shutil.rmtree(tree.path / "sys/dev/block")
    for directory in {"/sys/block", "/sys/class/block"} - set(lists):
        shutil.rmtree(tree.path / directory.lstrip("/"))
    return tree


@pytest.mark.parametrize("listed", ["/sys/block", "/sys/class/block"])
@pytest.mark.parametrize(("number", "node"), [("8:0", "/dev/sda"), ("8:1", "/dev/sda1")])
def test_a_block_device_that_only_a_class_lists_is_found(
    tree: HostTree, listed: str, number: str, node: str
) -> None:
    device = resolve(want("b", number), copied(tree, listed).root)
    assert isinstance(device, BlockDevice)
    assert (device.host_path, device.found_by) == (node, FoundBy.SYSFS)
    assert device.size_bytes
    with pytest.raises(NoSuchDevice):
        resolve(want("b", "8:9"), tree.root)


@pytest.mark.parametrize("uevent", [None, "", "MAJOR=8\nMINOR=0\n"])
@pytest.mark.parametrize(
    ("name", "node"), [("sda", "/dev/sda"), ("cciss!c0d0", "/dev/cciss/c0d0")]
)
def test_a_block_device_without_devname_is_called_as_its_directory(
    tree: HostTree, uevent: str | None, name: str, node: str
) -> None:
    tree.block_device("8:0", name)
    file = tree.path / f"sys/block/{name}/uevent"
    file.unlink()
    if uevent is not None:
        file.write_text(uevent)
    assert resolve(want("b", "8:0"), tree.root).host_path == node
    with HostPathCache(tree.root) as cache:
        assert cache.get_host_path(want("b", "8:0")) == node


def test_a_partition_that_goes_while_it_is_read_is_passed_over(tree: HostTree) -> None:
    tree.block_device("8:0", "sda", partitions={"8:1": "sda1", "8:2": "sda2"})
    (tree.path / "sys/block/sda/sda1/dev").unlink()
    assert [part.devnum for part in block(tree).relatives] == [DevNum(8, 2)]


@pytest.mark.parametrize(
    ("attribute", "content"),
    [("size", "big\n"), ("size", ""), ("ro", "yes\n"), ("sda1/dev", "8\n"), ("sda1/dev", "")],
)
def test_a_fact_that_makes_no_sense_is_refused_with_its_file(
    tree: HostTree, attribute: str, content: str
) -> None:
    tree.block_device("8:0", "sda", partitions={"8:1": "sda1"})
    tree.file(f"/sys/block/sda/{attribute}", content)
    with pytest.raises(AttributeReadError) as caught:
        block(tree)
    assert caught.value.path.endswith(f"/{attribute}")


def test_devices_with_the_same_bytes_know_of_each_other(tree: HostTree) -> None:
    tree.block_device("8:0", "sda", partitions={"8:1": "sda1"})
    disk, part = block(tree), block(tree, "8:1")
    assert part.identity in disk.related_identities
    assert disk.identity in part.related_identities


# Kinds


@pytest.mark.parametrize(
    ("dev_type", "number", "host_path", "kind"),
    [
        ("b", "8:0", "/dev/sda", DeviceType.BLOCK),
        ("b", "8:0", "/dev/vfio/12", DeviceType.BLOCK),
        ("b", "240:0", "/dev/x", DeviceType.BLOCK),
        ("b", "241:0", "/x", DeviceType.VHOST_USER_BLK),
        ("b", "242:0", "/x", DeviceType.VHOST_USER_SCSI),
        ("c", "241:0", "/dev/qat", DeviceType.GENERIC),
        ("c", "243:0", "/dev/vfio/12", DeviceType.VFIO),
        ("u", "243:0", "/dev/vfio/0", DeviceType.VFIO),
        ("c", "511:0", "/dev/vfio/devices/vfio0", DeviceType.VFIO),
        ("c", "10:196", "/dev/vfio/vfio", DeviceType.GENERIC),
        ("c", "243:0", "/dev/vfio/noiommu-0", DeviceType.GENERIC),
        ("c", "243:0", "/dev/vfio/12x", DeviceType.GENERIC),
        ("c", "243:0", "/dev/vfio/12\n", DeviceType.GENERIC),
        ("c", "243:0", "/dev/vfio/devices", DeviceType.GENERIC),
        ("c", "243:0", "/dev/vfio/devicesX/vfio0", DeviceType.GENERIC),
        ("c", "511:0", "/dev/vfio/devices/foo", DeviceType.GENERIC),
        ("c", "511:0", "/dev/vfio/devices/vfiovfio3", DeviceType.GENERIC),
        ("c", "243:0", "/dev/vfio//5", DeviceType.GENERIC),
        ("c", "243:0", "/dev/vfio/../sda", DeviceType.GENERIC),
        ("c", "243:0", "/x/dev/vfio/12", DeviceType.GENERIC),
        ("c", "10:229", "/dev/fuse", DeviceType.GENERIC),
        ("p", None, "/dev/vfio/12", DeviceType.GENERIC),
    ],
)
def test_the_kind_follows_from_type_number_and_host_path(
    dev_type: str, number: str | None, host_path: str, kind: DeviceType
) -> None:
    assert classify(want(dev_type, number), host_path, VhostUserStore("/store")) is kind


def test_without_a_store_its_numbers_are_block_devices_like_others() -> None:
    assert classify(want("b", "241:0"), "/dev/x") is DeviceType.BLOCK
    assert classify(want("b", "242:0"), "/dev/x") is DeviceType.BLOCK


def test_a_vfio_group_is_told_by_its_host_path_and_not_by_the_containers(tree: HostTree) -> None:
    tree.char_device("243:0", "vfio/12").char_device("10:229", "fuse")
    group = resolve(want("c", "243:0", "/dev/renamed"), tree.root)
    fuse = resolve(want("c", "10:229", "/dev/vfio/12"), tree.root)
    assert (group.kind, group.identity) == (DeviceType.VFIO, Identity.parse("vfio:12"))
    assert (fuse.kind, fuse.host_path) == (DeviceType.GENERIC, "/dev/fuse")
    assert fuse.found_by is FoundBy.SYSFS


# Regular files


def test_a_regular_file_goes_by_its_canonical_path(tree: HostTree) -> None:
    tree.file("/srv/images/a.img", b"x" * 1000)
    tree.link("/srv/absolute", "/srv/images/a.img").link("/srv/relative", "images/../images/a.img")
    for spelling in (
        "/srv/images/a.img",
        "/srv//images/./a.img",
        "/srv/absolute",
        "/srv/relative",
    ):
        device = resolve(want_file(spelling), tree.root)
        assert isinstance(device, DiskFile)
        assert (device.host_path, device.size_bytes) == ("/srv/images/a.img", 1000)
        assert device.identity == Identity.parse("file:/srv/images/a.img")
        assert (device.read_only, device.qcow2, device.found_by) == (False, None, FoundBy.FILE)


def test_a_link_out_of_the_root_leads_to_nothing_although_the_file_is_there(
    tree: HostTree, tmp_path: Path
) -> None:
    outside = tmp_path / "outside.img"
    outside.write_bytes(b"secret")
    tree.link("/up", "../outside.img").link("/absolute", str(outside)).file("/x")
    for path in ("/up", "/absolute", "/../outside.img"):
        with pytest.raises(NoSuchDevice) as caught:
            resolve(want_file(path), tree.root)
        assert caught.value.found == "nothing"


def test_a_root_is_not_confused_with_its_longer_named_neighbour(tmp_path: Path) -> None:
    inside, neighbour = HostTree(tmp_path / "a"), HostTree(tmp_path / "ab")
    neighbour.file("/image")
    inside.link("/image", "../ab/image")
    assert inside.root.real_path("/image") == "/ab/image"


@pytest.mark.parametrize(
    ("path", "found"),
    [("/absent", "nothing"), ("/dir", "a directory"), ("/pipe", "a FIFO"), ("image", "nothing")],
)
def test_anything_but_a_regular_file_at_an_absolute_path_is_no_disk(
    tree: HostTree, path: str, found: str
) -> None:
    tree.file("/dir/x").node("/pipe", "p").file("/image")
    with pytest.raises(NoSuchDevice) as caught:
        resolve(want_file(path), tree.root)
    assert (caught.value.found, caught.value.wanted) == (found, f"file {path}")


@pytest.mark.root
def test_a_device_node_given_as_a_file_is_refused_by_its_number(tree: HostTree) -> None:
    tree.node("/dev/sda", "b", "8:0")
    with pytest.raises(NoSuchDevice, match="found block device 8:0, expected a regular file"):
        resolve(want_file("/dev/sda"), tree.root)


def test_a_circle_of_links_is_an_error_of_the_host(tree: HostTree) -> None:
    tree.link("/a", "b").link("/b", "a")
    with pytest.raises(AttributeReadError, match="Too many levels"):
        resolve(want_file("/a"), tree.root)


# Many at once


def test_one_bad_device_does_not_hide_the_others(tree: HostTree) -> None:
    tree.block_device("8:0", "sda").char_device("10:229", "fuse").file("/image", b"x")
    tree.file("/sys/dev/char/10:7/uevent", "").link("/loop", "loop")
    answers = resolve_all(
        [
            want("b", "8:16"),
            want("b", "8:0"),
            want("c", "10:7"),
            want("c", "10:229"),
            want_file("/loop"),
            want_file("/image"),
        ],
        tree.root,
    )
    assert [summary(answer) for answer in answers] == [
        "NoSuchDevice",
        "/dev/sda",
        "AttributeReadError",
        "/dev/fuse",
        "AttributeReadError",
        "/image",
    ]


def test_a_store_that_is_not_there_only_concerns_its_own_devices(tree: HostTree) -> None:
    tree.block_device("8:0", "sda").char_device("241:0", "qat")
    store = VhostUserStore("/var/run/store", root=tree.root)
    wanted = [want("b", "241:0"), want("b", "8:0"), want("c", "241:0"), want("b", "242:0")]
    answers = resolve_all(wanted, tree.root, store)
    assert [summary(answer) for answer in answers] == [
        "NoSuchDevice",
        "/dev/sda",
        "/dev/qat",
        "NoSuchDevice",
    ]


@pytest.mark.root
def test_a_batch_answers_as_one_by_one_would(tree: HostTree) -> None:
    tree.block_device("8:0", "sda").char_device("241:0", "qat")
    for name, number in (("blk", "241:0"), ("scsi", "242:300"), ("deaf", "241:1")):
        tree.node(f"/store/block/devices/{name}", "b", number)
    tree.node("/store/block/sockets/blk", "s").node("/store/block/sockets/scsi", "s")
    store = VhostUserStore("/store", root=tree.root)
    wanted = [
        want("b", "241:0"),
        want("b", "8:0"),
        want("b", "242:300"),
        want("b", "241:1"),
        want("b", "241:2"),
        want("c", "241:0"),
        want_file("/absent"),
    ]
    batch = resolve_all(wanted, tree.root, store)
    assert [summary(answer) for answer in batch] == [
        summary(answer_one(info, tree.root, store)) for info in wanted
    ]
    assert batch[0] == VhostUserSocket(
        kind=DeviceType.VHOST_USER_BLK,
        devnum=DevNum(241, 0),
        socket_path="/store/block/sockets/blk",
        file_id=file_id((tree.path / "store/block/sockets/blk").stat()),
    )
    assert summary(batch[2]) == "/store/block/sockets/scsi"


def answer_one(info: DeviceInfo, root: HostRoot, store: VhostUserStore) -> HostDevice | HostError:
    try:
        return resolve(info, root, store)
    except HostError as error:
        return error


def summary(answer: HostDevice | HostError) -> str:
    return type(answer).__name__ if isinstance(answer, HostError) else answer.host_path


# Volumes


def bind(source: str, *, kind: str | None = "bind", read_only: bool = False) -> Mount:
    return Mount(destination="/dev/xvda", source=source, type=kind, read_only=read_only)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["bind", "none", "", None])
def test_a_block_device_that_is_bound_into_a_container_is_asked_for(
    tree: HostTree, kind: str | None
) -> None:
    tree.node("/dev/sda", "b", "8:0").link("/pods/volume", "/dev/sda")
    wanted = DeviceInfo(
        container_path="/dev/xvda", dev_type=DevType.BLOCK, devnum=DevNum(8, 0), read_only=True
    )
    for source in ("/dev/sda", "/pods/volume"):
        assert find_volumes([bind(source, kind=kind, read_only=True)], tree.root) == [wanted]
    (writable,) = find_volumes([bind("/dev/sda", kind=kind)], tree.root)
    assert not writable.read_only


@pytest.mark.root
@pytest.mark.parametrize("kind", ["ext4", "tmpfs", "overlay", "proc"])
def test_a_file_system_of_its_own_is_no_volume(tree: HostTree, kind: str) -> None:
    tree.node("/dev/sda", "b", "8:0")
    assert find_volumes([bind("/dev/sda", kind=kind)], tree.root) == []


@pytest.mark.root
def test_whatever_is_bound_but_no_block_device_is_no_volume(tree: HostTree) -> None:
    tree.node("/dev/null", "c", "1:3").file("/srv/file").node("/pipe", "p")
    for source in ("/dev/null", "/srv", "/srv/file", "/pipe", "/absent", "/srv/file/x", "srv"):
        assert find_volumes([bind(source)], tree.root) == []


# This host


def test_this_hosts_own_devices_are_found_under_their_own_names() -> None:
    for path in ("/dev/null", "/dev/zero", "/dev/full"):
        status = os.stat(path)
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        assert stat.S_ISCHR(status.st_mode)
        assert get_host_path(want("c", number), HostRoot()) == path
