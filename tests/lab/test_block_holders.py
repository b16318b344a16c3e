"""What the host does with its disks is found, by its right word, and its remedy mends it.

Nothing in here is imitated: the disks are the kernel's, what uses them are its own drivers and
the programs that administrators have.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.lab.blocks import (
    as_lsblk_says,
    code,
    facts,
    findings,
    held,
    is_free,
    kernel_name,
    load,
    load_with,
    looped,
    mapped,
    mirror,
    mounted,
    network_disk,
    null_disk,
    obey,
    partitioned,
    refusal,
    run,
    swapped_to,
    zram,
)
from tests.support.checking import READING
from tests.support.disks import disk_image
from vmplug import Code
from vmplug.host.finding import Finding, Severity

MAPPED_SECTORS = 32768
KEY = "ab" * 32


@pytest.fixture(scope="module", autouse=True)
def modules() -> None:
    load_with("null_blk", nr_devices=0)
    load_with("zram", num_devices=1)
    load_with("nbd", nbds_max=1)
    load("loop", "btrfs", "raid1", "dm-crypt", "xts", "dm-snapshot", "dm-thin-pool")
    load("dm-multipath", "dm-round-robin")


@pytest.fixture
def disk() -> Iterator[Path]:
    with null_disk("laba") as disk:
        yield disk


@pytest.fixture
def other() -> Iterator[Path]:
    with null_disk("labb") as disk:
        yield disk


# Device-mapper

Kind = Callable[[Path, Path], AbstractContextManager[list[Path]]]
"""Makes something of a disk, and perhaps of a second; gives what it has made."""


@contextmanager
def linear(disk: Path, _: Path) -> Iterator[list[Path]]:
    with mapped("lab", f"0 {MAPPED_SECTORS} linear {disk} 2048") as node:
        yield [node]


@contextmanager
def crypt(disk: Path, _: Path) -> Iterator[list[Path]]:
    with mapped("lab", f"0 {MAPPED_SECTORS} crypt aes-xts-plain64 {KEY} 0 {disk} 0") as node:
        yield [node]


@contextmanager
def multipath(disk: Path, other: Path) -> Iterator[list[Path]]:
    paths = f"round-robin 0 2 1 {disk} 1 {other} 1"
    with mapped("mpatha", f"0 {MAPPED_SECTORS} multipath 0 0 1 1 {paths}") as node:
        yield [node]


@contextmanager
def snapshot(disk: Path, other: Path) -> Iterator[list[Path]]:
    with (
        mapped("lab-origin", f"0 {MAPPED_SECTORS} snapshot-origin {disk}") as origin,
        mapped("lab", f"0 {MAPPED_SECTORS} snapshot {disk} {other} N 8") as node,
    ):
        yield [origin, node]


@pytest.mark.parametrize("kind", [linear, crypt, multipath, snapshot])
def test_what_device_mapper_makes_of_a_disk_goes_itself_or_is_removed_first(
    disk: Path, other: Path, kind: Kind
) -> None:
    assert is_free(disk, other)
    with kind(disk, other) as made:
        assert is_free(*made)
        names = sorted(map(kernel_name, made))
        finding = refusal(disk)
        assert finding.code is Code.HAS_HOLDERS
        assert finding.message == f"{disk} is part of {', '.join(names)}"
        assert code(disk, READING) is Code.HAS_HOLDERS
        assert as_lsblk_says(disk, other, *made)
        obey(finding)
        assert not any(node.exists() for node in made)
    assert is_free(disk, other)


def test_of_a_thin_pool_only_its_volumes_may_go(disk: Path, other: Path) -> None:
    with ExitStack() as stack:
        table = f"0 65536 thin-pool {disk} {other} 128 0"
        pool = stack.enter_context(mapped("lab-pool", table))
        run("dmsetup", "message", "lab-pool", "0", "create_thin 0")
        table = f"0 {MAPPED_SECTORS} thin {pool} 0"
        volume = stack.enter_context(mapped("lab-thin", table))
        assert is_free(volume)
        below = [refusal(node) for node in (pool, disk, other)]
        assert {finding.code for finding in below} == {Code.HAS_HOLDERS}
        assert as_lsblk_says(disk, other, pool, volume)
        obey(below[0])
        assert is_free(pool)
        obey(below[1])
        assert is_free(disk, other)


def test_a_mapping_that_cannot_write_is_shared_with_readers(disk: Path) -> None:
    table = f"0 {MAPPED_SECTORS} linear {disk} 0"
    with mapped("lab", table, options=["--readonly"]) as node:
        assert is_free(disk, node, wish=READING)
        assert code(disk) is Code.HAS_HOLDERS
        assert code(node) is Code.READ_ONLY_DEVICE
        assert as_lsblk_says(node)


def test_a_suspended_mapping_would_let_a_vm_wait_and_goes_when_it_is_resumed(disk: Path) -> None:
    with mapped("lab", f"0 {MAPPED_SECTORS} linear {disk} 0") as node:
        run("dmsetup", "suspend", "lab")
        (finding,) = findings(node, READING)  # nobody may look at what it shows
        assert finding.code is Code.UNREADABLE
        obey(finding)
        assert is_free(node)


def test_a_file_system_on_a_mapping_is_found_on_both(disk: Path, tmp_path: Path) -> None:
    with mapped("lab", f"0 {MAPPED_SECTORS} linear {disk} 0") as node:
        run("mkfs.ext4", "-q", node)
        with mounted(node, tmp_path / "a b"):
            assert code(disk) is Code.HAS_HOLDERS
            obey(refusal(node))
            assert is_free(node)


# md


def test_the_disks_of_a_raid_are_free_when_it_is_stopped(disk: Path, other: Path) -> None:
    with mirror("md0", disk, other) as array:
        assert is_free(array)
        for member in (disk, other):
            finding = refusal(member)
            assert finding.code is Code.HAS_HOLDERS
            assert finding.message == f"{member} is part of md0"
        assert as_lsblk_says(disk, other, array)
        details = run("mdadm", "--detail", array)
        assert f"Array Size : {facts(array).size_bytes // 1024} " in details
        obey(finding)
        assert is_free(disk, other)


# File systems and partitions


def test_a_partition_in_use_keeps_its_disk_and_leaves_its_neighbour(
    disk: Path, tmp_path: Path
) -> None:
    with partitioned(disk) as (first, second):
        assert is_free(disk, first, second)
        assert as_lsblk_says(disk, first, second)
        run("mkfs.ext4", "-q", first)
        uses: list[tuple[AbstractContextManager[object], Code]] = [
            (mounted(first, tmp_path / "mnt"), Code.MOUNTED_ON_HOST),
            (swapped_to(first), Code.IS_SWAP),
            (mapped("lab", f"0 2048 linear {first} 0"), Code.HAS_HOLDERS),
            (looped(first), Code.HAS_HOLDERS),
        ]
        for use, expected in uses:
            with use:
                (finding,) = findings(disk)
                assert finding.code is code(first) is expected
                assert is_free(second)
                obey(finding)
                assert is_free(disk, first)


def test_only_what_is_mounted_read_only_is_shared_with_readers(disk: Path, tmp_path: Path) -> None:
    run("mkfs.ext4", "-q", disk)
    with mounted(disk, tmp_path / "mnt", "--read-only"):
        assert code(disk) is Code.MOUNTED_ON_HOST
        assert is_free(disk, wish=READING)


def test_every_disk_of_a_btrfs_is_mounted(disk: Path, other: Path, tmp_path: Path) -> None:
    run("mkfs.btrfs", "--quiet", "--data=raid1", "--metadata=raid1", disk, other)
    options = f"--options=device={disk},device={other}"
    with mounted(disk, tmp_path / "mnt", options) as directory:
        for member in (disk, other):
            finding = refusal(member)
            assert finding.code is Code.MOUNTED_ON_HOST
            assert finding.message == f"{member} is mounted on the host at {directory}"
        obey(finding)
        assert is_free(disk, other)


# Swap


def test_a_disk_of_compressed_memory_is_free_when_the_host_does_not_swap_to_it() -> None:
    with zram() as disk:
        assert is_free(disk)
        with swapped_to(disk):
            assert as_lsblk_says(disk)
            finding = refusal(disk)
            assert finding.code is Code.IS_SWAP
            assert code(disk, READING) is Code.IS_SWAP
            obey(finding)
            assert is_free(disk)


def test_a_swap_file_and_its_disk_are_in_use(disk: Path, tmp_path: Path) -> None:
    run("mkfs.ext4", "-q", disk)
    with mounted(disk, tmp_path / "a b") as directory:
        file = directory / "swap file"
        run("fallocate", "--length=1M", file)
        assert is_free(file)
        with swapped_to(file):
            (finding,) = findings(file)
            assert finding.code is Code.IS_SWAP
            assert code(disk) is Code.MOUNTED_ON_HOST
            obey(finding)
            assert is_free(file)


# Loop devices, and who else has a disk open


def test_a_disk_below_a_loop_device_is_free_when_that_is_detached(disk: Path) -> None:
    with looped(disk, "--offset=1M") as loop:
        assert is_free(loop)
        assert as_lsblk_says(loop)
        finding = refusal(disk)
        assert finding.code is Code.HAS_HOLDERS
        message = f"{disk} is behind the loop device {loop}"
        assert finding.message == f"{message}, which nothing uses now"
        assert finding.severity is Severity.WARNING
        with held(loop):
            used = refusal(disk)
            assert used.message == message
            assert used.severity is Severity.ERROR
        obey(finding)
        assert is_free(disk)


def test_a_program_that_wants_a_disk_for_itself_is_found_and_named(disk: Path) -> None:
    with held(disk):
        finding = refusal(disk)
        assert finding.code is Code.OPEN_EXCLUSIVELY
        assert pid_that_fuser_names(finding) == os.getpid()
    assert is_free(disk)


@pytest.mark.parametrize("kind", ["disk", "file"])
def test_what_a_server_of_qemu_has_is_locked_and_the_network_disk_of_it_is_free(
    disk: Path, tmp_path: Path, kind: str
) -> None:
    image = disk if kind == "disk" else disk_image(tmp_path / "a b.img", 16, "x")
    assert is_free(image)
    with network_disk(image) as node:
        finding = refusal(image)
        assert finding.code is Code.IMAGE_LOCKED
        pid = pid_that_fuser_names(finding)
        assert Path(f"/proc/{pid}/comm").read_text() == "qemu-nbd\n"
        assert is_free(node)
        assert as_lsblk_says(node)
    assert is_free(image)


def pid_that_fuser_names(finding: Finding) -> int:
    """By the command that a hint begins with."""
    command, _, _ = finding.hint.partition(" may name" if " may " in finding.hint else " names")
    return int(run("sh", "-c", command).split()[0])
