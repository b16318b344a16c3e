"""A CDI spec as values: a file with devices of one kind, and what each does to a container.

A field that is missing has its default. Fields and their types are those of CDI 1.1.0, with the
two of Intel RDT that 1.1.0 took away. Source: the specification, section "JSON Definition".
"""

from collections.abc import Mapping
from typing import Annotated

import msgspec

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Uint32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


class _Part(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    rename="camel",
    forbid_unknown_fields=True,
    gc=False,
):
    """A mapping of the file; its keys are the fields in camelCase."""


class DeviceNode(_Part, frozen=True, kw_only=True):
    """A device node for the container.

    `host_path` is the node on the host, `path` if empty. `type` is b, c, u or p, and is the host
    node's if empty. Without a `major`, or with 0, it has the numbers of the host's node.
    `permissions` are some of r, w and m; empty means all three, and `none` means none.
    """

    path: str = ""
    host_path: str = ""
    type: str = ""
    major: Int64 | None = None
    minor: Int64 | None = None
    file_mode: Uint32 | None = None
    permissions: str = ""
    uid: Uint32 | None = None
    gid: Uint32 | None = None

    @property
    def is_read_only(self) -> bool:
        """Whether the container may read it and not write to it."""
        return bool(self.permissions) and "w" not in self.permissions

    @property
    def is_usable(self) -> bool:
        """Whether the container may read it or write to it: `m` alone only allows mknod."""
        return not self.permissions or not {"r", "w"}.isdisjoint(self.permissions)


class NetDevice(_Part, frozen=True, kw_only=True):
    """A network interface of the host, and its name in the container."""

    host_interface_name: str = ""
    name: str = ""


class Hook(_Part, frozen=True, kw_only=True):
    """A program that the OCI runtime runs at that moment; `timeout` is in seconds."""

    hook_name: str = ""
    path: str = ""
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    timeout: Int64 | None = None


class Mount(_Part, frozen=True, kw_only=True):
    """A mount for the container."""

    host_path: str = ""
    container_path: str = ""
    options: tuple[str, ...] = ()
    type: str = ""


class IntelRdt(_Part, frozen=True, kw_only=True):
    """Cache and memory bandwidth; CMT and MBM until 1.0.0, schemata and monitoring from 1.1.0."""

    clos_id: str = msgspec.field(default="", name="closID")
    l3_cache_schema: str = ""
    mem_bw_schema: str = ""
    enable_cmt: bool = msgspec.field(default=False, name="enableCMT")
    enable_mbm: bool = msgspec.field(default=False, name="enableMBM")
    schemata: tuple[str, ...] = ()
    enable_monitoring: bool = False


class ContainerEdits(_Part, frozen=True, kw_only=True):
    """What is done to the OCI config of a container."""

    env: tuple[str, ...] = ()
    device_nodes: tuple[DeviceNode, ...] = ()
    net_devices: tuple[NetDevice, ...] = ()
    hooks: tuple[Hook, ...] = ()
    mounts: tuple[Mount, ...] = ()
    intel_rdt: IntelRdt | None = None
    additional_gids: tuple[Uint32, ...] = ()


NO_EDITS = ContainerEdits()


class Device(_Part, frozen=True, kw_only=True):
    """A device by its name within the kind."""

    name: str = ""
    annotations: Mapping[str, str] = {}
    container_edits: ContainerEdits = NO_EDITS


class Spec(_Part, frozen=True, kw_only=True):
    """A file: `container_edits` are done once for a container that gets any of the devices."""

    cdi_version: str = ""
    kind: str = ""
    annotations: Mapping[str, str] = {}
    devices: tuple[Device, ...] = ()
    container_edits: ContainerEdits = NO_EDITS
