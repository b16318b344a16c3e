"""`plan` reads as sentences, each with its undo; -v and --json have the commands."""

import json
from pathlib import Path

import pytest

from tests.cli.command import Vmplug
from tests.cli.monitors import MemoryVm
from tests.cli.screen import WIDTHS, on_screen
from tests.support.disks import disk_image
from vmplug.address import PciPath
from vmplug.cli.steps import sentences
from vmplug.drivers.place import GuestAddress
from vmplug.drivers.ports import BIND, UNBIND, Command, Step


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return disk_image(tmp_path / "database-01.raw", 1, "a")


CLOSE, RELEASE = "    undo: close it", "    undo: ask the guest to release it, and take it out"


def test_a_disk_is_opened_and_shown(vmplug: Vmplug, vm: MemoryVm, image: Path) -> None:
    asked = ("plan", "--vm", "sb1", "-d", f"file:{image}")
    assert vmplug(*asked).answer().splitlines() == [
        f" 1  open {image} for writing, direct I/O",
        CLOSE,
        " 2  show it to the guest at port rp0, PCI path 10/00",
        RELEASE,
    ]


def test_options_are_part_of_the_sentences(vmplug: Vmplug, vm: MemoryVm, image: Path) -> None:
    options = ("-o", "bps-total=1M", "-o", "cache=writeback", "-o", "discard=unmap")
    driver = ("-o", "block-driver=virtio-scsi")
    asked = ("plan", "--vm", "sb1", "-d", f"file:{image}", "--read-only", *options, *driver)
    assert vmplug(*asked).answer().splitlines() == [
        " 1  set limits a second: bps-total 1048576",
        "    undo: remove the limits",
        f" 2  open {image} for reading only, through the host's page cache, discards free space",
        CLOSE,
        " 3  let all its I/O obey the limits",
        "    undo: take the limits off it",
        " 4  show it to the guest at LUN 0 of scsi0.0, PCI path 05",
        RELEASE,
    ]


def test_random_numbers_have_a_source(vmplug: Vmplug, vm: MemoryVm) -> None:
    lines = vmplug("plan", "--vm", "sb1", "-d", "rng:/dev/urandom").answer().splitlines()
    assert lines[:2] == [" 1  open /dev/urandom as a source of random numbers", CLOSE]


def test_v_adds_the_commands_that_json_has(vmplug: Vmplug, vm: MemoryVm, image: Path) -> None:
    asked = ("plan", "--vm", "sb1", "-d", f"file:{image}")
    told = vmplug(*asked).answer().splitlines()
    lines = vmplug(*asked, "-v").stdout.splitlines()
    assert lines[::2] == told
    commands = [line.strip().partition(" ")[::2] for line in lines[1::2]]
    listed = [
        command
        for step in vmplug(*asked, "--json").json()["steps"]
        for command in (step["do"], step["undo"])
    ]
    assert [execute for execute, _ in commands] == [command["execute"] for command in listed]
    for (_, arguments), command in zip(commands, listed, strict=True):  # ids are new each time
        assert json.loads(arguments).keys() == command["arguments"].keys()


@pytest.mark.parametrize("columns", WIDTHS)
def test_a_plan_fits_the_terminal(vmplug: Vmplug, vm: MemoryVm, image: Path, columns: int) -> None:
    asked = ("plan", "--vm", "sb1", "-d", f"file:{image}", "-o", "discard=unmap")
    screen = on_screen(vmplug, *asked, columns=columns)
    # A path that is wider than the terminal is broken, too.
    assert "".join(screen.text.split()) == "".join(vmplug(*asked).answer().split())
    assert [row for row in screen.rows if row.startswith("    undo: ")] == [CLOSE, RELEASE]


def test_functions_of_the_host_are_named() -> None:
    functions = {"functions": ["0000:3b:00.0", "0000:3b:00.1"]}
    bind = Step(do=Command(BIND, functions), undo=Command(UNBIND, functions))
    assert sentences(bind) == (
        "bind 0000:3b:00.0, 0000:3b:00.1 to VFIO",
        "give them back to their former drivers",
    )
    arguments = {"driver": "vfio-pci", "id": "a", "host": "0000:3b:00.0", "bus": "rp1"}
    guest = GuestAddress(pci_path=PciPath.parse("05/00"))
    add = Step(do=Command("device_add", arguments), undo=None, guest=guest)
    assert sentences(add) == (
        "show 0000:3b:00.0 to the guest at port rp1, PCI path 05/00",
        "none, QEMU cannot take it back",
    )
