"""`vmplug cdi write`: which devices of a host get names, and which files are vmplug's own."""

import fcntl
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import VMPLUG, Result, Vmplug
from tests.support.pci_tree import PciTree
from vmplug import cdi

SPEC_OR_POLICY, HOST, STATE = 3, 4, 6
ALL = """
[[rule]]
name = "all"
kinds = ["block", "vfio", "vhost-user-blk-pci", "vhost-user-scsi-pci"]
"""
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
NVME, GPU, SOUND, NIC = "0000:3b:00.0", "0000:41:00.0", "0000:41:00.1", "0000:5e:00.0"


class World:
    """A host of files, a policy, and the directory of the specs."""

    def __init__(self, vmplug: Vmplug, path: Path) -> None:
        self.tree = PciTree(path / "host")
        (self.tree.path / "sys").mkdir()
        self.directory = path / "cdi"
        self.policy = path / "policy.toml"
        self._vmplug = vmplug
        self.allow(ALL)

    def allow(self, text: str) -> None:
        self.policy.write_text(text)
        self.policy.chmod(0o600)

    def disk(self, number: str, name: str, *by_id: str, priority: int = 0, **more: Any) -> None:
        self.tree.block_device(number, name, **more)
        self.udev(number, *(f"disk/by-id/{each}" for each in by_id), priority=priority)

    def udev(self, number: str, *links: str, priority: int = 0) -> None:
        lines = [*(f"S:{link}" for link in links), f"L:{priority}", "E:ID_BUS=ata"]
        self.tree.file(f"/run/udev/data/b{number}", "".join(f"{line}\n" for line in lines))

    def run(self, *words: str | Path, directory: Path | str | None = None) -> Result:
        chosen = self.directory if directory is None else directory
        where = ("--directory", chosen, "--policy", self.policy)
        return self._vmplug("cdi", "write", "--root", self.tree.path, *where, *words)

    def write(self, *words: str | Path, status: int = 0) -> Any:
        """The answer as JSON; the paths of files are their names."""
        done = self.run("--json", *words)
        assert done.status == status, done
        answer = done.json()
        for key in ("written", "removed", "unchanged"):
            answer[key] = [os.path.relpath(path, self.directory) for path in answer[key]]
        return answer

    def named(self) -> dict[str, tuple[str, str, str]]:
        """Each device that the files name: its node, its path in a container, its access."""
        registry = cdi.read_directories([self.directory])
        assert not registry.problems
        assert not registry.conflicts
        found = {}
        for name, each in registry.devices.items():
            (node,) = each.device.container_edits.device_nodes
            assert node.file_mode is None
            assert each.source.spec.cdi_version <= "0.5.0"
            found[name] = (node.host_path or node.path, node.path, node.permissions)
        return found

    def files(self) -> dict[str, tuple[int, int, bytes]]:
        """What is in the directory, and whether that was written again."""
        found = {}
        for path in self.directory.iterdir():
            status = path.lstat()
            found[path.name] = (status.st_ino, status.st_mtime_ns, path.read_bytes())
        return found


@pytest.fixture
def world(vmplug: Vmplug, tmp_path: Path) -> World:
    return World(vmplug, tmp_path)


def by_id(name: str, node: str, access: str) -> dict[str, tuple[str, str, str]]:
    return {f"vmplug.org/disk={name}": (node, f"/dev/disk/by-id/{name}", access)}


def vfio(name: str, node: str) -> dict[str, tuple[str, str, str]]:
    return {name: (node, node, "rw")}


# VFIO


def test_a_group_goes_by_its_number_and_its_first_function(world: World) -> None:
    world.tree.pci_function(NVME, driver="vfio-pci", group=26).vfio_group(26)
    world.tree.pci_function(GPU, vendor=0x10DE, class_code=0x030200, driver="vfio-pci", group=27)
    world.tree.pci_function(SOUND, vendor=0x10DE, class_code=0x040300, group=27).vfio_group(27)
    assert world.write()["written"] == [
        "vmplug.org-vfio-10de-0302.yaml",
        "vmplug.org-vfio-8086-0108.yaml",
    ]
    assert world.named() == {
        **vfio("vmplug.org/vfio-10de-0302=27", "/dev/vfio/27"),
        **vfio("vmplug.org/vfio-8086-0108=26", "/dev/vfio/26"),
    }


