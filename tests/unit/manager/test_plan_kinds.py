"""Plans with every kind of device: tags, the order, one for several, what stays for ever."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.contract.sandbox import Refusing, Sandbox
from vmplug.address import PciPath, PciSlot
from vmplug.devnum import DevNum
from vmplug.drivers.place import (
    GuestAddress,
    MmioPlace,
    Offer,
    PciPort,
    Place,
    PlugMode,
)
from vmplug.drivers.plug import BlockDrive, DiskFrontend, RNGDevice, VhostUserDevice
from vmplug.drivers.ports import PlugDriver
from vmplug.drivers.select import select_driver
from vmplug.errors import (
    CannotPlug,
    CommandError,
    DeviceError,
    HostError,
    InUse,
    NoFreePort,
    NoSuchDevice,
    NotAttached,
    SpecError,
    StateError,
)
from vmplug.host.block.device import DiskFile
from vmplug.host.block.pmem import PfnInfo
from vmplug.host.device import CharDevice, EntropySource, HostDevice, SharedDirectory
from vmplug.host.finding import Code, Finding
from vmplug.host.kind import DeviceType, FoundBy, SharedFilesystem
from vmplug.host.vhost_user.device import VhostUserSocket
from vmplug.host.vhost_user.virtiofsd import Virtiofsd
from vmplug.journal.records import Attachment, DeviceRecord
from vmplug.journal.state import State
from vmplug.manager.examine import CheckedRequest
from vmplug.manager.known import Known
from vmplug.manager.plan import Plan, find_places, make_plan
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import NetInfo, RngInfo, ShareInfo

MIB = 1 << 20
FS, P9, NET = DeviceType.VHOST_USER_FS, DeviceType.VIRTIO_9P, DeviceType.VHOST_USER_NET
NVDIMM = {"block-driver": "nvdimm"}

Q35 = Offer(
    machine="q35",
    ports=tuple(
        PciPort(bus=f"rp{i}", path=PciPath.parse(f"{i:02x}"), free=(PciSlot(0),)) for i in range(8)
    ),
    controllers=(),
    shared_memory=True,
    mode=PlugMode.COLD,
    nvdimm=True,
    memory_slots=4,
)
MICROVM = Offer(
    machine="microvm",
    ports=(),
    controllers=(),
    shared_memory=True,
    mode=PlugMode.COLD,
    mmio=tuple(MmioPlace(bus=f"virtio-mmio-bus.{i}", index=i) for i in range(8)),
)


def disk(
    name: str = "a", *, ro: bool = False, pmem: bool = False, **options: str
) -> CheckedRequest:
    """A request for the image /srv/NAME."""
    path = f"/srv/{name}"
    info = DeviceInfo(
        container_path=f"/dev/{name}",
        dev_type=DevType.BLOCK,
        host_path=path,
        pmem=pmem,
        read_only=ro,
        driver_options={key.replace("_", "-"): said for key, said in options.items()},
    )
    found_by = FoundBy.BACKING_FILE if pmem else FoundBy.FILE
    return found(
        info,
        DiskFile(
            host_path=path,
            size_bytes=8 * MIB,
            direct_io=True,
            found_by=found_by,
            pfn=PfnInfo(2 * MIB) if pmem else None,
        ),
    )


def memory(name: str = "m", *, ro: bool = False) -> CheckedRequest:
    """A request for the image /srv/NAME as an NVDIMM."""
    return disk(name, ro=ro, block_driver="nvdimm")


def share(
    tag: str = "work", path: str = "/srv/work", *, ro: bool = False, **options: str
) -> CheckedRequest:
    is_9p = options.get("filesystem") == SharedFilesystem.VIRTIO_9P
    info = ShareInfo(tag=tag, source=path, read_only=ro, driver_options=options)
    directory = SharedDirectory(
        P9 if is_9p else FS, path, tag, virtiofsd=Virtiofsd(path="/usr/virtiofsd")
    )
    return found(info, directory)


def socket_share(tag: str, path: str = "/run/fs.sock") -> CheckedRequest:
    socket = VhostUserSocket(kind=FS, found_by=FoundBy.FILE, socket_path=path)
    return found(ShareInfo(tag=tag, source=path), socket)


FS_SOCKET = VhostUserSocket(kind=FS, found_by=FoundBy.FILE, socket_path="/run/fs.sock")


def network(path: str = "/run/net.sock", **options: str) -> CheckedRequest:
    socket = VhostUserSocket(kind=NET, found_by=FoundBy.FILE, socket_path=path)
    return found(NetInfo(label="eth0", socket_path=path, driver_options=options), socket)


def randomness() -> CheckedRequest:
    return found(RngInfo(), EntropySource("/dev/urandom"))


def null_device(*, ro: bool = False) -> CheckedRequest:
    info = DeviceInfo(
        container_path="/dev/null", dev_type=DevType.CHAR, devnum=DevNum(1, 3), read_only=ro
    )
    return found(
        info,
        CharDevice(
            device_node="/dev/null",
            devnum=info.devnum,
            found_by=FoundBy.SYSFS,
        ),
    )


def found(info: DeviceInfo | NetInfo | ShareInfo | RngInfo, device: HostDevice) -> CheckedRequest:
    driver = select_driver(info, device)
    return CheckedRequest(info=info, driver=driver, device=device, error=None, findings=())


def plan(
    *examined: CheckedRequest, known: tuple[DeviceRecord, ...] = (), offer: Offer = Q35
) -> Plan:
    def choose(driver: PlugDriver, device: HostDevice, taken: set[str]) -> tuple[Place, Offer]:
        return driver.choose_place(device, offer, taken), offer

    places = [record.place for record in known if record.place]
    vm_has = Known(devices=known, places=places)
    checked = find_places(examined, vm="sb1", known=vm_has, choose=choose)
    said = [finding.message for request in checked for finding in request.findings]
    try:
        made = make_plan(
            examined, vm="sb1", owner="c1", known=vm_has, choose=choose, journal_id="a1b2c3"
        )
    except DeviceError as error:
        if not (isinstance(error, SpecError | HostError) or error.message in said):
            pytest.fail(f"check does not say: {error.message}")
        raise
    held = {record.identity for record in known}
    for now, before in zip(checked, examined, strict=True):
        assert not now.is_refused, f"check says without a reason: {said}"
        if before.device and before.device.identity in held:
            assert now == before.as_counted()
        else:
            assert now == before
    return made


def record_of(examined: CheckedRequest, state: State = State.ATTACHED) -> DeviceRecord:
    """The device as the journal knows it once it is plugged."""
    (new,) = plan(examined).new
    return replace(new.record, state=state)


def paths(found: Plan) -> list[str]:
    """What is plugged, in order."""
    return [new.record.host_path for new in found.new]


def addresses(found: Plan) -> dict[str, GuestAddress | None]:
    return {hold.name: hold.guest_address for hold in found.holds}


def refusal(*examined: CheckedRequest, known: tuple[DeviceRecord, ...] = ()) -> StateError:
    with pytest.raises(StateError) as caught:
        plan(*examined, known=known)
    assert caught.value.hint
    return caught.value


# Every kind


def test_every_kind_gets_a_plug_and_a_place_of_its_own() -> None:
    asked = [disk(), share(), network(), randomness(), memory(), null_device()]
    made = plan(*asked)
    assert [type(new.plug).__name__ for new in made.new] == [
        "BlockDrive",
        "VhostUserDevice",
        "VhostUserDevice",
        "RNGDevice",
        "NoneType",
        "BlockDrive",
    ]
    assert [str(new.place) for new in made.new] == [
        *("rp0/00", "rp1/00", "rp2/00", "rp3/00"),
        "None",
        "memory/0",
    ]
    for new in made.new:
        assert (new.record.place or "None") == str(new.place)
        assert new.record.state is State.PLUGGING
        assert new.plug is None or new.plug.id == new.record.id


def test_holds_come_as_asked_with_where_the_guest_sees_each() -> None:
    made = plan(memory(), share(), null_device(), randomness())
    assert [hold.name for hold in made.holds] == [
        *("/dev/m", "share:work", "/dev/null", "rng:rng0")
    ]
    assert addresses(made) == {
        "/dev/m": GuestAddress(nvdimm_id=0, nvdimm_handle=1),
        "share:work": GuestAddress(pci_path=PciPath.parse("00/00"), mount_tag="work"),
        "/dev/null": None,
        "rng:rng0": GuestAddress(pci_path=PciPath.parse("01/00")),
    }
    assert [hold.container_path for hold in made.holds] == ["/dev/m", None, "/dev/null", None]


def test_a_counted_device_is_shared_by_its_number() -> None:
    made = plan(null_device(), null_device())
    assert len(made.new) == 1
    assert len(made.holds) == 2
    assert (made.new[0].plug, made.new[0].place) == (None, None)


@given(st.lists(st.sampled_from(["disk", "memory", "share", "net", "rng", "null"]), max_size=7))
def test_no_place_is_given_twice_and_permanent_devices_come_last(kinds: list[str]) -> None:
    makers: dict[str, Callable[[str], CheckedRequest]] = {
        "disk": disk,
        "memory": memory,
        "share": lambda name: share(name, f"/srv/{name}"),
        "net": lambda name: network(f"/run/{name}"),
        "rng": lambda _: randomness(),
        "null": lambda _: null_device(),
    }
    asked = [makers[kind](f"{kind}{index}") for index, kind in enumerate(kinds)]
    made = None
    try:
        made = plan(*asked)
    except NoFreePort:
        assert kinds.count("memory") > Q35.memory_slots
        return
    assert [hold.name for hold in made.holds] == [request.info.name for request in asked]
    places = [new.record.place for new in made.new if new.record.place]
    assert len(places) == len(set(places))
    leaves = [new.record.can_be_unplugged for new in made.new]
    assert leaves == sorted(leaves, reverse=True)


# The order


def test_nvdimms_come_last_and_all_else_as_asked() -> None:
    made = plan(memory("m0"), disk("a"), memory("m1"), share(), disk("b"))
    assert paths(made) == ["/srv/a", "/srv/work", "/srv/b", "/srv/m0", "/srv/m1"]


def test_a_microvm_gets_devices_in_the_order_of_the_request() -> None:
    made = plan(randomness(), disk("a"), share(), offer=MICROVM)
    assert paths(made) == ["/dev/urandom", "/srv/a", "/srv/work"]
    assert not any(new.record.can_be_unplugged for new in made.new)


def test_an_nvdimm_that_comes_alone_has_its_number() -> None:
    assert addresses(plan(memory(), disk()))["/dev/m"] == GuestAddress(
        nvdimm_id=0, nvdimm_handle=1
    )
    offer = replace(Q35, memory_slots_used=frozenset({0, 1}), nvdimms=2)
    later = plan(memory(), known=(record_of(memory("first")),), offer=offer)
    assert addresses(later)["/dev/m"] == GuestAddress(nvdimm_id=2, nvdimm_handle=3)


def test_nvdimms_that_come_at_once_have_known_handles_only() -> None:
    made = plan(memory("m0"), memory("m1"), disk())
    assert {**addresses(made), "/dev/a": None} == {
        "/dev/m0": GuestAddress(nvdimm_handle=1),
        "/dev/m1": GuestAddress(nvdimm_handle=2),
        "/dev/a": None,
    }
    assert [new.record.guest_address for new in made.new][1:] == [
        GuestAddress(nvdimm_handle=1),
        GuestAddress(nvdimm_handle=2),
    ]


def test_one_nvdimm_for_two_is_still_one() -> None:
    made = plan(memory("m0"), memory("m0"))
    assert [hold.guest_address for hold in made.holds] == [
        GuestAddress(nvdimm_id=0, nvdimm_handle=1)
    ] * 2


# Tags


def test_one_directory_under_one_tag_is_one_device() -> None:
    made = plan(share(), share())
    assert len(made.new) == 1
    assert {hold.device_id for hold in made.holds} == {made.new[0].record.id}


def test_one_directory_under_two_tags_is_two_devices() -> None:
    made = plan(share("a"), share("b"))
    assert [str(new.record.identity) for new in made.new] == [
        "share:a:/srv/work",
        "share:b:/srv/work",
    ]


@pytest.mark.parametrize("other", [share("work", "/srv/b"), socket_share("work")])
@pytest.mark.parametrize("state", [State.ATTACHED, State.RETAINED, State.DETACHING])
def test_a_tag_is_given_once_in_a_vm(other: CheckedRequest, state: State) -> None:
    for error in (
        refusal(share("work", "/srv/a"), other),
        refusal(other, known=(record_of(share("work", "/srv/a"), state),)),
    ):
        assert error.message == "the VM already has a share with the tag work: /srv/a"
        assert (error.state, error.required) == ("taken", "free")


def test_a_tag_does_not_collide_with_other_names() -> None:
    made = plan(share("eth0"), network(), disk("eth0"))
    assert len(made.new) == 3


def test_tags_of_other_shares_do_not_matter() -> None:
    made = plan(share("b", "/srv/b"), socket_share("c"), known=(record_of(share("a")),))
    assert len(made.new) == 2


# One device for several requests


@pytest.mark.parametrize(
    ("first", "second", "plugged"), [(True, True, True), (True, False, False), (False,) * 3]
)
def test_a_device_is_plugged_read_only_when_everybody_only_reads(
    *, first: bool, second: bool, plugged: bool
) -> None:
    made = plan(memory(ro=first), memory(ro=second))
    (new,) = made.new
    assert isinstance(new.plug, BlockDrive)
    assert (new.plug.read_only, new.record.read_only) == (plugged, plugged)
    assert [hold.read_only for hold in made.holds] == [first, second]


@pytest.mark.parametrize("state", [State.ATTACHED, State.RETAINED])
@pytest.mark.parametrize("make", [disk, memory, share])
def test_a_device_that_is_plugged_read_only_serves_no_writer(
    make: Callable[..., CheckedRequest], state: State
) -> None:
    known = record_of(make(ro=True), state)
    error = refusal(make(), known=(known,))
    assert error.message == (
        f"{known.host_path} is plugged read-only, and the request is for writing"
    )
    assert (error.state, error.required) == ("read-only", "writable")
    assert plan(make(ro=True), known=(known,)).new == ()


@pytest.mark.parametrize(
    ("writable", "reader"),
    [
        (disk(), disk(ro=True)),
        (memory(), memory(ro=True)),
        (share(), share(ro=True)),
        (
            socket_share("work"),
            found(ShareInfo(tag="work", source="/s", read_only=True), FS_SOCKET),
        ),
        (null_device(), null_device(ro=True)),
    ],
    ids=lambda request: request.info.description,
)
@pytest.mark.parametrize("state", [State.ATTACHED, State.RETAINED])
def test_a_device_that_is_plugged_for_writing_serves_nobody_who_must_not_write(
    writable: CheckedRequest, reader: CheckedRequest, state: State
) -> None:
    known = record_of(writable, state)
    error = refusal(reader, known=(known,))
    assert error.message == (
        f"{known.host_path} is plugged for writing, and the request is read-only: the guest could "
        "still write to it"
    )
    assert (error.state, error.required) == ("writable", "read-only")
    assert plan(writable, known=(known,)).new == ()


def test_an_owner_who_writes_may_also_ask_for_the_same_device_read_only() -> None:
    known = record_of(memory())
    made = plan(memory(), memory(ro=True), known=(known,))
    assert [hold.read_only for hold in made.holds] == [False, True]


# Options


@pytest.mark.parametrize(
    ("plugged", "wanted"),
    [
        (share(cache="auto"), share(cache="auto")),
        (share(cache="auto"), share()),
        (share(), share()),
        (network(queues="2"), network()),
        (memory(), memory()),
        (memory(), disk("m")),
    ],
)
def test_a_device_serves_requests_with_the_same_options_or_none(
    plugged: CheckedRequest, wanted: CheckedRequest
) -> None:
    known = record_of(plugged)
    made = plan(wanted, known=(known,))
    assert made.new == ()
    assert [hold.options for hold in made.holds] == [known.options]
    assert len(plan(plugged, wanted).new) == 1


@pytest.mark.parametrize(
    ("plugged", "wanted", "state", "required"),
    [
        (share(), share(cache="auto"), "none", "cache=auto"),
        (share(cache="auto"), share(cache="none"), "cache=auto", "cache=none"),
        (network(queues="2"), network(queues="1"), "queues=2", "queues=1"),
        (disk("m"), memory("m"), "none", "block-driver=nvdimm"),
        (memory("m"), disk("m", cache="none"), "block-driver=nvdimm", "cache=none"),
    ],
)
def test_other_options_are_another_device_than_the_one_that_is_plugged(
    plugged: CheckedRequest, wanted: CheckedRequest, state: str, required: str
) -> None:
    known = record_of(plugged)
    for error in (refusal(wanted, known=(known,)), refusal(plugged, wanted)):
        assert error.message == f"{known.host_path} is plugged with other options"
        assert (error.state, error.required) == (state, required)


# One thing as two kinds


@pytest.mark.parametrize(
    ("plugged", "wanted", "words"),
    [
        (socket_share("a"), socket_share("b"), "virtio-fs with the tag a"),
        (network("/run/s"), socket_share("a", "/run/s"), "virtio-net-pci"),
        (socket_share("a", "/run/s"), network("/run/s"), "virtio-fs with the tag a"),
        (share(), share(filesystem="virtio-9p"), "virtio-fs with the tag work"),
        (share(filesystem="virtio-9p"), share(), "virtio-9p with the tag work"),
        (disk("m"), disk("m", pmem=True), "block"),
    ],
)
def test_a_device_that_is_plugged_as_one_kind_serves_no_other(
    plugged: CheckedRequest, wanted: CheckedRequest, words: str
) -> None:
    known = record_of(plugged)
    for error in (refusal(wanted, known=(known,)), refusal(plugged, wanted)):
        assert f"is plugged as {words}, and the request is for another device" in error.message
        assert error.message.startswith(known.host_path)
        assert (error.state, error.required) == ("other", "the same")


def test_persistent_memory_serves_whoever_wants_its_file() -> None:
    known = record_of(disk("m", pmem=True))
    assert plan(disk("m", pmem=True), known=(known,)).new == ()
    assert plan(disk("m"), known=(known,)).new == ()


# What the VM has already


@pytest.mark.parametrize("state", [State.PLUGGING, State.DETACHING])
@pytest.mark.parametrize("request_", [share(), network(), randomness(), memory()])
def test_a_device_in_transition_serves_no_request(request_: CheckedRequest, state: State) -> None:
    known = record_of(request_, state)
    error = refusal(request_, known=(known,))
    assert error.message == f"{known.host_path} is {state}"
    assert "vmplug reconcile --vm sb1" in (error.hint or "")


def test_an_attached_device_is_held_and_not_revived() -> None:
    known = record_of(memory())
    made = plan(memory(), known=(known,))
    assert (made.new, made.revived) == ((), ())
    assert made.holds_on(new=False) == list(made.holds)
    assert made.holds_on(new=True) == []


def test_a_retained_device_is_revived_once_and_keeps_its_place() -> None:
    known = record_of(memory("m0"), State.RETAINED)
    made = plan(memory("m0"), disk(), memory("m0"), known=(known,))
    assert made.revived == (known.id,)
    assert paths(made) == ["/srv/a"]
    assert [hold.device_id == known.id for hold in made.holds] == [True, False, True]
    assert made.holds[0].guest_address == known.guest_address


def test_retained_devices_that_nobody_wants_keep_their_places() -> None:
    known = record_of(memory("m0"), State.RETAINED)
    made = plan(memory("m1"), known=(known,))
    assert made.revived == ()
    assert [new.record.place for new in made.new] == ["memory/1"]


# What may not go


def refused(request: CheckedRequest) -> CheckedRequest:
    return replace(request, findings=(Finding(Code.NO_BACKEND, "no process listens", "start it"),))


def test_a_device_with_a_finding_stops_the_batch() -> None:
    with pytest.raises(InUse, match="net:eth0: no process listens") as caught:
        plan(disk(), refused(network()), memory())
    assert caught.value.codes == (Code.NO_BACKEND,)
    assert caught.value.hint == "start it"


def test_a_plugged_device_is_not_checked_again() -> None:
    known = record_of(network())
    (hold,) = plan(refused(network()), known=(known,)).holds
    assert hold.device_id == known.id


def test_a_missing_device_raises_its_own_error() -> None:
    error = NoSuchDevice("shared directory /x", "/x cannot be shared", hint="name another")
    info = ShareInfo(tag="x", source="/x")
    missing = CheckedRequest(
        info=info,
        driver=None,
        device=None,
        error=error,
        findings=(Finding(Code.NO_SUCH_DEVICE, error.message, "name another"),),
    )
    with pytest.raises(NoSuchDevice) as caught:
        plan(disk(), missing)
    assert caught.value is error


@pytest.mark.parametrize(
    ("request_", "offer", "reason"),
    [
        (memory(), replace(Q35, nvdimm=False), "no-nvdimm"),
        (share(), replace(Q35, shared_memory=False), "memory-not-shared"),
        (network(), replace(Q35, shared_memory=False), "memory-not-shared"),
        (share(filesystem="virtio-9p"), replace(Q35, mode=PlugMode.HOT), "cold-plug-only"),
        (randomness(), replace(MICROVM, mode=PlugMode.HOT), "cold-plug-only"),
    ],
)
def test_a_device_that_the_vm_never_takes_stops_the_batch(
    request_: CheckedRequest, offer: Offer, reason: str
) -> None:
    with pytest.raises(CannotPlug) as caught:
        plan(request_, offer=offer)
    assert caught.value.reason == reason


def test_the_options_reach_the_plug() -> None:
    made = plan(share(cache="none"), network(queues="2"), disk(block_driver="virtio-blk"))
    fs, net, drive = (new.plug for new in made.new)
    assert isinstance(fs, VhostUserDevice)
    assert fs.daemon
    assert fs.daemon.cache == "never"
    assert isinstance(net, VhostUserDevice)
    assert net.queues == 2
    assert isinstance(drive, BlockDrive)
    assert drive.driver is DiskFrontend.VIRTIO_BLOCK
    (source,) = plan(randomness()).new
    assert isinstance(source.plug, RNGDevice)


# A retained device's life, on a VM in memory


@pytest.fixture(params=["live", "restored"])
def sandbox(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sandbox]:
    made = Sandbox(tmp_path, is_restored=request.param == "restored")
    yield made
    made.close()


def nvdimm(
    sandbox: Sandbox,
    name: str = "m.img",
    *,
    ro: bool = False,
    options: Mapping[str, str] | None = None,
) -> DeviceInfo:
    sandbox.file(name, size_bytes=2 * MIB)
    return sandbox.disk(name, ro=ro, options=NVDIMM if options is None else options)


def retain(sandbox: Sandbox, info: DeviceInfo) -> Attachment:
    """An NVDIMM that nobody holds any more."""
    attachment = sandbox.devices.attach(info, owner="first")
    sandbox.devices.detach(attachment.id)
    return attachment


def held(sandbox: Sandbox) -> list[tuple[str, str, int, State]]:
    return [(a.owner, a.name, a.count, a.state) for a in sandbox.devices.attachments()]


def test_an_nvdimm_stays_when_its_last_owner_lets_go(sandbox: Sandbox) -> None:
    before = sandbox.side.parts()
    first = sandbox.devices.attach(nvdimm(sandbox), owner="first")
    second = sandbox.devices.attach(nvdimm(sandbox), owner="second")
    parts = sandbox.side.parts()
    sandbox.devices.detach(first.id)
    assert held(sandbox) == [("second", "/dev/m.img", 1, State.ATTACHED)]
    sandbox.devices.detach(second.id)
    assert held(sandbox) == [("second", "/dev/m.img", 1, State.RETAINED)]
    assert sandbox.side.parts() == parts != before


def test_a_retained_nvdimm_is_the_next_owners_and_nothing_is_sent(sandbox: Sandbox) -> None:
    first = retain(sandbox, nvdimm(sandbox))
    sent = len(sandbox.changes_sent())
    again = sandbox.devices.attach(nvdimm(sandbox), owner="second")
    assert (again.device_id, again.guest_address) == (first.device_id, first.guest_address)
    assert (again.state, again.count) == (State.ATTACHED, 1)
    assert held(sandbox) == [("second", "/dev/m.img", 1, State.ATTACHED)]
    assert len(sandbox.changes_sent()) == sent


def test_its_former_owner_starts_counting_anew(sandbox: Sandbox) -> None:
    retain(sandbox, nvdimm(sandbox))
    sandbox.devices.attach(nvdimm(sandbox), owner="first")
    assert held(sandbox) == [("first", "/dev/m.img", 1, State.ATTACHED)]
    sandbox.devices.detach_owner("first")
    assert held(sandbox) == [("first", "/dev/m.img", 1, State.RETAINED)]


def test_a_retained_nvdimm_keeps_its_slot(sandbox: Sandbox) -> None:
    first = retain(sandbox, nvdimm(sandbox, "m0.img"))
    second = sandbox.devices.attach(nvdimm(sandbox, "m1.img"))
    assert first.guest_address == GuestAddress(nvdimm_id=0, nvdimm_handle=1)
    assert second.guest_address == GuestAddress(nvdimm_id=1, nvdimm_handle=2)


def test_letting_go_of_it_again_changes_nothing(sandbox: Sandbox) -> None:
    first = retain(sandbox, nvdimm(sandbox))
    before = sandbox.picture()
    for again in (
        lambda: sandbox.devices.detach(first.id),
        lambda: sandbox.devices.detach_owner("first"),
    ):
        with pytest.raises(NotAttached, match=r"first has released .* already"):
            again()
        assert sandbox.picture() == before


def test_an_owner_lets_go_of_what_he_still_holds(sandbox: Sandbox) -> None:
    retain(sandbox, nvdimm(sandbox))
    disk = sandbox.devices.attach(sandbox.disk("a.img"), owner="first")
    assert [hold.id for hold in sandbox.devices.detach_owner("first")] == [disk.id]
    (left,) = sandbox.devices.attachments()
    assert left.state is State.RETAINED


def test_a_retained_nvdimm_serves_no_other_wish(sandbox: Sandbox) -> None:
    retain(sandbox, nvdimm(sandbox, ro=True))
    before = sandbox.picture()
    with pytest.raises(StateError, match="is plugged read-only, and the request is for writing"):
        sandbox.devices.attach(nvdimm(sandbox))
    with pytest.raises(StateError, match="is plugged with other options"):
        sandbox.devices.attach(
            nvdimm(sandbox, ro=True, options={**NVDIMM, "fstype": "ext4"}), owner="second"
        )
    assert sandbox.picture() == before


def test_it_stays_retained_when_what_comes_with_it_is_refused(sandbox: Sandbox) -> None:
    retain(sandbox, nvdimm(sandbox))
    before = sandbox.picture()
    sandbox.talk_through(lambda monitor: Refusing(monitor, 2))
    with pytest.raises(CommandError, match="refused by the test"):
        sandbox.devices.attach_all([nvdimm(sandbox), sandbox.disk("a.img")], owner="second")
    sandbox.talk_plainly()
    assert sandbox.picture() == before


@pytest.mark.parametrize("refused_command", [1, 2, 3, 4])
def test_a_refusal_before_the_last_step_leaves_nothing(
    sandbox: Sandbox, refused_command: int
) -> None:
    """The NVDIMM comes last though it was asked for first: all before it can be undone."""
    before = sandbox.picture()
    sandbox.talk_through(lambda monitor: Refusing(monitor, refused_command))
    with pytest.raises(CommandError, match="refused by the test"):
        sandbox.devices.attach_all([nvdimm(sandbox), sandbox.disk("a.img")])
    sandbox.talk_plainly()
    assert sandbox.picture() == before


def test_of_two_nvdimms_the_first_is_retained_when_the_second_is_refused(
    sandbox: Sandbox,
) -> None:
    before = sandbox.side.parts()
    sandbox.talk_through(lambda monitor: Refusing(monitor, 6))
    with pytest.raises(CommandError, match="refused by the test"):
        sandbox.devices.attach_all(
            [nvdimm(sandbox, "m0.img"), sandbox.disk("a.img"), nvdimm(sandbox, "m1.img")],
            owner="first",
        )
    sandbox.talk_plainly()
    assert held(sandbox) == [("first", "/dev/m0.img", 1, State.RETAINED)]
    parts = sandbox.side.parts()
    assert parts.nodes == before.nodes
    assert [kind for name, kind in parts.devices.items() if name not in before.devices] == [
        "nvdimm"
    ]
    (again,) = sandbox.devices.attach_all([nvdimm(sandbox, "m0.img")], owner="second")
    assert again.state is State.ATTACHED
