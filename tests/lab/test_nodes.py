"""Nodes of groups in /dev: a stale and a missing one are found, and the remedies work."""

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import topology
from tests.cli.command import Vmplug

DEVICE = ("--device", f"vfio:{topology.EDU}")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Path]:
    """The node of a group that VFIO has."""
    vmplug = Vmplug(tmp_path / "state")
    subprocess.run(["modprobe", "vfio-pci"], check=True)
    vmplug("bind", topology.EDU).answer()
    group = os.readlink(f"/sys/bus/pci/devices/{topology.EDU}/iommu_group")
    yield Path("/dev/vfio") / group.rpartition("/")[2]
    vmplug("unbind", topology.EDU).answer()
    # The kernel removes only its own.
    (Path("/dev/vfio") / group.rpartition("/")[2]).unlink(missing_ok=True)


def check(state_dir: Path) -> tuple[int, str, str]:
    """The status of `check`, and the code and the remedy of the first error."""
    done = Vmplug(state_dir)("check", *DEVICE)
    lines = done.stdout.splitlines()
    at = next((number for number, line in enumerate(lines) if ": error " in line), None)
    if at is None:
        return done.status, "", ""
    return done.status, lines[at].split(": error ")[1].split(":")[0], lines[at + 1].strip()


@pytest.mark.parametrize("stale", [True, False], ids=["stale", "missing"])
def test_a_node_that_is_not_the_kernels_is_found_and_the_remedy_makes_the_right_one(
    node: Path, tmp_path: Path, *, stale: bool
) -> None:
    assert check(tmp_path)[0] == 0
    number = node.stat().st_rdev
    node.unlink()
    if stale:
        wrong = os.makedev(os.major(number), os.minor(number) + 100)
        os.mknod(node, stat.S_IFCHR | 0o600, wrong)
    status, code, remedy = check(tmp_path)
    assert (status, code) == (4, "wrong-node" if stale else "no-node")
    subprocess.run(["sh", "-ec", remedy.partition("; in a container")[0]], check=True)
    assert node.stat().st_rdev == number
    assert check(tmp_path)[0] == 0


def test_a_node_that_nothing_can_open_is_found_and_the_remedy_lets_it_be_opened(
    node: Path, tmp_path: Path
) -> None:
    directory = node.parent
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,nodev", directory], check=True)
        with pytest.raises(PermissionError):
            node.open("rb")
        status, code, remedy = check(tmp_path)
        assert (status, code) == (4, "wrong-node")
        subprocess.run(["sh", "-ec", remedy], check=True)
        node.open("rb").close()
        assert check(tmp_path)[0] == 0
    finally:
        subprocess.run(["umount", directory], check=True)