def test_a_group_goes_if_each_of_its_functions_may(world: World) -> None:
    world.tree.pci_function(GPU, vendor=0x10DE, class_code=0x030200, driver="vfio-pci", group=27)
    world.tree.pci_function(SOUND, vendor=0x10DE, class_code=0x040300, group=27).vfio_group(27)
    world.tree.pci_function(NVME, driver="vfio-pci", group=26).vfio_group(26)
    world.allow('[[rule]]\nname = "a"\nclasses = ["0x03", "0x01"]\n')
    world.write()
    assert [*world.named()] == ["vmplug.org/vfio-8086-0108=26"]


def test_functions_with_nodes_of_their_own_go_by_these(world: World) -> None:
    world.tree.pci_function(GPU, vendor=0x10DE, class_code=0x030200, group=27, cdev=3)
    world.tree.pci_function(SOUND, vendor=0x10DE, class_code=0x040300, group=27, cdev=12)
    world.tree.vfio_group(27)
    for number in (3, 12):
        world.tree.file(f"/dev/vfio/devices/vfio{number}")
    world.write()
    assert world.named() == {
        **vfio("vmplug.org/vfio-10de-0302=vfio3", "/dev/vfio/devices/vfio3"),
        **vfio("vmplug.org/vfio-10de-0403=vfio12", "/dev/vfio/devices/vfio12"),
    }


def test_a_group_of_which_one_member_has_no_node_goes_by_its_number(world: World) -> None:
    world.tree.pci_function(GPU, vendor=0x10DE, class_code=0x030200, group=27, cdev=3)
    world.tree.pci_function(SOUND, vendor=0x10DE, class_code=0x040300, group=27).vfio_group(27)
    world.tree.file("/dev/vfio/devices/vfio3")
    world.write()
    assert world.named() == vfio("vmplug.org/vfio-10de-0302=27", "/dev/vfio/27")


def test_a_mediated_device_goes_by_its_type(world: World) -> None:
    world.tree.pci_function(GPU, vendor=0x10DE).mdev_type(GPU, "i915-GVTg_V5.4")
    world.tree.mdev(UUID, GPU, "i915-GVTg_V5.4", group=9).vfio_group(9)
    world.write()
    assert world.named() == vfio("vmplug.org/mdev-i915-GVTg_V5-4=9", "/dev/vfio/9")


def test_a_group_that_may_only_be_read_has_no_name(world: World) -> None:
    """VFIO always gives full access."""
    world.tree.pci_function(NVME, driver="vfio-pci", group=26).vfio_group(26)
    world.disk("8:0", "sda", "wwn-0x5000")
    world.allow(f"{ALL}read-only = true\n")
    world.write()
    assert world.named() == by_id("wwn-0x5000", "/dev/sda", "r")


def test_what_the_kernel_has_no_iommu_for_has_no_name(world: World) -> None:
    world.tree.pci_function(NVME, driver="vfio-pci", group=26)
    world.tree.file("/sys/class/vfio/noiommu-26/dev", "243:0\n")
    assert world.run().status == HOST
    assert not world.directory.exists()


# Disks


def test_disks_go_by_each_of_their_names(world: World) -> None:
    world.disk("8:0", "sda", "wwn-0x5000", "ata-DISK_S1", partitions={"8:1": "sda1"})
    world.udev("8:1", "disk/by-id/wwn-0x5000-part1", "disk/by-path/pci-0", "disk/by-label/wwn-0x1")
    world.tree.block_device("8:16", "sdb")
    world.udev("8:16", "disk/by-uuid/1234")
    world.write()
    assert world.named() == {
        **by_id("ata-DISK_S1", "/dev/sda", "rw"),
        **by_id("wwn-0x5000", "/dev/sda", "rw"),
        **by_id("wwn-0x5000-part1", "/dev/sda1", "rw"),
    }


def test_a_name_that_comes_from_data_on_the_disk_is_none(world: World) -> None:
    world.disk("8:0", "sda", "lvm-pv-uuid-4XqJ2u", "wwn-0x5000")
    world.write()
    assert world.named() == by_id("wwn-0x5000", "/dev/sda", "rw")


