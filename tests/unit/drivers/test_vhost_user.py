"""Vhost-user disks, controllers and networks: options, what speaks against them, the plug."""

import re
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.unit.drivers.test_free_places import MICROVM, Q35, S390X
from vmplug.devnum import DevNum
from vmplug.drivers.place import Offer
from vmplug.drivers.plug import VhostUserDevice
from vmplug.drivers.ports import NewPlug
from vmplug.drivers.select import select_driver
from vmplug.drivers.vhost_user import OPTIONS, VhostUserDriver
from vmplug.errors import CannotPlug, NoFreePort, SpecError
from vmplug.host.finding import Code, Severity
from vmplug.host.kind import DeviceType, FoundBy
from vmplug.host.vhost_user.device import Backend, VhostUserSocket
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import NetInfo

ID = "0123456789abcdef"
BLK, SCSI, NET = DeviceType.VHOST_USER_BLK, DeviceType.VHOST_USER_SCSI, DeviceType.VHOST_USER_NET
KINDS = (BLK, SCSI, NET)
QUEUES = {BLK: "num-queues", SCSI: "num-queues", NET: "queues"}
READ_ONLY = 1 << 5
"""VIRTIO_BLK_F_RO. Source: virtio specification, 5.2.3."""


def socket_of(kind: DeviceType, *, features: int = 0, queues: int = 4) -> VhostUserSocket:
    """A socket whose backend has answered."""
    backend = Backend(features=features, queues=queues)
    return VhostUserSocket(kind=kind, socket_path="/run/vu.sock", backend=backend)


def plan(
    kind: DeviceType, device: VhostUserSocket | None = None, *, offer: Offer = Q35, **options: str
) -> VhostUserDevice:
    words = {key.replace("_", "-"): said for key, said in options.items()}
    driver = VhostUserDriver.parse(kind, words)
    device = device or socket_of(kind)
    place = driver.choose_place(device, offer, ())
    return driver.plan(NewPlug(id=ID, device=device, read_only=False), place, offer)


# Options


@pytest.mark.parametrize("kind", KINDS)
def test_without_options_every_choice_is_open(kind: DeviceType) -> None:
    assert VhostUserDriver.parse(kind, {}) == VhostUserDriver(type=kind)


def test_each_kind_has_its_own_options() -> None:
    assert {kind: set(options) for kind, options in OPTIONS.items()} == {
        BLK: {"num-queues", "reconnect", "fstype"},
        SCSI: {"num-queues"},
        NET: {"mac", "queues", "reconnect"},
    }


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (BLK, {"num-queues": "256"}, VhostUserDriver(type=BLK, queues=256)),
        (BLK, {"reconnect": "0"}, VhostUserDriver(type=BLK, reconnect_s=0)),
        (BLK, {"reconnect": "3600"}, VhostUserDriver(type=BLK, reconnect_s=3600)),
        (BLK, {"fstype": "ext4"}, VhostUserDriver(type=BLK, fs_type="ext4")),
        (SCSI, {"num-queues": "1"}, VhostUserDriver(type=SCSI, queues=1)),
        (NET, {"queues": "2"}, VhostUserDriver(type=NET, queues=2)),
        (NET, {"reconnect": "5"}, VhostUserDriver(type=NET, reconnect_s=5)),
        (
            NET,
            {"mac": "52:54:00:AA:bb:0C"},
            VhostUserDriver(type=NET, mac="52:54:00:aa:bb:0c"),
        ),
        (
            NET,
            {"mac": "02:00:00:00:00:00"},
            VhostUserDriver(type=NET, mac="02:00:00:00:00:00"),
        ),
    ],
)
def test_every_option_means_what_it_says(
    kind: DeviceType, options: dict[str, str], expected: VhostUserDriver
) -> None:
    assert VhostUserDriver.parse(kind, options) == expected


