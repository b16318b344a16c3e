"""File systems that a host, which is a VM itself, gets through a virtio function."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.fake_kernel import FakeKernel
from tests.support.pci_tree import PciTree
from tests.support.vfio import findings
from vmplug.errors import InUse
from vmplug.host.finding import Code
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.journal.journal import Journal
from vmplug.manager.binding.binder import Binder

SHARE, OTHER = "0000:00:05.0", "0000:00:06.0"
MOUNTED, FREE = {Code.NOT_BOUND, Code.MOUNTED_ON_HOST}, {Code.NOT_BOUND}


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    tree = PciTree(tmp_path / "host").pci_driver("vfio-pci")
    return tree.file("/proc/sys/kernel/random/boot_id", "11111111-2222-3333-4444-555555555555\n")


def virtio(tree: PciTree, bdf: str, name: str, driver: str) -> str:
    """A virtio function with a device of that driver; returns the directory of the device."""
    group = int(bdf[9])
    tree.pci_function(bdf, vendor=0x1AF4, driver="virtio-pci", group=group)
    path = f"{tree.real(bdf)}/{name}"
    tree.file(f"{path}/uevent", f"DRIVER={driver}\n")
    tree.link(f"{path}/driver", f"../../../../bus/virtio/drivers/{driver}")
    return path


def with_9p(tree: PciTree, bdf: str, tag: str) -> PciTree:
    path = virtio(tree, bdf, f"virtio{bdf[9]}", "9pnet_virtio")
    return tree.file(f"{path}/mount_tag", f"{tag}\0")


def with_virtiofs(tree: PciTree, bdf: str, tag: str | None) -> PciTree:
    """Linux before 6.9 does not show the tag."""
    path = virtio(tree, bdf, f"virtio{bdf[9]}", "virtiofs")
    if tag is None:
        return tree
    base = f"/sys/fs/virtiofs/{bdf[9]}"
    return tree.file(f"{base}/tag", f"{tag}\n").link(f"{base}/device", f"../../..{path[4:]}")


@pytest.mark.parametrize(("make", "fs_type"), [(with_9p, "9p"), (with_virtiofs, "virtiofs")])
def test_the_function_of_a_mounted_share_stays_with_the_host(
    tree: PciTree, make: Callable[[PciTree, str, str], PciTree], fs_type: str, tmp_path: Path
) -> None:
    make(tree, SHARE, "work")
    assert set(findings(tree, SHARE)) == FREE
    tree.mount("work", "/srv/work", "0:40", fs_type=fs_type)
    found = findings(tree, SHARE)
    assert set(found) == MOUNTED
    message = f"{SHARE} has the file system 'work' of {fs_type}, which is mounted on the host at "
    assert found[Code.MOUNTED_ON_HOST].message == message + "/srv/work"
    assert found[Code.MOUNTED_ON_HOST].hint == "umount /srv/work"
    kernel = FakeKernel(tree)
    with Journal.open(tmp_path / "state") as journal:
        with pytest.raises(InUse, match="/srv/work"):
            Binder(journal, kernel).bind(find_vfio_device(SHARE, kernel))
        assert kernel.writes == []
        tree.file("/proc/1/mountinfo")
        Binder(journal, kernel).bind(find_vfio_device(SHARE, kernel))
    assert findings(tree, SHARE) == {}


def test_the_root_file_system_cannot_be_unmounted(tree: PciTree) -> None:
    with_virtiofs(tree, SHARE, "root").mount("root", "/", "0:21", fs_type="virtiofs")
    assert "hand over another device" in findings(tree, SHARE)[Code.MOUNTED_ON_HOST].hint


def test_a_share_that_only_a_container_has_mounted_is_in_use(tree: PciTree) -> None:
    with_9p(tree, SHARE, "work").mount(
        "work", "/data", "0:40", fs_type="9p", pid=77, namespace="mnt:[4026532001]"
    )
    hint = findings(tree, SHARE)[Code.MOUNTED_ON_HOST].hint
    assert "umount --namespace /proc/77/ns/mnt /data" in hint


@pytest.mark.parametrize(
    ("tag", "source", "fs_type"),
    [("work", "other", "9p"), ("work", "work", "tmpfs"), ("tmpfs", "tmpfs", "tmpfs")],
)
def test_other_mounts_are_not_its_own(tree: PciTree, tag: str, source: str, fs_type: str) -> None:
    with_9p(tree, SHARE, tag).mount(source, "/srv", "0:40", fs_type=fs_type)
    assert set(findings(tree, SHARE)) == FREE


def test_where_the_kernel_shows_no_tag_any_mount_of_the_kind_may_be_its_own(
    tree: PciTree,
) -> None:
    with_virtiofs(tree, SHARE, None).mount("work", "/srv", "0:40", fs_type="virtiofs")
    message = findings(tree, SHARE)[Code.MOUNTED_ON_HOST].message
    assert "a file system of virtiofs, perhaps one that is mounted on the host at /srv" in message


def test_another_virtio_function_has_no_file_system(tree: PciTree) -> None:
    virtio(tree, OTHER, "virtio6", "virtio_net")
    with_9p(tree, SHARE, "work").mount("work", "/srv", "0:40", fs_type="9p")
    assert set(findings(tree, OTHER)) == FREE
