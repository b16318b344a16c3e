"""`--device` and BUNDLE as people name a disk: by its path, with `:CONTAINER_PATH` and `:ro`.

Without root no block node can be made: there links to /dev/null, whose names are like those below
/dev/disk, stand for them.
"""

from pathlib import Path

import pytest

from tests.cli.command import Vmplug, config, number_of
from tests.cli.monitors import MemoryVm
from tests.support.disks import disk_image, loop_device
from tests.support.tree import HostTree

BY_PATH = "pci-0000:00:1f.2-ata-1"
NODE_HINT = (
    "after the device write nothing, :/dev/xvda, :ro or :/dev/xvda:ro; without :ro the device is "
    "writable"
)


def asked(vmplug: Vmplug, words: str, *more: str) -> tuple[str, str, bool]:
    """The container path, the number and whether for reading only."""
    (device,) = vmplug("info", "-d", words, *more, "--json").json()["devices"]
    number = f"{device['major']}:{device['minor']}"
    return device["container_path"], number, device["read_only"]


@pytest.fixture
def node(tmp_path: Path) -> str:
    """A name with colons, and a shorter one that it begins with."""
    for name in (BY_PATH, f"{BY_PATH}-part1", "pci-0000"):
        (tmp_path / name).symlink_to("/dev/null")
    return str(tmp_path / BY_PATH)


@pytest.mark.parametrize(
    ("suffix", "path", "read_only"),
    [
        ("", None, False),
        (":ro", None, True),
        (":/dev/xvda", "/dev/xvda", False),
        (":/dev/xvda:ro", "/dev/xvda", True),
        (":/dev/disk/by-path/pci-0000:af:00.0-nvme-1", None, False),
        (":/dev/disk/by-path/usb-0:4:1.0-scsi-0:0:0:0:ro", None, True),
    ],
)
def test_the_longest_path_that_exists_is_the_device(
    vmplug: Vmplug, node: str, suffix: str, path: str | None, *, read_only: bool
) -> None:
    shown = path or suffix.removesuffix(":ro")[1:] or node
    assert asked(vmplug, node + suffix) == (shown, "1:3", read_only)


@pytest.mark.parametrize(
    ("words", "path"),
    [
        ("b:7:4:/dev/xvda:ro", "/dev/xvda"),
        ("b:7:4:ro", "/dev/block/7:4"),
        ("c:10:229:/dev/fuse:ro", "/dev/fuse"),
        ("file:/a.img:ro", "/dev/a.img"),
        ("file:/a.img:/dev/xvda:ro", "/dev/xvda"),
        ("nvdimm:/a.img:/dev/pmem0:ro", "/dev/pmem0"),
    ],
)
def test_ro_at_the_end_is_read_only_for_every_kind(vmplug: Vmplug, words: str, path: str) -> None:
    assert asked(vmplug, words)[::2] == (path, True)


def test_ro_at_the_end_makes_a_share_read_only(vmplug: Vmplug) -> None:
    (share,) = vmplug("info", "-d", "share:/srv/a:work:ro", "--json").json()["devices"]
    assert (share["name"], share["host_path"], share["read_only"]) == (
        "share:work",
        "/srv/a",
        True,
    )


@pytest.mark.parametrize(
    "suffix",
    [
        *(":rw", ":RO", ":r", ":", ":xvda", ":ro:/dev/xvda", ":/dev/xvda:rw", ":/dev/xvda:"),
        *(":/dev/xvda:readonly", ":/dev/xvda:ro:/x", ":/dev/xvda: ro", ":/dev/xvda:rw:ro"),
    ],
)
@pytest.mark.parametrize("device", ["{node}", "b:7:4"])
def test_any_other_word_after_a_device_is_refused_with_what_is_right(
    vmplug: Vmplug, node: str, device: str, suffix: str
) -> None:
    refused = vmplug("check", "-d", device.format(node=node) + suffix)
    assert (refused.status, refused.stdout) == (3, "")
    message, hint = refused.stderr.splitlines()
    assert message.endswith("' is neither a path in the container nor :ro")
    assert hint == f"hint: {NODE_HINT}"


def test_a_wrong_word_after_the_path_of_an_image_is_refused_too(vmplug: Vmplug) -> None:
    refused = vmplug("check", "-d", "file:/a.img:/dev/xvda:rw")
    assert (refused.status, refused.stderr.splitlines()[1]) == (3, f"hint: {NODE_HINT}")


@pytest.mark.parametrize("words", ["vfio:0000:3b:00.0:ro", "net:/run/eth0.sock:ro"])
def test_what_cannot_be_read_only_says_so(vmplug: Vmplug, words: str) -> None:
    refused = vmplug("check", "-d", words)
    assert (refused.status, refused.stdout) == (3, "")
    assert refused.stderr == (
        f"vmplug: --device {words}: such a device cannot be read-only\nhint: omit :ro\n"
    )


