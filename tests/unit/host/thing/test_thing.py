"""What a thing is made of, and who uses it: each relation and each use, at its place in the tree.

One generated test holds it to `check`: what `check` has of a thing is in its tree, and nothing is
in the tree that `check` does not have.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations_with_replacement
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.support.disks import qcow2_header
from tests.support.pci_tree import PciTree
from tests.support.tree import GIB, MIB
from vmplug.errors import NoSuchDevice, SpecError
from vmplug.host.block.usage import read_usage
from vmplug.host.check.device import check_device
from vmplug.host.finding import USES, Access, Code, Finding, Severity
from vmplug.host.kind import Identity
from vmplug.host.record.read import read_record
from vmplug.host.record.write import write_record
from vmplug.host.root import HostRoot
from vmplug.host.thing.describe import describe_other, describe_thing, relate
from vmplug.host.thing.name import find_named_device
from vmplug.host.thing.thing import Relation, Thing, ThingKind
from vmplug.host.use.claim import POD_PREFIX, Claim

BRIDGE, NVME, PORTS, CARD, SOUND = (
    "0000:00:1c.0",
    "0000:3b:00.0",
    "0000:3c:00.0",
    "0000:3d:00.0",
    "0000:3d:00.1",
)
VF, UUID, IMAGE = "0000:3c:02.0", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", "/srv/a.img"
LOOP_FILES = {"backing_file": f"{IMAGE}\n", "offset": "0\n", "sizelimit": "0\n"}


@pytest.fixture
def disks(tmp_path: Path) -> PciTree:
    """A host with disks and an image that nothing uses."""
    return with_disks(PciTree(tmp_path / "host"))


@pytest.fixture
def cards(tmp_path: Path) -> PciTree:
    """A host with functions that nothing uses."""
    return with_cards(PciTree(tmp_path / "host"))


@pytest.fixture
def host(disks: PciTree) -> PciTree:
    """A host with both."""
    return with_cards(disks)


def with_disks(host: PciTree) -> PciTree:
    host.block_device("8:0", "sda", partitions={"8:1": "sda1", "8:2": "sda2"})
    host.block_device("8:16", "sdb", partitions={"8:17": "sdb1", "8:18": "sdb2"})
    host.file(IMAGE, bytes(MIB)).file("/proc/interrupts", "0: 1 IR-IO-APIC 2-edge timer\n")
    host.block_device("7:0", "loop0", partitions={"259:9": "loop0p1"}, loop=LOOP_FILES)
    return host.swap()


def with_cards(host: PciTree) -> PciTree:
    host.pci_function(BRIDGE, class_code=0x060400, driver="pcieport", group=26)
    host.pci_function(NVME, below=BRIDGE, driver="nvme", group=26)
    parts = {"259:1": "nvme0n1p1", "259:2": "nvme0n1p2"}
    host.pci_disk(NVME, "259:0", "nvme0n1", partitions=parts)
    host.class_device(f"{NVME}/nvme/nvme0", "char", "245:0", "nvme0")
    host.pci_function(PORTS, class_code=0x020000, driver="i40e", group=27)
    host.network(PORTS, "eth0").sriov(PORTS, VF, group=28, driver="iavf").network(VF, "eth1")
    host.pci_function(CARD, class_code=0x030000, driver="i915", group=29)
    host.pci_function(SOUND, class_code=0x040300, driver="snd_hda_intel", group=29)
    host.class_device(f"{CARD}/drm/card0", "char", "226:0", "dri/card0")
    host.mdev_type(CARD, "i915-1", title="GVTg").mdev(UUID, CARD, "i915-1", group=40)
    return host


def show(host: PciTree | HostRoot, name: str, claims: Sequence[Claim] | None = ()) -> Thing:
    root = host if isinstance(host, HostRoot) else host.root
    usage = read_usage(root)
    device = relate(find_named_device(name, root), usage, root)
    return describe_thing(device, usage=usage, claims=claims, root=root)


def show_other(host: PciTree, name: str) -> Thing:
    return describe_other(name, read_usage(host.root), host.root)


def outline(thing: Thing, depth: int = 0) -> Iterator[str]:
    """`  partition /dev/sda1 mounted-on-host`."""
    words = (thing.relation or thing.kind, thing.name, *(use.code for use in thing.uses))
    yield "  " * depth + " ".join(words)
    for part in thing.made_of:
        yield from outline(part, depth + 1)


def tree_of(host: PciTree, name: str) -> list[str]:
    return list(outline(show(host, name)))


# Disks


def test_a_disk_has_its_partitions_and_what_is_built_on_them(disks: PciTree) -> None:
    disks.block_device("253:0", "dm-0").hold("sda2", "dm-0").hold("sdb2", "dm-0")
    disks.file("/sys/devices/virtual/block/dm-0/dm/name", "vg-root\n")
    disks.block_device("9:0", "md0", partitions={"259:30": "md0p1"}).hold("dm-0", "md0")
    disks.mount("/dev/sda1", "/boot", "8:1").mount("/dev/md0p1", "/srv", "259:30")
    disks.swap("/dev/md0")
    assert tree_of(disks, "/dev/sda") == [
        "disk /dev/sda",
        "  partition /dev/sda1 mounted-on-host",
        "  partition /dev/sda2 has-holders",
        "    built-on-it /dev/dm-0 has-holders",
        "      built-on-it /dev/md0 is-swap",
        "        partition /dev/md0p1 mounted-on-host",
    ]
    thing = show(disks, "sda")
    volume = next(part for part in thing.walk() if part.name == "/dev/dm-0")
    assert (volume.kind, volume.title) == (ThingKind.DEVICE_MAPPER, "vg-root")
    assert volume.size_bytes == GIB


def test_a_partition_depends_on_its_disk_and_not_on_its_neighbour(disks: PciTree) -> None:
    disks.mount("/dev/sda2", "/srv", "8:2").swap("/dev/sda")
    assert tree_of(disks, "8:1") == ["partition /dev/sda1", "  disk /dev/sda is-swap"]


def test_what_is_built_on_a_disk_is_called_by_its_kind(disks: PciTree) -> None:
    for minor, name in enumerate(("bcache0", "dm-5", "md5", "drbd0")):
        disks.block_device(f"252:{minor}", name).hold("sdb", name)
    above = [part for part in show(disks, "sdb").made_of if part.relation == "built-on-it"]
    assert [(part.kind, part.name) for part in above] == [
        ("bcache", "/dev/bcache0"),
        ("device-mapper", "/dev/dm-5"),
        ("disk", "/dev/drbd0"),
        ("md", "/dev/md5"),
    ]
    assert tree_of(disks, "sdb")[0] == "disk /dev/sdb has-holders"


def test_a_holder_that_a_copy_lacks_is_there_by_its_name(disks: PciTree) -> None:
    disks.hold("sdb", "dm-7")
    assert tree_of(disks, "sdb")[-1] == "  built-on-it /dev/dm-7"


def test_what_a_volume_is_built_from_is_in_its_tree(disks: PciTree) -> None:
    disks.block_device("253:0", "dm-0").hold("sda2", "dm-0").mount("/dev/sda1", "/boot", "8:1")
    disks.link("/sys/devices/virtual/block/dm-0/slaves/sda2", "../../sda/sda2")
    assert tree_of(disks, "dm-0") == [
        "device-mapper /dev/dm-0",
        "  built-from /dev/sda2",
        "  built-from /dev/sda",
    ]


def test_other_names_of_a_disk_are_in_its_tree_with_their_uses(disks: PciTree) -> None:
    for name in ("sda", "sdb"):
        disks.file(f"/sys/devices/virtual/block/{name}/device/wwid", "naa.600\n")
    disks.block_device("253:0", "mpath").mount("/dev/sdb2", "/srv", "8:18")
    assert tree_of(disks, "sda") == [
        "disk /dev/sda",
        "  partition /dev/sda1",
        "  partition /dev/sda2",
        "  same-disk /dev/sdb",
        "  same-disk /dev/sdb1",
        "  same-disk /dev/sdb2 mounted-on-host",
    ]
    assert tree_of(disks, "sda2")[-1] == "  same-disk /dev/sdb2 mounted-on-host"


# Files and loop devices


def test_a_file_has_its_loop_devices_with_their_partitions(disks: PciTree) -> None:
    assert tree_of(disks, IMAGE) == [
        f"file {IMAGE} has-holders",
        "  built-on-it /dev/loop0",
        "    partition /dev/loop0p1",
    ]
    (use,) = show(disks, IMAGE).uses
    assert use.severity is Severity.WARNING  # nothing uses the loop device
    disks.mount("/dev/loop0p1", "/mnt", "259:9")
    assert tree_of(disks, IMAGE)[2] == "    partition /dev/loop0p1 mounted-on-host"


def test_a_loop_device_has_the_file_behind_it_and_the_others_on_that(disks: PciTree) -> None:
    disks.block_device("7:1", "loop1", loop=LOOP_FILES).mount("/dev/loop1", "/mnt", "7:1")
    assert tree_of(disks, "loop0") == [
        "loop /dev/loop0",
        "  partition /dev/loop0p1",
        f"  file {IMAGE} has-holders",
        "    built-on-it /dev/loop1 mounted-on-host",
    ]


def test_a_loop_device_on_a_disk_is_between_both(disks: PciTree) -> None:
    files = {**LOOP_FILES, "backing_file": "/dev/sdb1\n"}
    disks.file("/dev/sdb1").block_device("7:1", "loop1", loop=files).swap("/dev/loop1")
    assert tree_of(disks, "sdb")[1:3] == [
        "  partition /dev/sdb1 has-holders",
        "    built-on-it /dev/loop1 is-swap",
    ]


def test_a_loop_device_on_a_file_without_a_name_says_so(disks: PciTree) -> None:
    files = {**LOOP_FILES, "backing_file": "/srv/gone.img (deleted)\n"}
    (file,) = show(disks.block_device("7:1", "loop1", loop=files), "loop1").made_of
    assert (file.name, file.title, file.identity) == ("/srv/gone.img", "deleted", None)
    assert "no name that vmplug can see leads to it" in file.unknown[0]


def test_an_image_has_the_file_that_it_refers_to(disks: PciTree) -> None:
    header = (
        b"QFI\xfb" + (3).to_bytes(4, "big") + (104).to_bytes(8, "big") + (8).to_bytes(4, "big")
    )
    disks.file("/srv/b.qcow2", header.ljust(104, b"\0") + b"base.img")
    thing = show(disks.file("/srv/base.img", b"12345678"), "/srv/b.qcow2")
    assert thing.title == "like qcow2"
    (below,) = thing.made_of
    assert (below.relation, below.name, below.size_bytes) == (
        Relation.BACKING_FILE,
        "/srv/base.img",
        8,
    )


def test_an_image_has_the_whole_chain_and_the_uses_of_each_file(disks: PciTree) -> None:
    disks.file("/srv/top.qcow2", qcow2_header(backing=b"mid.qcow2", data_file=b"/srv/top.raw"))
    disks.file("/srv/mid.qcow2", qcow2_header(backing=b"/srv/base.qcow2"))
    disks.file("/srv/base.qcow2", qcow2_header()).file("/srv/top.raw", b"12345678")
    disks.process(99, "qemu-nbd", "/srv/top.raw").process(98, "cp", "/srv/base.qcow2")
    assert tree_of(disks, "/srv/top.qcow2") == [
        "file /srv/top.qcow2",
        "  data-file /srv/top.raw open-by-process",
        "  backing-file /srv/mid.qcow2",
        "    backing-file /srv/base.qcow2 open-by-process",
    ]


def test_an_image_whose_chain_cannot_be_followed_says_so(disks: PciTree) -> None:
    disks.file("/srv/top.qcow2", qcow2_header(data_file=b"top.raw"))
    thing = show(disks, "/srv/top.qcow2")
    assert thing.unknown[0] == (
        "the other files of the image: vmplug does not follow what its header names"
    )


def test_a_file_of_persistent_memory_is_a_file(disks: PciTree) -> None:
    thing = show(disks.pmem_file("/srv/c.pmem"), "/srv/c.pmem")
    assert (thing.kind, thing.title) == (ThingKind.FILE, "like an NVDIMM")
    assert show(disks.pmem("namespace0.0"), "namespace0.0").name == "/dev/pmem0"


def test_a_character_device_has_its_users(disks: PciTree) -> None:
    disks.char_device("10:232", "kvm").char_device("1:3", "null")
    disks.process(99, "firecracker", "/dev/kvm", "/dev/null")
    assert tree_of(disks, "c:10:232") == ["character-device /dev/kvm open-by-process"]
    thing = show(disks, "c:10:232")
    assert [use.severity for use in thing.uses] == [Severity.WARNING]
    assert not [words for words in thing.unknown if "open" in words]
    assert tree_of(disks, "c:1:3") == ["character-device /dev/null"]
    assert "who has it open: every process may have it" in show(disks, "c:1:3").unknown


# Functions


def test_a_function_has_its_disks_and_nodes_and_its_bridge_beside_it(cards: PciTree) -> None:
    cards.block_device("253:0", "dm-0").hold("nvme0n1p2", "dm-0").mount("/dev/dm-0", "/", "253:0")
    cards.process(812, "smartd", "/dev/nvme0")
    assert tree_of(cards, "3b:00.0") == [
        f"function {NVME}",
        "  disk /dev/nvme0n1",
        "    partition /dev/nvme0n1p1",
        "    partition /dev/nvme0n1p2 has-holders",
        "      built-on-it /dev/dm-0 mounted-on-host",
        "  node /dev/nvme0 open-by-process",
        f"  bridge {BRIDGE}",
    ]
    node = next(part for part in show(cards, NVME).walk() if part.name == "/dev/nvme0")
    (use,) = node.uses
    assert (use.who, use.found_by) == ("process 812 (smartd)", "the open files of all processes")


def test_a_group_has_all_its_members(cards: PciTree) -> None:
    cards.file("/dev/vfio/29").process(99, "qemu", "/dev/vfio/29")
    assert tree_of(cards, "29") == [
        "iommu-group 29",
        "  node /dev/vfio/29 open-by-process",
        f"  member {CARD}",
        "    node /dev/dri/card0",
        f"    mediated-device {UUID}",
        f"  member {SOUND}",
    ]
    assert tree_of(cards, SOUND)[2] == f"  same-group {CARD}"
    assert tree_of(cards, "/dev/vfio/29") == tree_of(cards, "29")


def test_a_bridge_that_a_driver_uses_is_in_use(cards: PciTree) -> None:
    cards.take(BRIDGE, "shpchp")
    assert tree_of(cards, NVME)[-1] == f"  bridge {BRIDGE} member-in-use"


def test_a_network_function_has_interfaces_and_virtual_functions(cards: PciTree) -> None:
    cards.route("eth0").route("eth1", target="0000A8C0")
    assert tree_of(cards, PORTS) == [
        f"function {PORTS} has-virtual-functions",
        "  interface eth0 network-in-use",
        f"  virtual-function {VF}",
        "    interface eth1 network-in-use",
    ]
    assert tree_of(cards, VF) == [
        f"function {VF}",
        "  interface eth1 network-in-use",
        f"  physical-function {PORTS}",
    ]


def test_an_interface_in_another_namespace_is_a_use_of_its_function(tmp_path: Path) -> None:
    cards = PciTree(tmp_path / "moved").pci_function(PORTS, driver="i40e", group=27)
    cards.sriov(PORTS, VF, group=28, driver="iavf").moved_network(VF).moved_network(PORTS)
    assert tree_of(cards, PORTS) == [
        f"function {PORTS} network-in-use has-virtual-functions",
        f"  virtual-function {VF} network-in-use",
    ]


def test_a_mediated_device_depends_on_its_parent(cards: PciTree) -> None:
    assert tree_of(cards, UUID.upper()) == [f"mediated-device {UUID}", f"  parent {CARD}"]
    kind = show_other(cards, "i915-1")
    assert list(outline(kind)) == ["mediated-type i915-1", f"  parent {CARD}"]
    with pytest.raises(NoSuchDevice):
        show_other(cards, "i915-2")


def test_a_parent_that_is_not_a_function_has_its_devices(cards: PciTree) -> None:
    matrix = "/sys/devices/vfio_ap/matrix"
    other = "00000000-0000-4000-8000-000000000001"
    cards.mdev_type(matrix, "vfio_ap-passthrough").mdev(
        other, matrix, "vfio_ap-passthrough", matrix=["05.0004"]
    )
    (device,) = show_other(cards, "matrix").made_of
    assert (device.name, device.title) == (other, "vfio-ap, queues 05.0004")


# VMs, and the rest


HELD = [
    ("sda", "block:8:1", "/dev/sda1"),
    ("sda", "block:8:0", "/dev/sda"),
    ("loop0", f"file:{IMAGE}", IMAGE),
    (NVME, "block:259:1", "/dev/nvme0n1p1"),
    (CARD, f"vfio:{SOUND}", SOUND),
    (UUID, f"vfio:{UUID}", UUID),
    (VF, f"vfio:{PORTS}", PORTS),
    ("sda", "block:253:0", "/dev/dm-0"),
    (CARD, f"vfio:{UUID}", UUID),
    (PORTS, f"vfio:{VF}", VF),
]
"""A thing, what a VM has, and the part of the thing that it is."""


def test_what_a_vm_has_is_a_use_of_that_part(host: PciTree) -> None:
    host.block_device("253:0", "dm-0").hold("sda2", "dm-0")
    for name, held, at in HELD:
        identity = Identity.parse(held)
        claim = Claim(vm="sb1", identity=identity, read_only=False, share_rw=False)
        used = {part.name: part.uses for part in show(host, name, [claim]).walk()}
        assert [use.who for use in used[at] if use.code is Code.IN_USE_BY_VM] == ["VM 'sb1'"]
        codes = [use.code for uses in used.values() for use in uses]
        assert codes.count(Code.IN_USE_BY_VM) == 1
        other = replace(claim, identity=Identity.parse("block:99:0"))
        assert "VM 'sb1'" not in str(show(host, name, [other]))


def test_a_directory_may_be_shared_again(disks: PciTree) -> None:
    claim = Claim(
        vm="sb1", identity=Identity.parse("share:work:/srv"), read_only=False, share_rw=False
    )
    thing = show(disks, "/srv", [claim])
    assert (thing.kind, [use.severity for use in thing.uses]) == (
        ThingKind.DIRECTORY,
        [Severity.WARNING],
    )


def test_a_node_of_another_kind_is_a_thing_too(disks: PciTree) -> None:
    thing = show(disks.char_device("10:183", "hwrng"), "c:10:183")
    assert (thing.kind, thing.name, thing.identity) == (
        ThingKind.CHARACTER_DEVICE,
        "/dev/hwrng",
        "char 10:183",
    )


def test_a_name_that_nothing_has_is_said(disks: PciTree) -> None:
    for name in ("4096:0", "b:1:1048576", "u:999999999:0"):
        with pytest.raises(SpecError, match="is not in 0"):
            show(disks, name)
    for name in (
        "",
        "x:8:0",
        "8:0:0",
        "a\0b",
        "sda\n",
        "sda/../sdb",
        "/dev",
        "sdz",
        "/dev/sdz",
        "9:9",
        "b:9:9",
        "99",
        CARD,
        UUID,
        "/no",
        "x" * 5000,
    ):
        with pytest.raises(NoSuchDevice):
            show(disks, name)


# Identity, and what is unknown


def test_the_identity_is_what_no_name_can_fake(disks: PciTree) -> None:
    disks.file("/sys/devices/virtual/block/sda/diskseq", "7\n")
    disks.file("/sys/devices/virtual/block/sda/sda1/start", "2048\n")
    thing = show(disks, "sda")
    assert [part.identity for part in thing.walk()] == [
        "block 8:0 7",
        "block 8:1 7 2048",
        "block 8:2 7 -",
    ]


def test_an_inode_of_a_copy_is_not_an_identity(host: PciTree) -> None:
    assert show(host, IMAGE).identity is None
    assert show(host, NVME).identity == f"vfio {NVME}:8086:0953:-"
    assert show(host, "29").identity == f"vfio {CARD}:- {SOUND}:-"


def test_what_a_copy_cannot_tell_is_unknown_and_not_absent(host: PciTree) -> None:
    shutil.rmtree(host.path / "proc")
    disk, card, port = show(host, "sda", None), show(host, CARD), show(host, PORTS)
    assert [sentence.partition(":")[0] for sentence in disk.unknown] == [
        "who has it open (O_EXCL, the locks of QEMU)",
        "the VMs of vmplug",
    ]
    (use,) = disk.uses
    assert use.code is Code.UNKNOWN_USE
    assert use.message.endswith(
        "mounts (no /proc/PID/mountinfo), swap space (no /proc/swaps), open files of processes "
        "(no /proc/PID/fd)"
    )
    assert [(use.code, use.message.count("(no ")) for use in card.uses] == [(Code.UNKNOWN_USE, 1)]
    interface = next(part for part in port.walk() if part.name == "eth0")
    assert interface.unknown == ("its addresses and routes",)
    host.mount("/dev/sdb", "/", "8:16").swap().process(5, "init", "/dev/null")
    disk = show(host, "sda")
    assert (len(disk.unknown), disk.uses) == (1, ())


def test_a_neighbour_that_cannot_be_read_hides_no_other(disks: PciTree) -> None:
    above = disks.block_device("253:0", "dm-0").hold("sda2", "dm-0")
    above.file("/sys/devices/virtual/block/dm-0/ro", "nonsense\n")
    (part,) = [part for part in show(disks, "sda").walk() if part.name == "/dev/dm-0"]
    assert "nonsense" in part.unknown[0]
    assert tree_of(disks, "sda")[2] == "  partition /dev/sda2 has-holders"


# As check says


def mount(host: PciTree) -> None:
    host.mount("/dev/sda1", "/srv", "8:1").mount("/dev/nvme0n1p1", "/data", "259:1")


def volume(host: PciTree) -> None:
    host.block_device("253:0", "dm-0").hold("sda2", "dm-0").hold("nvme0n1p2", "dm-0")
    host.mount("/dev/mapper/a", "/var", "253:0")


def mirror(host: PciTree) -> None:
    host.block_device("9:0", "md0").hold("sda", "md0").hold("sdb", "md0")


def swap(host: PciTree) -> None:
    host.swap("/dev/loop0p1", "/dev/sdb", "/dev/nvme0n1p2")


def twins(host: PciTree) -> None:
    for name in ("sda", "sdb"):
        host.file(f"/sys/devices/virtual/block/{name}/device/wwid", "naa.600\n")


def second_loop(host: PciTree) -> None:
    host.block_device("7:1", "loop1", loop=LOOP_FILES).mount("/dev/loop1", "/mnt", "7:1")


def network(host: PciTree) -> None:
    host.route("eth0").route("eth1", target="0000A8C0")


def openers(host: PciTree) -> None:
    host.process(9, "Xorg", "/dev/dri/card0").process(10, "smartd", "/dev/nvme0")


def console(host: PciTree) -> None:
    host.file(f"{host.real(CARD)}/boot_vga", "1\n").take(BRIDGE, "shpchp")


def exports(host: PciTree) -> None:
    for number, path in enumerate(("/dev/sda2", "/dev/nvme0", IMAGE)):
        base = f"/sys/kernel/config/nvmet/subsystems/nqn.a/namespaces/{number}"
        host.file(f"{base}/device_path", f"{path}\n").file(f"{base}/enable", "1\n")


def behind(host: PciTree) -> None:
    host.block_device("7:9", "loop9", loop={"backing_file": "/dev/sda1\n"})


WORLDS = [mount, volume, mirror, swap, twins, second_loop, network, openers, console]
WORLDS += [exports, behind]
THINGS = (
    *("sda", "sda1", "sda2", "sdb", "sdb2", "loop0", "loop0p1", "nvme0n1", "nvme0n1p2"),
    *(IMAGE, NVME, "26", PORTS, VF, CARD, SOUND, "29", UUID),
)
CLAIMS = [
    Claim(vm="sb1", identity=Identity.parse(text), read_only=False, share_rw=False)
    for text in ("block:8:1", f"vfio:{SOUND}", f"vfio:{VF}", f"vfio:{UUID}", "block:253:0")
]
CLAIMS.append(replace(CLAIMS[0], vm=f"{POD_PREFIX}vmplug.dev/disks=data"))


def check(root: HostRoot, name: str) -> list[Finding]:
    """What `check` has of a thing, for writing."""
    usage = read_usage(root)
    device = relate(find_named_device(name, root), usage, root)
    wanted = {device.identity, *device.related_identities}
    claims = [claim for claim in CLAIMS if claim.identity in wanted]
    return check_device(device, Access(read_only=False), usage=usage, claims=claims, root=root)


def uses_in(root: HostRoot, name: str) -> tuple[Thing, set[tuple[Code, str]]]:
    usage = read_usage(root)
    device = relate(find_named_device(name, root), usage, root)
    thing = describe_thing(device, usage=usage, claims=CLAIMS, root=root)
    return thing, {(use.code, use.message) for part in thing.walk() for use in part.uses}


def assert_agrees(root: HostRoot, name: str) -> set[Code]:
    thing, shown = uses_in(root, name)
    found = {(f.code, f.message) for f in check(root, name) if f.code in USES}
    assert found <= shown, name
    apart = {Relation.BUILT_ON_IT, Relation.VIRTUAL_FUNCTION, Relation.MEDIATED_DEVICE}
    above = [part.name for part in thing.walk() if part.relation in apart]
    of_parts = {(f.code, f.message) for part in above for f in check(root, part)}
    assert shown <= found | of_parts, name
    assert {code for code, _ in shown} <= USES
    return {code for code, _ in shown}


@pytest.mark.parametrize("worlds", [[], WORLDS])
def test_every_use_that_check_finds_is_in_the_tree_and_no_other(
    host: PciTree, worlds: Sequence[Callable[[PciTree], None]]
) -> None:
    for world in worlds:
        world(host)
    codes = set[Code]().union(*(assert_agrees(host.root, name) for name in THINGS))
    live = {Code.OPEN_EXCLUSIVELY, Code.IMAGE_LOCKED, Code.UNKNOWN_USE, Code.BACKEND_BUSY}
    if len(worlds) == len(WORLDS):
        assert codes == USES - live - {Code.MACHINE_PART}


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), list(combinations_with_replacement(WORLDS, 2)))
def test_two_uses_at_once_agree_too(
    host: PciTree, one: Callable[[PciTree], None], other: Callable[[PciTree], None]
) -> None:
    for world in {one, other}:
        world(host)
    for name in THINGS:
        assert_agrees(host.root, name)


def test_every_finding_says_its_user_if_it_is_a_use_and_only_then(host: PciTree) -> None:
    for world in WORLDS:
        world(host)
    for name in THINGS:
        for finding in check(host.root, name):
            assert (finding.used_by is not None) == (finding.code in USES), finding


def test_a_recorded_host_shows_the_same_tree(host: PciTree, tmp_path: Path) -> None:
    for world in (mount, volume, network):
        world(host)
    names = ("sda", "loop0", NVME, PORTS, "29", UUID)
    expected = {name: tree_of(host, name) for name in names}
    write_record(str(tmp_path / "report.tar"), host.root)
    root = read_record(str(tmp_path / "report.tar"))
    found = {name: "\n".join(outline(show(root, name))) for name in names}
    # A record has no open files of processes.
    seen = {name: text.replace(" unknown-use", "") for name, text in found.items()}
    assert {name: text.split("\n") for name, text in seen.items()} == expected
    assert "unknown-use" in found[UUID]
    for name in names:
        assert_agrees(root, name)


@pytest.mark.parametrize(
    ("name", "node"),
    [("/dev/kvm", "/dev/kvm"), ("kvm", "/dev/kvm"), ("/dev/snd/seq", "/dev/snd/seq")],
)
def test_a_character_device_of_a_copy_is_known_by_the_node_that_it_had(
    tmp_path: Path, name: str, node: str
) -> None:
    tree = PciTree(tmp_path).char_device("10:232", "kvm").char_device("116:1", "snd/seq")
    tree.process(9, "qemu", node)
    thing, shown = uses_in(tree.root, name)
    assert (thing.name, thing.kind) == (node, ThingKind.CHARACTER_DEVICE)
    assert [code for code, _ in shown] == [Code.OPEN_BY_PROCESS]
    with pytest.raises(NoSuchDevice):
        uses_in(tree.root, f"{name}0")
