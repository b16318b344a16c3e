"""Tests of the lab: they take disks and drivers away from the machine they run on."""

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import topology
from tests.lab.nested import NestedGuest, running_guest
from tests.support.lab import namespace_of

if "LAB_VM" not in os.environ:
    raise pytest.UsageError("these tests run in the lab VM alone: make test-lab")

_CLEARED_BYTES = 1 << 20
"""More than any file system or array has at the start of a disk."""

HERE = Path(__file__).parent
HAS_IOMMUFD = not platform.release().startswith("6.1.")
"""The lab's newer kernels have it."""
REMAPS_INTERRUPTS = "IR-" in Path("/proc/interrupts").read_text()


def is_for_this_lab(name: str) -> bool:
    """Whether a file of tests is for a lab with this kernel and this IOMMU."""
    if not REMAPS_INTERRUPTS:
        return name == "test_no_remapping.py"
    return name != "test_no_remapping.py" and (HAS_IOMMUFD or name != "test_cdev.py")


collect_ignore = [path.name for path in HERE.glob("test_*.py") if not is_for_this_lab(path.name)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them have the mark."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.lab)


@pytest.fixture(scope="module", autouse=True)
def markers() -> None:
    """Every NVMe begins with its marker, whatever other tests made of it."""
    for bdf, marker in (
        (topology.NVME, topology.NVME_MARKER),
        (topology.MULTI_NVME, topology.MULTI_MARKER),
        (topology.SRIOV, topology.SRIOV_MARKER),
    ):
        with namespace_of(bdf).open("r+b") as disk:
            disk.write(marker.encode().ljust(_CLEARED_BYTES, b"\0"))


@pytest.fixture(scope="session")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NestedGuest]:
    """A guest that runs, for all tests: each takes out again what it plugs into its VM."""
    with running_guest(tmp_path_factory.mktemp("guest")) as guest:
        yield guest
