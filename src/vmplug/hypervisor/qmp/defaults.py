"""Leave out of a command what QEMU does by default.

QEMU reads QMP one byte per turn of its main loop, 3 us each, which is most of the time of an
attach. So steps, `vmplug plan` and the log state every option, and the socket gets only those that
differ. Only defaults that hold for all machine types: the `discard` of virtio-blk does not. What
data depends on is always sent, as `-global` in a QEMU that others have started changes it for hot
plug too: who may write at the same time, and the size of a sector.
Source: QEMU block.c, bdrv_inherited_options; hw/block/block.c; measured on QEMU 7.2 and 10.0.
"""

from collections.abc import Mapping
from typing import Any

from vmplug.drivers.ports import Command

_OF_NODE = {"read-only": False, "discard": "ignore"}
_OF_FILE = {"aio": "threads"}
_INHERITED = ("read-only", "cache")
"""What the file of a raw image gets from the image, unless it says otherwise."""
_OF_DEVICE = {
    "physical_block_size": 512,
    "channel": 0,
}


def sent_arguments(command: Command) -> dict[str, Any]:
    """The arguments of `command` for the socket."""
    match command.execute:
        case "blockdev-add":
            return _sent_node(command.arguments)
        case "device_add":
            return _without(command.arguments, _OF_DEVICE)
        case _:
            return dict(command.arguments)


def _sent_node(node: Mapping[str, Any]) -> dict[str, Any]:
    """A raw image passes discards on to its file only if it takes them itself.

    Other formats also discard what they no longer need: all of their nodes state everything.
    """
    if node["driver"] != "raw" or not isinstance(node.get("file"), Mapping):
        return dict(node)
    inherited = {key: node[key] for key in _INHERITED if key in node}
    file = _without(
        node["file"], {**inherited, "discard": node["file"].get("discard"), **_OF_FILE}
    )
    sent = {**_without(node, _OF_NODE), "file": file}
    if "cache" in sent:
        sent["cache"] = {key: value for key, value in sent["cache"].items() if value}
    return {key: value for key, value in sent.items() if value != {}}


def _without(said: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in said.items() if value != defaults.get(key, _NOTHING)}


_NOTHING = object()
