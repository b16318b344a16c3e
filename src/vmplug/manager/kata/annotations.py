"""What Kata's agent must know of GPUs: annotations that name them by CDI inside the guest.

The guest's driver numbers its GPUs in the order of its buses, and its CDI spec names them so. An
annotation of the container says which of them came for it. Source: Kata Containers
src/runtime/virtcontainers/container.go, annotateContainerWithVFIOMetadata; it compares the names
of buses as text, and so confuses the GPUs of a VM with more than ten.
"""

from collections.abc import Iterable, Mapping

import msgspec

from vmplug.address import PciPath
from vmplug.errors import AttributeReadError
from vmplug.host.root import THIS_HOST, HostRoot
from vmplug.journal.records import Attachment

AgentAnnotations = Mapping[str, Mapping[str, str]]
"""Annotations for the agent, by the id of the attachment."""

_GUEST_DRIVES = "guest-kernel"
_NVIDIA, _DISPLAY = 0x10DE, 0x030
_KIND = "nvidia.com/gpu"


class _Gpu(msgspec.Struct, frozen=True, order=True):
    """One function in a VM, at its place on the guest's buses."""

    vm: str
    place: tuple[int, tuple[tuple[int, int], ...], tuple[int, int]]
    device_id: str


def find_agent_annotations(
    held: Iterable[Attachment], host: HostRoot = THIS_HOST
) -> dict[str, dict[str, str]]:
    """By the id of the attachment: `cdi.k8s.io/vfio26` -> `nvidia.com/gpu=0`.

    `held` is everything that the VMs have: GPUs are numbered over the whole VM, and only those
    that the guest's own driver has (`mode=guest-kernel`). Those of one container whose groups or
    cdevs have the same number share an annotation.
    """
    holds = [hold for hold in held if hold.options.get("mode") == _GUEST_DRIVES]
    gpus = dict[str, set[_Gpu]]()
    for hold in holds:
        for gpu in _gpus_of(hold, host):
            gpus.setdefault(hold.vm, set()).add(gpu)
    numbered = {gpu: number for found in gpus.values() for number, gpu in enumerate(sorted(found))}
    names = dict[tuple[str, str, str], list[str]]()
    for hold in holds:
        own = {gpu for gpu in numbered if (gpu.vm, gpu.device_id) == (hold.vm, hold.device_id)}
        names.setdefault(_key(hold), []).extend(f"{_KIND}={numbered[gpu]}" for gpu in sorted(own))
    return {
        hold.id: {f"cdi.k8s.io/vfio{_node_number(hold)}": ",".join(dict.fromkeys(shared))}
        for hold in holds
        if (shared := names[_key(hold)])
    }


def _key(hold: Attachment) -> tuple[str, str, str]:
    """What one annotation is for: a group and a cdev of a container may have the same number."""
    return hold.vm, hold.owner, _node_number(hold)


def _gpus_of(hold: Attachment, host: HostRoot) -> Iterable[_Gpu]:
    for function in hold.guest_address.functions if hold.guest_address else ():
        if function.pci_path and _is_gpu(function.host, host):
            yield _Gpu(hold.vm, _bus_order(function.pci_path), hold.device_id)


def _bus_order(path: PciPath) -> tuple[int, tuple[tuple[int, int], ...], tuple[int, int]]:
    """What sorts functions as the guest does, which numbers its buses on the way down."""
    slots = tuple((slot.slot, slot.function) for slot in path.slots)
    return path.root_bus, slots[:-1], slots[-1]


def _is_gpu(bdf: str, host: HostRoot) -> bool:
    directory = f"{host.pci_devices}/{bdf}"
    try:
        vendor = int(host.read_text(f"{directory}/vendor") or "0", 16)
        class_code = int(host.read_text(f"{directory}/class") or "0", 16)
    except (AttributeReadError, ValueError):
        return False
    return vendor == _NVIDIA and class_code >> 12 == _DISPLAY


def _node_number(hold: Attachment) -> str:
    """The number of its group or cdev: `26` of /dev/vfio/26, `3` of /dev/vfio/devices/vfio3."""
    node = hold.name if hold.name.startswith("/dev/vfio/") else hold.host_path
    return node.rpartition("/")[2].removeprefix("vfio")