def test_the_words_of_the_policy_select(world: World) -> None:
    for number, letter in ((0, "a"), (16, "b"), (32, "c"), (48, "d")):
        world.disk(f"8:{number}", f"sd{letter}", f"wwn-0x{letter}")
    world.allow("""
[[rule]]
name = "by name, for reading"
paths = ["/dev/disk/by-id/wwn-0xa"]
read-only = true
[[rule]]
name = "by number, for some"
numbers = ["b:8:16"]
vms = ["sb*"]
owners = ["ctr1"]
cold-only = true
[[rule]]
name = "by node"
paths = ["/dev/sdc"]
""")
    world.write()
    assert world.named() == {
        **by_id("wwn-0xa", "/dev/sda", "r"),
        **by_id("wwn-0xb", "/dev/sdb", "rw"),
        **by_id("wwn-0xc", "/dev/sdc", "rw"),
    }


def test_a_rule_for_cdi_kinds_gives_the_names_that_it_allows(world: World) -> None:
    world.disk("8:0", "sda", "wwn-0x5000")
    world.tree.pci_function(NVME, driver="vfio-pci", group=26).vfio_group(26)
    for kind in ("vmplug.org/disk", "vmplug.org/vfio-8086-0108"):
        world.allow(f'[[rule]]\nname = "a"\ncdi-kinds = ["{kind}"]\n')
        world.write()
        assert [name.partition("=")[0] for name in world.named()] == [kind]


def test_a_read_only_disk_is_written_so(world: World) -> None:
    world.disk("8:0", "sda", "wwn-0x5000", ro=True)
    world.write()
    assert world.named() == by_id("wwn-0x5000", "/dev/sda", "r")


def test_a_disk_in_use_keeps_its_name(world: World) -> None:
    world.disk("8:0", "sda", "wwn-0x5000")
    world.tree.mount("/dev/sda", "/", "8:0")
    world.write()
    assert world.named() == by_id("wwn-0x5000", "/dev/sda", "rw")


def test_a_name_of_two_disks_is_given_to_neither(world: World) -> None:
    world.disk("8:0", "sda", "usb-STICK", "wwn-0x5000")
    world.disk("8:16", "sdb", "usb-STICK")
    (left_out,) = world.write(status=HOST)["left_out"]
    assert left_out == {
        "code": "ambiguous-name",
        "what": "usb-STICK",
        "message": "/dev/disk/by-id/usb-STICK is the name of b:8:0 and b:8:16: neither gets it",
    }
    assert world.named() == by_id("wwn-0x5000", "/dev/sda", "rw")


def test_a_name_of_two_disks_that_nobody_may_have_is_no_matter(world: World) -> None:
    world.disk("8:0", "sda", "usb-STICK")
    world.disk("8:16", "sdb", "usb-STICK")
    world.disk("8:32", "sdc", "wwn-0x5000")
    world.allow('[[rule]]\nname = "a"\npaths = ["/dev/sdc"]\n')
    world.write()
    assert world.named() == by_id("wwn-0x5000", "/dev/sdc", "rw")


def test_a_multipath_device_has_the_name_before_its_paths(world: World) -> None:
    """As udev decides whose the link is."""
    world.disk("8:0", "sda", "wwn-0x5000", "scsi-1")
    world.disk("253:0", "dm-0", "wwn-0x5000", priority=50)
    world.write()
    assert world.named() == {
        **by_id("scsi-1", "/dev/sda", "rw"),
        **by_id("wwn-0x5000", "/dev/dm-0", "rw"),
    }


def test_a_name_that_cdi_forbids(world: World) -> None:
    world.disk("8:0", "sda", r"usb-A\x20B=1", "wwn-0x5000")
    done = world.run()
    assert done.status == HOST
    (said,) = done.stderr.splitlines()
    assert said.startswith(r"vmplug: no name for usb-A\x20B=1: 'usb-A")
    assert said.endswith("at both ends, and only letters, digits, _ - . : between")
    assert world.named() == by_id("wwn-0x5000", "/dev/sda", "rw")


def test_a_name_too_long_for_a_path_disturbs_no_other(world: World) -> None:
    """As a USB stick with a long serial number has it in udev's database."""
    world.disk("8:0", "sda", "usb-" + "x" * 300, "wwn-0x5000")
    (left_out,) = world.write(status=HOST)["left_out"]
    assert left_out["code"] == "bad-cdi-name"
    assert left_out["message"].endswith("has 304 bytes; at most 255 are allowed")
    assert world.named() == by_id("wwn-0x5000", "/dev/sda", "rw")
    world.allow('[[rule]]\nname = "none"\nnumbers = ["b:9:9"]\n')
    assert world.run().stderr.startswith("vmplug: nothing on this host")


