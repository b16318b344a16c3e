"""CDI: which devices do the files of this host define, and what is one for a container?

    files -> Registry -> inject(config, names) -> config       Spec -> write_spec -> file

In come the files of /etc/cdi and /var/run/cdi, a container's OCI config and qualified names
(`vendor.com/class=name`); out comes the config that a container engine makes of them, or an error
that names the file, the field, what is wrong and what is right. Nothing is run, followed or
mounted. Of the rest of vmplug it needs the errors alone; it imports PyYAML to read YAML, or JSON
that not every parser reads alike.

Container Device Interface up to 1.1.0. Source: tags.cncf.io/container-device-interface.
"""

from vmplug.arguments import checked
from vmplug.cdi.inject import MissingNode, apply, inject
from vmplug.cdi.names import ANNOTATION_PREFIX, QualifiedName, make_annotation, parse_annotations
from vmplug.cdi.node import HostNode, find_node
from vmplug.cdi.problem import CdiError, Problem, UnresolvableDevices
from vmplug.cdi.read import parse_spec, read_spec
from vmplug.cdi.registry import (
    DEFAULT_DIRECTORIES,
    FoundDevice,
    Registry,
    SpecFile,
    read_directories,
)
from vmplug.cdi.spec import (
    ContainerEdits,
    Device,
    DeviceNode,
    Hook,
    IntelRdt,
    Mount,
    NetDevice,
    Spec,
)
from vmplug.cdi.version import VERSIONS, minimum_version
from vmplug.cdi.write import format_spec, write_spec

__all__ = [
    "ANNOTATION_PREFIX",
    "DEFAULT_DIRECTORIES",
    "VERSIONS",
    "CdiError",
    "ContainerEdits",
    "Device",
    "DeviceNode",
    "FoundDevice",
    "Hook",
    "HostNode",
    "IntelRdt",
    "MissingNode",
    "Mount",
    "NetDevice",
    "Problem",
    "QualifiedName",
    "Registry",
    "Spec",
    "SpecFile",
    "UnresolvableDevices",
    "apply",
    "find_node",
    "format_spec",
    "inject",
    "make_annotation",
    "minimum_version",
    "parse_annotations",
    "parse_spec",
    "read_directories",
    "read_spec",
    "write_spec",
]

# A wrong type is a TypeError that names the argument, as for all of vmplug. Its own modules call
# each other without that.
globals().update({name: checked(globals()[name]) for name in __all__})
