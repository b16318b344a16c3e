"""Block devices of the lab, made and used as administrators do, and what others say of them.

Everything made here is a context manager that takes apart what is left of it: a remedy that was
tried may have done so before.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.checking import WRITING, want, want_file
from tests.support.disks import detach_loop
from tests.support.lab import wait_until
from vmplug.host.block.device import BlockDevice
from vmplug.host.finding import Access, Code, Finding
from vmplug.host.resolve import resolve
from vmplug.host.root import HostRoot
from vmplug.manager.examine import examine

TIMEOUT_S = 60.0
MIB = 1 << 20
HOST = HostRoot()
NULL_DISKS = Path("/sys/kernel/config/nullb")
ZRAM = Path("/sys/class/zram-control")
UDEV_SOCKET = Path("/run/udev/control")
UDEV_DIRECTORIES = ("/run/udev", "/dev/disk")

_REMEDY = re.compile(
    r"\b(?:umount|swapoff|losetup|dmsetup|mdadm|blockdev|echo|rmdir|zramctl) [^)]*"
)


def run(*command: str | Path, text: str = "") -> str:
    """What a command prints; RuntimeError with what it complained about when it fails."""
    # Without udev, device-mapper's library makes the nodes itself.
    without_udev = {} if UDEV_SOCKET.exists() else {"DM_DISABLE_UDEV": "1"}
    done = subprocess.run(
        command,
        input=text,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env={**os.environ, **without_udev},
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


def load(*modules: str) -> None:
    run("modprobe", "--all", *modules)


def load_with(module: str, **parameters: int) -> None:
    run("modprobe", module, *(f"{name}={value}" for name, value in parameters.items()))


# What vmplug says


def number(node: Path) -> str:
    status = node.stat()
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def findings(path: Path, wish: Access = WRITING) -> list[Finding]:
    """All that `vmplug check` has against a device, or a file that is to be a disk."""
    info = want(number(path)) if path.is_block_device() else want_file(str(path))
    (examined,) = examine([info._replace(read_only=wish.read_only)], HOST)
    return list(examined.findings)


def is_free(*paths: Path, wish: Access = WRITING) -> bool:
    """Whether nothing speaks against any of them."""
    return not any(findings(path, wish) for path in paths)


def refusal(path: Path, wish: Access = WRITING) -> Finding:
    """The one finding against it, by which nothing was changed."""
    before = picture(path)
    (finding,) = findings(path, wish)
    assert picture(path) == before
    return finding


def code(path: Path, wish: Access = WRITING) -> Code:
    """That of the one finding against it."""
    (finding,) = findings(path, wish)
    return finding.code


def obey(finding: Finding) -> None:
    """Runs the command that a finding's hint names."""
    command = _REMEDY.search(finding.hint)
    assert command, finding.hint
    run("sh", "-c", command[0])


# What others say


def picture(path: Path) -> list[str]:
    """All that lsblk and the kernel's tables say."""
    tables = [Path(f"/proc/{name}").read_text() for name in ("self/mountinfo", "swaps")]
    node = [path] if path.is_block_device() else []
    return [run("lsblk", "--json", "--output-all", "--bytes", *node), *tables]


class Facts(NamedTuple):
    node: str
    number: str
    size_bytes: int
    sector_bytes: int | None
    read_only: bool | None
    removable: bool | None
    holders: frozenset[str]
    relatives: frozenset[str]


def facts(node: Path) -> Facts:
    """What vmplug knows of a device."""
    device = resolve(want(number(node)), HOST)
    assert isinstance(device, BlockDevice)
    assert device.size_bytes is not None
    return Facts(
        node=device.device_node,
        number=str(device.devnum),
        size_bytes=device.size_bytes,
        sector_bytes=device.sector_bytes,
        read_only=device.read_only,
        removable=device.removable,
        holders=frozenset(device.holders or ()),
        relatives=frozenset(part.device_node for part in device.relatives),
    )


def facts_of_lsblk(*nodes: Path) -> dict[str, Facts]:
    """The same of these devices, or of all, by lsblk and by their kernel names."""
    told = json.loads(run("lsblk", "--json", "--output-all", "--bytes", "--all", *nodes))
    return dict(_told(told["blockdevices"]))


def _told(entries: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Facts]]:
    for entry in entries:
        above = entry.get("children", [])
        parts = {f"/dev/{child['kname']}" for child in above if child["type"] == "part"}
        disk = {f"/dev/{entry['pkname']}"} if entry["type"] == "part" else set()
        yield (
            entry["kname"],
            Facts(
                node=f"/dev/{entry['kname']}",
                number=entry["maj:min"],
                size_bytes=entry["size"],
                sector_bytes=entry["log-sec"],
                read_only=entry["ro"],
                removable=entry["rm"],
                holders=frozenset(child["kname"] for child in above if child["type"] != "part"),
                relatives=frozenset(parts | disk),
            ),
        )
        yield from _told(above)


def as_lsblk_says(*nodes: Path) -> bool:
    """Whether vmplug and lsblk know the same of devices."""
    told = facts_of_lsblk(*nodes)
    return all(told[kernel_name(node)] == facts(node) for node in nodes)


def kernel_name(node: Path) -> str:
    return Path(f"/sys/dev/block/{number(node)}").resolve().name


# Devices, and what uses them


