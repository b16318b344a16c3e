"""Persistent memory: which files hold the block, and which mounts of a bundle mean one."""

import os
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.disks import PFN_DATA_OFFSET, dax_image, loop_device
from tests.support.tree import MIB, HostTree
from vmplug.devnum import DevNum
from vmplug.errors import SpecError
from vmplug.host.block.device import DiskFile
from vmplug.host.block.pmem import PFN_OFFSET_BYTES, PfnInfo, read_pfn_info
from vmplug.host.block.volumes import find_requests, find_volumes
from vmplug.host.kind import FoundBy
from vmplug.host.resolve import resolve
from vmplug.host.root import HostRoot
from vmplug.oci.info import DeviceInfo, DevType, Mount
from vmplug.oci.requests import RngInfo
from vmplug.oci.spec import Bundle

IMAGE, MOUNTED, DEVICE = "/srv/pmem.img", "/mnt/volume", "/dev/loop0"
OFFSET = 2 * MIB
NVDIMM = {"block-driver": "nvdimm"}

# The information block


def test_the_block_says_where_the_data_begins(tree: HostTree) -> None:
    tree.pmem_file(IMAGE, data_offset=OFFSET)
    assert read_pfn_info(IMAGE, tree.root) == PfnInfo(OFFSET)


@given(st.integers(0, (1 << 64) - 1))
def test_any_number_is_read_and_none_is_believed(offset: int) -> None:
    block = struct.pack("<16s40xQ", b"NVDIMM_PFN_INFO", offset)
    descriptor = os.memfd_create("image")
    try:
        os.pwrite(descriptor, block, PFN_OFFSET_BYTES)
        info = read_pfn_info(f"/proc/self/fd/{descriptor}", HostRoot())
    finally:
        os.close(descriptor)
    assert info == PfnInfo(offset)


@pytest.mark.parametrize("length", [15, 16, 48, 63])
def test_a_block_that_is_cut_short_has_no_offset(tree: HostTree, length: int) -> None:
    tree.pmem_file(IMAGE, size_bytes=PFN_OFFSET_BYTES + length)
    assert read_pfn_info(IMAGE, tree.root) == PfnInfo(None)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"NVDIMM_PFN_INFO",
        bytes(PFN_OFFSET_BYTES),
        bytes(PFN_OFFSET_BYTES) + b"NVDIMM_PFN_INF",
        bytes(PFN_OFFSET_BYTES) + b"nvdimm_pfn_info\0",
        bytes(PFN_OFFSET_BYTES - 1) + b"NVDIMM_PFN_INFO\0",
        bytes(PFN_OFFSET_BYTES + 1) + b"NVDIMM_PFN_INFO\0",
        bytes(PFN_OFFSET_BYTES) + b"NVDIMM_DAX_INFO\0" + bytes(64),
    ],
)
def test_any_other_file_has_no_block(tree: HostTree, content: bytes) -> None:
    tree.file(IMAGE, content)
    assert read_pfn_info(IMAGE, tree.root) is None


def test_what_cannot_be_read_has_no_block(tree: HostTree) -> None:
    tree.file("/srv/directory/x").node("/srv/fifo", "p").link("/srv/loop", "loop")
    for path in ("/srv/none", "/srv/directory", "/srv/fifo", "/srv/loop", "/srv/directory/x/y"):
        assert read_pfn_info(path, tree.root) is None


def test_a_file_is_found_with_its_block(tree: HostTree) -> None:
    tree.pmem_file(IMAGE).file("/srv/plain.img", bytes(MIB))
    dax = resolve(pmem_request(), tree.root)
    assert isinstance(dax, DiskFile)
    assert (dax.pfn, dax.found_by, dax.size_bytes) == (
        PfnInfo(OFFSET),
        FoundBy.BACKING_FILE,
        8 * MIB,
    )
    plain = DeviceInfo(
        container_path="/dev/vda", dev_type=DevType.BLOCK, host_path="/srv/plain.img"
    )
    found = resolve(plain, tree.root)
    assert isinstance(found, DiskFile)
    assert (found.pfn, found.found_by) == (None, FoundBy.FILE)


# Mounts that are persistent memory


