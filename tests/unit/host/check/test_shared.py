"""Who else uses a directory that a VM asks for: other VMs, other machines."""

from collections.abc import Sequence

import pytest

from tests.support.tree import HostTree
from vmplug.host.block.usage import read_usage
from vmplug.host.check.device import check_device
from vmplug.host.device import SharedDirectory
from vmplug.host.finding import Access, Code, Finding, Severity
from vmplug.host.kind import DeviceType

WORK = SharedDirectory(DeviceType.VHOST_USER_FS, "/srv/work", "work")


@pytest.fixture
def host(tree: HostTree) -> HostTree:
    return tree.file("/srv/work/file")


def check(host: HostTree, *, is_held: bool = False) -> Sequence[Finding]:
    usage, access = read_usage(host.root), Access(read_only=False)
    return check_device(WORK, access, usage=usage, is_held=is_held, root=host.root)


def test_a_directory_that_nobody_uses_has_no_finding(host: HostTree) -> None:
    host.process(99, "bash", "/srv").file("/var/lib/nfs/etab", "/home\t*(rw)\n")
    host.file("/proc/fs/nfsd/exports", "# Version 1.1\n# Path Client(Flags) # IPs\n")
    assert check(host) == []


@pytest.mark.parametrize("is_root", [True, False])
def test_the_processes_that_share_it_are_mentioned(host: HostTree, *, is_root: bool) -> None:
    host.process(99, "virtiofsd", *([] if is_root else ["/srv/work"]))
    if is_root:
        host.link("/proc/99/root", f"{host.path}/srv/work")
    (found,) = check(host)
    assert (found.code, found.severity) == (Code.OPEN_BY_PROCESS, Severity.WARNING)
    assert found.message == "/srv/work is open in process 99 (virtiofsd)"
    assert check(host, is_held=True) == []


@pytest.mark.parametrize("exported", ["/srv/work", "/srv", "/srv/work/below", "/srv/w\\040rk"])
@pytest.mark.parametrize("table", ["/var/lib/nfs/etab", "/proc/fs/nfsd/exports"])
def test_the_machines_that_it_is_exported_to_are_mentioned(
    host: HostTree, table: str, exported: str
) -> None:
    host.file(table, f"{exported}\t10.0.0.0/8(rw,sync)\n{exported}\thost.example(ro)\n")
    found = check(host)
    if "040" in exported:
        assert found == []
        return
    assert [finding.severity for finding in found] == [Severity.WARNING]
    assert found[0].message.startswith("/srv/work is exported by NFS to 10.0.0.0/8 host.example")
    assert found[0].hint.endswith(f"exportfs -u 10.0.0.0/8:{exported}")