@contextmanager
def null_disk(name: str, size_mib: int = 128) -> Iterator[Path]:
    """A disk of its own memory."""
    directory = NULL_DISKS / name
    directory.mkdir()
    try:
        for attribute, value in (("size", size_mib), ("memory_backed", 1), ("power", 1)):
            (directory / attribute).write_text(f"{value}\n")
        yield Path(f"/dev/{name}")
    finally:
        directory.rmdir()


@contextmanager
def scsi_disks(**parameters: int) -> Iterator[list[Path]]:
    """Two LUNs of each of two targets, in their order; all show the same bytes."""
    load_with("scsi_debug", dev_size_mb=16, num_tgts=2, max_luns=2, **parameters)
    try:
        pattern = "adapter*/host*/target*/*/block/*/size"
        adapters = Path("/sys/bus/pseudo/drivers/scsi_debug")
        wait_until(lambda: len(list(adapters.glob(pattern))) == 4, "disk of scsi_debug")
        yield [Path("/dev") / path.parent.name for path in sorted(adapters.glob(pattern))]
    finally:
        run("modprobe", "--remove", "scsi_debug")


@contextmanager
def zram(size_mib: int = 16) -> Iterator[Path]:
    """Compressed memory as a disk; one of size 0 has not been given any."""
    index = (ZRAM / "hot_add").read_text().strip()
    try:
        if size_mib:
            Path(f"/sys/block/zram{index}/disksize").write_text(f"{size_mib}M")
        yield Path(f"/dev/zram{index}")
    finally:
        Path(f"/sys/block/zram{index}/reset").write_text("1")
        (ZRAM / "hot_remove").write_text(index)


@contextmanager
def mapped(name: str, *table: str, options: Sequence[str] = ()) -> Iterator[Path]:
    """What device-mapper makes of a table; yields the node of its name."""
    run("dmsetup", "create", name, *options, text="\n".join(table))
    node = Path("/dev/mapper", name)
    try:
        yield node
    finally:
        if node.exists():
            run("dmsetup", "remove", name)


@contextmanager
def mirror(name: str, *members: Path) -> Iterator[Path]:
    """A RAID 1."""
    node = Path("/dev", name)
    create = ("mdadm", "--create", node, "--run", "--quiet", "--assume-clean", "--metadata=1.2")
    run(*create, "--level=1", f"--raid-devices={len(members)}", *members)
    try:
        yield node
    finally:
        if Path(f"/sys/block/{name}/md/dev-{members[0].name}").exists():
            run("mdadm", "--stop", "--quiet", node)


@contextmanager
def looped(file: Path, *options: str) -> Iterator[Path]:
    """A loop device on a file or a device."""
    node = Path(run("losetup", "--find", "--show", *options, file).strip())
    try:
        yield node
    finally:
        detach_loop(node)


@contextmanager
def partitioned(disk: Path) -> Iterator[tuple[Path, Path]]:
    """A disk's two partitions of 16 MiB."""
    run("sfdisk", "--quiet", disk, text="label: gpt\nsize=16M\nsize=16M\n")
    try:
        first, second = sorted(Path(f"/sys/block/{disk.name}").glob(f"{disk.name}*"))
        yield Path("/dev", first.name), Path("/dev", second.name)
    finally:
        run("sfdisk", "--quiet", "--delete", disk)


@contextmanager
def network_disk(image: Path) -> Iterator[Path]:
    """A disk that a server has, which is a QEMU's of this machine."""
    node = Path("/dev/nbd0")
    run("qemu-nbd", "--fork", "--format=raw", f"--connect={node}", image)
    try:
        size = Path("/sys/block/nbd0/size")
        wait_until(lambda: size.read_text() != "0\n", "size of the network disk")
        yield node
    finally:
        run("qemu-nbd", "--disconnect", node)
        wait_until(lambda: not Path("/sys/block/nbd0/pid").exists(), "end of the network disk")


@contextmanager
def mounted(node: Path, directory: Path, *options: str) -> Iterator[Path]:
    directory.mkdir(exist_ok=True)
    run("mount", *options, node, directory)
    try:
        yield directory
    finally:
        if directory.is_mount():
            run("umount", directory)


@contextmanager
def swapped_to(path: Path) -> Iterator[None]:
    """The host swaps to a device or a file."""
    path.chmod(0o600)
    run("mkswap", path)
    run("swapon", path)
    try:
        yield
    finally:
        if str(path) in Path("/proc/swaps").read_text():
            run("swapoff", path)


@contextmanager
def held(node: Path) -> Iterator[None]:
    """This process has it open for itself alone."""
    descriptor = os.open(node, os.O_RDWR | os.O_EXCL)
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def udev() -> Iterator[None]:
    """The daemon that gives names to the devices, which it has done for all there are.

    Afterwards nothing has a name: nobody would take those away of what is gone.
    """
    run("/lib/systemd/systemd-udevd", "--daemon")
    try:
        run("udevadm", "trigger", "--action=add", "--subsystem-match=block")
        settle()
        yield
    finally:
        settle()
        run("udevadm", "control", "--exit")
        wait_until(lambda: not _runs_udev(), "end of udev")
        for directory in UDEV_DIRECTORIES:
            shutil.rmtree(directory)


def _runs_udev() -> bool:
    """A worker may outlive the daemon for a moment, and takes names away."""
    for file in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if file.read_text().strip() in {"systemd-udevd", "(udev-worker)"}:
                return True
    return False


def settle() -> None:
    run("udevadm", "settle", "--timeout=30")
