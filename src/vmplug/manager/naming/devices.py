"""The devices that the policy lets this host hand over, by the names that CDI gives them.

A name is asked for as a container would ask for it: what the policy refuses then has none. Whether
a device is in use does not matter, as that changes from hour to hour: `check` asks when a
container wants it.
"""

import re
from collections.abc import Iterable, Iterator

import msgspec

from vmplug.cdi.names import find_name_problem
from vmplug.devnum import DevNum, is_decimal
from vmplug.errors import AttributeReadError, HostError, SpecError
from vmplug.host.block.device import BlockDevice
from vmplug.host.device import HostDevice
from vmplug.host.inventory import read_sockets
from vmplug.host.kind import DeviceType
from vmplug.host.paths import find_stable_names
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.uses import read_block_paths
from vmplug.host.pci.vfio import has_node, read_cdev_nodes
from vmplug.host.resolve import resolve_all
from vmplug.host.root import HostRoot
from vmplug.host.vhost_user.store import VhostUserStore
from vmplug.manager.setup import Setup
from vmplug.oci.info import DeviceInfo, DevType, normal_container_path
from vmplug.policy.gate import PolicyCheck
from vmplug.policy.rules import Policy

VENDOR = "vmplug.org"
"""That of every kind that vmplug writes."""

_GROUPS, _CDEVS = "/sys/class/vfio", "/sys/class/vfio-dev"
_NOT_IN_CLASS = re.compile(r"[^A-Za-z0-9_-]")
"""Also a dot, which needs CDI 0.6.0."""


class CdiDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device by its name within a kind; `host_path` is its node on this host."""

    kind: str
    name: str
    host_path: str
    container_path: str
    read_only: bool

    def __str__(self) -> str:
        return f"{self.kind}={self.name}"


class LeftOut(msgspec.Struct, frozen=True, kw_only=True):
    """What the policy allows, and yet has no name; `what` is the name or file that it is about."""

    code: str
    what: str
    message: str


class _Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A name, and the path in a container of what has it.

    `owners` are all that have the name, if several have.
    """

    name: str
    path: str
    node: str | None
    dev_type: DevType
    devnum: DevNum
    owners: tuple[DevNum, ...] = ()

    @property
    def request(self) -> DeviceInfo:
        """What a container asks for, by its number: the path may be none that it can have."""
        return DeviceInfo(
            container_path=f"/dev/{self.devnum}", dev_type=self.dev_type, devnum=self.devnum
        )


def find_named_devices(setup: Setup, policy: Policy) -> tuple[list[CdiDevice], list[LeftOut]]:
    """The devices in the order of their names, and what has to do without one.

    Raises AttributeReadError, and NoSuchDevice when there is no vhost-user store where one is
    named.
    """
    host, store = setup.host, setup.vhost_user_store
    candidates = [*_list_vfio(host), *_list_disks(host), *_list_stored(store, host)]
    answers = resolve_all([each.request for each in candidates], host, store)
    found, left_out = list[CdiDevice](), dict[str, LeftOut]()
    for candidate, answer in zip(candidates, answers, strict=True):
        try:
            if isinstance(answer, HostError):
                raise answer
            named = _name(candidate, answer, policy, host)
        except HostError as error:
            named = LeftOut(code=error.code, what=candidate.name, message=error.message)
        if isinstance(named, LeftOut):
            left_out[named.what] = named
        elif named:
            found.append(named)
    return sorted(found, key=str), [left_out[what] for what in sorted(left_out)]


def _list_vfio(root: HostRoot) -> Iterator[_Candidate]:
    """The nodes of VFIO. Kata's rule: a device is vfioN, or the number of its group."""
    groups = [(f"{_GROUPS}/{name}", "/dev/vfio", name) for name in root.list_dir(_GROUPS)]
    cdevs = [(f"{_CDEVS}/{name}", "/dev/vfio/devices", name) for name in root.list_dir(_CDEVS)]
    known = [each for each in groups if is_decimal(each[2])]
    for path, directory, name in [*known, *cdevs]:
        number, node = root.read_devnum(f"{path}/dev"), f"{directory}/{name}"
        if number and has_node(node, root):
            yield _Candidate(name=name, path=node, node=node, dev_type=DevType.CHAR, devnum=number)


