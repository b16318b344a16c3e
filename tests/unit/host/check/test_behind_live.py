"""What is behind a loop device, on the running host: a loop device claims nothing of it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.checking import READING, WRITING, codes, want_file
from tests.support.disks import MIB, disk_image, loop_device, loop_with_partition
from vmplug.devnum import DevNum
from vmplug.host.block.usage import read_usage
from vmplug.host.check.device import check_device
from vmplug.host.finding import Access, Finding, Severity
from vmplug.host.resolve import resolve
from vmplug.host.root import HostRoot
from vmplug.oci.info import DeviceInfo, DevType

pytestmark = pytest.mark.root
ROOT = HostRoot("/")
HOLD = """
import fcntl, os, struct, sys
how = {"exclusive": os.O_EXCL, "qemu": 0, "writer": 0}[sys.argv[1]]
file = os.open(sys.argv[2], os.O_RDWR | how)
if sys.argv[1] == "qemu":
    for byte in (100, 101, 201):
        fcntl.fcntl(file, 37, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, byte, 1, 0))
print(flush=True)
sys.stdin.read()
"""
"""An exclusive open, the lock bytes of QEMU, an open file. Source: QEMU block/file-posix.c."""


def found(node: Path, wish: Access = WRITING) -> list[Finding]:
    number = node.stat().st_rdev
    info = DeviceInfo(
        container_path="/dev/wanted",
        dev_type=DevType.BLOCK,
        devnum=DevNum(os.major(number), os.minor(number)),
    )
    return check_device(resolve(info, ROOT), wish, usage=read_usage(ROOT), root=ROOT)


def found_file(path: Path) -> list[Finding]:
    file = resolve(want_file(str(path)), ROOT)
    return check_device(file, WRITING, usage=read_usage(ROOT), root=ROOT)


def errors(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity is Severity.ERROR]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Path, Path, Path]]:
    """A disk, its partition, and a loop device on that, by a name that leads nowhere since."""
    image = disk_image(tmp_path / "disk.img", 16, "behind")
    with ExitStack() as made:
        disk, part = made.enter_context(loop_with_partition(image))
        number = Path(f"/sys/class/block/{part.name}/dev").read_text().strip()
        own = tmp_path / "node"
        os.mknod(own, 0o60600, os.makedev(*map(int, number.split(":"))))
        upper = made.enter_context(loop_device(own))
        own.unlink()
        if not part.exists():
            os.mknod(part, 0o60600, os.makedev(*map(int, number.split(":"))))
            made.callback(part.unlink, missing_ok=True)
        yield disk, part, upper


@pytest.mark.parametrize(
    ("how", "code"),
    [("exclusive", "open-exclusively"), ("qemu", "image-locked"), ("writer", "open-by-process")],
)
@pytest.mark.parametrize("where", ["disk", "partition"])
def test_whoever_has_what_is_behind_a_loop_device_has_it(
    nodes: tuple[Path, Path, Path], how: str, code: str, where: str
) -> None:
    disk, part, upper = nodes
    assert found(upper) == []
    held = disk if where == "disk" else part
    command = [sys.executable, "-c", HOLD, how, str(held)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"\n"
        (finding,) = found(upper)
        assert finding.code == code
        assert finding.used_by
        assert finding.used_by.on in {str(held), str(part)}
        if how == "exclusive":  # the remedy names the process
            command = ["sh", "-c", finding.hint.partition(" may name")[0]]
            named = subprocess.run(command, capture_output=True, text=True, check=True)
            assert str(holder.pid) in named.stdout.split()
        holder.communicate()
    assert found(upper) == []


def test_a_mount_of_what_is_behind_a_loop_device_counts(
    nodes: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, part, upper = nodes
    subprocess.run(["mkfs.ext4", "-q", "-F", str(part)], check=True)
    (tmp_path / "mnt").mkdir()
    subprocess.run(["mount", str(part), str(tmp_path / "mnt")], check=True)
    try:
        (finding,) = found(upper)
        assert codes([finding]) == ["mounted-on-host"]
        assert finding.message.startswith(f"{part}, which is below {upper}, is mounted")
        assert found(upper, READING)
    finally:
        subprocess.run(finding.hint.split(), check=True)
    assert found(upper) == []


@pytest.mark.parametrize(
    ("offset", "codes_"),
    [(8 * MIB, []), (8 * MIB - 4096, ["has-holders"]), (0, ["has-holders"])],
)
@pytest.mark.parametrize("base", ["file", "loop"])
def test_a_loop_device_does_not_use_other_parts_of_its_file(
    tmp_path: Path, offset: int, codes_: list[str], base: str
) -> None:
    image = disk_image(tmp_path / "disk.img", 16, "parts")
    (tmp_path / "mnt").mkdir()
    with ExitStack() as made:
        below = made.enter_context(loop_device(image)) if base == "loop" else image
        first = made.enter_context(loop_device(below, size_limit=8 * MIB))
        second = made.enter_context(loop_device(below, offset=offset))
        subprocess.run(["mkfs.ext4", "-q", "-F", str(first)], check=True)
        subprocess.run(["mount", str(first), str(tmp_path / "mnt")], check=True)
        made.callback(subprocess.run, ["umount", str(tmp_path / "mnt")], check=True)
        against = errors(found(second))
        assert codes(against) == codes_
        assert all(str(first) in finding.message for finding in against)
        whole = found(below) if base == "loop" else found_file(image)
        assert codes(errors(whole)) == ["has-holders"]
