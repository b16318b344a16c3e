"""A random number device, as QMP commands. Source: QEMU qapi/qom.json, RngRandomProperties."""

from vmplug.address import qemu_id
from vmplug.drivers.place import Place
from vmplug.drivers.plug import RNGDevice
from vmplug.drivers.ports import Step
from vmplug.hypervisor.qemu.steps.frontend import object_step, virtio_step


def plug_steps(device: RNGDevice, place: Place) -> tuple[Step, ...]:
    """The source, and the device that the guest reads."""
    source = qemu_id(device.id, "source")
    properties: dict[str, object] = {"rng": source}
    if device.max_bytes is not None:
        properties |= {"max-bytes": device.max_bytes, "period": device.period_ms}
    return (
        object_step("rng-random", source, {"filename": device.filename}),
        virtio_step("virtio-rng", device.id, place, properties),
    )
