"""Disks of the host that tests hand over: image files that say who they are, and loop devices."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECTOR_BYTES = 512
TIMEOUT_S = 30.0


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
        _run("losetup", "--detach", node)


def _run(*command: str) -> str:
    """What a command prints; RuntimeError with what it complained about when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
