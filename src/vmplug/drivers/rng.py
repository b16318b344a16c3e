"""Random numbers for the guest, from a source of the host."""

from collections.abc import Collection, Iterator, Mapping
from typing import Self

import msgspec

from vmplug.devnum import DevNum
from vmplug.drivers.free_places import virtio_place
from vmplug.drivers.options import Option, number, parse_options
from vmplug.drivers.place import Place, Places
from vmplug.drivers.plug import RNGDevice
from vmplug.drivers.ports import NewPlug
from vmplug.errors import SpecError
from vmplug.host.device import EntropySource, HostDevice
from vmplug.host.finding import Code, Finding

OPTIONS: Mapping[str, Option] = {
    "max-bytes": Option(
        "max_bytes", number(1, 1 << 40), "bytes in each period; default: no limit"
    ),
    "period": Option("period_ms", number(1, 1 << 31), "milliseconds; default 1000"),
}
PERIOD_MS = 1000
_RANDOM = {DevNum(1, 8), DevNum(1, 9), DevNum(10, 183)}
"""/dev/random, /dev/urandom, /dev/hwrng. Source: Documentation/admin-guide/devices.txt."""


class RngDriver(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a random number device, checked; without `max_bytes` there is no limit."""

    max_bytes: int | None = None
    period_ms: int | None = None

    @property
    def share_rw(self) -> bool:
        """Always true: a source can be shared."""
        return True

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> Self:
        """The options by their names in `OPTIONS`; SpecError names the one that is wrong."""
        parsed = cls(**parse_options(options, OPTIONS, "a random number device"))
        if parsed.period_ms and not parsed.max_bytes:
            raise SpecError("option period", "has no effect without max-bytes")
        return parsed

    def check(self, device: HostDevice, *, read_only: bool) -> Iterator[Finding]:  # noqa: ARG002
        """See Driver: QEMU reads whatever the node gives it, and some drivers act on a read."""
        number = device.devnum if isinstance(device, EntropySource) else None
        if number is not None and number not in _RANDOM:
            yield Finding(
                Code.NOT_RANDOM,
                f"{device.host_path} is char device {number}, which is not a source of random "
                "numbers of the kernel's",
                "name /dev/urandom, /dev/random or /dev/hwrng; a policy can name another device "
                "(docs/security.md)",
            )

    def choose_place(
        self,
        device: HostDevice,  # noqa: ARG002  one is as good as another
        offer: Places,
        taken: Collection[str],
    ) -> Place:
        """See Driver."""
        return virtio_place(offer, taken, "a random number device")

    def plan(self, new: NewPlug, place: Place, offer: Places) -> RNGDevice:  # noqa: ARG002
        """See Driver."""
        limit = self.max_bytes
        return RNGDevice(
            id=new.id,
            filename=new.device.host_path,
            file_id=new.device.file_id if isinstance(new.device, EntropySource) else None,
            max_bytes=limit,
            period_ms=(self.period_ms or PERIOD_MS) if limit else None,
        )
