"""A program that uses a function by VFIO and shows it in no descriptor: HOW NODE BDF.

It opens the function by the node of its group, or by its own (`cdev`), and leaves a child that has
it `mapped`, or `sent` to a socket that nobody reads, and no descriptor of it. It prints the child.
Source: include/uapi/linux/vfio.h.
"""

import ctypes
import fcntl
import mmap
import os
import signal
import socket
import struct
import sys

_SET_CONTAINER, _SET_IOMMU, _GET_DEVICE, _REGION_INFO, _BIND = (
    0x3B68,
    0x3B66,
    0x3B6A,
    0x3B6C,
    0x3B76,
)
_TYPE1 = 1


def opened_by_group(node: str, bdf: str) -> tuple[int, list[int]]:
    """The function, and what may be closed before it."""
    container, group = os.open("/dev/vfio/vfio", os.O_RDWR), os.open(node, os.O_RDWR)
    fcntl.ioctl(group, _SET_CONTAINER, struct.pack("i", container))
    fcntl.ioctl(container, _SET_IOMMU, _TYPE1)
    device = fcntl.ioctl(group, _GET_DEVICE, bytearray(bdf.encode() + b"\0"))
    return device, [container, group]


def opened_by_cdev(node: str) -> tuple[int, list[int]]:
    """The same by its own node."""
    device, iommufd = os.open(node, os.O_RDWR), os.open("/dev/iommu", os.O_RDWR)
    fcntl.ioctl(device, _BIND, bytearray(struct.pack("IIiI", 16, 0, iommufd, 0)))
    return device, [iommufd]


def map_region(device: int) -> None:
    """Map a page of the first region; mmap of Python would keep a descriptor of its own."""
    info = bytearray(struct.pack("IIIIQQ", 32, 0, 0, 0, 0, 0))
    fcntl.ioctl(device, _REGION_INFO, info)
    offset = struct.unpack("IIIIQQ", info)[5]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    found = libc.mmap(None, mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_SHARED, device, offset)
    assert found not in {None, ctypes.c_void_p(-1).value}, ctypes.get_errno()


def main() -> None:
    how, node, bdf = sys.argv[1:]
    if os.fork():
        os.wait()  # until its own parent has said that it is ready
        return
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        os.read(reading, 1)
        os.write(1, b"%d\n" % child)
        os._exit(0)
    os.setsid()
    is_cdev = node.startswith("/dev/vfio/devices/")
    device, others = opened_by_cdev(node) if is_cdev else opened_by_group(node, bdf)
    ends = socket.socketpair()
    if how == "mapped":
        map_region(device)
    else:
        socket.send_fds(ends[0], [b"x"], [device])
    for descriptor in (device, *others):
        os.close(descriptor)
    os.write(writing, b"1")
    os.close(1)
    os.close(2)
    signal.pause()


if __name__ == "__main__":
    main()