@pytest.mark.parametrize(
    ("kind", "key", "said", "message"),
    [
        (BLK, "num-queues", "0", "'0' is not a number from 1 to 256"),
        (SCSI, "num-queues", "257", "'257' is not a number from 1 to 256"),
        (NET, "queues", "0", "'0' is not a number from 1 to 256"),
        (NET, "queues", "two", "'two' is not a number"),
        (BLK, "reconnect", "-1", "'-1' is not a number from 0 to 3600"),
        (NET, "reconnect", "3601", "'3601' is not a number from 0 to 3600"),
        (BLK, "fstype", "", "'' is not printable text"),
        (SCSI, "reconnect", "1", "unknown for a vhost-user-scsi-pci device"),
        (SCSI, "mac", "52:54:00:12:34:56", "unknown for a vhost-user-scsi-pci device"),
        (BLK, "queues", "1", "unknown for a vhost-user-blk-pci device"),
        (BLK, "cache", "none", "unknown for a vhost-user-blk-pci device"),
        (NET, "num-queues", "1", "unknown for a virtio-net-pci device"),
    ],
)
def test_a_wrong_option_is_refused_with_its_name(
    kind: DeviceType, key: str, said: str, message: str
) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        VhostUserDriver.parse(kind, {key: said})
    assert caught.value.where == f"option {key}"


@pytest.mark.parametrize(
    "said",
    [
        "",
        "52:54:00:12:34",
        "52:54:00:12:34:56:78",
        "52-54-00-12-34-56",
        "525400123456",
        "52:54:00:12:34:5",
        "52:54:00:12:34:5g",
        " 52:54:00:12:34:56",
        "52:54:00:12:34:56\n",
        "52:54:00:12:34:٣6",
    ],
)
def test_anything_else_is_no_mac_address(said: str) -> None:
    with pytest.raises(SpecError, match="is not a MAC address such as 52:54") as caught:
        VhostUserDriver.parse(NET, {"mac": said})
    assert caught.value.where == "option mac"
    assert repr(said) in caught.value.message


@pytest.mark.parametrize(
    "said", ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "53:54:00:12:34:56", "00:00:00:00:00:00"]
)
def test_a_group_address_or_zero_is_no_cards(said: str) -> None:
    with pytest.raises(SpecError, match="it is a multicast address, or zero"):
        VhostUserDriver.parse(NET, {"mac": said})


@given(st.binary(min_size=6, max_size=6), st.sampled_from([str.upper, str.lower]))
def test_every_address_of_one_card_is_taken_and_no_other(
    raw: bytes, case: Callable[[str], str]
) -> None:
    mac = raw.hex(":")
    error = options = None
    try:
        options = VhostUserDriver.parse(NET, {"mac": case(mac)})
    except SpecError as caught:
        error = caught
    is_one = not raw[0] & 1 and any(raw)
    assert (options and options.mac) == (mac if is_one else None)
    assert (error is None) is is_one


@given(st.sampled_from(KINDS), st.dictionaries(st.text(max_size=10), st.text(), max_size=3))
def test_any_options_are_taken_or_refused(kind: DeviceType, options: dict[str, str]) -> None:
    error = None
    try:
        VhostUserDriver.parse(kind, options)
    except SpecError as caught:
        error = caught
    assert error is None or error.where.removeprefix("option ") in options


# What speaks against one


def found(
    device: VhostUserSocket, options: Mapping[str, str] | None = None, *, read_only: bool = False
) -> list[Code]:
    driver = VhostUserDriver.parse(device.kind, options or {})
    findings = list(driver.check(device, read_only=read_only))
    assert all(device.socket_path in finding.message for finding in findings)
    assert all(finding.hint for finding in findings)
    assert {finding.severity for finding in findings} <= {Severity.ERROR}
    return [finding.code for finding in findings]


@pytest.mark.parametrize(
    ("kind", "features", "read_only", "codes"),
    [
        (BLK, 0, False, []),
        (BLK, READ_ONLY, True, []),
        (BLK, READ_ONLY, False, [Code.READ_ONLY_DEVICE]),
        (BLK, 0, True, [Code.CANNOT_BE_READ_ONLY]),
        (BLK, ~READ_ONLY & 0xFFFFFFFF, True, [Code.CANNOT_BE_READ_ONLY]),
        (SCSI, 0, False, []),
        (SCSI, 0, True, [Code.CANNOT_BE_READ_ONLY]),
        (SCSI, READ_ONLY, True, [Code.CANNOT_BE_READ_ONLY]),
        (SCSI, READ_ONLY, False, []),
        (NET, READ_ONLY, False, []),
        (NET, READ_ONLY, True, [Code.CANNOT_BE_READ_ONLY]),
    ],
)
def test_only_the_backend_of_a_disk_can_see_to_reading_only(
    kind: DeviceType, features: int, *, read_only: bool, codes: list[Code]
) -> None:
    assert found(socket_of(kind, features=features), read_only=read_only) == codes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("asked", "codes"), [("4", []), ("5", [Code.TOO_MANY_QUEUES])])
