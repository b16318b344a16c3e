"""CDI: which devices do the files of this host define, and what is one for a container?

    files -> Registry -> inject(config, names) -> config       Spec -> write_spec -> file

In come the files of /etc/cdi and /var/run/cdi, a container's OCI config and qualified names
(`vendor.com/class=name`); out comes the config that a container engine makes of them, or an error
that names the file, the field, what is wrong and what is right. Nothing is run, followed or
mounted. Only this package and vmplug.errors are imported, and PyYAML for YAML.

Container Device Interface up to 1.1.0. Source: tags.cncf.io/container-device-interface.
"""

from vmplug.cdi.inject import MissingNode as MissingNode
from vmplug.cdi.inject import apply as apply
from vmplug.cdi.inject import inject as inject
from vmplug.cdi.names import ANNOTATION_PREFIX as ANNOTATION_PREFIX
from vmplug.cdi.names import QualifiedName as QualifiedName
from vmplug.cdi.names import make_annotation as make_annotation
from vmplug.cdi.names import parse_annotations as parse_annotations
from vmplug.cdi.node import HostNode as HostNode
from vmplug.cdi.node import find_node as find_node
from vmplug.cdi.problem import CdiError as CdiError
from vmplug.cdi.problem import Problem as Problem
from vmplug.cdi.problem import UnresolvableDevices as UnresolvableDevices
from vmplug.cdi.read import parse_spec as parse_spec
from vmplug.cdi.read import read_spec as read_spec
from vmplug.cdi.registry import DEFAULT_DIRECTORIES as DEFAULT_DIRECTORIES
from vmplug.cdi.registry import FoundDevice as FoundDevice
from vmplug.cdi.registry import Registry as Registry
from vmplug.cdi.registry import SpecFile as SpecFile
from vmplug.cdi.registry import read_directories as read_directories
from vmplug.cdi.spec import ContainerEdits as ContainerEdits
from vmplug.cdi.spec import Device as Device
from vmplug.cdi.spec import DeviceNode as DeviceNode
from vmplug.cdi.spec import Hook as Hook
from vmplug.cdi.spec import IntelRdt as IntelRdt
from vmplug.cdi.spec import Mount as Mount
from vmplug.cdi.spec import NetDevice as NetDevice
from vmplug.cdi.spec import Spec as Spec
from vmplug.cdi.version import VERSIONS as VERSIONS
from vmplug.cdi.version import minimum_version as minimum_version
from vmplug.cdi.write import format_spec as format_spec
from vmplug.cdi.write import write_spec as write_spec
