"""Check the shape of QEMU's answers as they arrive, so that other code can trust them.

A QEMU that its guest has compromised may send anything. An answer of another shape, or larger than
that of any VM, is a ProtocolError. Only the members named here are passed on.
Source: QEMU qapi/qom.json, qapi/machine.json, qapi/block-core.json, qapi/char.json; QEMU 7.2.
"""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec

from vmplug.drivers.ports import Command
from vmplug.errors import ProtocolError

_ENTRIES_MAX = 1 << 14
"""PCI has room for 65 536 functions on 256 buses; no VM comes near."""

_Byte = Annotated[int, msgspec.Meta(ge=0, le=0xFF)]
_U16 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
_U32 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]
_Size = Annotated[int, msgspec.Meta(ge=0)]
_CcwDevNo = Annotated[str, msgspec.Meta(pattern=r"\A(fe|0)\.[0-3]\.[0-9a-f]{4}\Z")]
_Many = msgspec.Meta(max_length=_ENTRIES_MAX)


class _MemoryDeviceData(TypedDict):
    memdev: NotRequired[str]
    slot: NotRequired[_U32]


class _MemoryDevice(TypedDict):
    type: str
    data: _MemoryDeviceData


class _Property(TypedDict):
    name: str
    type: str


class _Backend(TypedDict):
    id: NotRequired[str]
    share: bool


class _Chardev(TypedDict):
    label: str
    filename: str


class _Parameter(TypedDict):
    name: str


class _Option(TypedDict):
    parameters: Annotated[list[_Parameter], _Many]


class _Accelerators(TypedDict):
    enabled: str


class _Kvm(TypedDict):
    enabled: bool


class _Status(TypedDict):
    status: str


class _MachineMemory(TypedDict):
    slots: NotRequired[_U16]


_Cpu = TypedDict("_Cpu", {"thread-id": NotRequired[_U32], "qom-path": NotRequired[str]})
_Node = TypedDict("_Node", {"node-name": str})
_Sizes = TypedDict("_Sizes", {"base-memory": _Size, "plugged-memory": NotRequired[_Size]})


class _Fd(TypedDict):
    fd: int
    opaque: NotRequired[str]


_FdSet = TypedDict("_FdSet", {"fdset-id": int, "fds": Annotated[list[_Fd], _Many]})
_NewFd = TypedDict("_NewFd", {"fdset-id": Annotated[int, msgspec.Meta(ge=0)]})


class _Inserted(TypedDict):
    file: str


_Drive = TypedDict(
    "_Drive",
    {
        "qdev": NotRequired[str],
        "io-status": NotRequired[Literal["ok", "failed", "nospace"]],
        "inserted": NotRequired[_Inserted],
    },
)


class _GraphNode(TypedDict):
    id: _Size
    type: str
    name: str


class _GraphEdge(TypedDict):
    parent: _Size
    name: str
    child: _Size


class _Graph(TypedDict):
    nodes: Annotated[list[_GraphNode], _Many]
    edges: Annotated[list[_GraphEdge], _Many]


_ANSWERS: dict[str, Any] = {
    "add-fd": _NewFd,
    "device-list-properties": Annotated[list[_Parameter], _Many],
    "qom-list": Annotated[list[_Property], _Many],
    "qom-list-types": list[Any],
    "query-accelerators": _Accelerators,
    "query-command-line-options": Annotated[list[_Option], _Many],
    "query-block": Annotated[list[_Drive], _Many],
    "query-blockstats": Annotated[list[_Node], _Many],
    "query-chardev": Annotated[list[_Chardev], _Many],
    "query-cpus-fast": Annotated[list[_Cpu], _Many],
    "query-fdsets": Annotated[list[_FdSet], _Many],
    "query-kvm": _Kvm,
    "query-memdev": Annotated[list[_Backend], _Many],
    "query-memory-devices": Annotated[list[_MemoryDevice], _Many],
    "query-memory-size-summary": _Sizes,
    "query-status": _Status,
    "x-debug-query-block-graph": _Graph,
}
_PROPERTIES: dict[str, Any] = {
    "addr": _Byte,
    "bus_nr": _Byte,
    "dev_id": _CcwDevNo,
    "drive": str,
    "hotplug": bool,
    "lun": _U32,
    "mem-reserve": _Size,
    "memory": _MachineMemory,
    "numa_node": _U16,
    "nvdimm": bool,
    "parent_bus": str,
    "phys-bits": Annotated[int, msgspec.Meta(ge=0, le=64)],
    "pref64-reserve": _Size,
    "scsi-id": _U32,
    "shpc": bool,
    "type": str,
}
"""By the property that `qom-get` asks for."""


def validate_reply(command: Command, answer: Any) -> Any:
    """The used members of an answer to `command`; ProtocolError when it makes no sense."""
    try:
        return msgspec.convert(answer, _shape(command))
    except (
        msgspec.ValidationError,
        UnicodeEncodeError,
    ) as error:  # the latter: an incomplete character
        raise ProtocolError(
            f"QEMU's answer to {command.execute} makes no sense: {str(error).replace('`', '')}",
            hint="the process on that socket is not QEMU, or its guest has compromised it",
        ) from error


def _shape(command: Command) -> Any:
    if command.execute != "qom-get":
        return _ANSWERS.get(command.execute, Any)
    name = str(command.arguments["property"])
    return str if name.startswith("child[") else _PROPERTIES.get(name, Any)