def _list_disks(root: HostRoot) -> Iterator[_Candidate]:
    """The block devices that have names which stay the same."""
    paths = read_block_paths(root).values()
    numbers = [number for path in paths if (number := root.read_devnum(f"{path}/dev"))]
    names, alike = find_stable_names(numbers, root)
    shared = [(name, number) for name, numbers in alike.items() for number in numbers]
    for name, number in [*names.items(), *shared]:
        yield _Candidate(
            name=name,
            path=f"/dev/disk/by-id/{name}",
            node=None,
            dev_type=DevType.BLOCK,
            devnum=number,
            owners=alike.get(name, ()),
        )


def _list_stored(store: VhostUserStore | None, root: HostRoot) -> Iterator[_Candidate]:
    """The nodes of a vhost-user store."""
    for stored in read_sockets(store, root) if store else ():
        name = stored.device_node.rpartition("/")[2]
        yield _Candidate(
            name=name,
            path=f"/dev/vhost-user/{name}",
            node=stored.device_node,
            dev_type=DevType.BLOCK,
            devnum=stored.devnum,
        )


def _name(
    candidate: _Candidate, device: HostDevice, policy: Policy, root: HostRoot
) -> CdiDevice | LeftOut | None:
    """The device by its name; None if it has another, or the policy does not allow it."""
    if isinstance(device, VfioGroup) and not _is_named_by(candidate.node, device, root):
        return None
    device_class = _find_class(candidate.node, device, root)
    kind = f"{VENDOR}/{device_class or 'unknown'}"
    named = candidate.request._replace(cdi_names=(f"{kind}={candidate.name}",))
    info = _find_allowed(named, device, policy, root)
    if info is None:
        return None
    if candidate.owners:
        owners = " and ".join(f"b:{number}" for number in candidate.owners)
        why = f"{candidate.path} is the name of {owners}: neither gets it"
        return LeftOut(code="ambiguous-name", what=candidate.name, message=why)
    if problem := find_name_problem(candidate.name) or _find_path_problem(candidate.path):
        return LeftOut(code="bad-cdi-name", what=candidate.name, message=problem)
    if device_class is None:
        raise AttributeReadError(device.host_path, why="no vendor or class")
    return CdiDevice(
        kind=kind,
        name=candidate.name,
        host_path=candidate.node or device.host_path,
        container_path=candidate.path,
        read_only=info.read_only,
    )


def _find_path_problem(path: str) -> str | None:
    try:
        normal_container_path(path)
    except SpecError as error:
        return error.message
    return None


def _is_named_by(node: str | None, group: VfioGroup, root: HostRoot) -> bool:
    """Whether a group goes by this node: its members' own, if they have such, or else its own.

    A group without members has gone, or has only what vmplug does not support.
    """
    cdevs = group.cdev_nodes or read_cdev_nodes(group, root)
    nodes = [cdev for _, cdev in cdevs] or [group.group_node]
    return bool(group.members) and node in nodes


def _find_allowed(
    info: DeviceInfo, device: HostDevice, policy: Policy, root: HostRoot
) -> DeviceInfo | None:
    """The request that the policy allows: for reading and writing, or else for reading alone."""
    check = PolicyCheck(policy=policy)
    for asked in (info._replace(read_only=read_only) for read_only in _accesses(device)):
        if not check.judge(asked, device, None, root).refusals:
            return asked
    return None


def _accesses(device: HostDevice) -> Iterable[bool]:
    """Whether it is asked for read-only, the wider access first; VFIO always gives all."""
    if isinstance(device, BlockDevice) and device.read_only:
        return (True,)
    can_be = device.kind in {DeviceType.BLOCK, DeviceType.VHOST_USER_BLK}
    return (False, True) if can_be else (False,)


def _find_class(node: str | None, device: HostDevice, root: HostRoot) -> str | None:
    """The class of its kind; None if the kernel does not say what it is."""
    if not isinstance(device, VfioGroup):
        is_disk = device.kind is DeviceType.BLOCK
        return "disk" if is_disk else device.kind.removesuffix("-pci")
    if device.mediated:
        path = f"{device.mediated.sysfs_path}/mdev_type"
        type_name = (root.read_link(path) or "").rpartition("/")[2]
        return f"mdev-{_NOT_IN_CLASS.sub('-', type_name)}".rstrip("-_")
    member = next((name for name, cdev in device.cdev_nodes if cdev == node), None)
    function = next((f for f in device.functions if str(f.bdf) == member), device.functions[0])
    if function.vendor_id is None or function.class_code is None:
        return None
    return f"vfio-{function.vendor_id:04x}-{function.class_code >> 8:04x}"
