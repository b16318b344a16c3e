"""The format of a disk: what the request states, against what is in the file or device."""

from collections.abc import Iterator

from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.block.formats import LUKS, ImageFormat
from vmplug.host.finding import Code, Finding, Severity


def check_format(
    device: BlockDevice | DiskFile, stated: ImageFormat | None, *, read_only: bool
) -> Iterator[Finding]:
    """Reasons not to plug this disk in the stated format, or as raw where none is stated.

    Only a request without a format depends on the content: a guest may have written it. A format
    is refused, never chosen.
    """
    if stated is None:
        yield from check_unstated(device, may_be_qcow2=isinstance(device, DiskFile))
    elif isinstance(device, BlockDevice):
        if stated is ImageFormat.QCOW2:
            yield Finding(
                Code.NOT_THAT_FORMAT,
                f"{device.host_path} is a block device; format=qcow2 is for regular files",
                "hand it over as raw",
            )
    elif stated is ImageFormat.QCOW2:
        yield from _check_qcow2(device, read_only=read_only)


def opens_others(device: DiskFile) -> bool:
    """Whether QEMU would open other files that the image's header names."""
    return device.qcow2 is not None and bool(
        device.qcow2.backing_file or device.qcow2.external_data
    )


def check_unstated(
    device: BlockDevice | DiskFile, *, may_be_qcow2: bool = False
) -> Iterator[Finding]:
    """Reasons not to plug this as raw; `may_be_qcow2`: the request could state that format."""
    if found := device.looks_like:
        yield Finding(
            Code.FORMAT_NOT_STATED,
            f"{device.host_path} looks like a {found} image, but no format is set",
            _remedy(found, may_be_qcow2=may_be_qcow2)
            + "set format=raw if the guest should see the bytes as they are",
        )
    if isinstance(device, BlockDevice) and device.is_silent:
        yield Finding(
            Code.UNREADABLE,
            f"{device.host_path} does not answer: QEMU would wait for it, with the whole VM",
            "check its storage (dmesg, multipath -ll)",
            Severity.WARNING,
        )


def _remedy(found: str, *, may_be_qcow2: bool) -> str:
    if found == ImageFormat.QCOW2 and may_be_qcow2:
        return "set format=qcow2, or "
    if found == LUKS:
        return "open it on the host (cryptsetup open), or, for a guest that unlocks it, "
    return f"convert it (qemu-img convert -f {found} -O raw OLD NEW), or "


def _check_qcow2(device: DiskFile, *, read_only: bool) -> Iterator[Finding]:
    for fault in device.faults:
        is_harmless = fault.only_for_writing and (read_only or fault.file is not None)
        which = f"needs {fault.file}, which " if fault.file else ""
        yield Finding(
            Code.UNUSABLE_IMAGE,
            f"{device.host_path} {which}{fault.what}",
            fault.remedy,
            Severity.WARNING if is_harmless else Severity.ERROR,
        )
    header = device.qcow2
    if header is None and not device.faults:
        yield Finding(
            Code.NOT_THAT_FORMAT,
            f"{device.host_path} is not a qcow2 image",
            "set format=raw, or name the right file (qemu-img info shows the format)",
        )
    if header and opens_others(device):
        others = [header.backing_file] if header.backing_file else []
        others += ["its external data file"] * header.external_data
        yield Finding(
            Code.HAS_BACKING_FILE,
            f"{device.host_path} makes QEMU open another file: {' and '.join(others)}",
            "flatten it (qemu-img convert -O qcow2 OLD NEW), or allow this finding if you made "
            "the image yourself",
        )
