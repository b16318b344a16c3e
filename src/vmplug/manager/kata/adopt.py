"""Adopt: record devices that Kata plugged in the journal, as if vmplug had plugged them.

The VM decides: a device is adopted when QEMU has it under Kata's name, and its place is read from
QEMU, as Kata saves PCI paths as `{}`. Nothing in the VM is changed.
"""

from enum import StrEnum
from typing import Protocol

import msgspec

from vmplug.address import new_id
from vmplug.drivers.place import GuestAddress, Place
from vmplug.drivers.plug import found_address
from vmplug.drivers.ports import Endpoint
from vmplug.host.kind import DeviceType, Identity, IdentityKind
from vmplug.host.root import HostRoot
from vmplug.host.use.claim import is_pod
from vmplug.journal.journal import Journal
from vmplug.journal.records import Attachment, DeviceRecord
from vmplug.journal.state import State
from vmplug.manager.kata.proof import with_things
from vmplug.manager.kata.saved_state import KataDevice, KataState


class Vm(Protocol):
    """The interface of the VM for this."""

    @property
    def endpoint(self) -> Endpoint | None:
        """Its socket, and QEMU's process."""

    def find_place(self, name: str) -> Place | None:
        """The place of the device with that name; None when there is none."""


class ImportOutcome(StrEnum):
    """The outcome for a device of Kata's."""

    IMPORTED = "imported"
    KNOWN = "known already"
    LEFT_OUT = "left out"


class Adopted(msgspec.Struct, frozen=True, kw_only=True):
    """One device of Kata's; `device_id` is the journal's, None when it is left out."""

    device: KataDevice
    outcome: ImportOutcome
    reason: str
    device_id: str | None = None


def adopt(state: KataState, vm: str, journal: Journal, hypervisor: Vm) -> list[Adopted]:
    """Record devices of Kata that are not in the journal; returns the outcome for all.

    All of it is written in one transaction. Raises HypervisorError, StoreError.
    """
    known = {device.identity: device.id for device in journal.devices(vm)}
    told: list[Adopted] = []
    records: list[DeviceRecord] = []
    holds: list[Attachment] = []
    for device in state.devices:
        record = _record(device, vm, hypervisor, journal)
        if isinstance(record, str):
            told.append(Adopted(device=device, outcome=ImportOutcome.LEFT_OUT, reason=record))
        elif record.identity in known:
            reason = "it is in the journal"
            told.append(
                Adopted(
                    device=device,
                    outcome=ImportOutcome.KNOWN,
                    reason=reason,
                    device_id=known[record.identity],
                )
            )
        else:
            known[record.identity] = record.id
            records.append(record)
            holds += _holds(device, record, state)
            reason = _shared_with(record, journal) or (
                "it is in QEMU" if record.place else "counted; no VM gets a character device"
            )
            told.append(
                Adopted(
                    device=device,
                    outcome=ImportOutcome.IMPORTED,
                    reason=reason,
                    device_id=record.id,
                )
            )
    if records:
        pid = hypervisor.endpoint.pid if hypervisor.endpoint else None
        journal.add_devices(with_things(records, pid, journal.host), holds)
    return told


def _record(device: KataDevice, vm: str, hypervisor: Vm, journal: Journal) -> DeviceRecord | str:
    """The record of the device for the journal, or why it is left out."""
    if not device.attach_count:
        return "Kata did not attach it"
    if device.kind not in set(DeviceType):
        return f"{device.kind!r} is not a kind of device that vmplug supports"
    if device.identity is None:
        return "the state does not identify the device, or the device has no name in QEMU"
    places = [hypervisor.find_place(name) for name in device.fronts]
    found = [place for place in places if place]
    if len(found) < len(places):
        return f"the VM does not hold {device.fronts[places.index(None)]}"
    return DeviceRecord(
        id=new_id(journal.id),
        vm=vm,
        identity=_canonical(device.identity, journal.host),
        kind=DeviceType(device.kind),
        host_path=device.host_path,
        state=State.ATTACHED,
        read_only=device.read_only,
        share_rw=False,
        options=device.options,
        place=" ".join(map(str, found)) or None,
        guest_address=_guest_address(device, found),
        parts=device.parts,
    )


def _canonical(identity: Identity, host: HostRoot) -> Identity:
    """A file by its canonical path, as in a request."""
    if identity.kind not in {IdentityKind.FILE, IdentityKind.SOCKET}:
        return identity
    return identity._replace(key=host.real_path(identity.key))


def _guest_address(device: KataDevice, places: list[Place]) -> GuestAddress | None:
    if not places:
        return None
    known = GuestAddress(nvdimm_id=device.nvdimm_id)
    return found_address(places, device.functions, known)


def _holds(device: KataDevice, record: DeviceRecord, state: KataState) -> list[Attachment]:
    """Every container's hold; the sandbox's own when no container has it."""
    counts: dict[tuple[str, str], int] = {}
    for hold in state.holds:
        if hold.device == device.id:
            key = hold.container, hold.container_path or device.host_path
            counts[key] = counts.get(key, 0) + 1
    counts = counts or {(state.sandbox, device.host_path): device.attach_count}
    return [
        Attachment(
            id=new_id(),
            vm=record.vm,
            owner=owner,
            name=name,
            host_path=record.host_path,
            kind=record.kind,
            read_only=record.read_only,
            count=count,
            state=record.state,
            guest_address=record.guest_address,
            device_id=record.id,
            options=record.options,
        )
        for (owner, name), count in counts.items()
    ]


def _shared_with(record: DeviceRecord, journal: Journal) -> str | None:
    found = journal.find_claims(record.vm, record.identity, [])
    claims = [claim for claim in found if not is_pod(claim.vm)]  # whose VM this may be
    return f"it is in QEMU, and VM {claims[0].vm} has it too" if claims else None
