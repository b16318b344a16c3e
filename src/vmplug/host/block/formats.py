"""Image formats by their content, as the drivers of QEMU recognise theirs.

Only a hint: a guest can write any of this into its raw disk. So it may stop a request that states
no format, and never chooses one.
Source: QEMU block/*.c, the functions `bdrv_probe`; VHD and UDIF specifications for the footers.
"""

import re
import struct
from enum import StrEnum

HEAD_BYTES = 2048
TAIL_BYTES = 512

LUKS = "luks"


class ImageFormat(StrEnum):
    """Formats that a request may state, as QEMU's block drivers call them."""

    RAW = "raw"
    QCOW2 = "qcow2"


_VMDK_TEXT = re.compile(rb"(#[^\n]*\n| *\r?\n)*version=[123]\r?\n")
_VMDK_TITLE = re.compile(rb"(\xef\xbb\xbf)?\s*# Disk DescriptorFile\s", re.IGNORECASE)
"""How VMware begins every descriptor; QEMU does not probe all of them."""
_CLOOP = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
_BOCHS = b"Bochs Virtual HD Image\0"
_MAGICS = (
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, struct.pack("<Q", 0xCAFEBABE), "vmdk"),  # SESparse, behind a descriptor
    (0, b"QED\0", "qed"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"LUKS\xba\xbe", LUKS),
    (0, _BOCHS, "bochs"),
    (0, _CLOOP, "cloop"),
    (64, struct.pack("<I", 0xBEDA107F), "vdi"),
)


def find_format(head: bytes, tail: bytes = b"", name: str = "") -> str | None:
    """QEMU's name of the format of a file with these first and last bytes; None for raw.

    `name` is that of a file: QEMU knows a dmg image by it.
    """
    if head.startswith(b"QFI\xfb"):
        return "qcow" if head[4:8] == b"\0\0\0\1" else ImageFormat.QCOW2
    for offset, magic, format_ in _MAGICS:
        if head.startswith(magic, offset):
            return format_
    if _VMDK_TEXT.match(head) or _VMDK_TITLE.match(head):
        return "vmdk"
    if b"conectix" in {tail[:8], tail[1:9]}:  # Virtual PC before 2004 had a footer of 511 bytes
        return "vpc"
    if tail.startswith(b"koly") or name.endswith(".dmg"):
        return "dmg"
    return None