def bind(
    source: str = MOUNTED, *, ro: bool = False, type_: str | None = "bind", **options: str
) -> Mount:
    """A bind mount that the host's operator wants as an NVDIMM."""
    return Mount("/data", source, type_, ro, {**NVDIMM, **options})


def refused(tree: HostTree, mount: Mount | None = None) -> str:
    """Why the mount cannot be an NVDIMM; without the word for it it is an ordinary directory."""
    mount = mount or bind()
    assert find_volumes([mount._replace(driver_options={})], tree.root) == []
    with pytest.raises(SpecError, match="block-driver=nvdimm is not possible") as caught:
        find_volumes([mount], tree.root)
    assert caught.value.where == "mount /data"
    assert caught.value.hint
    return caught.value.message


def pmem_request(*, ro: bool = False, **options: str) -> DeviceInfo:
    return DeviceInfo(
        container_path="/data",
        dev_type=DevType.BLOCK,
        host_path=IMAGE,
        pmem=True,
        read_only=ro,
        driver_options={"fstype": "ext4", **NVDIMM, **options},
    )


def loop(
    tree: HostTree,
    *,
    backing: str = IMAGE,
    offset: int = OFFSET,
    size_limit: int = 0,
    ro: bool = False,
) -> HostTree:
    """A loop device on the file, and the directory that it is mounted on."""
    attributes = {
        "backing_file": f"{backing}\n",
        "offset": f"{offset}\n",
        "sizelimit": f"{size_limit}\n",
    }
    tree.block_device("7:0", "loop0", loop=attributes, ro=ro)
    return tree.file(f"{MOUNTED}/part/file")


def volume(tree: HostTree) -> HostTree:
    """A volume as pmem-csi makes one."""
    return loop(tree.pmem_file(IMAGE)).mount(DEVICE, MOUNTED, "7:0")


@pytest.mark.parametrize("type_", [None, "", "none", "bind"])
def test_the_mount_point_of_a_file_system_on_persistent_memory_is_its_file(
    tree: HostTree, type_: str | None
) -> None:
    assert find_volumes([bind(type_=type_)], volume(tree).root) == [pmem_request()]


def test_the_file_system_is_told_and_options_count_more(tree: HostTree) -> None:
    loop(tree.pmem_file(IMAGE)).mount(DEVICE, MOUNTED, "7:0", fs_type="xfs")
    (plain,) = find_volumes([bind()], tree.root)
    assert plain.driver_options == {"fstype": "xfs", **NVDIMM}
    (other,) = find_volumes([bind(fstype="ext4", format="raw")], tree.root)
    assert other.driver_options == {"fstype": "ext4", "format": "raw", **NVDIMM}


@pytest.mark.parametrize("options", [{}, {"fstype": "ext4"}, {"block-driver": "virtio-blk"}])
def test_only_the_host_makes_a_directory_an_nvdimm(
    tree: HostTree, options: dict[str, str]
) -> None:
    """A guest can have written the block into what is mounted here, for example before a btrfs."""
    mount = bind()._replace(driver_options=options)
    assert find_volumes([mount], volume(tree).root) == []


def test_a_file_that_the_whole_loop_device_shows_is_one_too(tree: HostTree) -> None:
    loop(tree.pmem_file(IMAGE), offset=0).mount(DEVICE, MOUNTED, "7:0")
    assert find_volumes([bind()], tree.root) == [pmem_request()]


@pytest.mark.parametrize("offset", [4096, OFFSET - 512, OFFSET + 4096, 1])
def test_a_loop_device_that_begins_elsewhere_shows_something_else(
    tree: HostTree, offset: int
) -> None:
    loop(tree.pmem_file(IMAGE), offset=offset).mount(DEVICE, MOUNTED, "7:0")
    assert "does not show the part of" in refused(tree)


def test_a_block_that_is_cut_short_fits_no_offset_but_zero(tree: HostTree) -> None:
    tree.pmem_file(IMAGE, size_bytes=PFN_OFFSET_BYTES + 20)
    loop(tree).mount(DEVICE, MOUNTED, "7:0")
    assert "does not show the part of" in refused(tree)


def test_a_loop_device_that_ends_early_hides_what_the_guest_would_see(tree: HostTree) -> None:
    loop(tree.pmem_file(IMAGE), size_limit=4 * MIB).mount(DEVICE, MOUNTED, "7:0")
    assert "does not show the part of" in refused(tree)


