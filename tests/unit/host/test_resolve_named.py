"""Requests that name their other end: a socket, a directory, a source, a descriptor."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.tree import HostTree
from vmplug.errors import AttributeReadError, NoSuchDevice, SpecError
from vmplug.host.device import EntropySource, OpenConnection, SharedDirectory
from vmplug.host.file_id import file_id
from vmplug.host.kind import DeviceType, FoundBy, Identity
from vmplug.host.resolve import resolve, resolve_all
from vmplug.host.root import HostRoot
from vmplug.host.vhost_user.device import VhostUserSocket
from vmplug.host.vhost_user.virtiofsd import VIRTIOFSD_PROGRAMS, Virtiofsd
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import NetInfo, RngInfo, ShareInfo

FS, P9 = DeviceType.VHOST_USER_FS, DeviceType.VIRTIO_9P
DIRECTORY, SOCKET = "/srv/work", "/run/vu.sock"
TIMEOUT_S = 60.0


def share(source: str = DIRECTORY, **options: str) -> ShareInfo:
    return ShareInfo(tag="work", source=source, driver_options=options)


def net(path: str = SOCKET) -> NetInfo:
    return NetInfo(label="eth0", socket_path=path)


def id_of(tree: HostTree, path: str) -> str:
    status = (tree.path / path[1:]).stat()
    return f"inode {status.st_dev}:{status.st_ino}"


@pytest.fixture
def host(tree: HostTree) -> HostTree:
    """One of everything, each behind a link too."""
    tree.file(f"{DIRECTORY}/file").node(SOCKET, "s").file("/srv/plain").node("/srv/fifo", "p")
    tree.link("/srv/link", "work").link("/run/link.sock", "vu.sock").link("/var/run", "../run")
    return tree.link("/srv/nowhere", "none").link("/srv/round", "round")


# Shares


@pytest.mark.parametrize(
    "source", [DIRECTORY, f"{DIRECTORY}/", "/srv//./work", "/srv/link", "/srv/link/../work"]
)
def test_a_share_is_the_directory_by_its_one_path(host: HostTree, source: str) -> None:
    assert resolve(share(source), host.root) == SharedDirectory(
        FS, DIRECTORY, "work", file_id=id_of(host, DIRECTORY)
    )


@pytest.mark.parametrize(
    ("options", "kind"),
    [({}, FS), ({"filesystem": "virtio-fs"}, FS), ({"filesystem": "virtio-9p"}, P9)],
)
def test_the_option_says_who_shares_it(
    host: HostTree, options: dict[str, str], kind: DeviceType
) -> None:
    found = resolve(share(**options), host.root)
    assert (found.kind, found.found_by) == (kind, FoundBy.FILE)


@pytest.mark.parametrize("program", VIRTIOFSD_PROGRAMS)
def test_the_hosts_virtiofsd_is_found_wherever_it_is_installed(
    host: HostTree, program: str
) -> None:
    host.file(program)
    found = resolve(share(), host.root)
    assert isinstance(found, SharedDirectory)
    assert found.virtiofsd == Virtiofsd(path=program)  # that of another root is not run
    own = resolve(share(filesystem="virtio-9p"), host.root)
    assert isinstance(own, SharedDirectory)
    assert own.virtiofsd is None


def test_of_several_virtiofsds_the_first_is_taken(host: HostTree) -> None:
    for program in VIRTIOFSD_PROGRAMS:
        host.file(program)
    found = resolve(share(), host.root)
    assert isinstance(found, SharedDirectory)
    assert found.virtiofsd == Virtiofsd(path=VIRTIOFSD_PROGRAMS[0])


@pytest.mark.parametrize("source", [SOCKET, "/run/link.sock", "/var/run/vu.sock"])
def test_a_share_may_be_the_socket_of_somebody_elses_virtiofsd(
    host: HostTree, source: str
) -> None:
    found = resolve(share(source), host.root)
    checked = file_id((host.path / SOCKET[1:]).stat())
    assert found == VhostUserSocket(
        kind=FS, found_by=FoundBy.FILE, socket_path=SOCKET, file_id=checked
    )
    assert found.identity == Identity.parse(f"socket:{SOCKET}")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("/srv/none", "nothing"),
        ("/srv/nowhere", "nothing"),
        ("/srv/plain", "a regular file"),
        ("/srv/fifo", "a FIFO"),
        ("/srv/plain/below", "nothing"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_what_is_there(
    host: HostTree, source: str, found: str
) -> None:
    with pytest.raises(NoSuchDevice) as caught:
        resolve(share(source), host.root)
    assert caught.value.message == f"{source} cannot be shared: found {found}"
    assert (caught.value.wanted, caught.value.found) == (f"share of {source}", found)
    assert "virtiofsd" in (caught.value.hint or "")


@pytest.mark.parametrize("request_", [share("/srv/round"), net("/srv/round")])
def test_links_that_lead_round_are_said_to_be_so(
    host: HostTree, request_: ShareInfo | NetInfo
) -> None:
    with pytest.raises(AttributeReadError, match="/srv/round"):
        resolve(request_, host.root)


# Descriptors


def test_an_open_socket_of_this_process_is_a_connection() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        found = resolve(share(f"fd:{ours.fileno()}"), HostRoot())
        inode = os.fstat(ours.fileno()).st_ino
        assert found == OpenConnection(ours.fileno(), inode)
        copy = os.dup(ours.fileno())
        assert resolve(share(f"fd:{copy}"), HostRoot()).identity == found.identity
        os.close(copy)
        other = resolve(share(f"fd:{theirs.fileno()}"), HostRoot())
        assert other.identity != found.identity


def test_a_descriptor_that_is_open_on_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with path.open("rb") as file, pytest.raises(SpecError) as caught:
        resolve(share(f"fd:{file.fileno()}"), HostRoot())
    assert caught.value.where == "share:work"
    assert "is not an open socket: found a regular file" in caught.value.message


@pytest.mark.parametrize("number", [999_999, 10**9 - 1])
def test_a_descriptor_that_is_not_open_is_refused(number: int) -> None:
    with pytest.raises(
        SpecError, match=f"descriptor {number} is not an open socket: found nothing"
    ):
        resolve(share(f"fd:{number}"), HostRoot())


# Networks


@pytest.mark.parametrize("path", [SOCKET, "/run/link.sock", "/var/run/vu.sock", "/run/./vu.sock"])
def test_a_network_is_the_socket_by_its_one_path(host: HostTree, path: str) -> None:
    assert resolve(net(path), host.root) == VhostUserSocket(
        kind=DeviceType.VHOST_USER_NET,
        found_by=FoundBy.FILE,
        socket_path=SOCKET,
        file_id=file_id((host.path / SOCKET[1:]).stat()),
    )


@pytest.mark.parametrize(
    ("path", "found"),
    [("/run/none", "nothing"), (DIRECTORY, "a directory"), ("/srv/plain", "a regular file")],
)
def test_no_socket_is_refused_with_what_is_there(host: HostTree, path: str, found: str) -> None:
    with pytest.raises(NoSuchDevice) as caught:
        resolve(net(path), host.root)
    message = f"{path} is not the socket of a vhost-user backend: found {found}"
    assert (caught.value.message, caught.value.found) == (message, found)
    assert caught.value.wanted == f"vhost-user network {path}"
    assert caught.value.hint


# Random numbers


@pytest.mark.root
@pytest.mark.parametrize("source", ["/dev/hwrng", "/dev/random"])
def test_a_source_is_a_character_device_by_its_one_path(tree: HostTree, source: str) -> None:
    tree.node("/dev/hwrng", "c", "10:183").link("/dev/random", "hwrng")
    assert resolve(RngInfo(source=source), tree.root) == EntropySource("/dev/hwrng", "char 10:183")


def test_this_host_has_random_numbers() -> None:
    assert resolve(RngInfo(), HostRoot()) == EntropySource("/dev/urandom", "char 1:9")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("/dev/hwrng", "nothing"),
        ("/srv/plain", "a regular file"),
        ("/srv/fifo", "a FIFO"),
        (SOCKET, "a socket"),
        (DIRECTORY, "a directory"),
    ],
)
def test_anything_else_gives_no_random_numbers(host: HostTree, source: str, found: str) -> None:
    with pytest.raises(NoSuchDevice) as caught:
        resolve(RngInfo(source=source), host.root)
    assert caught.value.message == f"{source} is not a source of random numbers: found {found}"
    assert caught.value.hint


@pytest.mark.root
def test_a_block_device_gives_no_random_numbers(tree: HostTree) -> None:
    tree.node("/dev/sda", "b", "8:0")
    with pytest.raises(NoSuchDevice, match="found block device 8:0"):
        resolve(RngInfo(source="/dev/sda"), tree.root)


# Among others


def test_each_of_many_is_answered_in_its_place(host: HostTree) -> None:
    disk = DeviceInfo(container_path="/dev/a", dev_type=DevType.BLOCK, host_path="/srv/plain")
    answers = resolve_all([net("/none"), share(), disk, RngInfo(source="/none")], host.root)
    kinds = [type(answer).__name__ for answer in answers]
    assert kinds == ["NoSuchDevice", "SharedDirectory", "DiskFile", "NoSuchDevice"]


@pytest.mark.root
def test_a_directory_that_is_mounted_read_only_takes_no_writes(tmp_path: Path) -> None:
    def is_read_only() -> bool:
        found = resolve(share(str(tmp_path)), HostRoot())
        assert isinstance(found, SharedDirectory)
        return found.read_only

    assert not is_read_only()
    run("mount", "--options=bind,ro", str(tmp_path), str(tmp_path))
    try:
        assert is_read_only()
    finally:
        run("umount", str(tmp_path))
    assert not is_read_only()


def run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=TIMEOUT_S)
