"""The devices of a sandbox as saved by Kata Containers' Go runtime, as typed values.

A sandbox has a persist.json and a directory for each container with another. vmplug reads only the
parts about devices, and ignores everything else. The names are those that Kata gives in QEMU.
Source: kata-containers src/runtime/virtcontainers/persist/api, persist/fs, qemu.go.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from vmplug.devnum import DevNum
from vmplug.errors import SpecError
from vmplug.host.kind import DeviceType, Identity, IdentityKind

T = TypeVar("T", bound=msgspec.Struct)

SANDBOXES = "/run/vc/sbs"
_STATE = "persist.json"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")
"""The characters of an id in QEMU. Source: QEMU util/id.c."""

_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Saved(msgspec.Struct, rename="pascal", frozen=True):
    """Keys as Go writes them: the fields' own names."""


class _Drive(_Saved, frozen=True, kw_only=True):
    id: str = msgspec.field(name="ID")
    file: str
    read_only: bool = False
    pmem: bool = False
    nvdimm_id: str = msgspec.field(name="NvdimmID", default="")


class _Vfio(_Saved, frozen=True, kw_only=True):
    id: str = msgspec.field(name="ID")
    bdf: str = msgspec.field(name="BDF", default="")
    sysfs_dev: str = ""
    host_path: str = ""


class _VhostUser(_Saved, frozen=True, kw_only=True):
    dev_id: str = msgspec.field(name="DevID")
    socket_path: str


class _Device(_Saved, frozen=True, kw_only=True):
    id: str = msgspec.field(name="ID")
    type: str
    dev_type: str = ""
    major: int = -1
    minor: int = 0
    attach_count: _Count = 0
    driver_options: dict[str, str] | None = None
    block_drive: _Drive | None = None
    vhost_user_dev: _VhostUser | None = None
    vfio_devs: list[_Vfio] | None = msgspec.field(name="VFIODevs", default=None)


class _Sandbox(_Saved, frozen=True, kw_only=True):
    devices: list[_Device] | None = None


class _Map(_Saved, frozen=True, kw_only=True):
    id: str = msgspec.field(name="ID")
    container_path: str = ""


class _Container(_Saved, frozen=True, kw_only=True):
    device_maps: list[_Map] | None = None


class KataDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device that Kata saved.

    `identity` is its identity in vmplug, None where the state does not show it. `fronts` are its
    devices in QEMU, one for each function, and `parts` all its names there; both are empty for a
    device that is only counted, or has no name in QEMU. `functions` are those of a group.
    """

    id: str
    kind: str
    identity: Identity | None
    host_path: str
    attach_count: int
    read_only: bool = False
    options: Mapping[str, str] = msgspec.field(default_factory=dict)
    fronts: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    nvdimm_id: int | None = None


class KataHold(msgspec.Struct, frozen=True, kw_only=True):
    """A container's hold on a device, under its path in the container."""

    device: str
    container: str
    container_path: str


class KataState(msgspec.Struct, frozen=True, kw_only=True):
    """The devices of a sandbox in the order of creation, and the holds on them."""

    sandbox: str
    devices: tuple[KataDevice, ...]
    holds: tuple[KataHold, ...] = ()


def read_kata(source: str) -> KataState:
    """The state in a persist.json, in the directory of one, or of a sandbox id.

    Raises SpecError, with the JSON path, for unreadable or malformed state.
    """
    path = _find(source)
    directory = path.parent
    devices = decode_devices(_read(path), str(path))
    holds: list[KataHold] = []
    for container in sorted(directory.glob(f"*/{_STATE}")):
        holds += decode_holds(_read(container), container.parent.name, str(container))
    return KataState(sandbox=directory.name, devices=devices, holds=tuple(holds))


def decode_devices(data: bytes, file: str) -> tuple[KataDevice, ...]:
    """The devices in the state of a sandbox."""
    devices = _decode(data, _Sandbox, file).devices or []
    return tuple(_device(d, f"{file}: $.Devices[{i}]") for i, d in enumerate(devices))


def decode_holds(data: bytes, container: str, file: str) -> list[KataHold]:
    """The holds of a container, from its own state."""
    maps = _decode(data, _Container, file).device_maps or []
    return [
        KataHold(device=entry.id, container=container, container_path=entry.container_path)
        for entry in maps
    ]


def _find(source: str) -> Path:
    if "/" not in source and not os.path.exists(source):
        return Path(SANDBOXES, source, _STATE)
    path = Path(os.path.abspath(source))
    return path / _STATE if os.path.isdir(path) else path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise SpecError(
            str(path),
            f"cannot be read: {reason}",
            hint=f"pass a Kata sandbox below {SANDBOXES}, or its {_STATE}",
        ) from error


