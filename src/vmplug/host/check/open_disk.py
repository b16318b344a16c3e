"""Does a process have a disk open that did not claim it? sysfs and the kernel let it in.

A writer destroys what the guest writes, or the guest what it writes: a database, another VMM, a
program that exports the disk. A reader sees what the guest writes, and harms nothing: smartd, a
backup.
"""

import stat
from collections.abc import Iterator
from functools import partial
from shlex import quote

from msgspec.structs import replace

from vmplug.devnum import DevNum, key_of
from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.block.sysfs import (
    find_block_directory,
    find_block_node,
    find_disk_path,
    read_command_nodes,
)
from vmplug.host.block.usage import HostUsage
from vmplug.host.check.unknown import find_unread, not_looked_for
from vmplug.host.finding import Access, Code, Finding, Severity, UsedBy
from vmplug.host.root import HostRoot
from vmplug.host.use.kernel_users import find_unknown_exports
from vmplug.host.use.openers import (
    DeviceNode,
    FileLock,
    Opener,
    Wanted,
    find_unseen_locks,
    read_locks,
    read_open_files,
    wanted_node,
)
from vmplug.host.use.qemu_lock import is_locked


def check_open_disk(
    disk: BlockDevice | DiskFile, access: Access, usage: HostUsage, root: HostRoot
) -> Iterator[Finding]:
    """Processes that keep it open, or what shows its bytes.

    The one that makes a network disk out of what a server sends may.
    """
    commands = _wanted_commands(disk, root)
    own, below = _wanted(disk, root) | commands, _wanted_below(disk, root)
    client = _network_client(disk, root)

    def matters(opener: Opener) -> bool:
        # multipathd reads the paths that a disk is built on, and may.
        sees_guest = opener.path in own.values() and not access.read_only
        # QEMU takes no lock on what it sends commands to.
        is_vm = opener.pid in usage.vms and opener.path not in commands.values()
        if is_vm or not (opener.writes or sees_guest):
            return False
        return not (client and root.stat_or_none(f"/proc/{opener.pid}/task/{client}"))

    for opener in usage.open_files.find_lasting(below | own, matters):
        is_command = opener.path in commands.values()
        named = f"{opener.path}, which sends commands to {disk.host_path}," if is_command else None
        yield _open_by(opener, named or opener.path, access)
    yield from open_in_vm(disk, usage, root)
    yield from _locked_unseen(own | below, access, usage, root)
    # Those that even root may not look into are not counted here: docs/safety.md.
    yield from map(not_looked_for, find_unread(usage.open_files, usage.open_files.unlisted))
    yield from map(not_looked_for, find_unknown_exports(root))


def _locked_unseen(
    wanted: Wanted, access: Access, usage: HostUsage, root: HostRoot
) -> Iterator[Finding]:
    """Users that only a lock shows, such as a process in a PID namespace beside this one."""
    locks = usage.once(read_locks)
    files = (key for key in wanted if not isinstance(key, str))
    locked = [key for key in files if key in locks and key not in usage.kernel_users]
    if not any(find_unseen_locks(key, locks[key], usage.open_files, root) for key in locked):
        return
    # Since the look at the open files one may have been opened; after this look it may be closed.
    opened = read_open_files(root)
    locks = read_locks(root)
    for key in locked if opened.is_known else ():
        for lock in find_unseen_locks(key, locks.get(key, ()), opened, root):
            if lock.writes or not access.read_only:
                yield _locked_by(lock, wanted[key], access, root)


def _locked_by(lock: FileLock, path: str, access: Access, root: HostRoot) -> Finding:
    name = (root.read_text(f"/proc/{lock.pid}/comm") or "?").strip() if lock.pid else None
    who = f"process {lock.pid} ({name})" if lock.pid else "a process"
    does = "writing" if lock.writes else "reading"
    return Finding(
        Code.OPEN_BY_PROCESS,
        f"{path} is locked for {does} by {who}, whose open files vmplug does not see",
        "end that use: of an NFS client, or of a process in another PID namespace; lslocks shows "
        "the lock",
        Severity.WARNING if access.share_rw or not lock.writes else Severity.ERROR,
        used_by=UsedBy(on=path, who=who, how="/proc/locks"),
    )


def find_openers_elsewhere(
    disk: BlockDevice, usage: HostUsage, root: HostRoot
) -> Iterator[Finding]:
    """Openers of loop devices on it and of its other names: `check_openers` has its own nodes."""
    own = {disk.device_node, *(part.device_node for part in disk.relatives)}
    own |= set(_wanted_commands(disk, root).values())
    for finding in check_open_disk(disk, Access(read_only=False), usage, root):
        if finding.used_by and finding.used_by.on not in own:
            yield finding


def open_in_vm(
    disk: BlockDevice | DiskFile, usage: HostUsage, root: HostRoot
) -> Iterator[Finding]:
    """VMs that write to it, and do not have it as the journal says.

    A warning: QEMU's own lock refuses what may not be shared.
    """
    identities = set(map(str, (disk.identity, *disk.related_identities)))
    vms = {pid: vm.vm for pid, vm in usage.vms.items() if not vm.holds & identities}

    def matters(opener: Opener) -> bool:
        return opener.writes and opener.pid in vms

    if vms:
        wanted = _wanted(disk, root) | _wanted_below(disk, root)
        for opener in usage.open_files.find_lasting(wanted, matters):
            yield _open_by_vm(opener, vms[opener.pid])


