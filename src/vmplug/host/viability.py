"""May an IOMMU group be handed over? Every reason against it, each with its remedy."""

from collections.abc import Iterator

from vmplug.host.device import VfioGroup
from vmplug.host.finding import Code, Finding
from vmplug.host.mounts import HostUsage
from vmplug.host.root import HostRoot


def check_group(group: VfioGroup, *, usage: HostUsage, root: HostRoot) -> Iterator[Finding]:  # noqa: ARG001
    """What speaks against handing the group over."""
    yield Finding(
        Code.NO_DRIVER,
        f"{group.host_path} is a VFIO device, which this vmplug cannot plug",
        "leave it out of the bundle",
    )
