"""Groups on the command line of a VM that `vmplug vm start` makes, and room for large BARs."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lab import topology
from tests.cli.command import Vmplug
from tests.support.raw_qmp import RawQmp
from vmplug import Qemu
from vmplug.drivers.place import Windows

MULTI = (topology.MULTI_NVME, topology.MULTI_EDU, topology.MULTI_NIC)
GIB = 1 << 30


@pytest.fixture(autouse=True)
def modules() -> None:
    for module in ("vfio-pci", "nvme", "e1000e"):
        subprocess.run(["modprobe", module], check=True)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state directory, of which every VM is ended."""
    yield tmp_path / "state"
    vmplug(tmp_path / "state", "vm", "stop", "sb1", "--timeout", "0", check=False)


def vmplug(state: Path, *words: str, check: bool = True) -> Any:
    """The verb's JSON answer, or its error."""
    verb = words[:2] if words[0] == "vm" else words[:1]
    done = Vmplug(state)(*verb, "--json", *words[len(verb) :])
    assert not check or done.status == 0, done
    return json.loads(done.stdout or done.stderr)


def start(state: Path, *words: str, check: bool = True) -> Any:
    small = ("--accel", "tcg", "--memory", "128", "--ports", "2")
    return vmplug(state, "vm", "start", "sb1", *small, *words, "--", "-S", check=check)


def drivers(*bdfs: str) -> list[str | None]:
    links = [Path(f"/sys/bus/pci/devices/{bdf}/driver") for bdf in bdfs]
    return [link.resolve().name if link.exists() else None for link in links]


def test_all_functions_of_a_group_are_on_the_command_line_and_go_back_at_the_end(
    state: Path,
) -> None:
    before = drivers(*MULTI)
    told = start(state, "--device", f"vfio:{MULTI[0]}", "--managed", "--owner", "ctr1")
    (held,) = told["attachments"]
    assert [f["host"] for f in held["guest"]["functions"]] == list(MULTI)
    assert [f["pci_path"] for f in held["guest"]["functions"]] == ["04/00", "04/00.1", "04/00.2"]
    assert drivers(*MULTI) == ["vfio-pci"] * 3
    command_line = Path(f"/proc/{told['vm']['pid']}/cmdline").read_bytes()
    assert all(f'"host": "{bdf}"'.encode() in command_line for bdf in MULTI)
    vmplug(state, "vm", "stop", "sb1", "--timeout", "0")
    assert drivers(*MULTI) == before


def test_a_vm_that_does_not_start_gives_back_what_was_bound_for_it(state: Path) -> None:
    before = drivers(*MULTI)
    told = start(
        state,
        *("--device", f"vfio:{MULTI[0]}", "--managed", "--owner", "ctr1"),
        *("--", "-device", "no-such-device"),
        check=False,
    )
    assert told["error"]["code"]
    assert drivers(*MULTI) == before


def test_room_is_made_for_the_bar_of_a_function_that_is_to_come(state: Path) -> None:
    told = start(state, "--room-for", topology.LARGE, "--bridges", "1")
    with closing(Qemu.connect(told["vm"]["qmp"])) as qemu:
        ports = {port.bus: port.windows for port in qemu.offer().ports}
    assert ports == {
        "rp0": Windows(16 * GIB, 2 << 20),
        "rp1": Windows(2 << 20, 2 << 20),
        "br0": Windows(2 << 20, 2 << 20),
    }
    held = vmplug(
        state,
        *("attach", "--device", f"vfio:{topology.LARGE}", "-o", "port=root-port"),
        *("--managed", "--vm", "sb1", "--owner", "ctr1"),
    )["attachments"]
    assert held[0]["guest"]["pci_path"] == "04/00"
    with RawQmp.connect(Path(told["vm"]["qmp"])) as qmp:
        names = [e["name"] for e in qmp.execute("qom-list", path="/machine/peripheral")]
    assert [name for name in names if name.startswith("vmplug-")]