def find_qemu_locks(path: str, access: Access, root: HostRoot) -> Iterator[Finding]:
    """The lock bytes that QEMU sets in each file it opens."""
    if root.ask_open(path, partial(is_locked, read_only=access.read_only)):
        yield Finding(
            Code.IMAGE_LOCKED,
            f"{path} is open in another QEMU or in qemu-storage-daemon",
            f"fuser --verbose {quote(path)} names the process; stop it first",
            used_by=UsedBy(
                on=path, who="a QEMU or qemu-storage-daemon", how="the lock bytes of QEMU"
            ),
        )


def check_qemu_locks(
    path: str, disk: BlockDevice | DiskFile, access: Access, usage: HostUsage, root: HostRoot
) -> Iterator[Finding]:
    """`find_qemu_locks`, with the name of the VM if it is one of the journal."""
    for locked in find_qemu_locks(path, access, root):
        vm = next(open_in_vm(disk, usage, root), None)
        yield replace(vm, code=locked.code, severity=locked.severity) if vm else locked


def find_kernel_users(
    disk: BlockDevice | DiskFile, access: Access, usage: HostUsage, root: HostRoot
) -> Iterator[Finding]:
    """What the kernel itself uses the disk for, what shows its bytes, or what it is built on."""
    if usage.kernel_users:
        wanted = _wanted(disk, root) | _wanted_below(disk, root)
        yield from used_by_kernel(wanted, access, usage)


def used_by_kernel(wanted: Wanted, access: Access, usage: HostUsage) -> Iterator[Finding]:
    """One finding for each user in the kernel of these files."""
    found = (
        (path, user) for key, path in wanted.items() for user in usage.kernel_users.get(key, ())
    )
    for path, user in dict.fromkeys(found):
        is_harmless = not user.writes or (user.code is Code.IS_EXPORTED and access.share_rw)
        yield Finding(
            user.code,
            f"{path} {user.does} {user.who}",
            user.remedy,
            Severity.WARNING if is_harmless else Severity.ERROR,
            used_by=UsedBy(on=path, who=user.who, how=user.how),
        )


def _network_client(disk: BlockDevice | DiskFile, root: HostRoot) -> int | None:
    """The thread that makes a network disk; None for other disks.

    Source: Linux drivers/block/nbd.c, pid_show.
    """
    if isinstance(disk, DiskFile) or disk.sysfs_path is None:
        return None
    return root.read_int(f"{find_disk_path(disk.sysfs_path, root)}/pid")


def _open_by_vm(opener: Opener, vm: str) -> Finding:
    return Finding(
        Code.OPEN_BY_PROCESS,
        f"{opener.path} is open for writing in VM {vm!r}, which did not get it from this journal",
        f"detach it where it was attached: by another journal's vmplug (vmplug reconcile --vm "
        f"{vm} lists such devices), or on QEMU's command line",
        Severity.WARNING,
        used_by=UsedBy(
            on=opener.path,
            who=f"VM {vm!r} (not from this journal)",
            how="the open files of all processes",
        ),
    )


def _open_by(opener: Opener, named: str, access: Access) -> Finding:
    process, path = f"process {opener.pid} ({opener.name})", opener.path
    end = f"end that process, or the service that it belongs to: fuser --verbose {quote(path)}"
    used_by = UsedBy(on=path, who=process, how="the open files of all processes")
    if not opener.writes:
        return Finding(
            Code.OPEN_BY_PROCESS,
            f"{named} is open for reading in {process}, which can see what the guest writes",
            f"leave it if it may see that; else {end}",
            Severity.WARNING,
            used_by=used_by,
        )
    return Finding(
        Code.OPEN_BY_PROCESS,
        f"{named} is open for writing in {process}",
        f"{end}; or set share-rw=on if its file system supports several writers",
        Severity.WARNING if access.share_rw else Severity.ERROR,
        used_by=used_by,
    )


def _wanted(disk: BlockDevice | DiskFile, root: HostRoot) -> Wanted:
    """The disk and all that shows its bytes."""
    wanted: Wanted = {}
    for number in disk.loops or ():
        wanted |= _wanted_block(number, None, root)
    if isinstance(disk, DiskFile):
        for path in disk.nodes:
            wanted |= _wanted_file(path, root)
        return wanted
    for part in disk.same_bytes:
        wanted |= _wanted_block(part.devnum, part.device_node, root)
    return wanted | _wanted_block(disk.devnum, disk.device_node, root)


def _wanted_commands(disk: BlockDevice | DiskFile, root: HostRoot) -> Wanted:
    """What sends commands to the disk, or to another that shows its bytes."""
    wanted: Wanted = {}
    if isinstance(disk, BlockDevice):
        numbers = (disk.devnum, *(part.devnum for part in disk.same_bytes), *disk.below)
        paths = (root.real_path(find_block_directory(number, root)) for number in numbers)
        for path in dict.fromkeys(find_disk_path(path, root) for path in paths):
            for node, number in read_command_nodes(path, root):
                wanted |= wanted_node(
                    DeviceNode(path=node, kind=stat.S_IFCHR, number=number), root
                )
    return wanted


def _wanted_below(disk: BlockDevice | DiskFile, root: HostRoot) -> Wanted:
    """What a block device is built on."""
    wanted: Wanted = {}
    if isinstance(disk, BlockDevice):
        for number in disk.below:
            wanted |= _wanted_block(number, None, root)
        for path in disk.below_files:
            wanted |= _wanted_file(path, root)
    return wanted


def _wanted_block(devnum: DevNum, node: str | None, root: HostRoot) -> Wanted:
    node = node or find_block_node(devnum, root) or f"/dev/block/{devnum}"
    return wanted_node(DeviceNode(path=node, kind=stat.S_IFBLK, number=devnum), root)


def _wanted_file(path: str, root: HostRoot) -> Wanted:
    status = root.stat_or_none(path)
    wanted: Wanted = {} if root.is_live else {path: path}
    return wanted | ({key_of(status): path} if status else {})
