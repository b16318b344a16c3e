"""Thing: one picture of what a device is, what it is made of, and who uses it.

A thing is a tree. `made_of` has whatever is on it and leaves the host with it: the partitions of a
disk, what the kernel built on them, the disks, nodes and interfaces of a function, its virtual
functions and mediated devices, the other members of its IOMMU group. It also has what the thing
depends on, and is in use through it: the disk of a partition, the file behind a loop device, the
physical function of a virtual one, the parent of a mediated device. `relation` says which.

A use stands at the part that is in use. The uses are the findings of `vmplug.host.check` that say
who uses what (`Finding.used_by`): those that `check` has of the thing itself, and, at what is
built on it, those that `check` has of that. So `check` and this tree cannot disagree.

Unknown is not no: `unknown` says which uses could not be looked for.
"""

from collections.abc import Iterator
from enum import StrEnum

import msgspec

from vmplug.host.finding import Code, Severity


class ThingKind(StrEnum):
    """What a thing is."""

    BCACHE = "bcache"
    BRIDGE = "bridge"
    CHARACTER_DEVICE = "character-device"
    CONNECTION = "connection"
    DEVICE_MAPPER = "device-mapper"
    DIRECTORY = "directory"
    DISK = "disk"
    FILE = "file"
    FUNCTION = "function"
    INTERFACE = "network-interface"
    IOMMU_GROUP = "iommu-group"
    LOOP = "loop"
    MD = "md"
    MEDIATED_DEVICE = "mediated-device"
    MEDIATED_TYPE = "mediated-type"
    OTHER_DEVICE = "other-device"
    PARTITION = "partition"
    SOCKET = "socket"


class Relation(StrEnum):
    """What a thing is to the thing that it is listed in.

    `disk`, `backing-file`, `data-file`, `file`, `built-from`, `physical-function` and `parent`
    are what that thing depends on. All others are on it, or go with it.
    """

    BACKING_FILE = "backing-file"
    BRIDGE = "bridge"
    BUILT_FROM = "built-from"
    BUILT_ON_IT = "built-on-it"
    DATA_FILE = "data-file"
    DISK = "disk"
    FILE = "file"
    FUNCTION = "function"
    INTERFACE = "interface"
    MEDIATED_DEVICE = "mediated-device"
    MEMBER = "member"
    NODE = "node"
    PARENT = "parent"
    PARTITION = "partition"
    PHYSICAL_FUNCTION = "physical-function"
    SAME_DISK = "same-disk"
    SAME_FILE = "same-file"
    SAME_GROUP = "same-group"
    VIRTUAL_FUNCTION = "virtual-function"


class ThingUse(msgspec.Struct, frozen=True, kw_only=True):
    """One use of a thing; `code`, `message`, `hint` and `severity` are those of `check`.

    `where` is a mount point, a node, a namespace; None where there is no such place. `found_by` is
    what shows the use.
    """

    code: Code
    who: str
    where: str | None
    found_by: str
    message: str
    hint: str
    severity: Severity = Severity.ERROR


class Thing(msgspec.Struct, frozen=True, kw_only=True):
    """One thing of the host. A fact that the host does not give is None.

    `name` is a node, a path, the address of a function, a UUID, or a name of the kernel.
    `identity` is what no name can fake, as `vmplug.host.check.thing` describes it. `relation` is
    None for the thing that was asked for. `title` is a second name, such as that of a volume.
    `unknown` are sentences.
    """

    kind: ThingKind
    name: str
    identity: str | None = None
    relation: Relation | None = None
    title: str | None = None
    driver: str | None = None
    size_bytes: int | None = None
    made_of: tuple["Thing", ...] = ()
    uses: tuple[ThingUse, ...] = ()
    unknown: tuple[str, ...] = ()

    def walk(self) -> Iterator["Thing"]:
        """This thing and all that it is made of, each before its parts."""
        yield self
        for part in self.made_of:
            yield from part.walk()
