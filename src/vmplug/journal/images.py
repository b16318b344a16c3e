"""The files that an image of a VM makes its QEMU open: the VM has them too.

The journal has only the image itself. Its header names the others: the guest's data may be in one
of them, and backing files are only read.
"""

from collections.abc import Iterable, Iterator

from vmplug.errors import HostError
from vmplug.host.block.formats import ImageFormat
from vmplug.host.block.qcow2 import ImageFile, read_image
from vmplug.host.check.thing import identify_file
from vmplug.host.finding import Claim
from vmplug.host.kind import Identity, IdentityKind
from vmplug.host.root import HostRoot
from vmplug.journal.records import DeviceRecord


def find_files(identities: Iterable[Identity], host: HostRoot) -> list[str]:
    """The files among the identities, by what each is whatever its names are."""
    paths = (one.key for one in identities if one.kind is IdentityKind.FILE)
    return list(filter(None, (identify_file(path, host) for path in paths)))


class ImageClaims:
    """The claims of VMs on those files; each image is read once, as QEMU opens it once.

    Not those of an image that has been replaced under its name: the VM does not have it. What it
    has instead is known by QEMU's locks alone.
    """

    def __init__(self, host: HostRoot) -> None:
        self._host = host
        self._known: dict[str, tuple[Claim, ...]] = {}

    def of(self, record: DeviceRecord) -> tuple[Claim, ...]:
        """Those of one device; none for other disks, and images that cannot be read."""
        if record.options.get("format") != ImageFormat.QCOW2:
            return ()
        if record.id not in self._known:
            try:
                if record.is_other(identify_file(record.host_path, self._host)):
                    return ()
                image = read_image(record.host_path, self._host)
            except (HostError, ValueError):
                return ()
            self._known[record.id] = tuple(_claims(image, record))
        return self._known[record.id]


def _claims(image: ImageFile, record: DeviceRecord, *, reads: bool = False) -> Iterator[Claim]:
    for file, only_read in ((image.data_file, reads), (image.backing, True)):
        if file:
            yield Claim(
                vm=record.vm,
                identity=file.identity,
                read_only=record.read_only or only_read,
                share_rw=record.share_rw,
            )
            yield from _claims(file, record, reads=only_read)
