"""Vhost-user devices, as QMP commands: a connection to the backend, and the device.

Source: QEMU qapi/char.json, qapi/net.json; sequences and traps measured on QEMU 7.2.
"""

from typing import Any

from vmplug.address import qemu_id
from vmplug.drivers.place import PciPlace, Place
from vmplug.drivers.plug import VhostUserDevice
from vmplug.drivers.ports import END_DAEMON, START_DAEMON, Command, Step
from vmplug.host.kind import DeviceType
from vmplug.hypervisor.qemu.abilities import RECONNECT, RECONNECT_MS, Abilities
from vmplug.hypervisor.qemu.steps.frontend import virtio_step
from vmplug.hypervisor.virtiofsd import command_line

LINK, NETDEV = "link", "net"
"""The parts of a device: its chardev, and for a network its netdev."""


def plug_steps(device: VhostUserDevice, place: Place, can: Abilities) -> tuple[Step, ...]:
    """The commands that plug `device` at `place`, each with its undo."""
    steps = [*_start(device), *_connect(device, can)]
    link = qemu_id(device.id, LINK)
    backend = device.socket_path or (device.daemon.program if device.daemon else link)
    match device.type:
        case DeviceType.VHOST_USER_BLK:
            model, properties = "vhost-user-blk", {"chardev": link, "num-queues": device.queues}
        case DeviceType.VHOST_USER_SCSI:
            model, properties = "vhost-user-scsi", {"chardev": link, "num_queues": device.queues}
        case DeviceType.VHOST_USER_NET:
            steps.append(_netdev(device, link, backend))
            model, properties = "virtio-net", _network(device, place)
        case DeviceType.VHOST_USER_FS:
            model, properties = "vhost-user-fs", {"chardev": link, **_share(device)}
        case _:
            raise AssertionError(f"{device.type} is not a vhost-user device")
    return (*steps, virtio_step(model, device.id, place, properties, backend=backend))


def _start(device: VhostUserDevice) -> list[Step]:
    if device.daemon is None:
        return []
    what = {"argv": command_line(device.daemon, "N")}
    return [
        Step(do=Command(START_DAEMON, what), undo=Command(END_DAEMON, {"device": device.id})),
    ]


def _connect(device: VhostUserDevice, can: Abilities) -> list[Step]:
    link = qemu_id(device.id, LINK)
    steps = []
    if device.socket_path is None or device.descriptor is not None:
        take = Command("getfd", {"fdname": link}, descriptor=device.descriptor)
        steps.append(Step(do=take, undo=Command("closefd", {"fdname": link})))
        address = {"type": "fd", "data": {"str": link}}
    else:
        address = {"type": "unix", "data": {"path": device.socket_path}}
    data: dict[str, Any] = {"addr": address, "server": False}
    if device.reconnect_s:
        data |= _reconnect(device.reconnect_s, can)
    arguments = {"id": link, "backend": {"type": "socket", "data": data}}
    add = Command("chardev-add", arguments, backend=device.socket_path)
    steps.append(Step(do=add, undo=Command("chardev-remove", {"id": link})))
    return steps


def _reconnect(seconds: int, can: Abilities) -> dict[str, int]:
    """QEMU 9.2 has the first of these too, QEMU 11 only the first."""
    return {RECONNECT_MS: seconds * 1000} if can.reconnect_ms else {RECONNECT: seconds}


def _netdev(device: VhostUserDevice, link: str, backend: str) -> Step:
    """Deleting it takes its chardev along. QEMU aborts if the network device is still there."""
    name = qemu_id(device.id, NETDEV)
    arguments = {"type": "vhost-user", "id": name, "chardev": link, "queues": device.queues}
    return Step(
        do=Command("netdev_add", arguments, backend=backend),
        undo=Command("netdev_del", {"id": name}),
    )


def _network(device: VhostUserDevice, place: Place) -> dict[str, Any]:
    """On PCI with one message interrupt per queue plus two; elsewhere there are none."""
    properties: dict[str, Any] = {
        "netdev": qemu_id(device.id, NETDEV),
        "mac": device.mac_address,
        "mq": device.queues > 1,
    }
    if not isinstance(place, PciPlace):
        return properties
    if not device.msix:
        properties["vectors"] = 0
    elif device.queues > 1:
        properties["vectors"] = 2 * device.queues + 2
    return properties


def _share(device: VhostUserDevice) -> dict[str, Any]:
    properties: dict[str, Any] = {"tag": device.tag, "queue-size": device.queue_size}
    if device.cache_size_mib:
        properties["cache-size"] = device.cache_size_mib << 20
    return properties
