"""The back ends of devices in the in-memory hypervisor: disks, connections, objects.

The contract tests compare its answers with those of a real QEMU.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vmplug.drivers.ports import VF_UUID
from vmplug.hypervisor.qemu.abilities import IOMMUFD, RECONNECT, RECONNECT_MS

_NO_AIO = (
    "Unable to use native AIO: failed to create linux AIO context: "
    "Resource temporarily unavailable"
)


class Refused(Exception):
    """A refusal in QEMU's words."""

    def __init__(self, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.error_class = error_class


@dataclass(slots=True)
class FakeBackends:
    """The commands that add and remove the parts of a device, by their QMP names.

    `reconnect` is the option of chardevs, that of QEMU 7.2 or that of 11. `iommufd`: there are
    objects of that type. `vf_token`: vfio-pci has the property. `sizes` are those of nodes that
    were resized, `memory` those of memory backends. `kept` are files that QEMU will never close.
    `aio`: the host has contexts for aio=native. `fdsets` are the opaque words of
    sets by their numbers.
    """

    nodes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    objects: dict[str, str] = field(default_factory=dict)
    chardevs: dict[str, str] = field(default_factory=dict)
    netdevs: dict[str, str] = field(default_factory=dict)
    descriptors: set[str] = field(default_factory=set)
    sizes: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    reconnect: str = RECONNECT_MS
    iommufd: bool = False
    vf_token: bool = False
    kept: list[str] = field(default_factory=list)
    aio: bool = True
    fdsets: dict[int, str] = field(default_factory=dict)

    @abstractmethod
    def _used(self, key: str) -> set[Any]:
        """The values of that property in devices, and for a chardev also in networks."""

    def _query_blockstats(self, *, query_nodes: bool) -> list[dict[str, str]]:
        return [{"node-name": name} for name in self.nodes]

    def _query_chardev(self) -> list[dict[str, Any]]:
        return [
            {"label": name, "filename": connection, "frontend-open": True}
            for name, connection in self.chardevs.items()
        ]

    def _blockdev_add(self, node_name: str, **options: Any) -> dict[str, Any]:
        group, file = options.get("throttle_group"), options.get("file")
        if group and group not in self.objects:
            raise Refused(f"Throttle group '{group}' does not exist")
        if isinstance(file, str) and file not in self.nodes:
            raise Refused(f"Cannot find device='{file}' nor node-name='{file}'")
        if node_name in self.nodes:
            raise Refused(f"Duplicate nodes with node-name='{node_name}'")
        if isinstance(file, Mapping) and file.get("aio") == "native" and not self.aio:
            raise Refused(_NO_AIO)
        self.nodes[node_name] = options
        return {}

    def _blockdev_del(self, node_name: str) -> dict[str, Any]:
        if node_name not in self.nodes:
            raise Refused(f"Failed to find node with node-name='{node_name}'")
        if node_name in self._used("drive"):
            raise Refused(f"Node {node_name} is in use")
        if node_name in [node.get("file") for node in self.nodes.values()]:
            raise Refused(f"Block device {node_name} is in use")
        del self.nodes[node_name]
        return {}

    def _object_add(self, qom_type: str, id: str, **properties: Any) -> dict[str, Any]:
        if qom_type == IOMMUFD and not self.iommufd:
            raise Refused(f"Parameter 'qom-type' does not accept value '{IOMMUFD}'")
        if qom_type == IOMMUFD and "fd" in properties:
            self._take_file(properties["fd"])
            self.kept.append(properties["fd"])
        if id in self.objects:
            raise Refused(f"attempt to add duplicate property '{id}' to object (type 'container')")
        self.objects[id] = qom_type
        if "size" in properties:
            self.memory[id] = properties["size"]
        return {}

    def _qom_list_types(self, implements: str) -> list[dict[str, str]]:
        known = {IOMMUFD} if self.iommufd else set()
        return [{"name": name, "parent": "object"} for name in known & {implements}]

    def _device_list_properties(self, typename: str) -> list[dict[str, str]]:
        names = ["host", "sysfsdev", *([VF_UUID] if self.vf_token else [])]
        return [{"name": name, "type": "str"} for name in names]

    def _object_del(self, id: str) -> dict[str, Any]:
        if id not in self.objects:
            raise Refused(f"object '{id}' not found")
        groups = [node.get("throttle_group") for node in self.nodes.values()]
        if id in [*groups, *self._used("memdev"), *self._used(IOMMUFD)]:
            raise Refused(f"object '{id}' is in use, can not be deleted")
        del self.objects[id]
        return {}

    def _getfd(self, fdname: str) -> dict[str, Any]:
        self.descriptors.add(fdname)
        return {}

    def _add_fd(self, opaque: str) -> dict[str, Any]:
        number = max(self.fdsets, default=-1) + 1
        self.fdsets[number] = opaque
        return {"fdset-id": number, "fd": 0}

    def _remove_fd(self, fdset_id: int) -> dict[str, Any]:
        if self.fdsets.pop(fdset_id, None) is None:
            raise Refused(f"File descriptor named 'fdset-id:{fdset_id}' not found")
        return {}

    def _query_fdsets(self) -> list[dict[str, Any]]:
        return [
            {"fdset-id": number, "fds": [{"fd": 0, "opaque": opaque}]}
            for number, opaque in self.fdsets.items()
        ]

    def _x_debug_query_block_graph(self) -> dict[str, Any]:
        """A node for each name, and one for each child that was described in its place."""
        nodes: list[dict[str, Any]] = []
        edges: list[dict[str, Any]] = []

        def add(name: str, options: Mapping[str, Any]) -> int:
            number = len(nodes)
            nodes.append({"id": number, "type": "block-driver", "name": name})
            for role in ("file", "backing", "data-file"):
                if isinstance(below := options.get(role), Mapping):
                    child = add(f"#block{len(nodes)}", below)
                    edges.append({"parent": number, "name": role, "child": child})
            return number

        for name, options in self.nodes.items():
            add(name, options)
        return {"nodes": nodes, "edges": edges}

    def _take_file(self, name: str) -> None:
        """From now on a file that was passed belongs to a device or an object."""
        if name not in self.descriptors:
            why = f"File descriptor named '{name}' has not been found"
            raise Refused(f"Could not parse remote object fd {name}:{why}")
        self.descriptors.remove(name)

    def _closefd(self, fdname: str) -> dict[str, Any]:
        if fdname not in self.descriptors:
            raise Refused(f"File descriptor named '{fdname}' not found")
        self.descriptors.remove(fdname)
        return {}

    def _chardev_add(self, id: str, backend: Mapping[str, Any]) -> dict[str, Any]:
        if id in self.chardevs:
            raise Refused(f"Chardev with id '{id}' already exists")
        data = backend["data"]
        for unknown in data.keys() & {RECONNECT, RECONNECT_MS} - {self.reconnect}:
            raise Refused(f"Parameter 'backend.data.{unknown}' is unexpected")
        name = data["addr"]["data"].get("str")
        if name not in {None, *self.descriptors}:
            why = f"File descriptor named '{name}' has not been found"
            raise Refused(f"Failed to add chardev '{id}': {why}")
        self.descriptors.discard(name)
        self.chardevs[id] = "unix:"
        return {}

    def _query_command_line_options(self, option: str) -> list[dict[str, Any]]:
        parameters = [{"name": "path"}, {"name": self.reconnect}]
        return [{"option": option, "parameters": parameters}]

    def _chardev_remove(self, id: str) -> dict[str, Any]:
        if id not in self.chardevs:
            raise Refused(f"Chardev '{id}' not found")
        if id in self._used("chardev"):
            raise Refused(f"Chardev '{id}' is busy")
        del self.chardevs[id]
        return {}

    def _netdev_add(self, type: str, id: str, chardev: str, queues: int = 1) -> dict[str, Any]:
        if id in self.netdevs:
            raise Refused(f"Duplicate ID '{id}'")
        if chardev not in self.chardevs:
            raise Refused(f'chardev "{chardev}" not found')
        self.netdevs[id] = chardev
        return {}

    def _netdev_del(self, id: str) -> dict[str, Any]:
        if id not in self.netdevs:
            raise Refused(f"Device '{id}' not found", "DeviceNotFound")
        self.chardevs.pop(self.netdevs.pop(id), None)
        return {}

    def _block_resize(self, node_name: str, size: int) -> dict[str, Any]:
        if node_name not in self.nodes:
            raise Refused(f"Cannot find device='' nor node-name='{node_name}'")
        self.sizes[node_name] = size
        return {}
