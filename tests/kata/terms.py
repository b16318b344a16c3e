"""QMP commands and command lines in terms that Kata's and ours share.

Names of parts are numbered by their kind ("node 1"), what is drawn has a word, numbers and
switches are text, and what only repeats QEMU's own default is left out, as if it were not said.
Source: QEMU 7.2, qemu(1); `-device MODEL,help`; qapi/qom.json, qapi/net.json.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vmplug.drivers.ports import Command

Terms = list[list[Any]]
"""Commands or options in turn, each with what is said with it."""

_KIND_OF_ID = {
    "blockdev-add": "node",
    "blockdev-del": "node",
    "object-add": "object",
    "object-del": "object",
    "chardev-add": "chardev",
    "chardev-remove": "chardev",
    "netdev_add": "netdev",
    "netdev_del": "netdev",
    "device_add": "device",
    "device_del": "device",
    "-drive": "node",
    "-object": "object",
    "-chardev": "chardev",
    "-netdev": "netdev",
    "-fsdev": "fsdev",
}
_KIND_OF_KEY = {
    "drive": "node",
    "chardev": "chardev",
    "netdev": "netdev",
    "memdev": "object",
    "rng": "object",
    "iothread": "object",
    "fsdev": "fsdev",
    "iommufd": "object",
}
_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    "rng-random": {"filename": "/dev/urandom"},
    "memory-backend-file": {"share": "off", "readonly": "off", "pmem": "off"},
    "nvdimm": {"unarmed": "off"},
    "virtio-blk": {
        "config-wce": "on",
        "write-cache": "on",
        "discard": "on",
        "share-rw": "off",
        "logical_block_size": "512",
        "physical_block_size": "512",
    },
    "scsi-hd": {
        "channel": "0",
        "write-cache": "on",
        "share-rw": "off",
        "logical_block_size": "512",
        "physical_block_size": "512",
    },
    "vhost-user-blk": {"num-queues": "1"},
    "vhost-user-scsi": {"num_queues": "1"},
    "virtio-net": {"mq": "off"},
    "vhost-user": {"queues": "1"},
    "local": {"readonly": "off"},
    "vfio": {"addr": "00"},
    "-drive": {"readonly": "off", "cache": "writeback", "discard": "ignore", "if": "none"},
}
"""By model. Left alone, a disk has the write cache of its node and the blocks of its file, of 512
bytes here, and a backend's device has a queue for each CPU, of which there is one; a port has one
slot only; no drive of Kata's has another interface than none."""

_FIRST_KEY = {
    "-device": "driver",
    "-object": "qom-type",
    "-chardev": "backend",
    "-fsdev": "fsdriver",
}
_DRAWN_MAC = "52:54:00:"
_PLACE = {"bus", "addr", "slot"}
_UNITS = {"K": 10, "M": 20, "G": 30}


def commands(said: Iterable[Command | Mapping[str, Any] | str]) -> Terms:
    """QMP commands in order; Kata's are JSON objects, or texts such as `device_del {...}`."""
    terms = []
    for command in said:
        match command:
            case Command():
                name, arguments = command.execute, command.arguments
            case str():
                name, _, text = command.partition(" ")
                arguments = json.loads(text)
            case _:
                name, arguments = command["execute"], command["arguments"]
        terms.append([name, _plain(arguments)])
    for _, arguments in terms:
        if "addr" in arguments:
            arguments["addr"] = f"{int(arguments['addr'], 16):02x}"
    return _numbered(terms)


