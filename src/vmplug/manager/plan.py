"""Plan an attach completely before its first step."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import msgspec
from msgspec.structs import replace

from vmplug.address import new_id
from vmplug.drivers.free_places import Taken
from vmplug.drivers.place import LEASED, LeasePlace, MemorySlot, Offer, Place, Places
from vmplug.drivers.plug import Plug, guest_address
from vmplug.drivers.ports import BIND, UNBIND, Command, NewPlug, PlugDriver, Step
from vmplug.errors import CannotPlug, NoFreePort, StateError
from vmplug.host.block.device import DiskFile
from vmplug.host.device import HostDevice
from vmplug.host.finding import Code, Finding
from vmplug.host.kind import Identity
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.vfio import is_vfio_driver
from vmplug.host.root import HostRoot
from vmplug.journal.images import list_files
from vmplug.journal.records import Attachment, DeviceRecord
from vmplug.journal.state import (
    REPLACED,
    UNIDENTIFIED,
    State,
    on_its_way,
)
from vmplug.manager.examine import CheckedRequest, refuse, refuse_not_allowed
from vmplug.manager.known import Known
from vmplug.oci.info import DeviceInfo
from vmplug.oci.requests import Request, ShareInfo

Choose = Callable[[PlugDriver, HostDevice, Taken], tuple[Place, Places]]
"""Returns a place for a device that is not taken, and the offer that has it."""


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """A device with a number, and its driver, which also knows what a QEMU makes of it."""

    driver: PlugDriver
    device: HostDevice


class LeaseOffer(Offer, frozen=True, kw_only=True):
    """All that a VMM may be able to do; `chosen` are the devices by the numbers of their places.

    A plan that is made again gives the same numbers once more, and its devices count.
    """

    chosen: dict[int, Chosen] = msgspec.field(default_factory=dict)

    def choose(self, driver: PlugDriver, device: HostDevice, taken: Taken) -> LeasePlace:
        """The lowest number that is not among the taken places."""
        while str(place := LeasePlace(number=taken.full_to[LEASED])) in taken:
            taken.full_to[LEASED] += 1
        self.chosen[place.number] = Chosen(driver=driver, device=device)
        return place


def choose_place(driver: PlugDriver, device: HostDevice, offer: Places, taken: Taken) -> Place:
    """A free place; of a lease any number will do. Raises as `PlugDriver.choose_place`."""
    if isinstance(offer, LeaseOffer):
        return offer.choose(driver, device, taken)
    return driver.choose_place(device, offer, taken)


class NewDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device to plug; `plug` and `place` are None for one that is only counted."""

    record: DeviceRecord
    device: HostDevice
    plug: Plug | None = None
    place: Place | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """New devices in the order to plug them, and the requested holds on new and known ones.

    `revived` are the ids of retained devices, which have an owner again.
    """

    new: tuple[NewDevice, ...]
    holds: tuple[Attachment, ...]
    revived: tuple[str, ...] = ()

    def holds_on(self, *, new: bool) -> list[Attachment]:
        """The holds on new devices, or on the others."""
        ids = {device.record.id for device in self.new}
        return [hold for hold in self.holds if (hold.device_id in ids) is new]


def make_plan(
    examined: Sequence[CheckedRequest],
    *,
    vm: str,
    owner: str,
    known: Known,
    choose: Choose,
    journal_id: str,
) -> Plan:
    """The plan for requests that all passed the checks; nothing is changed.

    A device that the VM already has only gets one more hold, whatever `check` finds now, if the
    policy allows it to this owner too. The ids of new ones begin with `journal_id`. Raises
    PolicyError, the errors of `refuse` and `choose`, and StateError when a known device does not
    fit a request.
    """
    records = {record.identity: record for record in known.devices}
    refuse_not_allowed(examined)
    refuse([request for request in examined if not _is_known(request, records)])
    wanted: dict[Identity, list[CheckedRequest]] = {}
    for request in examined:
        wanted.setdefault(_identity(request), []).append(request)
    for identity in wanted.keys() & records.keys():
        if records[identity].state not in {State.ATTACHED, State.RETAINED}:
            record = records[identity]
            raise on_its_way(record.vm, record.host_path, record.state)
    new: dict[Identity, NewDevice] = {}
    taken = Taken(_words_of(known.places))
    for identity, requests in wanted.items():
        if identity not in records:
            new[identity] = _new_device(requests, vm, taken, choose, new_id(journal_id))
            _check_tag(new[identity].record, records.values())
            records[identity] = new[identity].record
            taken.update(_words_of([records[identity].place]))
        for request in requests:
            if error := _misfit(records[identity], request, requests):
                raise error
    devices = _without_numbers(new.values())
    records |= {device.record.identity: device.record for device in devices}
    holds = (_hold(records[_identity(request)], request.info, owner) for request in examined)
    # Devices that cannot be unplugged come last.
    ordered = sorted(devices, key=lambda device: not device.record.can_be_unplugged)
    retained = (records[i].id for i in wanted if records[i].state is State.RETAINED)
    return Plan(new=tuple(ordered), holds=tuple(holds), revived=tuple(retained))


