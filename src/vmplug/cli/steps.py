"""The steps of `vmplug plan` as sentences, each with its undo."""

import json
from collections.abc import Mapping
from typing import Any

from vmplug.cli.render.output import size
from vmplug.drivers.place import GuestAddress
from vmplug.drivers.ports import BIND, START_DAEMON, Command, Step

_NO_UNDO = "none, QEMU cannot take it back"
_RELEASE = "ask the guest to release it, and take it out"


_OF_THE_DEVICE = {
    "getfd": ("hand {} to QEMU as an open file", "let QEMU close that file"),
    "chardev-add": ("connect to the vhost-user backend of {}", "hang up"),
    "netdev_add": ("make that connection a network back end", "remove the network back end"),
    "fsdev": ("let QEMU itself share {}", _NO_UNDO),
    START_DAEMON: ("start a virtiofsd that shares {}", "end that virtiofsd"),
}


def sentences(step: Step) -> tuple[str, str]:
    """What the step does, and what undoes it."""
    do, undo = _told(step.do, step.host_path or "it", step.guest)
    return do, undo if step.undo else _NO_UNDO


def _told(command: Command, device: str, guest: GuestAddress | None) -> tuple[str, str]:
    arguments = command.arguments
    match command.execute:
        case "blockdev-add":
            return _node(arguments)
        case "object-add":
            return _object(arguments)
        case "device_add":
            where = _place(arguments, guest)
            return f"show {arguments.get('host', 'it')} to the guest{where}", _RELEASE
        case execute if execute == BIND:
            functions = ", ".join(arguments["functions"])
            return f"bind {functions} to VFIO", "give them back to their former drivers"
        case execute:
            do, undo = _OF_THE_DEVICE.get(execute, (f"{execute} for {{}}", "undo that"))
            return do.replace("{}", device), undo


def _node(arguments: Mapping[str, Any]) -> tuple[str, str]:
    """`open /dev/sdb for writing, direct I/O`."""
    if arguments["driver"] == "throttle":
        return "let all its I/O obey the limits", "take the limits off it"
    file, cache = arguments["file"], arguments["cache"]
    words = [
        f"open {file['filename']} for {'reading only' if arguments['read-only'] else 'writing'}",
        "" if arguments["driver"] == "raw" else f"as {arguments['driver']}",
        "direct I/O" if cache["direct"] else "through the host's page cache",
        "without flushes" if cache["no-flush"] else "",
        "discards free space" if arguments["discard"] == "unmap" else "",
        f"with its backing file {name}" if (name := _backing(arguments)) else "",
    ]
    return ", ".join(filter(None, words)), "close it"


def _backing(arguments: Mapping[str, Any]) -> str | None:
    backing = arguments.get("backing")
    return backing["file"]["filename"] if backing else None


def _object(arguments: Mapping[str, Any]) -> tuple[str, str]:
    match arguments["qom-type"]:
        case "throttle-group":
            limits = ", ".join(f"{name} {limit}" for name, limit in arguments["limits"].items())
            return f"set limits a second: {limits}", "remove the limits"
        case "iothread":
            return "start an I/O thread for it", "end that thread"
        case "rng-random":
            return f"open {arguments['filename']} as a source of random numbers", "close it"
        case "memory-backend-file":
            file = f"{arguments['mem-path']} as memory, {size(arguments['size'])}"
            return f"map {file}{_only_reading(arguments['readonly'])}", "unmap it"
        case other:
            return f"create a QEMU object of type {other}", "delete that object"


def _only_reading(is_so: object) -> str:
    return ", for reading only" if is_so else ""


def _place(arguments: Mapping[str, Any], guest: GuestAddress | None) -> str:
    """` at port rp0, PCI path 04/00`, as far as it is known before."""
    places = (
        f"at port {arguments['bus']}" if "bus" in arguments and "lun" not in arguments else "",
        f"at LUN {arguments['lun']} of {arguments['bus']}" if "lun" in arguments else "",
        f"in memory slot {arguments['slot']}" if "slot" in arguments else "",
        f"as device {arguments['devno']}" if "devno" in arguments else "",
        f"PCI path {guest.pci_path}" if guest and guest.pci_path else "",
        f"tag {guest.mount_tag}" if guest and guest.mount_tag else "",
    )
    told = ", ".join(filter(None, places))
    return f" {told}" if told else ""


def raw(command: Command) -> str:
    """The command as QEMU gets it."""
    return f"{command.execute} {json.dumps(dict(command.arguments))}"
