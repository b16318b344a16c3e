"""What kubelet is answered: lists of devices, and what a container gets with them."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from vmplug.cdi.names import make_annotation
from vmplug.kubernetes.config import Given, Resource
from vmplug.kubernetes.device_plugin_pb2 import (
    CDIDevice,
    ContainerAllocateResponse,
    Device,
    DeviceSpec,
    NUMANode,
    TopologyInfo,
)
from vmplug.kubernetes.picture import Offer
from vmplug.kubernetes.units import Unit

_HEALTHY, _UNHEALTHY = "Healthy", "Unhealthy"
_PERMISSIONS = "mrw"
_PLUGIN = "vmplug"


def list_devices(offers: Sequence[Offer]) -> list[Device]:
    """All devices of a resource.

    Each has its NUMA node, or none has: kubelet's policy single-numa-node refuses a mixture.
    """
    nodes = {offer.key: offer.unit.numa_node for offer in offers if offer.unit}
    with_topology = len(nodes) == len(offers) and None not in nodes.values()
    return [
        Device(
            ID=offer.id,
            health=_HEALTHY if offer.health.state.is_healthy else _UNHEALTHY,
            topology=TopologyInfo(nodes=[NUMANode(ID=nodes[offer.key])])
            if with_topology
            else None,
        )
        for offer in offers
    ]


def prefer(
    offers: Iterable[Offer], available: Collection[str], must: Sequence[str], size: int
) -> list[str]:
    """The IDs to give: those that must be, then from as few NUMA nodes as possible.

    The nodes of what must be come first, then the smallest that has enough, else the largest. The
    same question has the same answer.
    """
    nodes = {offer.id: offer.unit.numa_node if offer.unit else None for offer in offers}
    chosen = list(dict.fromkeys(must))[:size]
    by_node = dict[int | None, list[str]]()
    for id_, node in nodes.items():  # in the order of the list
        if id_ in available and id_ not in chosen:
            by_node.setdefault(node, []).append(id_)
    for node in dict.fromkeys(nodes.get(id_) for id_ in chosen):
        chosen += by_node.pop(node, [])[: size - len(chosen)]
    while by_node and len(chosen) < size:
        node = _next_node(by_node, size - len(chosen))
        chosen += by_node.pop(node)[: size - len(chosen)]
    return chosen


def _next_node(by_node: Mapping[int | None, Sequence[str]], wanted: int) -> int | None:
    def rank(node: int | None) -> tuple[bool, int, int]:
        count = len(by_node[node])
        has_enough = count >= wanted
        return not has_enough, count if has_enough else -count, -1 if node is None else node

    return min(by_node, key=rank)


def describe_allocated(resource: Resource, units: Sequence[Unit]) -> ContainerAllocateResponse:
    """What a container gets with these devices."""
    answer = ContainerAllocateResponse(envs=_environment(resource, units))
    names = [f"{resource.name}={unit.id}" for unit in units]
    match resource.given:
        case Given.NODES:
            nodes = dict.fromkeys(node for unit in units for node in unit.nodes)
            answer.devices.extend(
                DeviceSpec(
                    container_path=node.container_path,
                    host_path=node.host_path,
                    permissions=_PERMISSIONS,
                )
                for node in nodes
            )
        case Given.CDI_ANNOTATIONS:
            for first in units[:1]:
                key, value = make_annotation(_PLUGIN, first.id, names)
                answer.annotations[key] = value
        case Given.CDI_CRI:
            answer.cdi_devices.extend(CDIDevice(name=name) for name in names)
    return answer


def _environment(resource: Resource, units: Iterable[Unit]) -> dict[str, str]:
    """The addresses of the functions, in the variables that others set too."""
    members = ",".join(member for unit in units for member in unit.members)
    prefixes = ("PCIDEVICE", *(("PCI_RESOURCE",) if resource.pci_resource_env else ()))
    return {f"{prefix}_{resource.in_env}": members for prefix in prefixes} if members else {}
