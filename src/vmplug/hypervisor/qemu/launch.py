"""Start a QEMU that has room to plug into: the embedded default, for who has none.

User text goes to QEMU as JSON or as an argument of its own, never inside an option string.
"""

import errno
import json
import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmplug.errors import ConnectError, HypervisorError, SpecError
from vmplug.hypervisor.qemu import Qemu

MAX_PORTS = 27
_FIRST_PORT_SLOT = 0x4
_SCSI_SLOT, _DISK_SLOT = 0x2, 0x3
_SOCKET_PATH_MAX = 107
"""Longest path of a unix socket. Source: unix(7), sun_path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSpec:
    """A q35 machine to start.

    `disk` is a raw image to boot from and `kernel`, `initrd`, `append` a direct kernel boot; each
    may be None. `extra` goes to QEMU as it is.
    """

    name: str
    memory_mib: int = 512
    cpus: int = 1
    ports: int = 8
    accel: str = "kvm"
    kernel: str | None = None
    initrd: str | None = None
    append: str | None = None
    disk: str | None = None
    extra: tuple[str, ...] = ()


def command_line(spec: VmSpec, qmp_descriptor: int) -> list[str]:
    """QEMU's arguments: root ports, a virtio-scsi controller, shared memory, a QMP socket."""
    size = spec.memory_mib << 20
    arguments = ["qemu-system-x86_64", "-name", spec.name]
    arguments += ["-machine", "q35,memory-backend=mem", "-accel", spec.accel]
    arguments += ["-cpu", "host" if spec.accel == "kvm" else "max", "-smp", str(spec.cpus)]
    arguments += ["-m", f"{spec.memory_mib}M", "-nodefaults", "-no-user-config"]
    arguments += ["-display", "none"]
    arguments += _json("-object", qom_type="memory-backend-memfd", id="mem", size=size, share=True)
    arguments += ["-chardev", f"socket,id=qmp,fd={qmp_descriptor},server=on,wait=off"]
    arguments += ["-mon", "chardev=qmp,mode=control"]
    arguments += ["-chardev", "file,id=console,path=console.log", "-serial", "chardev:console"]
    for index in range(spec.ports):
        slot = hex(_FIRST_PORT_SLOT + index)
        number = index + 1
        port = {"id": f"rp{index}", "bus": "pcie.0", "addr": slot}
        arguments += _json("-device", driver="pcie-root-port", **port, chassis=number, slot=number)
    scsi = {"id": "scsi0", "bus": "pcie.0", "addr": hex(_SCSI_SLOT)}
    arguments += _json("-device", driver="virtio-scsi-pci", **scsi)
    arguments += _boot(spec)
    return [*arguments, *spec.extra]


def _boot(spec: VmSpec) -> list[str]:
    arguments = []
    for option, value in (
        ("-kernel", spec.kernel),
        ("-initrd", spec.initrd),
        ("-append", spec.append),
    ):
        arguments += [option, value] if value is not None else []
    if spec.disk is not None:
        file = {"driver": "file", "filename": spec.disk}
        arguments += _json("-blockdev", driver="raw", node_name="boot", file=file)
        place = {"bus": "pcie.0", "addr": hex(_DISK_SLOT), "bootindex": 0}
        arguments += _json("-device", driver="virtio-blk-pci", id="boot", drive="boot", **place)
    return arguments


def _json(option: str, **properties: Any) -> list[str]:
    return [option, json.dumps({key.replace("_", "-"): v for key, v in properties.items()})]


def launch(spec: VmSpec, directory: Path, *, timeout_s: float) -> tuple[int, str]:
    """Start the machine in `directory`; gives QEMU's pid and its QMP socket once it answers.

    QEMU outlives this process. Raises HypervisorError with QEMU's own words when it does not come
    up, and leaves no process behind then.
    """
    path = str(directory / "qmp.sock")
    if len(os.fsencode(path)) > _SOCKET_PATH_MAX:
        raise SpecError(
            "--state-dir",
            f"the socket {path} would be longer than {_SOCKET_PATH_MAX} bytes",
            hint="name a shorter directory",
        )
    log_path = directory / "qemu.log"
    with socket.socket(socket.AF_UNIX) as listener, log_path.open("wb") as log:
        listener.bind(path)
        listener.listen(1)  # so that connecting waits for QEMU, and fails when it dies
        arguments = command_line(spec, listener.fileno())
        try:
            process = subprocess.Popen(
                arguments,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        except FileNotFoundError:
            raise HypervisorError(
                "qemu-system-x86_64 is not installed",
                hint="on Debian: apt install qemu-system-x86",
            ) from None
    try:
        Qemu.connect(path, timeout_s=timeout_s).close()
    except ConnectError as error:
        process.kill()
        process.wait()
        words = "; ".join(log_path.read_text(errors="replace").splitlines())
        raise HypervisorError(
            f"QEMU did not come up: {words or error.message}",
            hint="vmplug vm start --help shows what can be chosen; --accel tcg needs no KVM",
        ) from error
    process.returncode = 0  # it is meant to outlive us
    return process.pid, path


def is_listening(path: str) -> bool | None:
    """Whether a process listens on a unix socket; None when there is no such file.

    A QEMU keeps listening for as long as it lives, also while it serves a client. A full queue
    of waiting clients is a listener too. Source: unix(7), connect(2).
    """
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(0)
        number = client.connect_ex(path)
    return None if number == errno.ENOENT else number != errno.ECONNREFUSED
