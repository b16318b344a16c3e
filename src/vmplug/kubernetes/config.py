"""The configuration of the device plugin: which devices are a resource, and how they are given."""

import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import StrEnum
from ipaddress import ip_address
from typing import Annotated, TypeVar

import msgspec

from vmplug.cdi.names import find_kind_problem
from vmplug.host.kind import DeviceType
from vmplug.manager.naming.specs import DEFAULT_DIRECTORY
from vmplug.policy.pattern import ClassPattern, PathPattern, PciPattern
from vmplug.policy.rules import Rule
from vmplug.policy.toml import OperatorsFile, Words

KUBELET_DIRECTORY = "/var/lib/kubelet"
RECONCILE_S = 60.0

_NAME = re.compile(
    r"[a-z]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*"
    r"/[A-Za-z]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
)
"""What Kubernetes and CDI both take. Source: k8s.io/apimachinery, IsQualifiedName."""
_NAME_LENGTH_MAX = 200
"""The name of its CDI file has it whole, and the kernel takes 255 characters."""
_OF_QUOTAS = "requests."
"""Kubernetes takes no such resource. Source: pkg/apis/core/v1/helper, IsExtendedResourceName."""
_RESERVED = ("kubernetes.io", "k8s.io")
_ADDRESS = re.compile(r"(?:\[([0-9a-f:.]+)\]|([0-9.]+)):([0-9]{1,5})", re.ASCII)
_PORT_MAX = 65535
_NOT_IN_ENV = re.compile(r"[^A-Z0-9]")

T = TypeVar("T")


class Given(StrEnum):
    """How a container gets its devices."""

    NODES = "nodes"
    CDI_ANNOTATIONS = "cdi-annotations"
    CDI_CRI = "cdi-cri"

    @property
    def is_cdi(self) -> bool:
        """Whether it is by the names of CDI."""
        return self is not Given.NODES


class Managed(StrEnum):
    """When vmplug binds a device to VFIO."""

    START = "start"
    PRE_START = "pre-start"


class Address(msgspec.Struct, frozen=True):
    """An IP address and a port, as in `127.0.0.1:9808` and `[::1]:9808`."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Raises ValueError."""
        if found := _ADDRESS.fullmatch(text):
            with suppress(ValueError):
                host, port = str(ip_address(found[1] or found[2])), int(found[3])
                if 0 < port <= _PORT_MAX:
                    return cls(host, port)
        raise ValueError(f"{text!r} is not an IP address and a port, such as '127.0.0.1:9808'")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Resource(msgspec.Struct, frozen=True, kw_only=True):
    """Devices that pods ask for by one name; see docs/kubernetes.md for each key.

    `rule` selects them, together with `drivers` and `numa`: None there is any.
    """

    name: str
    rule: Rule
    drivers: frozenset[str] | None = None
    numa: frozenset[int] | None = None
    given: Given = Given.NODES
    managed: Managed | None = None
    pci_resource_env: bool = False

    @property
    def is_of_disks(self) -> bool:
        """Whether its devices are block devices."""
        return self.rule.paths is not None

    @property
    def in_env(self) -> str:
        """Its name in the names of environment variables, as in `PCIDEVICE_EXAMPLE_COM_GPU`."""
        return _NOT_IN_ENV.sub("_", self.name.upper())


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """All resources of a node; `name` is the path of the file, for messages.

    `metrics` is where Prometheus may ask; None for nowhere.
    """

    name: str
    resources: tuple[Resource, ...]
    kubelet_directory: str = KUBELET_DIRECTORY
    cdi_directory: str = DEFAULT_DIRECTORY
    reconcile_s: float = RECONCILE_S
    metrics: Address | None = None

    @property
    def plugin_directory(self) -> str:
        """Where kubelet and its plugins have their sockets."""
        return os.path.join(self.kubelet_directory, "device-plugins")

    @property
    def pod_resources_socket(self) -> str:
        """Where kubelet answers which pod has what."""
        return os.path.join(self.kubelet_directory, "pod-resources", "kubelet.sock")


class _Resource(
    msgspec.Struct, rename="kebab", forbid_unknown_fields=True, frozen=True, kw_only=True
):
    name: str
    pci: Words | None = None
    classes: Words | None = None
    drivers: Words | None = None
    paths: Words | None = None
    numa: (
        Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(min_length=1)] | None
    ) = None
    given: Given = Given.NODES
    managed: Managed | None = None
    pci_resource_env: bool = False


