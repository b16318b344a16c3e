"""Who else uses a directory that a VM asks for? They may go on: they are only mentioned.

A virtiofsd has it as its root, a QEMU with virtio-9p has it open, and the NFS server of the kernel
exports it to other machines.
Source: exports(5); exportfs(8), /var/lib/nfs/etab; nfsd(7), /proc/fs/nfsd/exports.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress

from vmplug.devnum import FileKey, is_decimal, key_of
from vmplug.errors import AttributeReadError
from vmplug.host.block.usage import HostUsage
from vmplug.host.check.open_char import mention, mention_openers, unknown_in_copy
from vmplug.host.device import SharedDirectory
from vmplug.host.finding import Code, Finding, Severity, UsedBy
from vmplug.host.root import HostRoot
from vmplug.host.use.mounts import unescape
from vmplug.host.use.statx import read_place

_EXPORTS = ("/proc/fs/nfsd/exports", "/var/lib/nfs/etab")


def check_shared(
    directory: SharedDirectory, usage: HostUsage, root: HostRoot
) -> Iterator[Finding]:
    """The processes of others that share it, and the machines that it is exported to."""
    path, status = directory.host_path, root.stat_or_none(directory.host_path)
    outside = root.stat_or_none("/")
    if status and outside and key_of(status) != key_of(outside):
        key = key_of(status)
        roots = usage.once(_read_roots).get(key, ())
        openers = [*(mention(path, who) for who in roots), *mention_openers({key: path}, usage)]
        yield from dict.fromkeys(openers)
        yield from unknown_in_copy(usage, root)
    for exported, clients in usage.once(_read_exports).items():
        if _overlap(path, exported):
            yield _is_exported(path, exported, clients)


def _read_roots(root: HostRoot) -> dict[FileKey, list[str]]:
    """The processes that have each directory as their root."""
    found = dict[FileKey, list[str]]()
    for pid in filter(is_decimal, root.list_dir("/proc")):
        if key := _root_of(pid, root):
            name = (root.read_text(f"/proc/{pid}/comm") or "?").strip()
            found.setdefault(key, []).append(f"process {pid} ({name})")
    return found


def _root_of(pid: str, root: HostRoot) -> FileKey | None:
    """Its storage is not asked: that of another process may not answer."""
    link = f"/proc/{pid}/root"
    if root.is_live:
        with suppress(AttributeReadError):
            place = read_place(link)
            return place[0] if place else None
        return None
    status = root.stat_or_none(link)
    return key_of(status) if status else None


def _read_exports(root: HostRoot) -> Mapping[str, str]:
    """The clients of each directory that the kernel's NFS server exports."""
    found = dict[str, set[str]]()
    for table in _EXPORTS:
        with suppress(AttributeReadError):
            for line in (root.read_text(table) or "").splitlines():
                path, _, clients = line.partition("\t")
                if path.startswith("/") and clients:
                    names = {word.partition("(")[0] for word in clients.split()}
                    found.setdefault(unescape(path), set()).update(names)
    return {path: " ".join(sorted(names)) for path, names in found.items()}


def _overlap(path: str, exported: str) -> bool:
    one, other = (f"{name.rstrip('/')}/" for name in (path, exported))
    return one.startswith(other) or other.startswith(one)


def _is_exported(path: str, exported: str, clients: str) -> Finding:
    where = "" if path == exported else f", with {exported}"
    return Finding(
        Code.OPEN_BY_PROCESS,
        f"{path} is exported by NFS to {clients}{where}",
        "leave it if those machines and the VM may use it together; else end the export: "
        f"exportfs -u {clients.partition(' ')[0]}:{exported}",
        Severity.WARNING,
        used_by=UsedBy(on=path, who=f"NFS clients {clients}", how="the tables of the NFS server"),
    )