def _words_of(places: Iterable[str | None]) -> Iterator[str]:
    """Every single place; a group has several."""
    return (word for place in places for word in (place or "").split())


def bind_steps(new: NewDevice, host: HostRoot, *, managed: bool) -> list[Step]:
    """The steps on the host before a group is plugged: none when it is bound to VFIO."""
    group = new.device
    if not (managed and isinstance(group, VfioGroup)):
        return []
    outside = [str(f.bdf) for f in group.functions if not is_vfio_driver(f, host)]
    if not outside:
        return []
    functions = {"functions": outside}
    return [Step(do=Command(BIND, functions), undo=Command(UNBIND, functions))]


def find_places(
    examined: Sequence[CheckedRequest],
    *,
    vm: str,
    known: Known,
    choose: Choose,
) -> list[CheckedRequest]:
    """The requests, with the VM's findings: all that `make_plan` would refuse them for."""
    records = {record.identity: record for record in known.devices}
    answers = [
        request.as_counted() if _is_known(request, records) else request for request in examined
    ]
    taken = Taken(_words_of(known.places))
    indices: dict[Identity, list[int]] = {}
    for index, request in enumerate(answers):
        if request.device and not request.is_refused:
            indices.setdefault(request.device.identity, []).append(index)
    for identity, wanted in indices.items():
        requests = [examined[index] for index in wanted]
        try:
            if is_new := identity not in records:
                records[identity] = _new_record(requests, vm, records, taken, choose)
                taken.update(_words_of([records[identity].place]))
            record = records[identity]
            if record.state not in {State.ATTACHED, State.RETAINED} and not is_new:
                raise on_its_way(record.vm, record.host_path, record.state)
        except (NoFreePort, CannotPlug, StateError) as error:
            answers[wanted[0]] = answers[wanted[0]].with_finding(_no_place(error))
            continue
        for index, request in zip(wanted, requests, strict=True):
            if misfit := _misfit(record, request, requests):
                answers[index] = answers[index].with_finding(_no_place(misfit))
    return answers


def _new_record(
    requests: Sequence[CheckedRequest],
    vm: str,
    records: Mapping[Identity, DeviceRecord],
    taken: Taken,
    choose: Choose,
) -> DeviceRecord:
    """The record that an attach would write. Raises as `make_plan`."""
    record = _new_device(requests, vm, taken, choose, new_id()).record
    _check_tag(record, records.values())
    return record


def _no_place(error: NoFreePort | CannotPlug | StateError) -> Finding:
    match error:
        case CannotPlug():
            is_split = error.reason == Code.SPLIT_GROUP
            code = Code.SPLIT_GROUP if is_split else Code.CANNOT_PLUG
        case StateError():
            codes = {
                _TAKEN: Code.TAG_TAKEN,
                REPLACED: Code.REPLACED,
                UNIDENTIFIED: Code.UNIDENTIFIED,
            }
            code = codes.get(error.state, Code.PLUGGED_OTHERWISE)
        case _:
            code = Code.NO_PORT
    return Finding(code, error.message, error.hint or "detach something first")


def _is_known(request: CheckedRequest, records: Mapping[Identity, DeviceRecord]) -> bool:
    return request.device is not None and request.device.identity in records


def _identity(request: CheckedRequest) -> Identity:
    assert request.device, "a request without a device is refused"
    return request.device.identity


