"""What the host's screen and console are on, whatever driver the card has."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.checking import WRITING
from tests.support.pci_tree import PciTree
from vmplug.host.block.inventory import Use
from vmplug.host.block.usage import read_usage
from vmplug.host.check.device import check_device
from vmplug.host.finding import Code, Severity
from vmplug.host.inventory import read_inventory
from vmplug.host.pci.vfio import find_vfio_device

CARD, OTHER = "0000:3b:00.0", "0000:3c:00.0"
VGA, DISPLAY, SERIAL, COMMUNICATION = 0x030000, 0x038000, 0x070002, 0x078000


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    tree = PciTree(tmp_path)
    tree.pci_function(CARD, class_code=DISPLAY, driver="nouveau", group=26)
    return tree.pci_function(OTHER, class_code=DISPLAY, group=27)


def said(tree: PciTree, bdf: str = CARD) -> list[str]:
    """What `check` says of the console."""
    group = find_vfio_device(bdf, tree.root)
    found = check_device(group, WRITING, usage=read_usage(tree.root), root=tree.root)
    consoles = [finding for finding in found if finding.code is Code.BOOT_CONSOLE]
    assert all(one.severity is Severity.ERROR and one.hint and one.used_by for one in consoles)
    entries = {str(entry.function.bdf): entry.uses for entry in read_inventory(tree.root).pci}
    assert (Use("console", bdf) in entries[bdf]) is bool(consoles)
    return [finding.message.partition(" ")[2] for finding in consoles]


IOMEM = """00000000-00000fff : Reserved
d0000000-ddffffff : PCI Bus 0000:00
  d0000000-d0ffffff : {card}
    d0000000-d02fffff : {picture}
  d1000000-d1ffffff : {other}
    d1000000-d1ffffff : nouveau
fee00000-fee00fff : Local APIC
"""
SCREEN = ["has the memory of the firmware's screen, which the host uses"]


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("picture", ["vesafb", "efifb", "simpledrm"])
def test_the_firmwares_picture_is_in_the_window_of_its_card(
    tree: PciTree, picture: str, *, is_cut: bool
) -> None:
    """Only root sees the addresses."""
    text = IOMEM.format(card=CARD, picture=picture, other=OTHER)
    if is_cut:
        text = "\n".join(map(_without_addresses, text.splitlines()))
    assert said(tree) == []
    tree.file("/proc/iomem", text)
    assert (said(tree), said(tree, OTHER)) == (SCREEN, [])


def _without_addresses(line: str) -> str:
    head, _, name = line.partition(" : ")
    blanks = len(head) - len(head.lstrip())
    return f"{' ' * blanks}00000000-00000000 : {name}"


@pytest.mark.parametrize("has_driver", [False, True])
def test_memory_of_the_firmwares_picture_without_a_driver_is_no_screen(
    tree: PciTree, *, has_driver: bool
) -> None:
    tree.file("/proc/iomem", IOMEM.format(card=CARD, picture="BOOTFB", other=OTHER))
    device = "/sys/bus/platform/devices/simple-framebuffer.0"
    tree.file(f"{device}/modalias", "platform:simple-framebuffer\n")
    if has_driver:
        tree.link(f"{device}/driver", "../../../bus/platform/drivers/simple-framebuffer")
    assert said(tree) == (SCREEN if has_driver else [])


@pytest.mark.parametrize("flag", ["boot_vga", "boot_display"])
def test_the_card_that_the_host_booted_with_has_its_screen_without_a_driver(
    tree: PciTree, flag: str
) -> None:
    tree.file(f"{tree.real(OTHER)}/{flag}", "1\n")
    assert said(tree, OTHER) == ["is the graphics card that the host booted with"]


def framebuffer(tree: PciTree, bdf: str, number: int) -> None:
    tree.file(f"{tree.real(bdf)}/graphics/fb{number}/name", "nouveaudrmfb\n")
    place = f"{tree.real(bdf)}/graphics/fb{number}".removeprefix("/sys/")
    tree.link(f"/sys/class/graphics/fb{number}", f"../../{place}")


def text_console(tree: PciTree, name: str = "(M) frame buffer device", bind: int = 1) -> None:
    tree.file("/sys/class/vtconsole/vtcon0/name", "(S) dummy device\n")
    tree.file("/sys/class/vtconsole/vtcon0/bind", f"{1 - bind}\n")
    tree.file("/sys/class/vtconsole/vtcon1/name", f"{name}\n")
    tree.file("/sys/class/vtconsole/vtcon1/bind", f"{bind}\n")


def test_the_first_framebuffer_is_the_screen_of_the_text_console(tree: PciTree) -> None:
    framebuffer(tree, CARD, 0)
    framebuffer(tree, OTHER, 10)
    text_console(tree)
    assert said(tree) == ["has the host's screen, /dev/fb0"]
    assert said(tree, OTHER) == []


@pytest.mark.parametrize(
    "build",
    [
        lambda tree: text_console(tree, bind=0),
        lambda tree: text_console(tree, "(M) VGA+"),
        lambda tree: tree.file("/sys/class/graphics/fbcon/rotate", "0\n"),
    ],
)
def test_a_framebuffer_without_a_text_console_is_no_screen(
    tree: PciTree, build: Callable[[PciTree], None]
) -> None:
    build(tree)
    if tree.root.list_dir("/sys/class/vtconsole"):
        framebuffer(tree, CARD, 0)
    assert said(tree) == []


@pytest.mark.parametrize("way", ["tty", "0000:05:00.0:0/0000:05:00.0:0.0/tty"])
@pytest.mark.parametrize("active", ["tty0 ttyS4\n", "ttyS4\n", None])
def test_the_serial_port_that_the_kernel_writes_to_is_its_console(
    tree: PciTree, way: str, active: str | None
) -> None:
    """Linux 6.7 and later have two directories more."""
    uart = "0000:05:00.0"
    tree.pci_function(uart, class_code=SERIAL, driver="serial", group=30)
    for name in ("ttyS4", "ttyS5"):
        place = f"{tree.real(uart)}/{way}/{name}"
        tree.file(f"{place}/dev", "4:68\n")
        tree.link(f"/sys/class/tty/{name}", f"../..{place.removeprefix('/sys')}")
    assert said(tree, uart) == []
    tree.file("/proc/cmdline", "root=/dev/sda1 console=tty0 console=ttyS5,115200n8 quiet\n")
    if active is not None:
        tree.file("/sys/class/tty/console/active", active)
    assert said(tree, uart) == [f"has the host's console {'ttyS4' if active else 'ttyS5'}"]
    tree.file("/sys/class/tty/console/active", "tty0 ttyS40\n")
    assert said(tree, uart) == []


def test_a_virtio_console_has_the_ports_that_are_called_hvc(tree: PciTree) -> None:
    ports = "0000:06:00.0"
    tree.pci_function(ports, class_code=COMMUNICATION, driver="virtio-pci", group=31)
    tree.file("/sys/class/tty/console/active", "hvc0\n")
    assert said(tree, ports) == []
    tree.link(f"{tree.real(ports)}/virtio3/driver", "../../../bus/virtio/drivers/virtio_console")
    assert said(tree, ports) == ["has the host's console hvc0"]
    tree.file("/sys/class/tty/console/active", "tty0\n")
    assert said(tree, ports) == []