def test_a_deleted_file_has_no_path_to_its_data(tree: HostTree) -> None:
    tree.pmem_file(f"{IMAGE}.other")
    loop(tree, backing=f"{IMAGE} (deleted)").mount(DEVICE, MOUNTED, "7:0")
    assert "a file that still exists" in refused(tree)
    tree.pmem_file(IMAGE)  # another file by now
    refused(tree)


def test_a_file_without_the_block_is_an_ordinary_volume(tree: HostTree) -> None:
    loop(tree.file(IMAGE, bytes(MIB))).mount(DEVICE, MOUNTED, "7:0")
    assert "has no NVDIMM_PFN_INFO block" in refused(tree)


@pytest.mark.parametrize("source", [f"{MOUNTED}/part", "/mnt", f"{MOUNTED}/part/file", "/none"])
def test_only_the_mount_point_itself_is_the_volume(tree: HostTree, source: str) -> None:
    assert "is not the mount point" in refused(volume(tree), bind(source))


def test_a_part_of_the_file_system_is_not_the_volume(tree: HostTree) -> None:
    loop(tree.pmem_file(IMAGE)).mount(DEVICE, MOUNTED, "7:0", shown="/part")
    assert "is not the mount point" in refused(tree)


def test_the_mount_on_top_counts(tree: HostTree) -> None:
    volume(tree).block_device("8:0", "sda").mount("/dev/sda", MOUNTED, "8:0")
    assert "is not mounted from a loop device" in refused(tree)
    tree.mount(DEVICE, MOUNTED, "7:0")
    assert find_volumes([bind()], tree.root) == [pmem_request()]


def test_a_mount_point_may_have_any_name_and_be_reached_by_links(tree: HostTree) -> None:
    tree.pmem_file(IMAGE).file("/mnt/a b\\c/x").link("/mnt/link", "a b\\c")
    loop(tree).mount(DEVICE, "/mnt/a\\040b\\134c", "7:0")
    for source in ("/mnt/a b\\c", "/mnt/link", "/mnt/link/", "/mnt/./link"):
        assert find_volumes([bind(source)], tree.root) == [pmem_request()]


def test_a_file_system_with_a_number_of_its_own_is_no_volume(tree: HostTree) -> None:
    loop(tree.pmem_file(IMAGE)).mount(DEVICE, MOUNTED, "0:42", fs_type="btrfs")
    assert "is not mounted from a loop device" in refused(tree)


@pytest.mark.parametrize("reason", ["nothing", "mount", "mount point", "file system", "loop"])
def test_it_is_read_only_when_anything_on_the_way_is(tree: HostTree, reason: str) -> None:
    loop(tree.pmem_file(IMAGE), ro=reason == "loop").mount(
        DEVICE,
        MOUNTED,
        "7:0",
        fs_options="ro" if reason == "file system" else "rw",
        mount_options="ro,relatime" if reason == "mount point" else "rw,relatime",
    )
    (found,) = find_volumes([bind(ro=reason == "mount")], tree.root)
    assert found == pmem_request(ro=reason != "nothing")


@pytest.mark.parametrize("type_", ["tmpfs", "ext4", "proc", "cgroup"])
def test_only_bind_mounts_have_a_source_on_the_host(tree: HostTree, type_: str) -> None:
    assert find_volumes([bind(type_=type_)], volume(tree).root) == []


@pytest.mark.parametrize("source", ["tmpfs", "mnt/volume", "volume", ""])
def test_a_source_that_is_no_path_is_passed_over(tree: HostTree, source: str) -> None:
    assert find_volumes([bind(source)], volume(tree).root) == []


def test_without_a_table_of_mounts_no_directory_is_a_volume(tree: HostTree) -> None:
    loop(tree.pmem_file(IMAGE))
    assert "is not the mount point" in refused(tree)


def test_what_persistent_memory_asks_for_must_have_a_file() -> None:
    with pytest.raises(SpecError, match="persistent memory needs the path of its file"):
        DeviceInfo(container_path="/data", dev_type=DevType.BLOCK, devnum=DevNum(7, 0), pmem=True)


# All that a bundle asks for