def command_line(arguments: Sequence[str]) -> Terms:
    """Options by their names, whatever their order.

    Where a PCI device sits and what a front end is called Kata mostly leaves to QEMU, so neither
    is in the terms. `-set` speaks of the option with that name.
    """
    terms: Terms = []
    by_name: dict[tuple[str, str], dict[str, Any]] = {}
    for word, text in zip(arguments[::2], arguments[1::2], strict=True):
        if word == "-set":
            group, name, assignment = text.split(".", 2)
            key, _, value = assignment.partition("=")
            by_name[f"-{group}", name][key] = value
        else:
            option, facts = _read_option(word, text)
            by_name[option, facts.get("id", "")] = facts
            terms.append([option, facts])
    for option, facts in terms:
        if option == "-device":
            for key in {"id", *_PLACE} & facts.keys():
                del facts[key]
    return _numbered(sorted(terms, key=lambda term: str(term[0])))


def _read_option(option: str, text: str) -> tuple[str, dict[str, Any]]:
    if text.startswith("{"):
        facts = json.loads(text)
        return ("-drive", _drive(facts)) if option == "-blockdev" else (option, _plain(facts))
    facts = {}
    for index, word in enumerate(text.split(",")):
        key, equals, value = word.partition("=")
        if not index and not equals and option in _FIRST_KEY:
            key, value = _FIRST_KEY[option], word
        elif not equals:
            value = "on"
        facts[key] = value
    return option, _plain(facts)


def _drive(node: Mapping[str, Any]) -> dict[str, Any]:
    """A node of ours in the words of `-drive`; both its layers say the same."""
    file = node["file"]
    assert file["driver"] in {"file", "host_device"}
    for key in ("read-only", "cache", "discard"):
        assert node[key] == file[key]
    cache = {(False, False): "writeback", (True, False): "none", (False, True): "unsafe"}
    return {
        "id": node["node-name"],
        "file": file["filename"],
        "aio": file["aio"],
        "format": node["driver"],
        "readonly": _plain(node["read-only"]),
        "cache": cache[node["cache"]["direct"], node["cache"]["no-flush"]],
        "discard": node["discard"],
    }


def _plain(value: Any) -> Any:
    """Numbers and switches as text, as they may be written either way."""
    match value:
        case Mapping():
            return {key: _plain(inner) for key, inner in value.items()}
        case bool():
            return "on" if value else "off"
        case "true" | "false":
            return "on" if value == "true" else "off"
        case str() if size := re.fullmatch(r"(\d+)([KMG])", value):
            return str(int(size[1]) << _UNITS[size[2]])
        case _:
            return str(value)


def _numbered(terms: Terms) -> Terms:
    """The terms with numbers for names, and without defaults."""
    numbers: dict[tuple[str, str], str] = {}

    def number(kind: str, name: str) -> str:
        known = [named for named in numbers if named[0] == kind]
        return numbers.setdefault((kind, name), f"{kind} {len(known) + 1}")

    for option, facts in terms:
        _name_drawn(facts)
        for key in {"id", "node-name"} & facts.keys():
            facts[key] = number(_KIND_OF_ID[option], facts[key])
    for option, facts in terms:
        for key in _KIND_OF_KEY.keys() & facts.keys():
            facts[key] = number(_KIND_OF_KEY[key], facts[key])
        defaults = _defaults(option, facts)
        for key in [key for key, value in facts.items() if defaults.get(key) == value]:
            del facts[key]
    return terms


def _name_drawn(facts: dict[str, Any]) -> None:
    if re.fullmatch(r"[0-9a-f]{16}", facts.get("serial", "")):
        facts["serial"] = "ID"
    if facts.get("mac", "").startswith(_DRAWN_MAC):
        facts["mac"] = f"{_DRAWN_MAC}..."


def _defaults(option: str, facts: Mapping[str, Any]) -> Mapping[str, str]:
    if option == "-drive":
        return _DEFAULTS[option]
    words = (facts.get(key) for key in ("driver", "qom-type", "fsdriver", "type"))
    model = next((word for word in words if word), "")
    bare = re.sub(r"-(pci|ccw|device)\Z", "", model)
    modern = {"disable-modern": "off"} if model.endswith("-pci") else {}
    return {**_DEFAULTS.get(bare, {}), **modern}
