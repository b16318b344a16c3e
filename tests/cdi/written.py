"""Specs that `vmplug cdi write` makes, of hosts of which only what a test needs is there."""

import os
from pathlib import Path

from tests.support.pci_tree import PciTree
from vmplug import Setup, read_policy, write_cdi_specs

STABLE = "ata-DISK_S1:2.3"
DISK = f"vmplug.org/disk={STABLE}"
_RULES = """
[[rule]]
name = "disks, for reading"
kinds = ["block"]
read-only = true
[[rule]]
name = "functions"
kinds = ["vfio"]
"""


def write_disk(node: Path, directory: Path) -> Path:
    """The file with a block device of this host, which udev has given the name STABLE."""
    status = node.stat()
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    tree = PciTree(directory / "host").block_device(number, node.name)
    tree.file(f"/run/udev/data/b{number}", f"S:disk/by-id/{STABLE}\n")
    (file,) = write_all(tree, directory)
    return file


def write_all(tree: PciTree, directory: Path) -> list[Path]:
    """The files with all disks and functions of a host."""
    (directory / "policy.toml").write_text(_RULES)
    setup = Setup(host=tree.root, policy=read_policy(directory / "policy.toml"))
    written = write_cdi_specs(directory / "cdi", setup=setup)
    return [Path(file) for file in written.written]
