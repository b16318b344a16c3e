"""The first file system of the lab VM: busybox, the modules that reach the root, scripts."""

import lzma
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

MODULES = ("virtio_pci", "virtio_console", "overlay", "9pnet_virtio", "9p")


def build_initrd(
    initrd: Path, *, busybox: Path, modules: Path, settings: Mapping[str, str], command: str
) -> None:
    """Write it to `initrd`: not compressed, as an emulated CPU would take longer to unpack it."""
    root = initrd.parent / "initrd.root"
    here = Path(__file__).parent
    for name in ("bin", "modules", "proc", "sys", "dev"):
        (root / name).mkdir(parents=True)
    shutil.copy(busybox, root / "bin/busybox")
    shutil.copy(here / "init", root / "init")
    (root / "init").chmod(0o755)
    shutil.copy(here / "second", root / "second")
    (root / "command").write_text(command)
    lines = (f"{name}={shlex.quote(value)}\n" for name, value in settings.items())
    (root / "settings").write_text("".join(lines))
    names = [_copy_module(modules / file, root / "modules") for file in _in_order(modules)]
    (root / "modules.order").write_text("\n".join(names))
    _pack(root, initrd)


def _copy_module(source: Path, directory: Path) -> str:
    data = source.read_bytes()
    name = source.name.removesuffix(".xz")
    (directory / name).write_bytes(lzma.decompress(data) if source.suffix == ".xz" else data)
    return name


def _in_order(modules: Path) -> Sequence[str]:
    """The files of MODULES and of what they depend on, in the order to load them.

    Source: modules.dep(5).
    """
    lines = (modules / "modules.dep").read_text().splitlines()
    needs = {file: rest.split() for file, _, rest in (line.partition(":") for line in lines)}
    files = {_name(file): file for file in needs}
    builtin = {_name(file) for file in (modules / "modules.builtin").read_text().split()}
    order: list[str] = []

    def add(file: str) -> None:
        for needed in needs[file]:
            add(needed)
        if file not in order:
            order.append(file)

    for name in MODULES:
        if name not in builtin:
            add(files[name])
    return order


def _name(file: str) -> str:
    return re.sub(r"\.ko.*", "", os.path.basename(file)).replace("-", "_")


def _pack(root: Path, initrd: Path) -> None:
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))
    with initrd.open("wb") as archive:
        subprocess.run(
            ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"],
            cwd=root,
            input="\n".join(files).encode(),
            stdout=archive,
            check=True,
        )
