"""The devices of a lease as words for a QEMU that another program starts."""

from collections.abc import Iterable
from contextlib import ExitStack

from msgspec.structs import replace

from vmplug.drivers.free_places import Taken
from vmplug.drivers.place import Place
from vmplug.drivers.plug import Plug, VFIODevices, VhostUserDevice
from vmplug.drivers.ports import NewPlug
from vmplug.errors import CannotPlug, SpecError
from vmplug.host.root import HostRoot
from vmplug.hypervisor.qemu.abilities import of_program
from vmplug.hypervisor.qemu.start.foreign import ForeignQemu, QemuCommand
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner
from vmplug.journal.records import DeviceRecord
from vmplug.leases.holder import LeaseHolder, LeaseLock


def make_words(
    command: QemuCommand, devices: Iterable[DeviceRecord], holder: LeaseHolder, host: HostRoot
) -> ForeignQemu:
    """All devices of a lease, in the order of a cold plug, with what QEMU inherits of them open.

    From then on the lease has nothing else open of them but the connections to its daemons. Raises
    SpecError, CannotPlug, NoFreePort before that for what the machine cannot have, and HostError
    for what is not there any more.
    """
    if holder.lock is not LeaseLock.NONE:
        raise SpecError(
            "{qemu-args}",
            f"the lease has locks ({holder.lock}), which would last until QEMU ends",
            hint="leave --lock out: QEMU locks its disks itself",
        )
    if any(opened.socket is not None for opened in holder.opened.values()):
        raise SpecError(
            "{qemu-args}",
            "the lease has the socket of a virtiofsd, and QEMU gets a connection",
            hint="leave the field socket of a share out, or ShareEnd.SOCKET in the library",
        )
    records = {record.id: record for record in devices}
    if counted := [record for record in records.values() if record.id not in holder.plugs]:
        raise CannotPlug(
            "no-such-model",
            f"QEMU has no device for {counted[0].host_path}: it is a character device",
            hint="lease it without {qemu-args}, and pass it by its field descriptor",
        )
    daemons = HostVirtiofsdRunner("")  # those of a lease run already
    words = ForeignQemu(command, of_program(command.program), daemons, host)
    offer, taken = words.offer(), Taken()
    planned = list[tuple[Plug, Place]]()
    for device_id, chosen in holder.chosen.items():
        place = chosen.driver.choose_place(chosen.device, offer, taken)
        taken.update(str(place).split())
        read_only = records[device_id].read_only
        new = NewPlug(id=device_id, device=chosen.device, read_only=read_only)
        plug = _as_leased(chosen.driver.plan(new, place, offer), holder)
        if isinstance(plug, VFIODevices) and offer.iommufd:
            plug = holder.with_cdevs(plug)
        planned.append((plug, place))
    with ExitStack() as undo:
        undo.enter_context(words)
        for plug, place in planned:
            words.plug(plug, place)
        undo.pop_all()
    for plug, _ in planned:
        holder.close_files_of(plug.id)
    return words


def _as_leased(plug: Plug, holder: LeaseHolder) -> Plug:
    """With the connection and the MAC address that the lease has."""
    leased = holder.plugs[plug.id]
    if not (isinstance(plug, VhostUserDevice) and isinstance(leased, VhostUserDevice)):
        return plug
    descriptor = holder.opened[plug.id].descriptor
    if descriptor is not None:
        plug = replace(plug, daemon=None, descriptor=descriptor)
    return replace(plug, mac_address=leased.mac_address)
