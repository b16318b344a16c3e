"""Which mounts another machine or process serves, by the kernel's table."""

import pytest

from vmplug.host.use.silent import _remote_mounts


@pytest.mark.parametrize("kind", ["nfs4", "nfs", "9p", "fuse", "fuseblk", "fuse.sshfs", "autofs"])
def test_what_another_serves_is_found(kind: str) -> None:
    table = f"36 35 0:51 / /mnt/a\\040-\\040b rw,noatime shared:1 - {kind} server:/x rw,vers=4\n"
    assert list(_remote_mounts(table)) == ["/mnt/a\\040-\\040b"]


@pytest.mark.parametrize("kind", ["ext4", "xfs", "tmpfs", "fusectl", "nfsd", "nfs.x"])
def test_what_the_kernel_has_itself_is_not(kind: str) -> None:
    assert list(_remote_mounts(f"36 35 8:1 / /mnt rw - {kind} nfs4 rw\n")) == []


def test_every_line_of_the_table_counts() -> None:
    local = "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n"
    remote = "36 22 0:51 / /b rw - nfs4 s:/b rw\n"
    assert list(_remote_mounts(local + remote + local + remote.replace("/b", "/c"))) == [
        "/b",
        "/c",
    ]
    assert list(_remote_mounts("")) == []
