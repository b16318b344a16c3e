"""Does a process have a character device open? It may go on: it is only mentioned.

No VM gets a character device: it is counted for its container, which shares it with the host.
"""

from collections.abc import Iterator
from shlex import quote

from vmplug.devnum import key_of
from vmplug.host.block.usage import HostUsage
from vmplug.host.check.unknown import find_unread, not_looked_for
from vmplug.host.device import CharDevice
from vmplug.host.finding import Code, Finding, Severity, UsedBy
from vmplug.host.root import HostRoot
from vmplug.host.use.openers import DeviceNode, Wanted, wanted_node

_EVERYBODYS = frozenset({1, 5})
"""Memory (null, zero, urandom) and terminals (tty, ptmx), which every container has.

Source: Documentation/admin-guide/devices.txt; OCI runtime-spec, config-linux.md, default devices.
"""


def may_have_users(device: CharDevice) -> bool:
    """Whether the processes that have it open say anything: any may have /dev/null."""
    return device.devnum is None or device.devnum.major not in _EVERYBODYS


def check_open_char(device: CharDevice, usage: HostUsage, root: HostRoot) -> Iterator[Finding]:
    """Processes that have it open, other than vmplug's own VMs."""
    if not may_have_users(device):
        return
    node = DeviceNode.of_char(device.device_node, root)
    if node.number is None:  # a copy of a host may have no nodes, only their names
        node = DeviceNode(path=node.path, kind=node.kind, number=device.devnum)
    wanted = wanted_node(node, root)
    status = None if node.key else root.stat_or_none(device.device_node)  # a FIFO
    wanted |= {key_of(status): device.device_node} if status else {}
    yield from mention_openers(wanted, usage)
    yield from unknown_in_copy(usage, root)


def unknown_in_copy(usage: HostUsage, root: HostRoot) -> Iterator[Finding]:
    """The open files that a copy of a host lacks; those of the running host may only go on."""
    if not root.is_live:
        opened = usage.open_files
        yield from map(not_looked_for, find_unread(opened, opened.unlisted))


def mention_openers(wanted: Wanted, usage: HostUsage) -> Iterator[Finding]:
    """The processes that have one of these files open, other than vmplug's own VMs."""
    for opener in usage.open_files.find(wanted):
        if opener.pid not in usage.vms:
            yield mention(opener.path, f"process {opener.pid} ({opener.name})")


def mention(path: str, who: str) -> Finding:
    """A user that may go on."""
    return Finding(
        Code.OPEN_BY_PROCESS,
        f"{path} is open in {who}",
        f"leave it if both may use it; else end that process: fuser --verbose {quote(path)}",
        Severity.WARNING,
        used_by=UsedBy(on=path, who=who, how="the open files of all processes"),
    )