@pytest.mark.parametrize(
    ("made", "words", "message", "hint"),
    [
        ("absent", "{path}", "{path} does not exist on this host", "vmplug host lists"),
        ("absent", "{path}:/dev/xvda:ro", "{path} does not exist on this host", "vmplug host"),
        ("dangling", "{path}:ro", "{path} leads to {path}-gone, which does not exist", "vmplug"),
        ("file", "{path}", "{path} is not a device: found a regular file", "write file:{path} to"),
        ("folder", "{path}:ro", "{path} is not a device: found a directory", "share:{path}:TAG"),
    ],
)
def test_a_path_that_leads_to_no_device_says_what_is_there(
    vmplug: Vmplug, tmp_path: Path, made: str, words: str, message: str, hint: str
) -> None:
    path = tmp_path / made
    if made == "dangling":
        path.symlink_to(f"{path}-gone")
    elif made == "file":
        path.touch()
    elif made == "folder":
        path.mkdir()
    refused = vmplug("check", "-d", words.format(path=path))
    assert (refused.status, refused.stdout) == (4, "")
    said, remedy = refused.stderr.splitlines()
    assert said.startswith("vmplug: " + message.format(path=path))
    assert hint.format(path=path) in remedy


def test_a_name_without_a_directory_is_no_path(vmplug: Vmplug) -> None:
    refused = vmplug("check", "-d", "sdb")
    assert refused.status == 3
    assert "'sdb' is not b, c, file," in refused.stderr
    assert "hint: write /dev/sdb, b:8:16, file:/images/a.img" in refused.stderr


# in place of a BUNDLE


def test_a_node_in_place_of_a_bundle_is_the_device(vmplug: Vmplug, node: str) -> None:
    for words in (node, f"{node}:/dev/xvda:ro", "/dev/null"):
        (one,) = vmplug("info", words, "--json").json()["devices"]
        (other,) = vmplug("info", "-d", words, "--json").json()["devices"]
        assert one == other
    assert vmplug("check", "/dev/null").answer().startswith("/dev/null: ")


def test_an_absent_name_below_dev_is_an_absent_device(vmplug: Vmplug) -> None:
    absent = vmplug("check", "/dev/vmplug-absent")
    assert (absent.status, absent.stdout) == (4, "")
    assert absent.stderr.startswith("vmplug: /dev/vmplug-absent does not exist on this host\n")


def test_the_standard_input_stays_a_bundle_by_every_name(vmplug: Vmplug) -> None:
    for name in ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"):
        document = vmplug.as_process("info", name, "--json", stdin=config()).json()
        assert document["devices"] == []


@pytest.mark.root
def test_a_disk_is_named_as_people_name_it(vmplug: Vmplug, tree: HostTree) -> None:
    tree.block_device("8:16", "sdb", partitions={"8:17": "sdb1"})
    tree.node("/dev/sdb", "b", "8:16").node("/dev/sdb1", "b", "8:17")
    tree.link("/dev/disk/by-id/wwn-0x5000c500", "../../sdb")
    tree.link(f"/dev/disk/by-path/{BY_PATH}", "../../sdb")
    tree.link(f"/dev/disk/by-path/{BY_PATH}-part1", "../../sdb1")
    root = ("--root", str(tree.path))
    by_path = f"/dev/disk/by-path/{BY_PATH}"
    assert asked(vmplug, "/dev/sdb", *root) == ("/dev/sdb", "8:16", False)
    assert asked(vmplug, "/dev/sdb:/dev/xvda:ro", *root) == ("/dev/xvda", "8:16", True)
    assert asked(vmplug, by_path, *root) == (by_path, "8:16", False)
    assert asked(vmplug, f"{by_path}:ro", *root) == (by_path, "8:16", True)
    assert asked(vmplug, f"{by_path}-part1:ro", *root) == (f"{by_path}-part1", "8:17", True)
    by_id = "/dev/disk/by-id/wwn-0x5000c500"
    assert asked(vmplug, f"{by_id}:/dev/xvda", *root) == ("/dev/xvda", "8:16", False)
    (found,) = vmplug("resolve", by_id, *root, "--json").json()["devices"]
    assert (found["host_path"], found["kind"]) == ("/dev/sdb", "block")


@pytest.mark.root
def test_check_of_a_disk_checks_the_disk(vmplug: Vmplug, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 2, "a loop device")
    with loop_device(image, read_only=True) as node:
        checked = vmplug("check", node)
        assert checked.status == 4
        assert checked.stdout.startswith(f"{node}: error read-only-device: {node} is read-only")
        assert vmplug("check", f"{node}:ro").status == 0
        assert vmplug("check", "-d", f"b:{number_of(node)}:/dev/xvda:ro").status == 0


@pytest.mark.root
def test_ro_reaches_qemu_and_without_it_the_disk_is_writable(
    vmplug: Vmplug, tmp_path: Path
) -> None:
    socket = vmplug.state_dir.with_name("qmp.sock")
    with MemoryVm(socket), loop_device(disk_image(tmp_path / "a.img", 2, "a disk")) as node:
        vmplug("vm", "adopt", "sb1", "--qmp", socket).answer()
        for suffix, read_only in ((":ro", True), (":/dev/xvda:ro", True), (":/dev/xvda", False)):
            for words in (("-d", f"{node}{suffix}"), (f"{node}{suffix}",)):
                steps = vmplug("plan", *words, "--vm", "sb1", "--json").json()["steps"]
                (disk,) = (step["do"] for step in steps if step["do"]["execute"] == "blockdev-add")
                assert disk["arguments"]["read-only"] is read_only
        attached = vmplug("attach", f"{node}:ro", "--vm", "sb1", "--owner", "ctr1", "--json")
        (hold,) = attached.json()["attachments"]
        assert (hold["read_only"], hold["host_path"]) == (True, str(node))
