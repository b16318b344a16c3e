"""A VM that its guest has taken over: what QEMU answers, with anything in place of anything."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from tests.fuzz.draw import Draw
from tests.fuzz.guard import changes_only
from vmplug.address import PciPath, PciSlot
from vmplug.drivers.place import PciPlace
from vmplug.drivers.plug import BlockDrive, DiskFrontend, RNGDevice
from vmplug.drivers.ports import Command
from vmplug.errors import CommandError, DeviceError
from vmplug.hypervisor.fake.monitor import FakeHypervisor, FakeMonitor
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qmp.monitor import EventReceiver, Monitor

DEVICE = "0123456789abcdef"
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 31, 256, 1 << 16, 1 << 31, 1 << 64, -(1 << 70), 0.5, "", "x"),
    *("child<", "child[0]", "link<x>", "link<", "/machine/peripheral/x", "/", "..", "\ud800"),
    *(f"vmplug-{DEVICE}", f"vmplug-{DEVICE}-link", "vmplug-", "pcie-root-port", "pci.0"),
    *("fe.0.0001", "fe.9.99999", "disconnected:", [], {}, [[]], [{}], {"x": []}, [None], "nvdimm"),
    *("child<pxb-pcie>", "child<virtio-scsi-pci>", "child<pci-bridge>", "virtual-css-bridge"),
    *([{"name": "child[0]", "type": "link<x>"}], {"type": "nvdimm", "data": {}}),
)


class _Hostile(Monitor):
    """The answers of a VM in memory, each as it is or spoiled."""

    def __init__(self, draw: Draw, machine: FakeMonitor) -> None:
        self._draw = draw
        self._machine = machine
        self._receivers: list[EventReceiver] = []

    def attempt(self, commands: Sequence[Command]) -> tuple[list[Any], CommandError | None]:
        answers, refusal = self._machine.attempt(commands)
        if self._draw and self._draw.number(3) == 0:
            for receive in self._receivers:
                receive(
                    self._draw.pick(("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", "")),
                    {"device": self._draw.pick(_ODD), "path": self._draw.pick(_ODD)},
                )
        if refusal and self._draw and self._draw.number(1):  # it knows more than the one in memory
            missing = len(commands) - len(answers)
            answers, refusal = [*answers, *(self._draw.pick(_ODD) for _ in range(missing))], None
        return [_spoil(answer, self._draw) for answer in answers], refusal

    def listen(self, receive: EventReceiver) -> None:
        self._receivers.append(receive)
        self._machine.listen(receive)

    def close(self) -> None:
        pass


def _spoil(value: Any, draw: Draw) -> Any:
    """The value with something else in it, at any depth; mostly as it is."""
    if not draw or draw.number(3):
        return value
    match value:
        case dict() if value and draw.number(2):
            key = draw.pick(list(value))
            if draw.number(7) == 0:
                return {k: v for k, v in value.items() if k != key}
            return {**value, key: _other(value[key], draw)}
        case list() if value and draw.number(2):
            index = draw.number(min(len(value), 256) - 1)
            return [*value[:index], _other(value[index], draw), *value[index + 1 :]]
        case _:
            return _other(value, draw)


def _other(value: Any, draw: Draw) -> Any:
    if isinstance(value, dict | list) and value and draw.number(1):
        return _spoil(value, draw)
    if draw.number(7) == 0:
        return draw.some().decode(errors="surrogateescape")
    if draw.number(7) == 0:
        return [value] * 20
    return draw.pick(_ODD)


def check(data: bytes) -> None:
    """Every question ends in an answer or in one of vmplug's errors, and in bounded time."""
    draw = Draw(data)
    real = FakeHypervisor()
    place = PciPlace(bus="rp0", slot=PciSlot(0), path=PciPath((PciSlot(16), PciSlot(0))))
    real.plug(RNGDevice(id=DEVICE, filename="/dev/urandom"), place)
    qemu = Qemu(_Hostile(draw, real.monitor), daemons=real._daemons)
    drive = BlockDrive(
        id="fedcba9876543210", file="/a.img", is_device=False, driver=DiskFrontend.VIRTIO_BLOCK
    )
    with changes_only():
        for ask in (
            qemu.offer,
            qemu.find_devices,
            qemu.find_lost,
            qemu.status,
            lambda: qemu.plug(drive, place),
            lambda: qemu.resize(DEVICE, 1 << 20),
            lambda: qemu.request_unplug([DEVICE]),
            lambda: qemu.wait_unplugged([DEVICE], 0.0),
            qemu.offer,
        ):
            with suppress(DeviceError):
                ask()