def test_no_more_queues_than_the_backend_serves(
    kind: DeviceType, asked: str, codes: list[Code]
) -> None:
    assert found(socket_of(kind, queues=4), {QUEUES[kind]: asked}) == codes


def test_both_numbers_of_queues_are_told() -> None:
    driver = VhostUserDriver(type=BLK, queues=9)
    (finding,) = driver.check(socket_of(BLK, queues=3), read_only=False)
    assert "serves 3 queues; the request is for 9" in finding.message


def test_everything_is_told_at_once() -> None:
    device = socket_of(BLK, queues=1)
    codes = found(device, {"num-queues": "2"}, read_only=True)
    assert codes == [Code.TOO_MANY_QUEUES, Code.CANNOT_BE_READ_ONLY]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_backend_that_was_not_probed_has_no_findings(
    kind: DeviceType, *, read_only: bool
) -> None:
    device = socket_of(kind)._replace(backend=None)
    assert found(device, {QUEUES[kind]: "256"}, read_only=read_only) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_backend_serves_one_vm(kind: DeviceType) -> None:
    assert not VhostUserDriver(type=kind).share_rw


# The place


@pytest.mark.parametrize("kind", KINDS)
def test_the_device_takes_the_place_of_any_virtio_device(kind: DeviceType) -> None:
    driver = VhostUserDriver(type=kind)
    assert str(driver.choose_place(socket_of(kind), Q35, ())) == "rp1/00"
    assert str(driver.choose_place(socket_of(kind), Q35, ("rp1/00",))) == "br0/01"


def test_a_channel_subsystem_takes_networks_only() -> None:
    place = VhostUserDriver(type=NET).choose_place(socket_of(NET), S390X, ())
    assert str(place) == "ccw/0.0.0002"
    for kind in (BLK, SCSI):
        with pytest.raises(CannotPlug, match="for a channel subsystem") as caught:
            VhostUserDriver(type=kind).choose_place(socket_of(kind), S390X, ())
        assert caught.value.reason == "no-such-model"


@pytest.mark.parametrize(("kind", "transport"), [(BLK, 3), (SCSI, 5), (NET, 5)])
def test_only_disks_take_the_transports_that_the_guest_names_disks_by(
    kind: DeviceType, transport: int
) -> None:
    place = VhostUserDriver(type=kind).choose_place(socket_of(kind), MICROVM, ())
    assert str(place) == f"virtio-mmio-bus.{transport}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offer", [Q35, S390X, MICROVM])
def test_memory_that_is_not_shared_is_refused_before_any_place(
    kind: DeviceType, offer: Offer
) -> None:
    with pytest.raises(CannotPlug, match=f"not shared .*, and a {kind} device needs") as caught:
        VhostUserDriver(type=kind).choose_place(
            socket_of(kind), replace(offer, shared_memory=False), ()
        )
    assert caught.value.reason == "memory-not-shared"


@pytest.mark.parametrize("kind", KINDS)
def test_no_place_left_names_the_kind(kind: DeviceType) -> None:
    with pytest.raises(NoFreePort, match=f"no free PCI port for a {kind} device"):
        VhostUserDriver(type=kind).choose_place(socket_of(kind), replace(Q35, ports=()), ())


# The plug


def test_a_disk_is_planned_with_what_was_said() -> None:
    assert plan(BLK, num_queues="2", reconnect="9", fstype="xfs") == VhostUserDevice(
        id=ID, type=BLK, socket_path="/run/vu.sock", queues=2, reconnect_s=9
    )


def test_a_network_is_planned_with_what_was_said() -> None:
    mac = "52:54:00:12:34:56"
    assert plan(NET, queues="2", reconnect="0", mac=mac) == VhostUserDevice(
        id=ID, type=NET, socket_path="/run/vu.sock", queues=2, msix=False, mac_address=mac
    )


@pytest.mark.parametrize(
    ("kind", "cpus", "queues", "planned"),
    [
        (BLK, 1, 4, 1),
        (BLK, 2, 4, 2),
        (BLK, 8, 4, 4),
        (SCSI, 8, 4, 4),
        (SCSI, 2, 4, 2),
        (NET, 8, 4, 1),
    ],
)
def test_a_disk_has_a_queue_for_each_cpu_if_the_backend_can(
    kind: DeviceType, cpus: int, queues: int, planned: int
) -> None:
    offer = replace(Q35, cpus=cpus)
    assert plan(kind, socket_of(kind, queues=queues), offer=offer).queues == planned
    unasked = socket_of(kind)._replace(backend=None)
    assert plan(kind, unasked, offer=offer).queues == 1