def _new_device(
    requests: Sequence[CheckedRequest],
    vm: str,
    taken: Taken,
    choose: Choose,
    device_id: str,
) -> NewDevice:
    """A record, plug and place for one device of one or more requests."""
    device, driver = requests[0].device, requests[0].driver
    assert device
    record = DeviceRecord(
        id=device_id,
        vm=vm,
        identity=device.identity,
        kind=device.kind,
        host_path=device.host_path,
        state=State.PLUGGING,
        read_only=all(request.info.read_only for request in requests),
        share_rw=driver is not None and driver.share_rw,
        options=requests[0].info.driver_options,
        place=None,
        guest_address=None,
        thing=requests[0].thing,
        files=tuple(list_files(device.image)) if isinstance(device, DiskFile) else (),
    )
    if driver is None:
        return NewDevice(record=record, device=device)
    place, offer = choose(driver, device, taken)
    new = NewPlug(id=record.id, device=device, read_only=record.read_only)
    plug = driver.plan(new, place, offer)
    record = replace(record, place=str(place), guest_address=guest_address(plug, place))
    return NewDevice(record=record, device=device, plug=plug, place=place)


def _hold(record: DeviceRecord, info: Request, owner: str) -> Attachment:
    return Attachment(
        id=new_id(),
        vm=record.vm,
        owner=owner,
        name=info.name,
        host_path=record.host_path,
        kind=record.kind,
        read_only=info.read_only,
        count=1,
        state=record.state,
        guest_address=record.guest_address,
        device_id=record.id,
        options=record.options,
    )


def _without_numbers(new: Iterable[NewDevice]) -> list[NewDevice]:
    """The devices; the order in which the guest will number several NVDIMMs is unknown.

    QEMU lists them in another order. Source: measured on QEMU 7.2, hot and cold.
    """
    devices = list(new)
    nvdimms = [device for device in devices if isinstance(device.place, MemorySlot)]
    if len(nvdimms) <= 1:
        return devices
    return [
        replace(device, record=_without_number(device.record))
        if isinstance(device.place, MemorySlot)
        else device
        for device in devices
    ]


def _without_number(record: DeviceRecord) -> DeviceRecord:
    assert record.guest_address
    return replace(record, guest_address=replace(record.guest_address, nvdimm_id=None))


_TAKEN = "taken"


def _check_tag(new: DeviceRecord, records: Iterable[DeviceRecord]) -> None:
    """StateError when two shares would have one tag, by which the guest mounts them."""
    tag = new.guest_address.mount_tag if new.guest_address else None
    for record in records if tag else ():
        if record.guest_address and record.guest_address.mount_tag == tag:
            raise StateError(
                f"the VM already has a share with the tag {tag}: {record.host_path}",
                state=_TAKEN,
                required="free",
                hint="choose another tag, or detach that share first",
            )


def _misfit(
    record: DeviceRecord, request: CheckedRequest, batch: Sequence[CheckedRequest]
) -> StateError | None:
    """Why the device, as it is or will be plugged, does not fit this request; None when it does.

    `batch` are the requests for the same device: who may write to it anyway may also read it.
    """
    device, guest = request.device, record.guest_address
    if other := record.why_not(request.thing):
        return other
    tag = request.info.tag if isinstance(request.info, ShareInfo) else None
    is_other = device and device.kind is not record.kind
    if is_other or (tag and guest and guest.mount_tag != tag) or _is_other_pmem(record, request):
        what = f" with the tag {guest.mount_tag}" if guest and guest.mount_tag else ""
        return StateError(
            f"{record.host_path} is plugged as {record.kind.word}{what}, and the request is for "
            "another device",
            state="other",
            required="the same",
            hint="detach it from every owner first",
        )
    if record.read_only and not request.info.read_only:
        return StateError(
            f"{record.host_path} is plugged read-only, and the request is for writing",
            state="read-only",
            required="writable",
            hint="detach it from every owner first, or request it read-only",
        )
    if not record.read_only and all(other.info.read_only for other in batch):
        return StateError(
            f"{record.host_path} is plugged for writing, and the request is read-only: the guest "
            "could still write to it",
            state="writable",
            required="read-only",
            hint="detach it from every owner first, or request it for writing",
        )
    wanted = request.info.driver_options
    if wanted and dict(wanted) != dict(record.options):
        return StateError(
            f"{record.host_path} is plugged with other options",
            state=_words(record.options),
            required=_words(wanted),
            hint="detach it from every owner first, or leave the options out",
        )
    return None


def _words(options: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items()) or "none"


def _is_other_pmem(record: DeviceRecord, request: CheckedRequest) -> bool:
    """Whether a file that is plugged as a disk is now requested as persistent memory.

    A file that is leased may be either: its VMM decides.
    """
    if record.place and record.place.startswith(LEASED):
        return False
    wants_pmem = isinstance(request.info, DeviceInfo) and request.info.pmem
    is_pmem = record.guest_address is not None and record.guest_address.nvdimm_handle is not None
    return wants_pmem and not is_pmem
