"""Persistent memory: a file or block device that the guest maps as an NVDIMM."""

from collections.abc import Iterator
from shlex import quote

from vmplug.drivers.disk_limits import check_limits
from vmplug.drivers.format import check_unstated
from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.finding import Code, Finding, Severity
from vmplug.host.kind import FoundBy

NVDIMM_OPTIONS = frozenset({"block-driver", "format", "fstype"})
"""The options of a disk that apply to an NVDIMM."""


PAGE_BYTES = 4096

NVDIMM_ALIGN_BYTES = 2 << 20
"""QEMU places NVDIMMs one after the other, and Linux maps them only at multiples of this.

Source: measured on QEMU 7.2 and Linux 6.1: after one of 3 MiB the next has no /dev/pmem.
"""


def is_pmem(device: DiskFile) -> bool:
    """Whether the request for a file was for persistent memory.

    The content never decides: a guest can write `NVDIMM_PFN_INFO` into its disk, and QEMU never
    releases an NVDIMM.
    """
    return device.found_by is FoundBy.BACKING_FILE


def check_nvdimm(
    device: BlockDevice | DiskFile, format_: str | None, *, read_only: bool = False
) -> Iterator[Finding]:
    """Reasons not to plug this as an NVDIMM."""
    if isinstance(device, BlockDevice):
        yield from check_limits(device, read_only=read_only)
    if format_ is None:
        yield from check_unstated(device)
    if format_ not in {None, "raw"}:
        yield Finding(
            Code.NOT_THAT_FORMAT,
            f"an NVDIMM shows the bytes of {device.host_path} as they are; format={format_} is "
            "not possible",
            f"set block-driver=virtio-blk; or convert it (qemu-img convert -f {format_} -O raw "
            "OLD NEW), and leave format out",
        )
    if device.size_bytes and device.size_bytes < PAGE_BYTES:
        yield Finding(
            Code.SIZE_ZERO,
            f"{device.host_path} has {device.size_bytes} bytes, less than a page of memory",
            "make its size a multiple of 2 MiB",
        )
    elif device.size_bytes and device.size_bytes % NVDIMM_ALIGN_BYTES:
        yield Finding(
            Code.NVDIMM_SIZE,
            f"{device.host_path} has {device.size_bytes} bytes, not a multiple of 2 MiB: the "
            "guest could not use the NVDIMMs after it",
            "make its size a multiple of 2 MiB, or attach it as a disk (block-driver=virtio-blk)",
        )
    if isinstance(device, DiskFile) and device.unallocated_bytes and not read_only:
        yield _sparse(device)
    if isinstance(device, DiskFile) and device.pfn is None:
        yield Finding(
            Code.NO_PFN_SIGNATURE,
            f"{device.host_path} has no NVDIMM_PFN_INFO block, so the guest cannot mount it with "
            "-o dax",
            "no action needed for a plain disk in memory; ndctl or pmem-csi write the block",
            Severity.WARNING,
        )


def _sparse(device: DiskFile) -> Finding:
    """A write that finds no room on the disk is a bus error: it ends QEMU, and so the VM."""
    free = device.free_bytes
    is_full = free is not None and free < device.unallocated_bytes
    state = f"its file system has {free} left" if is_full else "its file system may fill up"
    return Finding(
        Code.SPARSE_NVDIMM,
        f"{device.host_path} is sparse: {device.unallocated_bytes} bytes have no place on the "
        f"disk yet, and {state}; a write of the guest without one ends the whole VM",
        f"fallocate --length {device.size_bytes} {quote(device.host_path)}",
        Severity.ERROR if is_full else Severity.WARNING,
    )
