"""`--device` and BUNDLE: a device in the words of people, as a request.

A device is named by its path, as everywhere else, by its number, or by a word for what it becomes
in the guest (`file:`, `share:`). `:ro` at the end always asks for it read-only. What follows a
name is never guessed: vmplug refuses every other word, as a disk that is writable by mistake is
lost data.

msgspec, and what is made with it, are imported where they are used: it costs 9 ms.
"""

import os
import re
import stat
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmplug.devnum import DevNum
from vmplug.errors import DeviceError, NoSuchDevice, SpecError
from vmplug.host.root import THIS_HOST, HostRoot, describe, node_number
from vmplug.host.use.silent import find_silent, require_answer
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.limits import check_path

if TYPE_CHECKING:
    from vmplug.oci.requests import Request

_READ_ONLY = ":ro"
_NAMED = frozenset({"net", "share", "rng", "vfio"})
_NEVER_READ_ONLY = frozenset({"net", "vfio"})
_WORDS = "b, c, file, nvdimm, vfio, net, share, rng, a CDI name such as vendor.com/gpu=gpu0"
_REMEDY = "write /dev/sdb, b:8:16, file:/images/a.img, each also with :/dev/xvda and :ro"
_MISTAKEN_MODE = r"(?a::(?![0-9a-f]{2}:)\s*(?:[A-Za-z][A-Za-z0-9_,=-]{0,9})?\s*(?=:|\Z))"
"""Nothing or a short word after a colon of a container path, as `:rw`, `:RO` and `:read-only`.

No part of a name below /dev/disk/by-path is one: `pci-0000:af:00.0-nvme-1`.
"""
_OWN_DESCRIPTORS = ("/dev/fd/", "/dev/std", "/proc/self/fd/")


def parse_device(text: str, host: HostRoot = THIS_HOST) -> "Request":
    """`/dev/sdb:/dev/xvda:ro`, `b:7:0` (/dev/block/7:0), `file:/a.img:/dev/xvda`, `net:/s.sock`.

    Only a path is looked for on the host. Raises SpecError for words that name no device, and
    NoSuchDevice or AttributeReadError for a path that leads to none.
    """
    said = text.removesuffix(_READ_ONLY)
    read_only = said != text
    kind, _, rest = said.partition(":")
    if text.startswith("/"):
        request: Request = _parse_path(said, host)
    elif kind in {"file", "nvdimm"}:
        request = _parse_image(text, rest, pmem=kind == "nvdimm")
    elif kind in _NAMED:
        request = _parse_named(text, kind, rest)
    else:
        request = _parse_number(text, kind, rest)
    if not read_only:
        return request
    if kind in _NEVER_READ_ONLY:
        raise SpecError(f"--device {text}", "such a device cannot be read-only", hint="omit :ro")
    return request_read_only(request)


def names_cdi_device(text: str) -> bool:
    """Whether it is meant as a CDI name: `vendor.com/class=name`."""
    kind, equals, _ = text.partition("=")
    return bool(equals) and "/" in kind and ":" not in kind and text[0] not in "/."


def parse_cdi_names(texts: Iterable[str]) -> dict[str, bool]:
    """The CDI names, and whether each is wanted read-only: `vendor.com/class=name:ro`."""
    wanted = dict[str, bool]()
    for text in texts:
        name = text.removesuffix(_READ_ONLY)
        wanted[name] = wanted.get(name, False) or name != text
    return wanted


def request_read_only(request: "Request") -> "Request":
    """The same request, for reading; what cannot be read-only stays as it is."""
    if isinstance(request, DeviceInfo):
        return request._replace(read_only=True)
    if not request.name.startswith("share:"):
        return request
    from msgspec import structs  # noqa: PLC0415  9 ms, but `request` was made with it

    return structs.replace(request, read_only=True)


def names_device(text: str, host: HostRoot) -> bool:
    """Whether a BUNDLE is a device instead: a node, an absent name below /dev, or a CDI name.

    Nothing reads a node as a config.json, but the standard input and what a shell opened for it.
    """
    if text.startswith(_OWN_DESCRIPTORS) or find_silent([text], THIS_HOST):
        return False  # reading it as a bundle says so
    if names_cdi_device(text):
        return THIS_HOST.stat_or_none(text) is None
    if not text.startswith("/"):
        return _is_node(THIS_HOST.stat_or_none(text))
    try:
        status = _longest_path(text.removesuffix(_READ_ONLY), host)[1]
    except DeviceError:  # reading it as a bundle says why
        return False
    if status is not None:
        return _is_node(status)
    return text.startswith("/dev/") and THIS_HOST.stat_or_none(text) is None


def _is_node(status: os.stat_result | None) -> bool:
    return status is not None and (stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode))