def test_a_bundle_asks_for_devices_then_volumes_then_annotations(tree: HostTree) -> None:
    device = DeviceInfo(container_path="/dev/sda", dev_type=DevType.BLOCK, devnum=DevNum(8, 0))
    bundle = Bundle(
        name="c1",
        devices=(device,),
        mounts=(bind("/nowhere")._replace(driver_options={}), bind()),
        annotated=(RngInfo(),),
    )
    assert find_requests(bundle, volume(tree).root) == [device, pmem_request(), RngInfo()]


def test_a_bundle_without_any_asks_for_nothing(tree: HostTree) -> None:
    assert find_requests(Bundle(name=None, devices=()), tree.root) == []


@pytest.mark.root
@pytest.mark.parametrize("ro", [False, True])
def test_a_block_device_is_asked_for_itself(tree: HostTree, *, ro: bool) -> None:
    tree.node("/dev/sdb", "b", "8:16").link("/dev/disk", "sdb")
    for source in ("/dev/sdb", "/dev/disk"):
        assert find_volumes([bind(source, ro=ro, cache="none")], tree.root) == [
            DeviceInfo(
                container_path="/data",
                dev_type=DevType.BLOCK,
                devnum=DevNum(8, 16),
                read_only=ro,
                driver_options={"cache": "none", **NVDIMM},
            )
        ]
    tree.node("/dev/ttyS0", "c", "4:64")
    assert "is not the mount point" in refused(tree, bind("/dev/ttyS0"))


@pytest.mark.root
def test_a_block_device_cannot_be_mounted_outside_of_the_container(tree: HostTree) -> None:
    tree.node("/dev/sdb", "b", "8:16")
    with pytest.raises(SpecError, match=r"contains '\.\.'"):
        find_volumes([bind("/dev/sdb")._replace(destination="/data/../x")], tree.root)


# On this host


@pytest.mark.root
def test_the_image_of_the_tests_is_what_the_kernel_would_take(tmp_path: Path) -> None:
    image = dax_image(tmp_path / "dax.img", 16)
    assert read_pfn_info(str(image), HostRoot()) == PfnInfo(PFN_DATA_OFFSET)


@pytest.mark.root
def test_a_real_loop_device_tells_the_same(tmp_path: Path) -> None:
    image = dax_image(tmp_path / "dax.img", 16)
    with loop_device(image, offset=PFN_DATA_OFFSET) as node:
        number = os.stat(node).st_rdev
        live = HostRoot()
        tree = HostTree(tmp_path / "host")
        devnum = DevNum(os.major(number), os.minor(number))
        sysfs = f"/sys/dev/block/{devnum}"
        for attribute in ("backing_file", "offset", "sizelimit"):
            content = live.read_attribute(f"{sysfs}/loop/{attribute}")
            assert content is not None
            tree.file(f"{sysfs}/loop/{attribute}", content)
        (tree.path / str(image.parent).lstrip("/")).mkdir(parents=True)
        (tree.path / str(image).lstrip("/")).write_bytes(image.read_bytes())
        tree.file(f"{MOUNTED}/x").mount(str(node), MOUNTED, str(devnum))
        (found,) = find_volumes([bind()], tree.root)
        assert found.host_path == str(image)


@pytest.mark.root
def test_a_file_that_has_the_name_of_another_is_not_what_is_mounted(tmp_path: Path) -> None:
    image, other, place = tmp_path / "a.img", tmp_path / "other.img", tmp_path / "mnt"
    place.mkdir()
    mount = Mount(
        destination="/data", type="bind", source=str(place), read_only=False, driver_options=NVDIMM
    )
    dax_image(image, 16)
    dax_image(other, 16)
    with loop_device(image, offset=PFN_DATA_OFFSET) as node:
        subprocess.run(["mount", node, place], check=True)
        try:
            (found,) = find_volumes([mount], HostRoot())
            assert found.host_path == str(image)
            subprocess.run(["mount", "--bind", other, image], check=True)
            with pytest.raises(SpecError, match="is another file now"):
                find_volumes([mount], HostRoot())
            subprocess.run(["umount", image], check=True)
            assert find_volumes([mount], HostRoot()) == [found]
        finally:
            subprocess.run(["umount", place], check=True)
