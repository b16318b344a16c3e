"""Binding on a real kernel with a real IOMMU: the contract, and what only real drivers do."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import topology
from tests.contract.binding import BindingContract, Side
from vmplug.host.root import HostRoot

pytestmark = pytest.mark.lab

MULTI = (topology.MULTI_NVME, topology.MULTI_EDU, topology.MULTI_NIC)


@pytest.fixture
def host() -> HostRoot:
    return HostRoot()


class TestOnARealKernel(BindingContract):
    @pytest.fixture
    def side(self, host: HostRoot) -> Iterator[Side]:
        made = Side(host=host, single=topology.NVME, multi=MULTI)
        before = made.picture()
        yield made
        put_back(made, before)


def put_back(side: Side, before: dict[str, tuple[str | None, str]]) -> None:
    """By hand, whatever a test left."""
    for bdf, (driver, override) in before.items():
        if side.driver_of(bdf) != driver:
            side.override(bdf, driver or "")
            if side.driver_of(bdf):
                side.unbind(bdf)
            if driver:
                side.probe(bdf)
        if side.override_of(bdf) != override:
            side.override(bdf, "" if override == "(null)" else override)
    assert side.picture() == before


def test_the_lab_has_what_the_tests_are_about() -> None:
    assert Path("/sys/kernel/iommu_groups").exists()
