"""The ports: the interfaces of a driver and of a VM for the manager."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from vmplug.errors import CommandError

if TYPE_CHECKING:  # a journal, and a VM, is known without them
    from vmplug.drivers.place import GuestAddress, Place, Places
    from vmplug.drivers.plug import Plug
    from vmplug.host.device import HostDevice
    from vmplug.host.finding import Finding


class Command(msgspec.Struct, frozen=True):
    """One QMP command; `arguments` are its JSON object.

    `descriptor` is sent along. `backend` is the process that QEMU waits for during the command,
    which then has its own deadline. vmplug itself does START_DAEMON, END_DAEMON, BIND and UNBIND.
    """

    execute: str
    arguments: Mapping[str, Any]
    descriptor: int | None = None
    backend: str | None = None

    @property
    def shown(self) -> Mapping[str, Any]:
        """The arguments for a log, without secrets."""
        hidden = {VF_UUID: HIDDEN} if VF_UUID in self.arguments else {}
        return {**self.arguments, **hidden}


VF_UUID = "vf-token"
"""QEMU's property of a function with its VF token, which is a secret."""
HIDDEN = "(secret)"

START_DAEMON, END_DAEMON = "start-daemon", "end-daemon"
BIND, UNBIND = "bind", "unbind"


class Step(msgspec.Struct, frozen=True):
    """A command, and the one that undoes it; None when there is none.

    A planned step has the device for which it is done, and where the guest will see that.
    """

    do: Command
    undo: Command | None
    host_path: str | None = None
    guest: "GuestAddress | None" = None


class Endpoint(msgspec.Struct, frozen=True):
    """The address of a VM: its QMP socket, and the process that runs its guest.

    `started_at` (clock ticks after boot) distinguishes that process from a later one with its pid.
    Both are None where the process is unknown.
    """

    qmp_socket: str
    pid: int | None
    started_at: int | None = None


Choose = Callable[[Collection[str]], Collection[str]]
"""Chooses among ids of devices."""


class PlugDriver(Protocol):
    """How to plug one device: its checked options.

    `share_rw`: others may write to it at the same time.
    """

    @property
    def share_rw(self) -> bool:
        """Whether others may write to it too."""

    def check(self, device: "HostDevice", *, read_only: bool) -> "Iterator[Finding]":
        """Reasons not to plug this device with these options."""

    def choose_place(
        self, device: "HostDevice", offer: "Places", taken: Collection[str]
    ) -> "Place":
        """A free place that is not among the taken ones, which are places as text.

        Raises NoFreePort, and CannotPlug when the VM never has one.
        """

    def plan(self, new: "NewPlug", place: "Place", offer: "Places") -> "Plug":
        """The plug for that place. Raises SpecError when the options do not fit the place."""


class NewPlug(msgspec.Struct, frozen=True, kw_only=True):
    """A device to plug, with its new id."""

    id: str
    device: "HostDevice"
    read_only: bool


class UnplugFailure(StrEnum):
    """Why a device is still in the VM; the first one says most about what to do.

    `refused`: the guest keeps it. `lost`: its vhost-user backend is gone, and the guest waits for
    its I/O. `timeout`: the guest does not answer.
    """

    REFUSED = "refused"
    LOST = "lost"
    TIMEOUT = "timeout"


class DiskError(StrEnum):
    """Why I/O on a disk failed. Source: QEMU qapi/block-core.json, BlockDeviceIoStatus."""

    NO_SPACE = "nospace"
    FAILED = "failed"


class FailedDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk of which an error has stopped its VM.

    `file` is its file or device node, `device_id` None for a disk that vmplug did not plug. QEMU
    does not forget an error when the VM runs again: a disk may be among them for an earlier one.
    """

    file: str
    error: DiskError
    device_id: str | None

    def __str__(self) -> str:
        is_full = self.error is DiskError.NO_SPACE
        return f"{'no space left for writes to' if is_full else 'I/O fails on'} {self.file}"


class Hypervisor(Protocol):
    """The interface of a VM for the manager. Every wait has a deadline.

    `endpoint` is None for a VM that no other process can reach. Raises HypervisorError and its
    kinds.
    """

    @property
    def endpoint(self) -> Endpoint | None:
        """The address at which other processes find this VM."""

    @property
    def takes_vf_token(self) -> bool:
        """Whether a function of the host can be plugged with a VF token."""

    def places(self, known: Mapping[str, str]) -> "Places":
        """The places of the VM; `known` are those of the caller's devices, by their ids.

        Addresses of `known` SCSI disks need not be among those in use.
        """

    def claim_foreign_names(self, names: Mapping[str, str]) -> None:
        """Set the names that others assigned in the VM, mapped to the owning device ids.

        From then on they count as parts of that device.
        """

    def steps(self, plug: "Plug", place: "Place") -> tuple[Step, ...]:
        """The exact steps of `plug`; changes nothing, but may query the VM."""

    def plug(self, plug: "Plug", place: "Place") -> None:
        """Plug all of it or none: a failure undoes the steps before it.

        Only after a ProtocolError or ConnectError is it unknown what was done. Raises NoSuchDevice
        when the opened file is not the one that was checked.
        """

    def request_unplug(self, device_ids: Sequence[str]) -> dict[str, CommandError]:
        """Ask the guest to release them in turn; returns at once, also when it was asked before.

        Returns the refusal of each device that the guest could not be asked for.
        """

    def wait_unplugged(
        self, device_ids: Sequence[str], timeout_s: float
    ) -> dict[str, UnplugFailure]:
        """Wait for the guest, then remove what is left of the devices.

        Returns the reason for each device that is still there.
        """

    def close_files(self, device_ids: Collection[str]) -> None:
        """Close files that an interrupted attach passed to the VM and that it does not use yet."""

    def close_left_files(self, choose: Choose) -> None:
        """Close files that were passed to the VM for devices, and that it does not use.

        `choose` takes from the ids of all devices that have one those that no process plugs now.
        """

    def resize(self, device_id: str, size_bytes: int) -> None:
        """Report a disk's new size to the guest."""

    def find_devices(self) -> dict[str, bool]:
        """The ids of all devices of which the VM has any part; True where the guest sees it."""

    def find_drivers(self) -> dict[str, str]:
        """The drivers in QEMU, such as virtio-blk-pci, of the devices that the guest sees."""

    def find_lost(self) -> set[str]:
        """The ids of devices whose vhost-user backend is gone: the guest waits for its I/O."""

    def status(self) -> str:
        """QEMU's run state: `running`, `paused`, `prelaunch`, ..."""

    def close(self) -> None:
        """Close the connection; the VM keeps running."""