def _decode(data: bytes, kind: type[T], file: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        what, _, where = str(error).partition(" - at `")
        raise SpecError(f"{file}: {where.rstrip('`') or '$'}", what) from error


def _device(saved: _Device, where: str) -> KataDevice:
    common = _Common(saved=saved, where=where)
    match saved.type:
        case DeviceType.BLOCK if saved.block_drive:
            return common.disk(saved.block_drive)
        case DeviceType.VFIO if saved.vfio_devs:
            return common.group(saved.vfio_devs)
        case DeviceType.VHOST_USER_BLK | DeviceType.VHOST_USER_SCSI if saved.vhost_user_dev:
            return common.vhost_user(saved.vhost_user_dev)
        case DeviceType.GENERIC if saved.major >= 0:
            devnum = str(DevNum(saved.major, saved.minor))
            is_char = saved.dev_type in {"c", "u"}
            identity = Identity(IdentityKind.CHAR, devnum) if is_char else None
            return common.made(identity, f"{saved.dev_type} {devnum}")
        case _:
            return common.made(None, saved.id)


class _Common(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that all kinds have in common."""

    saved: _Device
    where: str

    def made(self, identity: Identity | None, host_path: str, **more: object) -> KataDevice:
        saved = self.saved
        return KataDevice(
            id=saved.id,
            kind=saved.type,
            identity=identity,
            host_path=host_path,
            attach_count=saved.attach_count,
            options=saved.driver_options or {},
            **more,  # type: ignore[arg-type]
        )

    def disk(self, drive: _Drive) -> KataDevice:
        """`nvdimm<ID>` over `nvdimmbackmem<ID>`, or `virtio-<ID>` over a node with the ID."""
        name = _qemu_name(drive.id, f"{self.where}.BlockDrive.ID")
        path = _path(drive.file, f"{self.where}.BlockDrive.File")
        is_pmem = drive.pmem or (self.saved.driver_options or {}).get("block-driver") == "nvdimm"
        front = f"nvdimm{name}" if is_pmem else f"virtio-{name}"
        return self.made(
            _numbered(self.saved) or Identity(IdentityKind.FILE, path),
            path,
            read_only=drive.read_only,
            fronts=(front,),
            parts=(front, f"nvdimmbackmem{name}" if is_pmem else name),
            nvdimm_id=int(drive.nvdimm_id) if drive.nvdimm_id.isdecimal() else None,
        )

    def group(self, members: list[_Vfio]) -> KataDevice:
        """`vfio-<id><N>` each; the iommufd that Kata may have made for it has a related name."""
        names = [
            _qemu_name(member.id, f"{self.where}.VFIODevs[{index}].ID", "vfio-")
            for index, member in enumerate(members)
        ]
        functions = [_function(member) for member in members]
        return self.made(
            Identity.of_vfio(functions[0]),
            members[0].host_path or functions[0],
            fronts=tuple(names),
            parts=(*names, *(f"iommufd{name}" for name in names)),
            functions=tuple(functions),
        )

    def vhost_user(self, device: _VhostUser) -> KataDevice:
        """Hot: `virtio-<DevID>` over a chardev with the DevID. Cold: `scsi-`, over `char-`."""
        name = _qemu_name(device.dev_id, f"{self.where}.VhostUserDev.DevID")
        path = _path(device.socket_path, f"{self.where}.VhostUserDev.SocketPath")
        is_hot = self.saved.type == DeviceType.VHOST_USER_BLK
        front, link = (f"virtio-{name}", name) if is_hot else (f"scsi-{name}", f"char-{name}")
        identity = _numbered(self.saved) or Identity(IdentityKind.SOCKET, path)
        return self.made(identity, path, fronts=(front,), parts=(front, link))


def _numbered(saved: _Device) -> Identity | None:
    """Kind and number of a block device; a regular file has -1 as its major."""
    is_numbered = saved.dev_type == "b" and saved.major > 0
    return Identity.of_block(DevNum(saved.major, saved.minor)) if is_numbered else None


def _function(member: _Vfio) -> str:
    """A BDF, or the UUID of a mediated device, whose BDF is a piece of its parent's."""
    name = member.sysfs_dev.rstrip("/").rpartition("/")[2]
    is_mediated = name.count("-") == 4
    return name if is_mediated else member.bdf or name or member.id


def _qemu_name(name: str, where: str, prefix: str = "") -> str:
    """SpecError for a name that Kata never gives to a device: it could be vmplug's own."""
    if not _NAME.match(name) or not name.startswith(prefix) or name.startswith("vmplug-"):
        raise SpecError(where, f"{name!r} is not a name that Kata gives to a device in QEMU")
    return name


def _path(path: str, where: str) -> str:
    if not path.startswith("/") or "\0" in path:
        raise SpecError(where, f"{path!r} is not an absolute path")
    return path
