"""Unpacks the kernel in a bzImage, which an emulated CPU would take seconds for.

Source: Documentation/arch/x86/boot.rst, payload_offset and payload_length.
"""

import lzma
import struct
import subprocess
import sys
from pathlib import Path

_SECTOR_BYTES = 512
_SETUP_SECTORS, _PAYLOAD = 0x1F1, 0x248
_XZ, _ZSTD, _ELF = b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x7fELF"


def unpack_kernel(image: bytes) -> bytes:
    """The vmlinux inside; ValueError for what is compressed in another way."""
    setup_sectors = image[_SETUP_SECTORS] or 4
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    start = (setup_sectors + 1) * _SECTOR_BYTES + offset
    payload = image[start : start + length]
    if payload.startswith(_XZ):
        kernel = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(_ZSTD):
        # The last four bytes are the length, and no part of the stream.
        command = ["zstd", "--decompress", "--stdout"]
        kernel = subprocess.run(command, input=payload[:-4], stdout=-1, check=True).stdout
    else:
        raise ValueError(f"a kernel that begins with {payload[:6]!r}")
    if not kernel.startswith(_ELF):
        raise ValueError("what is inside is no ELF file")
    return kernel


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(unpack_kernel(Path(sys.argv[1]).read_bytes()))
