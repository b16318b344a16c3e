"""The remedies for a console of the kernel: what its files are told, it does.

No device of the lab that vmplug could hand over has a console, so another one has it here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.blocks import load_with, run

ACTIVE = Path("/sys/class/tty/console/active")
SERIAL = Path("/sys/class/tty/ttyS0/console")
VTS = Path("/sys/class/vtconsole")


@contextmanager
def restored(switch: Path) -> Iterator[None]:
    before = switch.read_text()
    try:
        yield
    finally:
        switch.write_text(before)


def test_a_serial_port_is_no_console_when_it_was_taken_off() -> None:
    assert "ttyS0" in ACTIVE.read_text().split()
    with restored(SERIAL):
        run("sh", "-euc", f"echo N > {SERIAL}")
        assert "ttyS0" not in ACTIVE.read_text().split()
    assert "ttyS0" in ACTIVE.read_text().split()


@pytest.fixture
def framebuffer() -> Iterator[Path]:
    """The switch of the text console, which the first framebuffer takes over."""
    load_with("vfb", vfb_enable=1)
    try:
        (switch,) = (
            path.parent / "bind"
            for path in VTS.glob("*/name")
            if "frame buffer" in path.read_text()
        )
        yield switch
    finally:
        run("modprobe", "-r", "vfb")


def test_the_text_console_leaves_a_framebuffer(framebuffer: Path) -> None:
    assert framebuffer.read_text().strip() == "1"
    run("sh", "-euc", f"echo 0 > {framebuffer}")
    assert framebuffer.read_text().strip() == "0"
