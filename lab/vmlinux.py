"""Unpacks the kernel of a bzImage, which takes an emulated CPU seconds: `vmlinux.py IN OUT`.

Source: Documentation/x86/boot.rst, payload_offset and payload_length.
"""

import lzma
import struct
import subprocess
import sys
from pathlib import Path

SECTOR_BYTES = 512
SETUP_SECTORS, PAYLOAD = 0x1F1, 0x248
"""Offsets of a byte, and of an offset and a length."""
XZ, ZSTD, ELF = b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x7fELF"
LENGTH_BYTES = 4
"""The kernel's own length, which follows the compressed stream and is not part of it."""


def unpack_kernel(image: bytes) -> bytes:
    """The vmlinux in a bzImage. ValueError when it is compressed in another way than Debian's."""
    setup_sectors = image[SETUP_SECTORS] or 4
    offset, length = struct.unpack_from("<II", image, PAYLOAD)
    start = (setup_sectors + 1) * SECTOR_BYTES + offset
    payload = image[start : start + length]
    if payload.startswith(XZ):
        kernel = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(ZSTD):
        command = ["zstd", "--decompress", "--stdout", "--quiet"]
        stream = payload[:-LENGTH_BYTES]
        kernel = subprocess.run(command, input=stream, check=True, capture_output=True).stdout
    else:
        raise ValueError(f"neither xz nor zstd: a kernel that begins with {payload[:6].hex()}")
    if not kernel.startswith(ELF):
        raise ValueError("what is in the bzImage is not an ELF file")
    return kernel


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(unpack_kernel(Path(sys.argv[1]).read_bytes()))
