"""The lab's first file system: busybox, the modules that reach the real one, and two scripts."""

import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path

from lab.kernel import BUSYBOX, Kernel

MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay")
SCRIPTS = ("init", "start")
HERE = Path(__file__).parent

EXECUTABLE, DIRECTORY = 0o100755, 0o040755
"""Modes of both kinds of files, as stat(2) has them."""


def pack_initrd(kernel: Kernel, *, settings: str, command: str) -> bytes:
    """A cpio archive. `settings` is read by the scripts, `command` run by the second.

    It is not compressed: QEMU loads it faster than an emulated CPU unpacks it.
    """
    files = {
        "bin/busybox": BUSYBOX.read_bytes(),
        **{script: (HERE / script).read_bytes() for script in SCRIPTS},
        "settings": settings.encode(),
        "command": command.encode(),
        **{f"modules/{name}": data for name, data in _numbered_modules(kernel.modules)},
    }
    archive = bytearray()
    for directory in ("bin", "modules", "proc", "sys", "dev"):
        archive += _entry(directory, DIRECTORY, b"")
    for path, data in files.items():
        archive += _entry(path, EXECUTABLE, data)
    return bytes(archive + _entry("TRAILER!!!", 0, b""))


def _numbered_modules(directory: Path) -> Iterator[tuple[str, bytes]]:
    """MODULES and those they need, by names that sort in the order in which they are loaded."""
    for number, file in enumerate(_in_order(directory, MODULES)):
        data = (directory / file).read_bytes()
        if file.endswith(".xz"):
            data = lzma.decompress(data)
        yield f"{number:02}-{_module_of(file)}", data


def _in_order(directory: Path, modules: Sequence[str]) -> list[str]:
    """The files of modules, each behind those it needs. Source: modules.dep(5)."""
    lines = (directory / "modules.dep").read_text().splitlines()
    needs = {file: rest.split() for file, _, rest in (line.partition(":") for line in lines)}
    builtin = {_module_of(file) for file in (directory / "modules.builtin").read_text().split()}
    files = {_module_of(file): file for file in needs}
    order: dict[str, None] = {}

    def add(file: str) -> None:
        for needed in needs[file]:
            add(needed)
        order[file] = None

    for module in modules:
        if module not in builtin:
            add(files[module])
    return list(order)


def _module_of(file: str) -> str:
    """`9pnet_virtio` for `kernel/net/9p/9pnet_virtio.ko.xz`."""
    return file.rpartition("/")[2].partition(".")[0].replace("-", "_")


def _entry(path: str, mode: int, data: bytes) -> bytes:
    """One file of the archive. Source: Documentation/driver-api/early-userspace/buffer-format.rst.

    The numbers are: inode, mode, user, group, links, time, size; major and minor of the file
    system and of the device; length of the name, checksum.
    """
    name = path.encode() + b"\0"
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
    header = b"070701" + b"".join(b"%08x" % number for number in numbers)
    return _padded(header + name) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
