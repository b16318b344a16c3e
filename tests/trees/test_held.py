"""Files that are held while somebody else opens their names."""

from pathlib import Path

import pytest

from tests.contract.sandbox import Hooked
from vmplug.drivers.base import BlockDrive, BlockDriver, Command
from vmplug.drivers.place import MemorySlot
from vmplug.errors import CannotPlug
from vmplug.host.held import hold
from vmplug.hypervisor.memory import MemoryMonitor
from vmplug.hypervisor.qemu import Qemu

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.img"
    path.write_bytes(b"\1" * 4096)
    return path


def test_a_file_is_the_same_whatever_is_written_to_it(image: Path) -> None:
    with hold(str(image)) as file:
        image.write_bytes(b"other")
        assert file.is_same()


def test_a_file_that_was_made_anew_is_another(image: Path) -> None:
    """Held, its number is not given to the next one."""
    with hold(str(image)) as file:
        image.unlink()
        assert not file.is_same()
        image.write_bytes(b"\1" * 4096)
        assert not file.is_same()


def test_nothing_is_never_the_same(image: Path) -> None:
    image.unlink()
    with hold(str(image)) as file:
        image.touch()
        assert not file.is_same()


def test_an_nvdimm_whose_file_is_lost_in_the_last_moment_is_not_plugged(image: Path) -> None:
    """QEMU makes a file of zeros in its place."""
    machine = MemoryMonitor()

    def lose(command: Command) -> None:
        if command.execute == "object-add":
            image.unlink()
            image.touch()

    drive = BlockDrive(
        id="00000000000000a1",
        file=str(image),
        is_device=False,
        driver=BlockDriver.NVDIMM,
        size_bytes=MIB,
    )
    before = set(machine.devices)
    with pytest.raises(CannotPlug) as caught:
        Qemu(Hooked(machine, lose)).plug(drive, MemorySlot(slot=0, index=0))
    assert "delete it" in (caught.value.hint or "")
    assert (set(machine.devices), machine.objects) == (before, {})
