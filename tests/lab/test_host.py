"""`vmplug host` beside the kernel's own files and lspci, also when devices come and go."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lab.topology import FREE_PORT, NVME, Device, device_behind

from tests.cli.command import Vmplug
from tests.lab.blocks import mapped
from tests.lab.nested import paused_vm
from tests.support.lab import OuterQemu, namespace_of, wait_until

PCI = Path("/sys/bus/pci/devices")
GROUPS = Path("/sys/kernel/iommu_groups")


@pytest.fixture
def outer() -> Iterator[OuterQemu]:
    with OuterQemu.connect() as outer:
        yield outer


@pytest.fixture
def late(outer: OuterQemu) -> Iterator[Device]:
    """A device that is not there yet; it is removed in the end."""
    subprocess.run(["modprobe", "--all", "vfio-pci", "vfio_iommu_type1"], check=True)
    device = device_behind(FREE_PORT, "edu", qdev_id="late")
    yield device
    if device.qdev_id in outer.devices():
        outer.remove(device)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def vmplug(*words: str | Path, status: int = 0) -> Any:
    done = Vmplug(Path("/run/vmplug"))(*words, "--json")
    assert done.status == status, done
    return json.loads(done.stdout or done.stderr)


def functions() -> dict[str, dict[str, Any]]:
    return {function["address"]: function for function in vmplug("host")["pci"]}


def text(bdf: str, name: str) -> str:
    return (PCI / bdf / name).read_text().strip()


def test_every_function_is_told_as_the_kernel_tells_it() -> None:
    told = functions()
    assert set(told) == {path.name for path in PCI.iterdir()}
    for bdf, function in told.items():
        assert function["class"] == text(bdf, "class")
        assert (function["vendor"], function["device"]) == (
            text(bdf, "vendor"),
            text(bdf, "device"),
        )
        driver = PCI / bdf / "driver"
        assert function["driver"] == (driver.resolve().name if driver.exists() else None)
        group = (PCI / bdf / "iommu_group").resolve().name
        assert function["iommu_group"] == int(group)
        assert bdf in {path.name for path in (GROUPS / group / "devices").iterdir()}
        node = int(text(bdf, "numa_node"))
        assert function["numa_node"] == (None if node < 0 else node)


def test_it_is_pcie_where_lspci_finds_the_capability() -> None:
    shown = subprocess.run(["lspci", "-D", "-vv"], capture_output=True, text=True, check=True)
    expected = {
        block.split()[0]: "Express (v" in block for block in shown.stdout.split("\n\n") if block
    }
    assert {bdf: function["pcie"] for bdf, function in functions().items()} == expected


def test_bars_are_as_large_as_lspci_says() -> None:
    shown = subprocess.run(["lspci", "-D", "-vv"], capture_output=True, text=True, check=True)
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    told = functions()
    for block in filter(None, shown.stdout.split("\n\n")):
        regions = [line for line in block.splitlines() if "Region " in line and "[size=" in line]
        words = [line.rpartition("[size=")[2].rstrip("]") for line in regions]
        sizes = [int(w.rstrip("KMG")) * units.get(w[-1], 1) for w in words]
        assert [bar["size_bytes"] for bar in told[block.split()[0]]["bars"]] == sizes


def test_a_device_that_comes_is_shown_and_one_that_goes_is_not(
    outer: OuterQemu, late: Device
) -> None:
    assert late.bdf not in functions()
    outer.add(late)
    assert functions()[late.bdf]["device"] == "0x11e8"
    outer.remove(late)
    assert late.bdf not in functions()
    error = vmplug("resolve", "--device", f"vfio:{late.bdf}", status=4)
    assert "no PCI function" in json.dumps(error)


def test_the_journal_forgets_a_function_that_has_gone(
    outer: OuterQemu, late: Device, state: Path
) -> None:
    outer.add(late)
    vmplug("bind", late.bdf, "--state-dir", state)
    outer.remove(late)
    told = vmplug("reconcile", "--state-dir", state)
    assert [(b["address"], b["outcome"]) for b in told["bindings"]] == [(late.bdf, "forgotten")]
    assert vmplug("reconcile", "--state-dir", state)["bindings"] == []


def test_a_device_that_is_pulled_while_a_vm_has_it_leaves_nothing_behind(
    outer: OuterQemu, late: Device, state: Path, tmp_path: Path
) -> None:
    outer.add(late)
    with paused_vm(tmp_path) as vm:
        vmplug("vm", "adopt", "sb1", "--qmp", vm.qmp_path, "--state-dir", state)
        options = ("--vm", "sb1", "--owner", "ctr1", "--state-dir", state)
        wanted = ("--device", f"vfio:{late.bdf}", "-o", "port=root-port", "--managed")
        vmplug("attach", *wanted, *options)
        outer.execute("device_del", id=late.qdev_id)  # the kernel waits for the VM to let go
        vm.kill()
    told = vmplug("reconcile", "--state-dir", state)
    assert [repair["outcome"] for repair in told["repairs"]] == ["forgotten"]
    wait_until(lambda: late.qdev_id not in outer.devices(), f"end of {late.qdev_id}")
    assert vmplug("list", "--state-dir", state)["attachments"] == []
    assert late.bdf not in functions()


def test_what_holds_a_function_is_shown(state: Path) -> None:
    namespace = namespace_of(NVME)
    (function,) = [f for f in vmplug("host", NVME)["pci"] if f["address"] == NVME]
    assert str(namespace) in json.dumps(function)


@contextmanager
def held_open(path: Path) -> Iterator[None]:
    """By another process: what the one that runs the verb has open is its own."""
    with subprocess.Popen(
        ["sh", "-c", 'exec 3<"$0"; echo; exec cat', str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout
        holder.stdout.readline()
        yield
        holder.communicate()


def test_a_function_is_shown_with_what_is_on_it_and_who_uses_that() -> None:
    namespace = namespace_of(NVME)
    controllers = list((PCI / NVME / "nvme").iterdir())
    controller = Path("/dev") / controllers[0].name
    with mapped("lab", f"0 2048 linear {namespace} 0") as volume, held_open(controller):
        name = f"/dev/dm-{os.minor(volume.stat().st_rdev)}"
        thing = vmplug("host", NVME)["thing"]
    (disk,) = (part for part in thing["made_of"] if part["relation"] == "disk")
    (node,) = (part for part in thing["made_of"] if part["name"] == str(controller))
    (above,) = (part for part in disk["made_of"] if part["relation"] == "built-on-it")
    assert (thing["kind"], thing["driver"], disk["name"]) == ("function", "nvme", str(namespace))
    assert [use["code"] for use in disk["uses"]] == ["has-holders"]
    assert (above["name"], above["title"]) == (name, "lab")
    assert [use["code"] for use in node["uses"]] == ["open-by-process"]
    inode = (PCI / NVME).stat().st_ino
    ids = ":".join((PCI / NVME / name).read_text()[2:6] for name in ("vendor", "device"))
    assert thing["identity"] == f"vfio {NVME}:{ids}:{inode}"
    after = vmplug("host", NVME)["thing"]
    assert not any(part["uses"] for part in after["made_of"])
