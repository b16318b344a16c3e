"""What QEMU opened for a disk: the edges of its block graph, against those that were checked.

A header that is changed between the check and QEMU's open(2) can make a qcow2 image open another
file, and QEMU has no word for "no data file". But each file that it opened is a child of a node.
`query-named-block-nodes` shows the header's words instead, and names no edges before QEMU 11.
Source: QEMU block/qcow2.c; measured on QEMU 7.2, 10.0 and 11.1.
"""

from collections.abc import Mapping
from typing import Any

from vmplug.address import qemu_id
from vmplug.drivers.plug import BlockDrive, DiskFrontend, Plug
from vmplug.drivers.ports import Command
from vmplug.errors import NoSuchDevice
from vmplug.host.block.formats import ImageFormat
from vmplug.host.block.qcow2 import ImageFile
from vmplug.hypervisor.qmp.monitor import Talk

QUERY = Command("x-debug-query-block-graph", {})

Children = Mapping[str, "Children"]
"""The children of a node by their roles: `file`, `backing`, `data-file`."""


def check_graph(plug: Plug) -> Talk:
    """NoSuchDevice unless the node of a disk has exactly the children that were checked.

    QEMU is not asked about a raw image, which has no header: its node has the file that it was
    given, and can have no other child. Nor about persistent memory, which has no node.
    """
    if not isinstance(plug, BlockDrive) or plug.format is ImageFormat.RAW:
        return
    if plug.driver is DiskFrontend.NVDIMM:
        return
    graph = yield QUERY
    names = {node["name"]: node["id"] for node in graph["nodes"] if node["type"] == _BLOCK}
    children: dict[int, dict[str, int]] = {}
    for edge in graph["edges"]:
        children.setdefault(edge["parent"], {})[edge["name"]] = edge["child"]
    found = names.get(qemu_id(plug.id))
    if found is None or not _has(found, _expected(plug), children):
        raise NoSuchDevice(
            plug.file,
            f"{plug.file} was changed after vmplug checked it: QEMU opened other files for it",
            found="an image that names other files",
            hint="the VM is unchanged; qemu-img info shows which files the image names now",
        )


_BLOCK = "block-driver"


def _expected(drive: BlockDrive) -> Children:
    return _children(drive.format, drive.backing, drive.data_file)


def _children(
    format_: ImageFormat, backing: ImageFile | None, data_file: ImageFile | None
) -> Children:
    expected: dict[str, Children] = {"file": {}}
    if format_ is ImageFormat.QCOW2 and backing:
        expected["backing"] = _children(backing.format, backing.backing, backing.data_file)
    if format_ is ImageFormat.QCOW2 and data_file:
        expected["data-file"] = {}
    return expected


def _has(node: int, expected: Children, found: Mapping[int, Mapping[str, Any]]) -> bool:
    """Whether a node has these children, and they theirs; only as deep as they are expected."""
    children = found.get(node, {})
    return children.keys() == expected.keys() and all(
        _has(children[role], below, found) for role, below in expected.items()
    )