# The vhost-user store


@pytest.mark.root
def test_the_nodes_of_a_store(world: World) -> None:
    store = "/run/vu"
    for name, number in (("vol.1", "241:0"), ("scsi", "242:0"), ("bad name", "241:1")):
        world.tree.node(f"{store}/block/devices/{name}", "b", number)
        world.tree.node(f"{store}/block/sockets/{name}", "s")
    world.tree.node(f"{store}/block/devices/down", "b", "241:2")
    answer = world.write("--vhost-user-store", store, status=HOST)
    assert [(each["code"], each["what"]) for each in answer["left_out"]] == [
        ("bad-cdi-name", "bad name"),
        ("no-such-device", "down"),
    ]
    nodes = f"{store}/block/devices"
    assert world.named() == {
        "vmplug.org/vhost-user-blk=vol.1": (f"{nodes}/vol.1", "/dev/vhost-user/vol.1", "rw"),
        "vmplug.org/vhost-user-scsi=scsi": (f"{nodes}/scsi", "/dev/vhost-user/scsi", "rw"),
    }


def test_a_store_that_is_not_there(world: World) -> None:
    world.disk("8:0", "sda", "wwn-0x5000")
    done = world.run("--vhost-user-store", "/run/vu")
    assert (done.status, world.directory.exists()) == (HOST, False)
    assert "the vhost-user store /run/vu does not exist" in done.stderr


# Whose file it is


def test_what_has_not_changed_is_not_written_again(world: World) -> None:
    world.disk("8:0", "sda", "wwn-0x5000")
    world.tree.pci_function(NVME, driver="vfio-pci", group=26).vfio_group(26)
    world.write()
    before = world.files()
    assert world.write()["unchanged"] == sorted(before)
    assert world.files() == before
    world.disk("8:16", "sdb", "wwn-0x6000")
    answer = world.write()
    assert (answer["written"], answer["unchanged"]) == (
        ["vmplug.org-disk.yaml"],
        ["vmplug.org-vfio-8086-0108.yaml"],
    )
    (kept,) = answer["unchanged"]
    assert world.files()[kept] == before[kept]


def test_the_file_of_a_kind_that_has_gone_is_removed(world: World) -> None:
    world.disk("8:0", "sda", "wwn-0x5000")
    world.tree.pci_function(NVME, driver="vfio-pci", group=26).vfio_group(26)
    world.write()
    (world.tree.path / "sys/class/vfio/26").unlink()
    assert world.write()["removed"] == ["vmplug.org-vfio-8086-0108.yaml"]
    assert [*world.files()] == ["vmplug.org-disk.yaml"]


FOREIGN = {
    "vmplug.org-disk.yaml": b"cdiVersion: 0.5.0\n",
    "vmplug.org-gone.yaml": b"",
    "vmplug.org-disk.json": b"{}",
    "vendor.yaml": b"\xff",
    ".vmplug-spec-x": b"",
    "spec.1.tmp": b"",
}


def lay(directory: Path, files: Mapping[str, bytes]) -> None:
    directory.mkdir(exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)


def test_files_of_others_are_left_alone(world: World) -> None:
    lay(world.directory, FOREIGN)
    (world.directory / "vmplug.org-link.yaml").symlink_to("vendor.yaml")
    before = world.files()
    world.disk("8:0", "sda", "wwn-0x5000")
    world.tree.pci_function(NVME, driver="vfio-pci", group=26).vfio_group(26)
    answer = world.write(status=HOST)
    path = world.directory / "vmplug.org-disk.yaml"
    assert answer["left_out"] == [
        {
            "code": "foreign-spec",
            "what": str(path),
            "message": f"{path} is not as vmplug wrote it: it stays, and no device of kind "
            "vmplug.org/disk is written",
        }
    ]
    assert [each["name"] for each in answer["devices"]] == ["vmplug.org/vfio-8086-0108=26"]
    assert answer["written"] == ["vmplug.org-vfio-8086-0108.yaml"]
    after = world.files()
    del after["vmplug.org-vfio-8086-0108.yaml"]
    assert after == before