class _File(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, frozen=True, kw_only=True):
    resource: list[_Resource] = msgspec.field(default_factory=list)
    kubelet_directory: str = KUBELET_DIRECTORY
    cdi_directory: str = DEFAULT_DIRECTORY
    reconcile_seconds: Annotated[float, msgspec.Meta(ge=1, le=3600)] = RECONCILE_S
    metrics: str | None = None


def read_config(path: str | os.PathLike[str]) -> Config:
    """The configuration in a TOML file.

    PolicyError when it cannot be read, when anything in it is wrong or unknown, and when others
    than root and this user may write to it.
    """
    file = OperatorsFile(
        path=os.fspath(path),
        what="the configuration",
        named="resource",
        hint_unread="write it, or pass another with --config; docs/kubernetes.md has its keys",
        hint_wrong="vmplug offers nothing until it is fixed; docs/kubernetes.md has its keys",
    )
    said = file.convert(file.read_tables(), _File, {"given": [*Given], "managed": [*Managed]})
    if not said.resource:
        file.refuse("has no [[resource]], so there is nothing to offer")
    file.require_absolute("kubelet-directory", said.kubelet_directory)
    file.require_absolute("cdi-directory", said.cdi_directory)
    metrics = file.parse("metrics", said.metrics and [said.metrics], Address.parse)
    resources = tuple(_parse(resource, file) for resource in said.resource)
    _check_names(resources, file)
    return Config(
        name=file.path,
        resources=resources,
        kubelet_directory=said.kubelet_directory,
        cdi_directory=said.cdi_directory,
        reconcile_s=said.reconcile_seconds,
        metrics=metrics[0] if metrics else None,
    )


def _parse(said: _Resource, file: OperatorsFile) -> Resource:
    def parse(
        key: str, texts: Iterable[str] | None, one: Callable[[str], T]
    ) -> tuple[T, ...] | None:
        return file.parse(f"{key} of resource {said.name!r}", texts, one)

    vendor = said.name.partition("/")[0]
    if not _NAME.fullmatch(said.name) or find_kind_problem(said.name):
        file.refuse(
            f"is wrong at name of resource {said.name!r}: write a domain in small letters, a "
            "slash and a name of at most 63 letters, digits, '-', '_' and '.': example.com/gpu"
        )
    if len(said.name) > _NAME_LENGTH_MAX:
        file.refuse(
            f"is wrong at name of resource {said.name!r}: it is longer than {_NAME_LENGTH_MAX} "
            "characters"
        )
    if vendor.startswith(_OF_QUOTAS):
        file.refuse(
            f"is wrong at name of resource {said.name!r}: Kubernetes takes no domain that begins "
            f"with {_OF_QUOTAS!r}"
        )
    if vendor in _RESERVED or vendor.endswith(tuple(f".{name}" for name in _RESERVED)):
        file.refuse(
            f"is wrong at name of resource {said.name!r}: {vendor} is Kubernetes' own, use a "
            "domain of yours"
        )
    of_functions = [key for key in ("pci", "classes", "drivers") if getattr(said, key)]
    if said.paths and of_functions:
        file.refuse(
            f"has a resource {said.name!r} with paths and {of_functions[0]}: it has either block "
            "devices or PCI functions"
        )
    if not (said.paths or of_functions):
        file.refuse(
            f"has a resource {said.name!r} that names no devices: add pci, classes, drivers or "
            "paths"
        )
    if said.paths and (said.managed or said.pci_resource_env):
        key = "managed" if said.managed else "pci-resource-env"
        file.refuse(f"has a resource {said.name!r} with paths and {key}: it is for PCI functions")
    rule = Rule(
        name=said.name,
        kinds=frozenset({DeviceType.BLOCK if said.paths else DeviceType.VFIO}),
        paths=parse("paths", said.paths, PathPattern.parse),
        pci=parse("pci", said.pci, PciPattern.parse),
        classes=parse("classes", said.classes, ClassPattern.parse),
    )
    return Resource(
        name=said.name,
        rule=rule,
        drivers=None if said.drivers is None else frozenset(said.drivers),
        numa=None if said.numa is None else frozenset(said.numa),
        given=said.given,
        managed=said.managed,
        pci_resource_env=said.pci_resource_env,
    )


def _check_names(resources: Iterable[Resource], file: OperatorsFile) -> None:
    """Refuse names that a container cannot tell apart, in its environment."""
    seen = dict[str, str]()
    for resource in resources:
        other = seen.get(resource.in_env)
        seen[resource.in_env] = resource.name
        if other == resource.name:
            file.refuse(f"has two resources named {other!r}")
        if other:
            file.refuse(
                f"has the resources {other!r} and {resource.name!r}: a container sees both as "
                f"PCIDEVICE_{resource.in_env}"
            )
