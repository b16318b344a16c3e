"""The lab is what it says."""

import subprocess
from pathlib import Path

import pytest

from lab import topology

GROUPS = Path("/sys/kernel/iommu_groups")


def members(bdf: str) -> set[str]:
    """Everything in the IOMMU group of a function."""
    group = Path(f"/sys/bus/pci/devices/{bdf}/iommu_group").resolve()
    return {path.name for path in (group / "devices").iterdir()}


@pytest.mark.parametrize(
    ("members_of", "expected"),
    [
        (topology.NVME, {topology.NVME}),
        (topology.NIC, {topology.NIC}),
        (topology.EDU, {topology.EDU}),
        (topology.VIRTIO_DISK, {topology.VIRTIO_DISK}),
        (
            topology.MULTI_NVME,
            {topology.MULTI_NVME, topology.MULTI_EDU, topology.MULTI_NIC},
        ),
        (topology.LARGE, {topology.LARGE}),
        (topology.CONVENTIONAL[0], {topology.BRIDGE, *topology.CONVENTIONAL}),
        (topology.SRIOV, {topology.SRIOV}),
        (topology.FAR, {topology.FAR}),
    ],
)
def test_groups_are_as_the_topology_says(members_of: str, expected: set[str]) -> None:
    assert members(members_of) == expected


def test_the_disk_on_the_nvme_has_its_marker() -> None:
    subprocess.run(["modprobe", "nvme"], check=True)
    namespaces = Path(f"/sys/bus/pci/devices/{topology.NVME}/nvme").glob("nvme*/nvme*n1")
    (name,) = (path.name for path in namespaces)
    with open(f"/dev/{name}", "rb") as disk:
        assert disk.read(len(topology.NVME_MARKER)) == topology.NVME_MARKER.encode()


def test_the_far_function_is_on_another_numa_node() -> None:
    assert Path(f"/sys/bus/pci/devices/{topology.FAR}/numa_node").read_text() == "1\n"
