"""Disks and files that the kernel exports itself: the target's own words are read.

What a target has open claims nothing, or claims it under no name.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from tests.lab.blocks import (
    findings,
    is_free,
    load,
    load_with,
    looped,
    mounted,
    null_disk,
    obey,
    refusal,
    run,
)
from tests.support.disks import disk_image
from vmplug import Code

CONFIG = Path("/sys/kernel/config")

Export = Callable[[Path], AbstractContextManager[str]]
"""Exports a disk or file, and gives the words for that."""


@pytest.fixture(scope="module", autouse=True)
def modules() -> None:
    load_with("null_blk", nr_devices=0)
    load_with("zram", num_devices=1)
    load("loop", "configfs", "nvmet", "target_core_mod", "target_core_iblock", "target_core_file")
    if not CONFIG.is_mount():
        run("mount", "-t", "configfs", "none", CONFIG)


@contextmanager
def nvmet(path: Path) -> Iterator[str]:
    subsystem = CONFIG / "nvmet/subsystems/nqn.lab"
    namespace = subsystem / "namespaces/1"
    namespace.mkdir(parents=True)
    try:
        (namespace / "device_path").write_text(str(path))
        (namespace / "buffered_io").write_text(str(int(path.is_file())))  # tmpfs needs it
        (namespace / "enable").write_text("1")
        yield "the NVMe target nqn.lab"
    finally:
        (namespace / "enable").write_text("0")
        namespace.rmdir()
        subsystem.rmdir()


@contextmanager
def backstore(hba: str, control: str) -> Iterator[str]:
    base = CONFIG / "target/core" / hba / "lab"
    base.mkdir(parents=True)
    try:
        (base / "control").write_text(control)
        (base / "enable").write_text("1")
        yield "the SCSI target lab"
    finally:
        with suppress(FileNotFoundError):
            base.rmdir()
        base.parent.rmdir()


def iblock(path: Path) -> AbstractContextManager[str]:
    return backstore("iblock_7", f"udev_path={path}")


def fileio(path: Path) -> AbstractContextManager[str]:
    size = path.stat().st_size if path.is_file() else 0
    return backstore("fileio_7", f"fd_dev_name={path},fd_dev_size={size or 1 << 20}")


@pytest.mark.parametrize("export", [nvmet, iblock, fileio])
def test_a_disk_that_the_kernel_exports_is_in_use(export: Export) -> None:
    with null_disk("laba") as disk:
        assert is_free(disk)
        with export(disk) as who:
            finding = refusal(disk)
            assert finding.code is Code.IS_EXPORTED
            assert finding.message == f"{disk} is exported as {who}"
        assert is_free(disk)


@pytest.mark.parametrize("export", [nvmet, fileio])
def test_a_file_that_the_kernel_exports_is_in_use(tmp_path: Path, export: Export) -> None:
    image = disk_image(tmp_path / "a b.img", 4, "exported")
    assert is_free(image)
    with export(image) as who:
        finding = refusal(image)
        assert finding.code is Code.IS_EXPORTED
        assert finding.message == f"{image} is exported as {who}"
        with looped(image) as loop:
            assert refusal(loop) == finding
    # The kernel may take a moment to free the loop device.
    assert Code.IS_EXPORTED not in {finding.code for finding in findings(image)}


@pytest.mark.parametrize("export", [nvmet, iblock, fileio])
def test_the_remedy_ends_the_export(export: Export) -> None:
    with null_disk("laba") as disk, export(disk):
        obey(refusal(disk))
        assert is_free(disk)


def test_what_zram_writes_to_is_in_use_until_zram_is_reset() -> None:
    with null_disk("laba") as disk:
        backing = Path("/sys/block/zram0/backing_dev")
        backing.write_text(str(disk))
        finding = refusal(disk)
        assert finding.code is Code.OPEN_EXCLUSIVELY
        assert finding.message == f"{disk} is in use by the kernel for /dev/zram0"
        obey(finding)
        assert is_free(disk)


def test_the_journal_of_another_file_system_is_in_use(tmp_path: Path) -> None:
    with null_disk("laba") as disk, null_disk("labb") as journal:
        run("mke2fs", "-q", "-F", "-O", "journal_dev", "-b", "4096", journal)
        run("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-J", f"device={journal}", disk)
        with mounted(disk, tmp_path):
            finding = refusal(journal)
            assert finding.code is Code.OPEN_EXCLUSIVELY
            assert finding.message.endswith("for the journal of a mounted file system")
            obey(finding)
            assert is_free(journal)
            assert not tmp_path.is_mount()
