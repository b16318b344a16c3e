"""The files that an image of a VM makes its QEMU open: the VM has them too.

Its header names them: the guest's data may be in one of them, and backing files are only read. The
journal has them from the time of the plug: the header may be out of reach later.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from vmplug.errors import HostError
from vmplug.host.kind import Identity, IdentityKind
from vmplug.host.root import HostRoot
from vmplug.host.use.claim import Claim
from vmplug.host.use.file_handle import identify_file
from vmplug.journal.records import DeviceRecord, HeldFile

if TYPE_CHECKING:
    from vmplug.host.block.qcow2 import ImageFile


def find_things(identities: Iterable[Identity], host: HostRoot) -> list[str]:
    """What each file among the identities is, whatever its names are."""
    paths = (one.key for one in identities if one.kind is IdentityKind.FILE)
    return list(filter(None, (identify_file(path, host) for path in paths)))


def list_files(image: "ImageFile | None", *, reads: bool = False) -> Iterator[HeldFile]:
    """The files that QEMU opens besides the image; `reads`: it writes to none of them."""
    if image is None:
        return
    for file, only_read in ((image.data_file, reads), (image.backing, True)):
        if file:
            yield HeldFile(file.identity, file.thing, only_read)
            yield from list_files(file, reads=only_read)


class ImageClaims:
    """The claims of VMs on those files.

    Where the journal does not have them, the header is read, once, as QEMU opens it once. That of
    an image that has been replaced under its name says nothing: the VM does not have it. What it
    has instead is known by QEMU's locks alone.
    """

    def __init__(self, host: HostRoot) -> None:
        self._host = host
        self._known: dict[str, tuple[HeldFile, ...]] = {}

    def of(self, record: DeviceRecord) -> list[Claim]:
        """Those of one device; none for other disks, and images that cannot be read."""
        return [_claim(record, file) for file in self._files(record)]

    def on(
        self, record: DeviceRecord, names: Collection[str], things: Collection[str]
    ) -> list[Claim]:
        """Those on what has one of these names, or is one of these things."""
        return [
            _claim(record, file)
            for file in self._files(record)
            if str(file.identity) in names or file.thing in things
        ]

    def _files(self, record: DeviceRecord) -> tuple[HeldFile, ...]:
        if record.files is not None:
            return record.files
        if record.options.get("format") != "qcow2":
            return ()
        if record.id not in self._known:
            from vmplug.host.block.qcow2 import read_image  # noqa: PLC0415  1.5 ms

            try:
                if record.is_other(identify_file(record.host_path, self._host)):
                    return ()
                image = read_image(record.host_path, self._host)
            except (HostError, ValueError):
                return ()
            self._known[record.id] = tuple(list_files(image))
        return self._known[record.id]


def _claim(record: DeviceRecord, file: HeldFile) -> Claim:
    return Claim(
        vm=record.vm,
        identity=file.identity,
        read_only=record.read_only or file.only_read,
        share_rw=record.share_rw,
    )
