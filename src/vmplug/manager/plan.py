"""What an attach will do, decided before anything is done."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from vmplug.address import new_id
from vmplug.drivers.base import BlockDrive, BlockDriver, GuestAddress, Place
from vmplug.drivers.block import plan_drive
from vmplug.errors import StateError
from vmplug.host.device import BlockDevice, DiskFile
from vmplug.manager.examine import Examined, refuse
from vmplug.manager.records import Attachment, DeviceRecord
from vmplug.manager.state import State, on_its_way
from vmplug.oci.info import DeviceInfo

Choose = Callable[[set[str], BlockDriver | None], tuple[BlockDriver, Place]]
"""Gives a place that is not among the taken ones, for the wanted driver."""


@dataclass(frozen=True, slots=True)
class NewDevice:
    """A device to be plugged; `drive` and `place` are None for one that is only counted."""

    record: DeviceRecord
    drive: BlockDrive | None = None
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """New devices, and the holds on new and on known ones, in the order asked."""

    new: tuple[NewDevice, ...]
    holds: tuple[Attachment, ...]

    def holds_on(self, *, new: bool) -> list[Attachment]:
        """The holds on devices that are new, or that are not."""
        ids = {device.record.id for device in self.new}
        return [hold for hold in self.holds if (hold.device_id in ids) is new]


def make_plan(
    examined: Sequence[Examined],
    *,
    vm: str,
    owner: str,
    known: Iterable[DeviceRecord],
    choose: Choose,
) -> Plan:
    """The plan for requests that all may go; nothing is changed.

    A device that the VM has already is only held once more, whatever `check` says of it now.
    Raises what `refuse` raises, StateError when a known device does not serve a request, and what
    `choose` raises.
    """
    records = {record.identity: record for record in known}
    refuse([request for request in examined if _identity(request) not in records])
    wanted: dict[str, list[Examined]] = {}
    for request in examined:
        wanted.setdefault(_identity(request), []).append(request)
    for identity in wanted.keys() & records.keys():
        if records[identity].state is not State.ATTACHED:
            record = records[identity]
            raise on_its_way(record.vm, record.host_path, record.state)
    new: dict[str, NewDevice] = {}
    for identity, requests in wanted.items():
        if identity not in records:
            taken = {record.place for record in records.values() if record.place}
            new[identity] = _new_device(requests, vm, partial(choose, taken))
            records[identity] = new[identity].record
        for request in requests:
            _check_serves(records[identity], request)
    holds = (_hold(records[_identity(request)], request.info, owner) for request in examined)
    return Plan(tuple(new.values()), tuple(holds))


def _identity(request: Examined) -> str:
    return request.device.identity if request.device else ""


def _new_device(
    requests: Sequence[Examined],
    vm: str,
    choose: Callable[[BlockDriver | None], tuple[BlockDriver, Place]],
) -> NewDevice:
    """A record, drive and place for one device that one or more requests name."""
    device, options = requests[0].device, requests[0].options
    assert device
    record = DeviceRecord(
        id=new_id(),
        vm=vm,
        identity=device.identity,
        kind=device.kind,
        host_path=device.host_path,
        state=State.PLUGGING,
        read_only=all(request.info.read_only for request in requests),
        share_rw=options.share_rw,
        options=requests[0].info.driver_options,
        place=None,
        guest_address=None,
    )
    if not isinstance(device, BlockDevice | DiskFile):
        return NewDevice(record)
    driver, place = choose(
        options.driver or (BlockDriver.VIRTIO_BLOCK if options.iothread else None)
    )
    drive = plan_drive(record.id, device, options, read_only=record.read_only, driver=driver)
    record = replace(record, place=str(place), guest_address=GuestAddress.of(place))
    return NewDevice(record, drive, place)


def _hold(record: DeviceRecord, info: DeviceInfo, owner: str) -> Attachment:
    return Attachment(
        id=new_id(),
        vm=record.vm,
        owner=owner,
        container_path=info.container_path,
        host_path=record.host_path,
        kind=record.kind,
        read_only=info.read_only,
        count=1,
        state=record.state,
        guest_address=record.guest_address,
        device_id=record.id,
    )


def _check_serves(record: DeviceRecord, request: Examined) -> None:
    """StateError unless the device, as it is or will be plugged, serves this request."""
    if record.read_only and not request.info.read_only:
        raise StateError(
            f"{record.host_path} is plugged read-only and is now wanted for writing",
            state="read-only",
            required="writable",
            hint="detach it from every owner first, or ask for it read-only",
        )
    wanted = request.info.driver_options
    if wanted and dict(wanted) != dict(record.options):
        raise StateError(
            f"{record.host_path} is plugged with other options",
            state=_words(record.options),
            required=_words(wanted),
            hint="detach it from every owner first, or leave the options out",
        )


def _words(options: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items()) or "none"
