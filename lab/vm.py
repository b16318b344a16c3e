"""Runs one command as root in the lab VM."""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lab.initrd import build_initrd
from lab.topology import make_disks, qemu_arguments

BUILD = Path(__file__).parent.parent / "build" / "lab"
KERNELS = ("6.1", "6.12")
LAB_FAILED = 125
"""The status that says that the lab failed, and not what ran in it."""

_POLL_S = 0.05
_APPEND = (
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check tsc=reliable "
    "random.trust_cpu=on intel_iommu=on"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """How to run it: on which of KERNELS, with what shared for writing, for how long.

    The IOMMU remaps interrupts unless `remapping` is False. `verbose` shows the kernel's messages.
    """

    kernel: str = "6.1"
    share: Path = BUILD / "results"
    timeout_s: float = 600.0
    remapping: bool = True
    verbose: bool = False


def run(lab: Lab, command: Sequence[str]) -> int:
    """The command's exit status; LAB_FAILED, and why on stderr, when the lab itself failed.

    What the command says goes to stdout, of both its streams.
    """
    tree = BUILD / lab.kernel
    if not (tree / "ready").exists():
        print(f"lab: there is no {tree}: run make lab", file=sys.stderr)
        return LAB_FAILED
    lab.share.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lab.") as name:
        directory = Path(name)
        (modules,) = tree.glob("lib/modules/*")
        build_initrd(
            directory / "initrd",
            busybox=BUILD / "busybox",
            modules=modules,
            settings={
                "moddir": str(modules),
                "share": str(lab.share),
                "path": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            },
            command=f"cd {shlex.quote(os.getcwd())}\nexec {shlex.join(command)}\n",
        )
        make_disks(directory)
        return _run(lab, _command_line(lab, tree, directory), directory)


def _command_line(lab: Lab, tree: Path, directory: Path) -> list[str]:
    """Consoles go to files: QEMU would make a shared stdout non-blocking, and output be lost."""
    remapping = "on" if lab.remapping else "off"
    return [
        "qemu-system-x86_64",
        *("-M", "q35,kernel-irqchip=split", "-accel", "tcg,thread=multi", "-cpu", "max"),
        *("-smp", "1", "-m", "2G", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-object", "memory-backend-ram,id=ram0,size=1920M", "-numa", "node,memdev=ram0"),
        *("-object", "memory-backend-ram,id=ram1,size=128M", "-numa", "node,memdev=ram1"),
        *("-no-reboot", "-kernel", str(tree / "vmlinux"), "-initrd", str(directory / "initrd")),
        *("-append", _APPEND),
        *("-device", f"intel-iommu,intremap={remapping},caching-mode=on"),
        *("-serial", f"file:{directory / 'console'}", "-serial", f"file:{directory / 'status'}"),
        *("-device", "virtio-serial-pci,addr=1e.0"),
        *("-chardev", f"file,id=out,path={directory / 'out'}"),
        *("-device", "virtserialport,name=lab.out,chardev=out"),
        # The lab's own QMP, for what runs in it: see tests/lab/outer.py.
        *("-chardev", f"socket,id=qmp,path={directory / 'qmp'},server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=port,path={directory / 'qmp'}"),
        *("-device", "virtserialport,name=lab.qmp,chardev=port"),
        *("-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=root,mount_tag=labroot,addr=1d.0"),
        *("-fsdev", f"local,id=share,path={lab.share},security_model=none,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=share,mount_tag=labshare,addr=1c.0"),
        *qemu_arguments(directory),
    ]


def _run(lab: Lab, command: Sequence[str], directory: Path) -> int:
    deadline = time.monotonic() + lab.timeout_s
    tails = [_Tail(directory / "out", sys.stdout.fileno())]
    if lab.verbose:
        tails.append(_Tail(directory / "console", sys.stderr.fileno()))
    qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        while qemu.poll() is None and time.monotonic() < deadline:
            for tail in tails:
                tail.copy()
            time.sleep(_POLL_S)
        is_late = qemu.poll() is None
    finally:
        qemu.kill()
        qemu.wait()
    for tail in tails:
        tail.copy()
    status = _read(directory / "status").split()
    if is_late or not status or int(status[-1]) == LAB_FAILED:
        why = f"no end within {lab.timeout_s:g} s" if is_late else "it did not come to an end"
        console = _read(directory / "console")[-4000:]
        print(f"lab: the lab VM failed: {why}\n{console}", file=sys.stderr)
        return LAB_FAILED
    return int(status[-1])


class _Tail:
    """Copies what is new in a file."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._position = 0

    def copy(self) -> None:
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
            self._position += len(data)
            while data:
                data = data[os.write(self._descriptor, data) :]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