def test_a_name_that_a_file_of_others_defines_stays_theirs(world: World) -> None:
    """It would be of no use to anybody: two files of one directory would define it."""
    world.disk("8:0", "sda", "wwn-0x5000")
    world.write()
    path = world.directory / "mine.yaml"
    (world.directory / "vmplug.org-disk.yaml").rename(path)
    world.disk("8:16", "sdb", "wwn-0x6000")
    for words, ready in ((["--dry-run"], {}), ([], by_id("wwn-0x6000", "/dev/sdb", "rw"))):
        answer = world.write(*words, status=HOST)
        assert answer["left_out"] == [
            {
                "code": "foreign-spec",
                "what": "vmplug.org/disk=wwn-0x5000",
                "message": f"{path} defines it, and two files of a directory would make it "
                "unusable",
            }
        ]
        assert [each["name"] for each in answer["devices"]] == ["vmplug.org/disk=wwn-0x6000"]
        assert world.named() == {**by_id("wwn-0x5000", "/dev/sda", "rw"), **ready}
    path.unlink()
    world.write()
    assert [*world.named()] == [f"vmplug.org/disk=wwn-0x{number}000" for number in (5, 6)]


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"rw"', '"r"'))


def rename(path: Path) -> None:
    path.rename(path.with_name("vmplug.org-mine.yaml"))


def cut(path: Path) -> None:
    path.write_text(path.read_text()[:-20])


def widen(path: Path) -> None:
    path.chmod(0o666)


@pytest.mark.parametrize("change", [edit, rename, cut, widen])
def test_what_somebody_changed_is_theirs(world: World, change: Any) -> None:
    world.disk("8:0", "sda", "wwn-0x5000")
    world.tree.pci_function(NVME, driver="vfio-pci", group=26).vfio_group(26)
    world.write()
    change(world.directory / "vmplug.org-disk.yaml")
    before = world.files()
    world.disk("8:16", "sdb", "wwn-0x6000")
    for policy in (ALL, '[[rule]]\nname = "a"\nkinds = ["vfio"]\n'):
        world.allow(policy)
        world.run()
        after = world.files()
        if change is rename:
            after.pop("vmplug.org-disk.yaml", None)
        assert after == before


def test_a_dry_run_says_what_would_be_done(world: World) -> None:
    world.disk("8:0", "sda", "wwn-0x5000")
    answer = world.write("--dry-run")
    assert (answer["dry_run"], answer["written"]) == (True, ["vmplug.org-disk.yaml"])
    assert not world.directory.exists()
    world.write()
    before = world.files()
    world.allow('[[rule]]\nname = "a"\nkinds = ["vfio"]\n')
    world.tree.pci_function(NVME, driver="vfio-pci", group=26).vfio_group(26)
    file = world.directory / "vmplug.org-"
    assert world.run("--dry-run").answer().splitlines()[1:] == [
        "vmplug.org/vfio-8086-0108=26  /dev/vfio/26 rw",
        f"would write {file}vfio-8086-0108.yaml",
        f"would remove {file}disk.yaml",
    ]
    assert world.files() == before


# What cannot be done


def test_without_a_policy_nothing_has_a_name(vmplug: Vmplug, world: World) -> None:
    if Path("/etc/vmplug/policy.toml").exists():
        pytest.skip("this host has a policy")
    world.disk("8:0", "sda", "wwn-0x5000")
    words = ("--root", world.tree.path, "--directory", world.directory)
    done = vmplug("cdi", "write", *words)
    assert (done.status, world.directory.exists()) == (SPEC_OR_POLICY, False)
    assert done.stderr.startswith("vmplug: no policy says which devices of this host may have na")


def test_a_policy_that_is_wrong(world: World) -> None:
    world.disk("8:0", "sda", "wwn-0x5000")
    world.write()
    before = world.files()
    world.allow("[[rules]]")
    assert world.run().status == SPEC_OR_POLICY
    assert world.files() == before


def test_a_policy_that_selects_nothing(world: World) -> None:
    """What was written for another policy goes, as that would still be handed over."""
    world.disk("8:0", "sda", "wwn-0x5000")
    world.write()
    lay(world.directory, {"vendor.yaml": b""})
    world.allow('[[rule]]\nname = "a"\nkinds = ["vfio"]\n')
    done = world.run()
    assert (done.status, [*world.files()]) == (HOST, ["vendor.yaml"])
    said = f"vmplug: nothing on this host that {world.policy} allows has a name for CDI\n"
    assert done.stderr.startswith(said)


