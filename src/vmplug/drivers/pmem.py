"""Persistent memory: a file or block device that the guest maps as an NVDIMM."""

from collections.abc import Iterator

from vmplug.drivers.disk_limits import check_limits
from vmplug.drivers.format import check_format
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
        yield from check_format(device, None, read_only=False)
    if format_ not in {None, "raw"}:
        yield Finding(
            Code.NOT_THAT_FORMAT,
            f"an NVDIMM shows the bytes of {device.host_path} as they are; format={format_} is "
            "not possible",
            "leave format out, or set block-driver=virtio-blk",
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
    if isinstance(device, DiskFile) and device.pfn is None:
        yield Finding(
            Code.NO_PFN_SIGNATURE,
            f"{device.host_path} has no NVDIMM_PFN_INFO block, so the guest cannot mount it with "
            "-o dax",
            "no action needed for a plain disk in memory; ndctl or pmem-csi write the block",
            Severity.WARNING,
        )
