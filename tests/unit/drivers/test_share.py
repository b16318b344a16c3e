"""Shared directories: options, what speaks against them, and who serves them how."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.unit.drivers.test_free_places import MICROVM, Q35, S390X
from vmplug.drivers.place import Offer, PlugMode
from vmplug.drivers.plug import SharedFS, VhostUserDevice, VirtiofsdSpec
from vmplug.drivers.ports import NewPlug
from vmplug.drivers.select import select_driver
from vmplug.drivers.share import OPTIONS, ShareCache, ShareDriver
from vmplug.errors import CannotPlug, NoFreePort, SpecError
from vmplug.host.device import HostDevice, OpenConnection, SharedDirectory
from vmplug.host.finding import Code
from vmplug.host.kind import DeviceType, SharedFilesystem
from vmplug.host.vhost_user.device import VhostUserSocket
from vmplug.host.vhost_user.virtiofsd import Virtiofsd
from vmplug.oci.requests import ShareInfo

ID = "0123456789abcdef"
FS, P9 = DeviceType.VHOST_USER_FS, DeviceType.VIRTIO_9P
VIRTIOFSD = Virtiofsd(
    path="/usr/libexec/virtiofsd", options=frozenset({"--shared-dir", "--readonly"})
)
QEMUS_VIRTIOFSD = Virtiofsd(
    path="/usr/lib/qemu/virtiofsd", options=frozenset({"--help", "-o source"})
)
UNKNOWN = Virtiofsd(path="/usr/libexec/virtiofsd", options=frozenset({"--help"}))
"""One that says nothing of how it takes a directory."""

DIRECTORY = SharedDirectory(FS, "/srv/work", "work", virtiofsd=VIRTIOFSD)
BY_QEMU = SharedDirectory(P9, "/srv/work", "work")
SOCKET = VhostUserSocket(kind=FS, socket_path="/run/fs.sock")
CONNECTION = OpenConnection(7, 4711)
COLD = replace(Q35, mode=PlugMode.COLD)


def options(device: HostDevice | None = None, **said: str) -> ShareDriver:
    words = {key.replace("_", "-"): value for key, value in said.items()}
    return ShareDriver.parse("work", device, words)


def plan(
    device: HostDevice, *, read_only: bool = False, offer: Offer = COLD, **said: str
) -> VhostUserDevice | SharedFS:
    driver = options(device, **said)
    place = driver.choose_place(device, offer, ())
    return driver.plan(NewPlug(id=ID, device=device, read_only=read_only), place, offer)


# Options


def test_without_options_every_choice_is_open() -> None:
    assert options() == ShareDriver(tag="work")
    assert options().filesystem is SharedFilesystem.VIRTIO_FS
    assert set(OPTIONS) == {"filesystem", "cache", "cache-size", "queue-size"}


@pytest.mark.parametrize(
    ("key", "said", "expected"),
    [
        *[("filesystem", str(w), {"filesystem": w}) for w in SharedFilesystem],
        *[("cache", str(w), {"cache": w}) for w in ShareCache],
        ("cache-size", "0", {"cache_size_mib": 0}),
        ("cache-size", "1K", {"cache_size_mib": 1024}),
        ("queue-size", "1", {"queue_size": 1}),
        ("queue-size", "1024", {"queue_size": 1024}),
    ],
)
def test_every_option_means_what_it_says(key: str, said: str, expected: dict[str, object]) -> None:
    parsed = ShareDriver.parse("work", None, {key: said})
    assert {name: getattr(parsed, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("key", "said", "message"),
    [
        ("filesystem", "9p", "'9p' is not one of virtio-9p, virtio-fs"),
        ("filesystem", "virtio-fs-nydus", "is not one of virtio-9p, virtio-fs"),
        ("cache", "metadata", "'metadata' is not one of none, never, auto, always"),
        ("cache", "", "'' is not one of"),
        ("cache-size", "-1", "'-1' is not a number from 0 to 1048576"),
        ("cache-size", "2G", "'2G' is not a number from 0"),
        ("queue-size", "0", "'0' is not a power of two from 1 to 1024"),
        ("queue-size", "100", "'100' is not a power of two"),
        ("queue-size", "2048", "'2048' is not a power of two"),
        ("tag", "x", "unknown for a share"),
        ("read-only", "on", "unknown for a share"),
    ],
)
def test_a_wrong_option_is_refused_with_its_name(key: str, said: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        ShareDriver.parse("work", DIRECTORY, {key: said})
    assert caught.value.where == f"option {key}"


@pytest.mark.parametrize("other", [{"cache": "none"}, {"cache_size": "1"}, {"queue_size": "64"}])
def test_options_of_virtio_fs_are_refused_for_9p(other: dict[str, str]) -> None:
    options(DIRECTORY, **other)
    with pytest.raises(SpecError, match="virtio-9p has no cache, cache-size or") as caught:
        options(BY_QEMU, filesystem="virtio-9p", **other)
    assert caught.value.where == "option filesystem"
    assert caught.value.hint


@pytest.mark.parametrize("device", [SOCKET, CONNECTION])
def test_qemu_shares_directories_only(device: HostDevice) -> None:
    with pytest.raises(SpecError, match="virtio-9p shares a directory, not a socket"):
        options(device, filesystem="virtio-9p")


@pytest.mark.parametrize("device", [SOCKET, CONNECTION])
@pytest.mark.parametrize("cache", ["auto", "none"])
def test_a_virtiofsd_that_runs_has_its_cache_already(device: HostDevice, cache: str) -> None:
    with pytest.raises(SpecError) as caught:
        options(device, cache=cache)
    assert caught.value.where == "option cache"
    assert device.host_path in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("name", ["a,sandbox=none", "x,source=/etc", "a=b", "a\\", "a\\,xattr"])
@pytest.mark.parametrize("read_only", [True, False])
def test_a_name_with_options_in_it_is_for_a_virtiofsd_that_takes_any_name(
    name: str, *, read_only: bool
) -> None:
    directory = DIRECTORY._replace(host_path=f"/srv/{name}", virtiofsd=UNKNOWN)
    (finding,) = options(directory).check(directory, read_only=read_only)
    assert finding.code is Code.NO_BACKEND
    assert directory.host_path in finding.message
    for able in (VIRTIOFSD, QEMUS_VIRTIOFSD, Virtiofsd(path="/usr/libexec/virtiofsd")):
        named = directory._replace(virtiofsd=able)
        assert list(options(named).check(named, read_only=read_only)) == []


@pytest.mark.parametrize("virtiofsd", [UNKNOWN, None])
def test_qemu_itself_shares_a_directory_of_any_name(virtiofsd: Virtiofsd | None) -> None:
    named = BY_QEMU._replace(host_path="/srv/a,b=c\\", virtiofsd=virtiofsd)
    assert list(options(named).check(named, read_only=False)) == []


@pytest.mark.parametrize("name", ["a b", "-o", "$(id)", "%s", "a:b", "'\"", "\x1b[0m\n"])
def test_every_other_name_is_for_every_virtiofsd(name: str) -> None:
    directory = DIRECTORY._replace(host_path=f"/srv/{name}", virtiofsd=UNKNOWN)
    assert list(options(directory).check(directory, read_only=False)) == []


@pytest.mark.parametrize("device", [SOCKET, CONNECTION])
def test_the_rest_goes_with_somebody_elses_virtiofsd_too(device: HostDevice) -> None:
    parsed = options(device, filesystem="virtio-fs", cache_size="8", queue_size="64")
    assert (parsed.cache_size_mib, parsed.queue_size) == (8, 64)


@given(
    st.sampled_from([None, DIRECTORY, BY_QEMU, SOCKET, CONNECTION]),
    st.dictionaries(st.sampled_from(list(OPTIONS)) | st.text(max_size=4), st.text(), max_size=3),
)
def test_any_options_are_taken_or_refused(device: HostDevice | None, said: dict[str, str]) -> None:
    error = None
    try:
        ShareDriver.parse("work", device, said)
    except SpecError as caught:
        error = caught
    assert error is None or error.where.removeprefix("option ") in said


# What speaks against one


@pytest.mark.parametrize(
    ("device", "read_only", "codes"),
    [
        (DIRECTORY, False, []),
        (DIRECTORY, True, []),
        (DIRECTORY._replace(read_only=True), True, []),
        (DIRECTORY._replace(read_only=True), False, [Code.READ_ONLY_DEVICE]),
        (DIRECTORY._replace(virtiofsd=None), False, [Code.NO_BACKEND]),
        (
            DIRECTORY._replace(virtiofsd=None, read_only=True),
            False,
            [Code.READ_ONLY_DEVICE, Code.NO_BACKEND],
        ),
        (BY_QEMU, False, []),
        (BY_QEMU, True, []),
        (BY_QEMU._replace(read_only=True), False, [Code.READ_ONLY_DEVICE]),
        (SOCKET, False, []),
        (SOCKET, True, [Code.CANNOT_BE_READ_ONLY]),
        (CONNECTION, False, []),
        (CONNECTION, True, [Code.CANNOT_BE_READ_ONLY]),
    ],
)
def test_a_share_is_checked_by_who_serves_it(
    device: HostDevice, *, read_only: bool, codes: list[Code]
) -> None:
    findings = list(options(device).check(device, read_only=read_only))
    assert [finding.code for finding in findings] == codes
    assert all(device.host_path in finding.message for finding in findings)
    assert all(finding.hint for finding in findings)


def test_several_may_write_to_a_share() -> None:
    assert options().share_rw


# The place


@pytest.mark.parametrize("device", [DIRECTORY, SOCKET, CONNECTION])
@pytest.mark.parametrize(
    ("offer", "place"), [(Q35, "rp1/00"), (S390X, "ccw/0.0.0002"), (MICROVM, "virtio-mmio-bus.5")]
)
def test_a_share_goes_where_every_virtio_device_goes(
    device: HostDevice, offer: Offer, place: str
) -> None:
    assert str(options(device).choose_place(device, offer, ())) == place


@pytest.mark.parametrize("device", [DIRECTORY, SOCKET, CONNECTION])
def test_virtio_fs_needs_shared_memory(device: HostDevice) -> None:
    with pytest.raises(CannotPlug, match=r"not shared .*, and a virtio-fs share needs") as caught:
        options(device).choose_place(device, replace(Q35, shared_memory=False), ())
    assert caught.value.reason == "memory-not-shared"


@pytest.mark.parametrize("shared_memory", [False, True])
def test_qemu_shares_a_directory_only_from_its_start_on(*, shared_memory: bool) -> None:
    driver = options(BY_QEMU, filesystem="virtio-9p")
    cold = replace(COLD, shared_memory=shared_memory)
    assert str(driver.choose_place(BY_QEMU, cold, ())) == "rp1/00"
    with pytest.raises(CannotPlug, match="a virtio-9p share can only be plugged") as caught:
        driver.choose_place(BY_QEMU, replace(cold, mode=PlugMode.HOT), ())
    assert caught.value.reason == "cold-plug-only"


@pytest.mark.parametrize(
    ("device", "what"), [(DIRECTORY, "a virtio-fs share"), (BY_QEMU, "a virtio-9p share")]
)
def test_no_place_left_names_the_share(device: HostDevice, what: str) -> None:
    with pytest.raises(NoFreePort, match=f"no free PCI port for {what}"):
        options(device).choose_place(device, replace(COLD, ports=()), ())


# The plug


def test_a_directory_is_served_by_a_virtiofsd_of_our_own() -> None:
    assert plan(DIRECTORY) == VhostUserDevice(
        id=ID,
        type=FS,
        daemon=VirtiofsdSpec(
            program="/usr/libexec/virtiofsd",
            options=frozenset({"--shared-dir", "--readonly"}),
            directory="/srv/work",
            cache="auto",
            read_only=False,
        ),
        tag="work",
        queue_size=1024,
    )


@pytest.mark.parametrize(
    ("said", "cache"),
    [
        ({}, "auto"),
        ({"cache": "auto"}, "auto"),
        ({"cache": "always"}, "always"),
        ({"cache": "none"}, "never"),
        ({"cache": "never"}, "never"),
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_the_virtiofsd_is_told_its_cache_and_whether_to_write(
    said: dict[str, str], cache: str, *, read_only: bool
) -> None:
    driver = ShareDriver.parse("work", DIRECTORY, said)
    place = driver.choose_place(DIRECTORY, Q35, ())
    planned = driver.plan(NewPlug(id=ID, device=DIRECTORY, read_only=read_only), place, Q35)
    assert isinstance(planned, VhostUserDevice)
    assert planned.daemon
    assert (planned.daemon.cache, planned.daemon.read_only) == (cache, read_only)


def test_somebody_elses_virtiofsd_is_reached_by_its_socket_or_connection() -> None:
    by_path = plan(SOCKET, queue_size="64", cache_size="8")
    assert by_path == VhostUserDevice(
        id=ID, type=FS, socket_path="/run/fs.sock", tag="work", queue_size=64, cache_size_mib=8
    )
    assert plan(CONNECTION) == VhostUserDevice(
        id=ID, type=FS, descriptor=7, tag="work", queue_size=1024
    )


@pytest.mark.parametrize("read_only", [False, True])
def test_qemu_itself_serves_a_9p_share(*, read_only: bool) -> None:
    assert plan(BY_QEMU, read_only=read_only, filesystem="virtio-9p") == SharedFS(
        id=ID, directory="/srv/work", tag="work", read_only=read_only
    )


def test_a_virtiofsd_is_never_looked_for_again() -> None:
    """It serves one connection in its life."""
    for device in (DIRECTORY, SOCKET, CONNECTION):
        planned = plan(device)
        assert isinstance(planned, VhostUserDevice)
        assert planned.reconnect_s == 0


# What it is


def test_a_share_is_its_tag_and_its_directory() -> None:
    identities = {
        DIRECTORY.identity,
        DIRECTORY._replace(tag="other").identity,
        DIRECTORY._replace(host_path="/srv/other").identity,
    }
    assert str(DIRECTORY.identity) == "share:work:/srv/work"
    assert len(identities) == 3
    assert BY_QEMU.identity == DIRECTORY._replace(read_only=True).identity == DIRECTORY.identity
    assert DIRECTORY.related_identities == ()


def test_a_connection_is_its_socket_whatever_its_number() -> None:
    assert CONNECTION.identity == CONNECTION._replace(descriptor=9).identity
    assert str(CONNECTION.identity) == "socket:[4711]"
    assert CONNECTION.kind is FS
    assert CONNECTION.related_identities == ()


def test_the_request_finds_its_driver() -> None:
    info = ShareInfo(tag="t", source="/srv", driver_options={"cache": "none"})
    assert select_driver(info, DIRECTORY) == ShareDriver(tag="t", cache=ShareCache.NONE)
    with pytest.raises(SpecError, match="belongs to the virtiofsd behind /run/fs"):
        select_driver(info, SOCKET)