@pytest.mark.parametrize(("kind", "seconds"), [(BLK, 1), (NET, 1), (SCSI, 0)])
def test_a_lost_backend_is_looked_for_every_second_where_qemu_can(
    kind: DeviceType, seconds: int
) -> None:
    assert plan(kind).reconnect_s == seconds


@pytest.mark.parametrize(
    ("kind", "kvm", "msix"),
    [(NET, False, False), (NET, True, True), (BLK, False, True), (SCSI, False, True)],
)
def test_a_network_has_message_interrupts_only_with_kvm(
    kind: DeviceType, *, kvm: bool, msix: bool
) -> None:
    assert plan(kind, offer=replace(Q35, kvm=kvm)).msix is msix


def test_a_network_without_an_address_gets_one_of_qemus_own() -> None:
    drawn = {plan(NET).mac_address for _ in range(50)}
    assert len(drawn) > 45
    assert all(mac and re.fullmatch(r"52:54:00(:[0-9a-f]{2}){3}", mac) for mac in drawn)
    assert all(VhostUserDriver.parse(NET, {"mac": mac}).mac == mac for mac in drawn if mac)
    assert plan(BLK).mac_address is plan(SCSI).mac_address is None


# Who drives what


def test_a_network_request_and_a_stored_number_find_their_driver() -> None:
    net = NetInfo(label="eth0", socket_path="/s", driver_options={"queues": "2"})
    assert select_driver(net, socket_of(NET)) == VhostUserDriver(type=NET, queues=2)
    info = DeviceInfo(
        container_path="/dev/vda",
        dev_type=DevType.BLOCK,
        devnum=DevNum(242, 1),
        driver_options={"num-queues": "2"},
    )
    assert select_driver(info, socket_of(SCSI)) == VhostUserDriver(type=SCSI, queues=2)


@pytest.mark.parametrize("options", [{"cache": "none"}, {"reconnect": "1"}])
def test_a_stored_controller_takes_no_options_of_a_disk(options: dict[str, str]) -> None:
    info = DeviceInfo(
        container_path="/dev/vda",
        dev_type=DevType.BLOCK,
        devnum=DevNum(242, 1),
        driver_options=options,
    )
    with pytest.raises(SpecError, match="unknown for a vhost-user-scsi-pci device"):
        select_driver(info, socket_of(SCSI))


# What it is


def test_a_stored_socket_is_known_by_its_number_and_any_other_by_its_path() -> None:
    stored = socket_of(BLK)._replace(devnum=DevNum(241, 7))
    named = socket_of(NET)._replace(found_by=FoundBy.FILE)
    assert (str(stored.identity), str(named.identity)) == ("block:241:7", "socket:/run/vu.sock")
    assert stored.host_path == named.host_path == "/run/vu.sock"
    assert stored.related_identities == ()


@pytest.mark.parametrize(
    ("kind", "features", "fits"),
    [
        (SCSI, 0b1111, True),
        (SCSI, 1 << 32 | 1 << 30 | 0b1, True),
        (SCSI, 1 << 5, False),
        (SCSI, 1 << 23, False),
        (SCSI, 1 << 24, True),
        (NET, 1 << 23, True),
    ],
)
def test_a_scsi_controllers_features_are_no_other_kinds(
    kind: DeviceType, features: int, *, fits: bool
) -> None:
    assert Backend(features=features, queues=1).can_be(kind) is fits


@pytest.mark.parametrize(("has_config", "fits"), [(True, False), (False, True)])
def test_a_disk_that_tells_its_block_size_is_no_network(*, has_config: bool, fits: bool) -> None:
    """The bit alone says nothing: DPDK's networks have it too."""
    backend = Backend(features=1 << 6, queues=1, has_config=has_config)
    assert backend.can_be(NET) is fits


@pytest.mark.parametrize("has_config", [True, False])
def test_a_disks_backend_tells_its_size_in_the_configuration_space(*, has_config: bool) -> None:
    assert Backend(features=0, queues=1, has_config=has_config).can_be(BLK) is has_config
