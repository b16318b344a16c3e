"""Disks of the host that tests hand over: image files that say who they are, and loop devices."""

import ctypes
import fcntl
import os
import struct
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MIB = 1 << 20
SECTOR_BYTES = 512
PFN_DATA_OFFSET = 2 * MIB
"""Where the data of `dax_image` begins."""

TIMEOUT_S = 30.0

_FIRST_OWN, _OWN, _LOOP_CTL_REMOVE = 1000, 100_000, 0x4C81
"""Source: Linux include/uapi/linux/loop.h."""
_BLKPG, _ADD_PARTITION, _PARTITION_BYTES = 0x1269, 1, 152


def disk_image(path: Path, size_mib: int, marker: str) -> Path:
    """Makes a sparse raw image whose first sector starts with the marker, padded with dots."""
    first_sector = marker.encode().ljust(SECTOR_BYTES, b".")
    if len(first_sector) > SECTOR_BYTES:
        raise ValueError(f"marker {marker!r} does not fit into one sector")
    with path.open("wb") as image:
        image.write(first_sector)
        image.truncate(size_mib << 20)
    return path


def qcow2_image(path: Path, size_mib: int, marker: str) -> Path:
    """Makes a qcow2 image with the content of `disk_image`."""
    raw = disk_image(path.with_name(path.name + ".raw"), size_mib, marker)
    _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path))
    raw.unlink()
    return path


def qcow2_header(*, backing: bytes = b"", data_file: bytes = b"") -> bytes:
    """The header of an image, version 3, whose other files are qcow2 (backing) and raw (data)."""
    said = ((0xE2792ACA, b"qcow2" if backing else b""), (0x44415441, data_file))
    extensions = b"".join(
        kind.to_bytes(4, "big")
        + len(text).to_bytes(4, "big")
        + text.ljust(-(-len(text) // 8) * 8, b"\0")
        for kind, text in said
        if text
    ) + bytes(8)
    at = 104 + len(extensions) if backing else 0
    head = struct.pack(">4sIQII", b"QFI\xfb", 3, at, len(backing), 16)
    head = (head + (8 << 20).to_bytes(8, "big")).ljust(72, b"\0")
    head += (4 if data_file else 0).to_bytes(8, "big")
    return head.ljust(100, b"\0") + (104).to_bytes(4, "big") + extensions + backing


def dax_image(path: Path, size_mib: int, content: Path | None = None) -> Path:
    """Makes an image whose header says that the pages' structures are in ordinary memory.

    Behind the header is an ext4, with the files of the directory `content` in it.

    Source: Linux drivers/nvdimm/pfn.h, struct nd_pfn_sb; nd_fletcher64 in core.c.
    """
    size = size_mib * MIB
    header = struct.pack(
        "<16s16s16sIHHQQIIIIIH",
        b"NVDIMM_PFN_INFO\0",
        uuid.uuid4().bytes,
        bytes(16),  # parent_uuid: a namespace without labels has none
        0,  # flags
        1,  # version_major
        4,  # version_minor
        PFN_DATA_OFFSET,
        (size - PFN_DATA_OFFSET) // 4096,  # npfns
        1,  # mode: PFN_MODE_RAM
        0,  # start_pad
        0,  # end_trunc
        2 * MIB,  # align
        4096,  # page_size
        64,  # page_struct_size
    ).ljust(4096 - 8, b"\0")
    low = high = 0
    for (word,) in struct.iter_unpack("<I", header + bytes(8)):
        low = (low + word) & 0xFFFFFFFF
        high = (high + low) & 0xFFFFFFFF
    with path.open("wb") as image:
        image.truncate(size)
        image.seek(4096)
        image.write(header + struct.pack("<II", low, high))
    offset = f"offset={PFN_DATA_OFFSET}"
    blocks = str((size - PFN_DATA_OFFSET) // 4096)
    files = ["-d", str(content)] if content else []
    _run("mkfs.ext4", "-q", "-F", "-b", "4096", "-E", offset, *files, str(path), blocks)
    return path


@contextmanager
def loop_device(
    path: Path, *, read_only: bool = False, offset: int = 0, size_limit: int = 0
) -> Iterator[Path]:
    """A loop device on a file, attached inside the `with`; yields its node. Needs root.

    `offset` and `size_limit` are bytes; size_limit 0 is the rest of the file.
    """
    options = [f"--offset={offset}", f"--sizelimit={size_limit}"]
    if read_only:
        options.append("--read-only")
    node = _run("losetup", "--find", "--show", *options, str(path)).strip()
    try:
        yield Path(node)
    finally:
        detach_loop(Path(node))


@contextmanager
def own_loop_device(path: Path) -> Iterator[Path]:
    """One that the test may let go of and take again, and has let go of or not at the end.

    Nobody gets it meanwhile: who looks for a free one finds the first, and its number is high.
    """
    number = _FIRST_OWN + os.getpid() % _OWN
    node = Path(f"/dev/loop{number}")
    _run("losetup", str(node), str(path))
    try:
        yield node
    finally:
        detach_loop(node)
        with open("/dev/loop-control", "rb") as control, suppress(OSError):  # still busy
            fcntl.ioctl(control, _LOOP_CTL_REMOVE, number)


def detach_loop(node: Path) -> None:
    """Lets go of a loop device, whoever has asked for that already.

    Linux only marks one that somebody has open, as a VM, or udev for a moment, and frees it when
    the last closes it. Until then it has its directory in sysfs, and asking again can be an error.
    """
    try:
        _run("losetup", "--detach", str(node))
    except RuntimeError:
        marked = Path(f"/sys/block/{node.name}/loop/autoclear")
        with suppress(FileNotFoundError):
            if marked.read_text().strip() != "1":
                raise


def add_partition(disk: str, *, start_bytes: int, length_bytes: int) -> None:
    """Make the first partition of a disk by hand, as addpart(8) does, which Debian 13 lacks.

    Source: Linux include/uapi/linux/blkpg.h.
    """
    partition = ctypes.create_string_buffer(
        struct.pack("qqi128x4x", start_bytes, length_bytes, 1), _PARTITION_BYTES
    )
    request = struct.pack("iiiP", _ADD_PARTITION, 0, _PARTITION_BYTES, ctypes.addressof(partition))
    with open(disk, "rb") as file:
        fcntl.ioctl(file, _BLKPG, request)


@contextmanager
def loop_with_partition(image: Path) -> Iterator[tuple[Path, Path]]:
    """A loop device and its partition, added by hand: not every kernel reads the tables."""
    disk = _run("losetup", "--find", "--show", "--partscan", str(image)).strip()
    try:
        add_partition(disk, start_bytes=1 << 20, length_bytes=4 << 20)
        yield Path(disk), Path(f"{disk}p1")
    finally:
        detach_loop(Path(disk))


def _run(*command: str) -> str:
    """What a command prints; RuntimeError with what it complained about when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
