"""Specs of what a real kernel has: nodes of VFIO, names of udev, functions that come and go."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lab.topology import FREE_PORT, device_behind

from lab import topology
from tests.cli.command import Vmplug
from tests.cli.watching import Watching
from tests.lab.blocks import load, settle, udev
from tests.support.lab import OuterQemu, namespace_of
from vmplug import cdi

MULTI = (topology.MULTI_NVME, topology.MULTI_EDU, topology.MULTI_NIC)
PCI = Path("/sys/bus/pci/devices")
RULES = """
[[rule]]
name = "functions"
kinds = ["vfio"]
[[rule]]
name = "disks"
kinds = ["block"]
read-only = true
"""
EDU_KIND = "vmplug.org/vfio-1234-00ff"


@pytest.fixture(scope="module", autouse=True)
def modules() -> None:
    load("vfio-pci", "nvme")


@pytest.fixture
def vmplug(tmp_path: Path) -> Vmplug:
    return Vmplug(tmp_path / "state")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The arguments of a write."""
    policy = tmp_path / "policy.toml"
    policy.write_text(RULES)
    return ["--json", "--directory", str(tmp_path / "cdi"), "--policy", str(policy)]


@contextmanager
def bound(vmplug: Vmplug, bdf: str) -> Iterator[None]:
    vmplug("bind", bdf).answer()
    try:
        yield
    finally:
        vmplug("unbind", bdf).answer()


def names_by_rule(*functions: str) -> list[str]:
    """Kata's: the node of a device's own, or else the number of the group."""
    kinds = {}
    for bdf in functions:
        vendor, code = ((PCI / bdf / file).read_text()[2:6] for file in ("vendor", "class"))
        kinds[bdf] = f"vmplug.org/vfio-{vendor}-{code}"
    nodes = {bdf: [path.name for path in (PCI / bdf / "vfio-dev").glob("*")] for bdf in functions}
    if all(Path("/dev/vfio/devices", *names).is_char_device() for names in nodes.values()):
        return [f"{kinds[bdf]}={nodes[bdf][0]}" for bdf in functions]
    return [f"{kinds[functions[0]]}={(PCI / functions[0] / 'iommu_group').resolve().name}"]


def test_what_vfio_has(vmplug: Vmplug, words: list[str], tmp_path: Path) -> None:
    with bound(vmplug, MULTI[0]), bound(vmplug, topology.NVME):
        written = vmplug("cdi", "write", *words).json()
        wanted = [*names_by_rule(*MULTI), *names_by_rule(topology.NVME)]
        assert [each["name"] for each in written["devices"]] == sorted(wanted)
        registry = cdi.read_directories([tmp_path / "cdi"])
        config = cdi.inject({"linux": {}}, wanted, registry)
        for device in config["linux"]["devices"]:
            status = os.stat(device["path"])
            assert stat.S_ISCHR(status.st_mode)
            number = os.major(status.st_rdev), os.minor(status.st_rdev)
            assert number == (device["major"], device["minor"])
    done = vmplug("cdi", "write", *words)
    assert done.error()["code"] == "no-such-device"
    assert os.listdir(tmp_path / "cdi") == []


def test_the_names_that_udev_gives(vmplug: Vmplug, words: list[str], tmp_path: Path) -> None:
    node = namespace_of(topology.NVME)
    with udev():
        settle()
        vmplug("cdi", "write", *words).json()
        found = {}
        for device in cdi.read_directories([tmp_path / "cdi"]).devices.values():
            (each,) = device.device.container_edits.device_nodes
            assert (each.permissions, os.path.realpath(each.path)) == ("r", each.host_path)
            found[each.path] = each.host_path
        links = [str(path) for path in Path("/dev/disk/by-id").iterdir()]
        assert sorted(found) == sorted(link for link in links if "lvm-pv-uuid" not in link)
        assert str(node) in found.values()


def test_a_function_that_is_pulled_loses_its_name(
    vmplug: Vmplug, words: list[str], tmp_path: Path
) -> None:
    edu = device_behind(FREE_PORT, "edu", qdev_id="named-edu")
    file = tmp_path / "cdi" / f"{EDU_KIND.replace('/', '-')}.yaml"
    with OuterQemu.connect() as outer, bound(vmplug, topology.NVME):
        process = vmplug.begin("cdi", "write", "--watch", *words)
        try:
            watch = Watching(process)
            before = names_of(watch.next())
            for _ in range(2):
                outer.add(edu)
                vmplug("bind", edu.bdf).answer()
                (new,) = names_by_rule(edu.bdf)
                told = watch.next()
                assert told["written"] == [str(file)]
                assert names_of(told) == sorted([*before, new])
                outer.remove(edu)
                told = watch.next()
                assert (told["removed"], names_of(told)) == ([str(file)], before)
                assert not file.exists()
                vmplug("reconcile")
        finally:
            process.kill()
            process.communicate()


def names_of(told: dict[str, Any]) -> list[str]:
    return [each["name"] for each in told["devices"]]
