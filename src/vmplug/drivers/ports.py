"""The ports: what the manager asks of a driver, and of a VM."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vmplug.drivers.place import Offer, Place
from vmplug.drivers.plug import Plug
from vmplug.host.device import HostDevice
from vmplug.host.finding import Finding


@dataclass(frozen=True, slots=True)
class Command:
    """One QMP command; `arguments` are its JSON object.

    `descriptor` goes along with it. `backend` is the process that QEMU waits for in it, with a
    deadline of its own. START_DAEMON, END_DAEMON, BIND and UNBIND are done by vmplug itself.
    """

    execute: str
    arguments: Mapping[str, Any]
    descriptor: int | None = None
    backend: str | None = None


START_DAEMON, END_DAEMON = "start-daemon", "end-daemon"
BIND, UNBIND = "bind", "unbind"


@dataclass(frozen=True, slots=True)
class Step:
    """A command, and the one that takes it back; None when nothing does."""

    do: Command
    undo: Command | None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a VM is reached: its QMP socket, and its process.

    `pid` may be that of a launcher that made the socket, and is None if nothing is known.
    """

    qmp_socket: str
    pid: int | None


class PlugDriver(Protocol):
    """How one device is to be plugged: its options, checked.

    `share_rw` says that others may write to it at the same time.
    """

    @property
    def share_rw(self) -> bool:
        """Whether others may write to it too."""

    def check(self, device: HostDevice, *, read_only: bool) -> Iterator[Finding]:
        """What speaks against plugging this device so."""

    def choose_place(self, device: HostDevice, offer: Offer, taken: Collection[str]) -> Place:
        """A free place that is not among the taken ones, which are places as text.

        Raises NoFreePort, and CannotPlug when the VM never has one.
        """

    def plan(self, new: "NewPlug", place: Place, offer: Offer) -> Plug:
        """What to plug there. Raises SpecError when the options do not fit the place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPlug:
    """A device that is to be plugged, under the id that it has from now on."""

    id: str
    device: HostDevice
    read_only: bool


class Hypervisor(Protocol):
    """What the manager needs of a VM. Every wait has a deadline.

    `endpoint` is None for a VM that no other process can reach. Raises HypervisorError and its
    kinds.
    """

    @property
    def endpoint(self) -> Endpoint | None:
        """Where another process finds this VM."""

    def offer(self) -> Offer:
        """What the VM has to plug into now."""

    def claim_foreign_names(self, names: Mapping[str, str]) -> None:
        """Names in the VM that somebody else gave, each with the id of the device it is of.

        From then on they count as that device's parts.
        """

    def steps(self, plug: Plug, place: Place) -> tuple[Step, ...]:
        """Exactly what `plug` would do; changes nothing, but may ask the VM what it has."""

    def plug(self, plug: Plug, place: Place) -> None:
        """Plug all of it or none: whatever was done before a failure is undone.

        Only after a ProtocolError or ConnectError does nobody know what was done. Raises
        NoSuchDevice when what was opened is not the file that was checked.
        """

    def request_unplug(self, device_id: str) -> None:
        """Ask the guest to let go; comes back at once, also when it was asked before."""

    def wait_unplugged(self, device_ids: Sequence[str], timeout_s: float) -> dict[str, str]:
        """Wait for the guest, then take the devices' remains away.

        Gives the reason for each device that is still there: `timeout`, `refused` by the guest,
        or `lost` when its vhost-user backend is gone.
        """

    def close_files(self, device_ids: Collection[str]) -> None:
        """Close what an interrupted attach gave the VM open, and nothing in the VM uses yet."""

    def resize(self, device_id: str, size_bytes: int) -> None:
        """Tell the guest a disk's new size."""

    def find_devices(self) -> dict[str, bool]:
        """The ids of all devices of which the VM holds any part; True where the guest sees it."""

    def find_lost(self) -> set[str]:
        """The ids of devices whose vhost-user backend is gone: the guest waits for its I/O."""

    def status(self) -> str:
        """QEMU's run state: `running`, `paused`, `prelaunch`, ..."""

    def close(self) -> None:
        """End the conversation; the VM goes on."""