def test_directories_that_cannot_be_written(world: World, tmp_path: Path) -> None:
    world.disk("8:0", "sda", "wwn-0x5000")
    (tmp_path / "file").touch()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    before = sorted(tmp_path.iterdir())
    for directory, why in (
        (tmp_path / "not" / "there", "No such file or directory"),
        (tmp_path / "file", "Not a directory"),
        (tmp_path / "file" / "below", "Not a directory"),
        (tmp_path / "link", "it is a symbolic link, which engines do not follow"),
        (Path("/proc/cdi"), "No such file or directory"),
        (Path("/sys/kernel"), "Operation not permitted|Permission denied"),
    ):
        done = world.run(directory=directory)
        assert done.status == HOST
        said, hint, *more = done.stderr.splitlines()
        assert said in [f"vmplug: cannot write specs in {directory}: {w}" for w in why.split("|")]
        assert hint.startswith("hint: ")
        assert not more
    assert sorted(tmp_path.iterdir()) == before
    assert not [*(tmp_path / "real").iterdir()]


def test_a_directory_in_which_others_can_write_gets_no_names(world: World) -> None:
    """vmplug would refuse them there."""
    world.disk("8:0", "sda", "wwn-0x5000")
    world.directory.mkdir()
    world.directory.chmod(0o777)
    done = world.run()
    assert (done.status, world.files()) == (HOST, {})
    assert f"{world.directory}: it is writable by others (mode 0777)\nhint: " in done.stderr


def test_an_empty_directory_is_none(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.disk("8:0", "sda", "wwn-0x5000")
    world.directory.mkdir()
    monkeypatch.chdir(world.directory)
    done = world.run("--dry-run", directory="")
    assert (done.status, done.stdout) == (2, "")
    assert "'--directory': the path is empty" in done.stderr


def test_every_user_may_read_what_is_written(world: World) -> None:
    world.disk("8:0", "sda", "wwn-0x5000")
    former = os.umask(0o077)
    try:
        world.write()
    finally:
        os.umask(former)
    (file,) = world.directory.iterdir()
    assert (world.directory.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o755, 0o644)


@pytest.mark.root
@pytest.mark.parametrize(
    ("options", "why", "hint"),
    [
        ("ro", "Read-only file system", "pass a directory that engines read, with --directory"),
        ("nr_inodes=1", "No space left on device", "make room for them: df {}"),
    ],
)
def test_a_file_system_that_takes_no_file(world: World, options: str, why: str, hint: str) -> None:
    world.disk("8:0", "sda", "wwn-0x5000")
    world.directory.mkdir()
    script = f'mount -t tmpfs -o {options},mode=755 tmpfs "$1"; shift; exec "$@"'
    words = ("--root", world.tree.path, "--directory", world.directory, "--policy", world.policy)
    alone = ("unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh")
    done = subprocess.run(
        [*alone, world.directory, VMPLUG, "cdi", "write", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    said = f"vmplug: cannot write specs in {world.directory}: {why}"
    told = f"hint: {hint.format(world.directory)}"
    assert (done.returncode, done.stderr.splitlines()) == (HOST, [said, told])


def test_one_process_writes_at_a_time(world: World) -> None:
    world.disk("8:0", "sda", "wwn-0x5000")
    world.directory.mkdir()
    descriptor = os.open(world.directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        done = world.run()
        assert (done.status, world.files()) == (STATE, {})
        assert f"another process writes specs in {world.directory}" in done.stderr
    finally:
        os.close(descriptor)
    world.write()


@pytest.mark.parametrize(
    "words", [("--dry-run", "--watch"), ("--watch",), ("--root", "HOST", "--policy", "POLICY")]
)
def test_options_that_do_not_go_together(
    vmplug: Vmplug, world: World, words: tuple[str, ...]
) -> None:
    named = {"HOST": str(world.tree.path), "POLICY": str(world.policy)}
    where = () if "--root" in words else ("--root", str(world.tree.path), "--directory", "cdi")
    done = vmplug("cdi", "write", *where, *(named.get(word, word) for word in words))
    assert done.status == 2


def test_what_a_killed_process_left_is_removed(world: World) -> None:
    lay(world.directory, {".vmplug-spec-ab12.tmp": b"half"})
    world.disk("8:0", "sda", "wwn-0x5000")
    world.write()
    assert [*world.files()] == ["vmplug.org-disk.yaml"]