def _parse_path(said: str, host: HostRoot) -> DeviceInfo:
    """`/dev/sdb`, or `/dev/sdb:/dev/xvda`: the node that is there, by its number."""
    path, status = _longest_path(said, host)
    if status is None:
        path = said.partition(":/")[0]
        real = host.real_path(path)
        leads = "" if real == path else f" leads to {real}, which"
        raise NoSuchDevice(
            path,
            f"{path}{leads} does not exist on this host",
            hint="vmplug host lists what this host has",
        )
    container_path = _container_path(f"--device {said}", said.removeprefix(path)) or path
    if not _is_node(status):
        raise NoSuchDevice(
            path,
            f"{path} is not a device: found {describe(status)}",
            found=describe(status),
            hint=_OTHER_WORDS.get(stat.S_IFMT(status.st_mode), "name a device").format(path=path),
        )
    return DeviceInfo(
        container_path=container_path,
        dev_type=DevType.BLOCK if stat.S_ISBLK(status.st_mode) else DevType.CHAR,
        devnum=node_number(status),
    )


_OTHER_WORDS = {
    stat.S_IFREG: "write file:{path} to make a disk of a file",
    stat.S_IFDIR: "write share:{path}:TAG for a share",
    stat.S_IFSOCK: "write net:{path} for a vhost-user network, share:{path}:TAG for a virtiofsd",
}


def _longest_path(said: str, host: HostRoot) -> tuple[str, os.stat_result | None]:
    """The longest part before a colon that exists, as names in /dev may have colons too."""
    check_path("--device", said)
    require_answer(said.partition(":")[0], host)
    path = said
    while (status := host.stat(host.real_path(path))) is None and ":" in path:
        path = path.rpartition(":")[0]
    return path, status


def _container_path(where: str, rest: str) -> str | None:
    """The path in the container out of what follows the device; None where there is nothing."""
    if not rest:
        return None
    if not rest.startswith(":/") or re.search(_MISTAKEN_MODE, rest[1:]):
        raise SpecError(
            where,
            f"{rest!r} is neither a path in the container nor :ro",
            hint="after the device write nothing, :/dev/xvda, :ro or :/dev/xvda:ro; "
            "without :ro the device is writable",
        )
    return rest[1:]


def _parse_number(text: str, kind: str, rest: str) -> DeviceInfo:
    """`b:7:0` or `b:7:0:/dev/xvda`."""
    number = re.match(r"[^:]*(?::[^:]*)?", rest)
    assert number
    try:
        dev_type, devnum = DevType(kind), DevNum.parse(number[0])
    except ValueError as error:
        is_type = kind in {"b", "c", "u"}
        why = str(error) if is_type else f"{kind!r} is not {_WORDS}, or a path that begins with /"
        raise SpecError(f"--device {text}", why, hint=_REMEDY) from None
    path = _container_path(f"--device {text}", rest[number.end() :])
    directory = "/dev/block" if dev_type is DevType.BLOCK else "/dev/char"
    return DeviceInfo(
        container_path=path or f"{directory}/{devnum}", dev_type=dev_type, devnum=devnum
    )


def _parse_image(text: str, rest: str, *, pmem: bool) -> DeviceInfo:
    """`/a.img:/dev/xvda`; without a path it is the image's name below /dev."""
    image, colon, path = rest.rpartition(":/")
    if not colon:
        image, path = rest, f"dev/{os.path.basename(rest)}"
    else:
        _container_path(f"--device {text}", f":/{path}")
    if not image:
        kind = "nvdimm" if pmem else "file"
        hint = f"write {kind}:/images/a.img"
        raise SpecError(f"--device {text}", "no image is named", hint=hint)
    return DeviceInfo(
        container_path=f"/{path}",
        dev_type=DevType.BLOCK,
        host_path=os.path.abspath(image),
        pmem=pmem,
    )


def _parse_named(text: str, kind: str, rest: str) -> "Request":
    """What OCI has no word for: `net:/s.sock`, `share:/srv/work:work`, `rng`."""
    from vmplug.address import Bdf  # noqa: PLC0415  msgspec: 9 ms
    from vmplug.oci.requests import (  # noqa: PLC0415  msgspec: 9 ms
        DEFAULT_SOURCE,
        DESCRIPTOR_PREFIX,
        NetInfo,
        RngInfo,
        ShareInfo,
        VfioInfo,
    )

    if kind == "vfio":
        try:
            device = str(Bdf.parse_written(rest))
        except ValueError:  # a UUID, a node, or a mistake that resolving explains
            device = rest
        return VfioInfo(label=device.replace("/", "-").strip("-") or "-", device=device)
    if kind == "rng":
        return RngInfo(source=os.path.abspath(rest or DEFAULT_SOURCE))
    if kind == "net" and os.path.basename(rest):
        label = os.path.basename(rest).removesuffix(".sock").lstrip(".") or "net0"
        return NetInfo(label=label, socket_path=os.path.abspath(rest))
    source, colon, tag = rest.rpartition(":")
    if not (kind == "share" and colon and source and tag):
        hint = "write net:/run/vpp/eth0.sock" if kind == "net" else "write share:/srv/work:work"
        raise SpecError(f"--device {text}", "is not complete", hint=hint)
    is_descriptor = source.startswith(DESCRIPTOR_PREFIX)
    return ShareInfo(tag=tag, source=source if is_descriptor else os.path.abspath(source))
