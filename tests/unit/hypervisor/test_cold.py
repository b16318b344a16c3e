"""Cold plug: every step as an argument, read back the way QEMU reads it; names stay literal."""

import json
import socket
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.abilities import NEW, OLD
from vmplug.address import CcwDevNo, PciPath, PciSlot, ScsiAddress
from vmplug.drivers.place import (
    CcwPlace,
    MemorySlot,
    MmioPlace,
    PciPlace,
    Place,
    PlugMode,
    ScsiPlace,
)
from vmplug.drivers.plug import (
    BlockDrive,
    DiskFrontend,
    Plug,
    RNGDevice,
    SharedFS,
    Throttle,
    VhostUserDevice,
    VirtiofsdSpec,
)
from vmplug.errors import BackendError, CannotPlug, StateError
from vmplug.host.kind import DeviceType
from vmplug.hypervisor.qemu.abilities import Abilities
from vmplug.hypervisor.qemu.start.cold import ColdQemu
from vmplug.hypervisor.qemu.start.cold_devices import arguments
from vmplug.hypervisor.qemu.start.machine import (
    MAX_MEMORY_SLOTS,
    MAX_PORTS,
    Machine,
    VmSpec,
    cold_offer,
    command_line,
)
from vmplug.hypervisor.qemu.steps.plug import plug_steps
from vmplug.hypervisor.virtiofsd import VirtiofsdProcess

ID, OTHER_ID = "0123456789abcdef", "fedcba9876543210"
NAME = f"vmplug-{ID}"
DESCRIPTORS = QMP_DESCRIPTOR, _ = 5, 6
DESCRIPTOR = 7

PCI = PciPlace(bus="rp0", slot=PciSlot(0), path=PciPath.parse("04/00"))
CCW = CcwPlace(devno=CcwDevNo(0, 1))
MMIO = MmioPlace(bus="virtio-mmio-bus.23", index=0)
SCSI = ScsiPlace(bus="scsi0.0", address=ScsiAddress(0, 3), path=None)
MEMORY = MemorySlot(slot=2, index=1)

JSON_OPTIONS = {
    "-blockdev": "blockdev-add",
    "-object": "object-add",
    "-netdev": "netdev_add",
    "-device": "device_add",
}

ODD_NAMES = [
    "/srv/a,b=c.img",
    "/srv/,readonly=on",
    "/srv/with space",
    '/srv/"quoted"',
    "/srv/back\\slash",
    "/srv/%s%n",
    "/srv/json:{}",
    "/srv/nbd:host:1",
    "/srv/ÄÖ€😀",
    "/srv/a=b=c",
    "/srv/$HOME;`id`",
    "/srv/'",
    "/srv/new\nline",
    "/srv/-device",
]

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
paths = texts.map(lambda text: f"/{text}")


def drive(file: str = "/srv/a.img", **more: Any) -> BlockDrive:
    options = {"driver": DiskFrontend.VIRTIO_BLOCK, "size_bytes": 4 << 20, **more}
    return BlockDrive(id=ID, file=file, is_device=False, **options)


def backend(kind: DeviceType, path: str | None = "/run/a.sock", **more: Any) -> VhostUserDevice:
    return VhostUserDevice(id=ID, type=kind, socket_path=path, **more)


def virtio_fs(path: str | None = None, **more: Any) -> VhostUserDevice:
    return backend(DeviceType.VHOST_USER_FS, path, **{"tag": "work", "queue_size": 1024, **more})


def network(path: str | None = "/run/a.sock", **more: Any) -> VhostUserDevice:
    return backend(DeviceType.VHOST_USER_NET, path, **{"mac_address": "52:54:00:00:00:01", **more})


def virtio_9p(path: str = "/srv/work", *, read_only: bool = False, tag: str = "work") -> SharedFS:
    return SharedFS(id=ID, directory=path, tag=tag, read_only=read_only)


def rng(path: str = "/dev/urandom", **more: Any) -> RNGDevice:
    return RNGDevice(id=ID, filename=path, **more)


# QEMU's own reading of its arguments


class Read:
    """What QEMU makes of arguments: JSON objects, and groups of options that -set adds to.

    Source: QEMU softmmu/vl.c, qemu_set_option; util/qemu-option.c, opts_do_parse.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.json: list[tuple[str, dict[str, Any]]] = []
        self.groups: dict[tuple[str, str], dict[str, str]] = {}
        self.option_strings: list[str] = []
        pairs = iter(words)
        for option in pairs:
            value = next(pairs)
            if option in JSON_OPTIONS:
                self.json.append((JSON_OPTIONS[option], json.loads(value)))
            elif option == "-set":
                where, _, what = value.partition("=")
                group, name, key = where.split(".")
                assert key not in self.groups[group, name]
                self.groups[group, name][key] = what
            else:
                assert option in {"-chardev", "-fsdev"}
                self._read_option_string(option.lstrip("-"), value)

    def _read_option_string(self, group: str, value: str) -> None:
        self.option_strings.append(value)
        first, *words = value.split(",")
        options = dict(word.split("=") for word in words)
        name = options.pop("id")
        self.groups[group, name] = {"": first, **options}


def read(
    plug: Plug,
    place: Place,
    descriptors: Mapping[str, int] | None = None,
    *,
    can: Abilities = NEW,
) -> Read:
    """A plug on the command line."""
    return Read(arguments(plug_steps(plug, place, can), descriptors or {}))


PLUGS: list[tuple[Plug, Place]] = [
    (drive(), PCI),
    (drive(), SCSI),
    (drive(), CCW),
    (drive(), MMIO),
    (drive(driver=DiskFrontend.NVDIMM), MEMORY),
    (drive(iothread=True, throttle=Throttle(bps_total=1 << 40, iops_read=7)), PCI),
    (drive(read_only=True, discard=True, serial='S "1", 2'), PCI),
    (rng(), PCI),
    (rng(max_bytes=4096, period_ms=100), CCW),
    (rng(), MMIO),
    (backend(DeviceType.VHOST_USER_BLK, queues=2, reconnect_s=1), PCI),
    (backend(DeviceType.VHOST_USER_BLK), MMIO),
    (backend(DeviceType.VHOST_USER_SCSI), PCI),
    (network(msix=False), PCI),
    (network(queues=4), PCI),
    (network(), CCW),
    (virtio_fs("/run/fs.sock", cache_size_mib=64), PCI),
    (virtio_fs("/run/fs.sock"), CCW),
    (virtio_9p(), PCI),
    (virtio_9p(read_only=True), MMIO),
]


@pytest.mark.parametrize(("plug", "place"), PLUGS)
def test_each_step_of_hot_plug_is_an_argument_with_the_same_values(
    plug: Plug, place: Place
) -> None:
    steps = plug_steps(plug, place, NEW)
    found = read(plug, place)
    said = [(step.do.execute, dict(step.do.arguments)) for step in steps]
    assert found.json == [(what, words) for what, words in said if what in JSON_OPTIONS.values()]
    others = [(what, words) for what, words in said if what not in JSON_OPTIONS.values()]
    assert [what for what, _ in others] == [
        {"chardev": "chardev-add", "fsdev": "fsdev"}[group] for group, _ in found.groups
    ]


def test_a_step_comes_after_what_it_names() -> None:
    """QEMU makes objects and drives first whatever the order; nobody should need to know."""
    words = arguments(plug_steps(drive(throttle=Throttle(bps_total=1)), PCI, NEW), {})
    assert words[::2] == ["-object", "-blockdev", "-blockdev", "-device"]


@pytest.mark.parametrize(
    ("reconnect_s", "can", "reconnect"),
    [
        (0, OLD, {}),
        (0, NEW, {}),
        (3, OLD, {"reconnect": "3"}),
        (3, NEW, {"reconnect-ms": "3000"}),
    ],
)
def test_a_socket_is_a_chardev_whose_path_is_set(
    reconnect_s: int, can: Abilities, reconnect: dict[str, str]
) -> None:
    plug = backend(DeviceType.VHOST_USER_BLK, "/run/a.sock", reconnect_s=reconnect_s)
    found = read(plug, PCI, can=can)
    wanted = {"": "socket", "path": "/run/a.sock", **reconnect}
    assert found.groups == {("chardev", f"{NAME}-link"): wanted}
    (_, device) = found.json[-1]
    assert device["chardev"] == f"{NAME}-link"


def test_a_descriptor_is_a_chardev_that_qemu_inherits() -> None:
    found = read(virtio_fs(None, descriptor=DESCRIPTOR), PCI, {f"{NAME}-link": DESCRIPTOR})
    assert found.groups == {("chardev", f"{NAME}-link"): {"": "socket", "fd": str(DESCRIPTOR)}}
    ((_, device),) = found.json
    assert (device["driver"], device["tag"]) == ("vhost-user-fs-pci", "work")


@pytest.mark.parametrize("read_only", [False, True])
def test_9p_is_an_fsdev_whose_path_is_set(*, read_only: bool) -> None:
    found = read(virtio_9p(read_only=read_only), PCI)
    ((key, options),) = found.groups.items()
    assert key == ("fsdev", f"{NAME}-fs")
    assert options == {
        "": "local",
        "path": "/srv/work",
        "security_model": "none",
        "multidevs": "remap",
        "readonly": "on" if read_only else "off",
    }
    ((_, device),) = found.json
    assert (device["fsdev"], device["mount_tag"]) == (f"{NAME}-fs", "work")


@pytest.mark.parametrize(
    ("plug", "models"),
    [
        (drive(), ("virtio-blk-pci", "virtio-blk-ccw", "virtio-blk-device")),
        (rng(), ("virtio-rng-pci", "virtio-rng-ccw", "virtio-rng-device")),
        (network(), ("virtio-net-pci", "virtio-net-ccw", "virtio-net-device")),
        (virtio_9p(), ("virtio-9p-pci", "virtio-9p-ccw", "virtio-9p-device")),
        (
            virtio_fs("/run/fs.sock"),
            ("vhost-user-fs-pci", "vhost-user-fs-ccw", "vhost-user-fs-device"),
        ),
        (
            backend(DeviceType.VHOST_USER_BLK),
            ("vhost-user-blk-pci", "vhost-user-blk-ccw", "vhost-user-blk"),
        ),
        (
            backend(DeviceType.VHOST_USER_SCSI),
            ("vhost-user-scsi-pci", "vhost-user-scsi-ccw", "vhost-user-scsi"),
        ),
    ],
)
def test_the_place_says_which_model(plug: Plug, models: tuple[str, str, str]) -> None:
    """QEMU 7.2 has no vhost-user-blk-ccw and -scsi-ccw; a later one may."""
    devices = [read(plug, place).json[-1][1] for place in (PCI, CCW, MMIO)]
    assert [device["driver"] for device in devices] == list(models)
    assert (devices[0]["bus"], devices[0]["addr"]) == ("rp0", "0x0")
    assert devices[1]["devno"] == "fe.0.0001"
    assert devices[2]["bus"] == "virtio-mmio-bus.23"
    assert "addr" not in devices[1] | devices[2]


@pytest.mark.parametrize("place", [CCW, MMIO])
@pytest.mark.parametrize("queues", [1, 4])
def test_only_pci_has_message_interrupts(place: Place, queues: int) -> None:
    (_, device) = read(network(queues=queues, msix=False), place).json[-1]
    assert "vectors" not in device


def test_memory_has_its_slot() -> None:
    (_, memory), (_, module) = read(drive(driver=DiskFrontend.NVDIMM, read_only=True), MEMORY).json
    assert (memory["mem-path"], memory["readonly"]) == ("/srv/a.img", True)
    assert (module["memdev"], module["slot"], module["unarmed"]) == (memory["id"], 2, True)


# names


def plugs_named(name: str) -> list[tuple[Plug, Place]]:
    """A plug of each kind with this name in it."""
    return [
        (drive(name), PCI),
        (drive(name, driver=DiskFrontend.NVDIMM), MEMORY),
        (drive(serial=name), SCSI),
        (rng(name), CCW),
        (backend(DeviceType.VHOST_USER_BLK, name, reconnect_s=1), PCI),
        (backend(DeviceType.VHOST_USER_SCSI, name), MMIO),
        (network(name), PCI),
        (virtio_fs(name, tag=name), CCW),
        (virtio_fs(None, descriptor=DESCRIPTOR, tag=name), PCI),
        (virtio_9p(name, tag=name), PCI),
    ]


def assert_literal(name: str) -> None:
    """The name is a value in JSON or of -set, whole, and nowhere inside an option string."""
    descriptors = {f"{NAME}-link": DESCRIPTOR}
    for (plug, place), (like, _) in zip(plugs_named(name), plugs_named("plain"), strict=True):
        found = read(plug, place, descriptors)
        values = [value for _, words in found.json for value in leaves(words)]
        values += [value for options in found.groups.values() for value in options.values()]
        assert name in values
        assert found.option_strings == read(like, place, descriptors).option_strings


def leaves(value: object) -> Iterable[object]:
    """Every value in JSON that is no object."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from leaves(inner)
    else:
        yield value


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_literal(name: str) -> None:
    assert_literal(name)


@given(paths)
def test_any_name_is_literal(path: str) -> None:
    assert_literal(path)


@pytest.mark.parametrize("machine", Machine)
@given(path=paths, words=texts)
def test_what_is_booted_is_literal(machine: Machine, path: str, words: str) -> None:
    spec = VmSpec(name="sb1", machine=machine, kernel=path, initrd=path, append=words, disk=path)
    plain = VmSpec(name="sb1", machine=machine, kernel="k", initrd="i", append="a", disk="d")
    found = command_line(spec, *DESCRIPTORS)
    booted = [found[found.index(option) + 1] for option in ("-kernel", "-initrd", "-append")]
    assert booted == [path, path, words]
    nodes = [json.loads(after) for word, after in pairwise(found) if word == "-blockdev" != words]
    assert path in [node["file"]["filename"] for node in nodes] or words == "-blockdev"
    changed = [
        (one, other)
        for one, other in zip(found, command_line(plain, *DESCRIPTORS), strict=True)
        if one != other
    ]
    assert {one for one, _ in changed if not one.startswith("{")} <= {path, words}
    assert len(changed) <= 4


# machines


def devices_on(words: Sequence[str]) -> list[dict[str, str]]:
    """The machine's own devices: none is JSON, which QEMU makes behind everybody else's."""
    asked = [word for option, word in pairwise(words) if option == "-device"]
    assert not [word for word in asked if word.startswith("{")]
    return [
        dict(pair.split("=", 1) for pair in f"driver={word}".split(","))
        for word in asked
        if not word.startswith("sclpconsole")
    ]


def option(words: Sequence[str], name: str) -> str:
    """The value of an option that is said once."""
    assert words.count(name) == 1
    return words[words.index(name) + 1]


@pytest.mark.parametrize("disk", [None, "/srv/boot.img"])
@given(ports=st.integers(0, MAX_PORTS), slots=st.integers(0, MAX_MEMORY_SLOTS))
def test_a_q35_has_just_what_is_offered(disk: str | None, ports: int, slots: int) -> None:
    spec = VmSpec(name="sb1", ports=ports, memory_slots=slots, disk=disk)
    offer, words = cold_offer(spec), command_line(spec, *DESCRIPTORS)
    devices = devices_on(words)
    roots = [device for device in devices if device["driver"] == "pcie-root-port"]
    assert [(port.bus, str(port.path)) for port in offer.ports] == [
        (root["id"], f"{int(root['addr'], 16):02x}") for root in roots
    ]
    assert all(port.free == (PciSlot(0),) for port in offer.ports)
    (controller,) = offer.controllers
    (scsi,) = [device for device in devices if device["driver"] == "virtio-scsi-pci"]
    assert controller.bus == f"{scsi['id']}.0"
    assert str(controller.path) == f"{int(scsi['addr'], 16):02x}"
    addresses = [device["addr"] for device in devices]
    assert len(set(addresses)) == len(addresses)
    assert all(0 < int(address, 16) < 0x1F for address in addresses)
    assert (offer.memory_slots, offer.nvdimm) == (slots, True)
    assert (f"slots={slots}," in option(words, "-m")) is bool(slots)
    assert len({(root["chassis"], root["slot"]) for root in roots}) == ports


@pytest.mark.parametrize("disk", [None, "/srv/boot.img"])
@pytest.mark.parametrize("machine", [Machine.MICROVM, Machine.S390])
def test_other_machines_have_no_ports_and_no_memory_slots(
    machine: Machine, disk: str | None
) -> None:
    spec = VmSpec(name="sb1", machine=machine, ports=8, memory_slots=4, disk=disk)
    offer, words = cold_offer(spec), command_line(spec, *DESCRIPTORS)
    assert offer.ports == ()
    assert (offer.nvdimm, offer.memory_slots) == (False, 0)
    assert option(words, "-m") == "512M"
    assert not [device for device in devices_on(words) if "root-port" in device["driver"]]


@pytest.mark.parametrize("disk", [None, "/srv/boot.img"])
def test_a_microvms_disk_to_boot_from_has_the_first_transport(disk: str | None) -> None:
    spec = VmSpec(name="sb1", machine=Machine.MICROVM, disk=disk)
    offer = cold_offer(spec)
    used = [device["bus"] for device in devices_on(command_line(spec, *DESCRIPTORS))]
    assert not {place.bus for place in offer.mmio} & set(used)
    assert offer.mmio[0].index == (1 if disk else 0)
    assert len({place.bus for place in offer.mmio} | set(used)) == 23
    assert "virtio-mmio-bus.0" not in {place.bus for place in offer.mmio}
    assert (offer.controllers, offer.ccw_used) == ((), None)


@pytest.mark.parametrize("disk", [None, "/srv/boot.img"])
def test_an_s390s_own_numbers_are_not_offered(disk: str | None) -> None:
    spec = VmSpec(name="sb1", machine=Machine.S390, disk=disk)
    offer = cold_offer(spec)
    words = command_line(spec, *DESCRIPTORS)
    own = {CcwDevNo.parse(device["devno"]) for device in devices_on(words)}
    assert offer.ccw_used is not None
    assert own <= offer.ccw_used
    (controller,) = offer.controllers
    assert (controller.bus, controller.path) == ("scsi0.0", None)


@pytest.mark.parametrize(
    ("machine", "program"),
    [
        (Machine.Q35, "qemu-system-x86_64"),
        (Machine.MICROVM, "qemu-system-x86_64"),
        (Machine.S390, "qemu-system-s390x"),
    ],
)
@pytest.mark.parametrize(("accel", "cpu"), [("kvm", "host"), ("tcg", "max")])
def test_every_machine_shares_its_memory_and_answers_qmp(
    machine: Machine, program: str, accel: str, cpu: str
) -> None:
    spec = VmSpec(name="sb1", machine=machine, memory_mib=300, cpus=3, accel=accel)
    words = command_line(spec, *DESCRIPTORS)
    assert words[0] == program
    assert option(words, "-name") == "sb1"
    kind, *options = option(words, "-machine").split(",")
    assert kind == machine
    assert "memory-backend=mem" in options
    assert (option(words, "-accel"), option(words, "-cpu")) == (accel, cpu)
    assert option(words, "-smp") == "3"
    memory = json.loads(option(words, "-object"))
    assert (memory["id"], memory["share"], memory["size"]) == ("mem", True, 300 << 20)
    assert f"socket,id=qmp,fd={QMP_DESCRIPTOR},server=on,wait=off" in words
    assert option(words, "-qmp") == "chardev:qmp"
    offer = cold_offer(spec)
    assert (offer.machine, offer.mode, offer.cpus) == (machine, PlugMode.COLD, 3)
    assert offer.kvm is (accel == "kvm")
    assert offer.shared_memory


@pytest.mark.parametrize("machine", Machine)
def test_the_console_is_a_pipe(machine: Machine) -> None:
    words = command_line(VmSpec(name="sb1", machine=machine), *DESCRIPTORS)
    assert "file,id=console,path=/proc/self/fd/6" in words


def test_a_microvms_only_serial_port_may_be_wanted_for_something_else() -> None:
    extra = ("-chardev", "null,id=mine", "--serial", "chardev:mine")
    spec = VmSpec(name="sb1", machine=Machine.MICROVM, extra=extra)
    assert "-serial" not in command_line(spec, *DESCRIPTORS)
    spec = VmSpec(name="sb1", machine=Machine.Q35, extra=extra)
    assert option(command_line(spec, *DESCRIPTORS), "-serial") == "chardev:console"


# ColdQemu


class FakeDaemons:
    """Daemons that are only noted; `failure` is raised instead of starting one."""

    def __init__(self, failure: BackendError | None = None) -> None:
        self.running: dict[str, VirtiofsdSpec] = {}
        self.started: list[VirtiofsdProcess] = []
        self.failure = failure

    def start(self, daemon: VirtiofsdSpec, device_id: str) -> VirtiofsdProcess:
        if self.failure:
            raise self.failure
        ours, theirs = socket.socketpair()
        theirs.close()
        self.running[device_id] = daemon
        self.started.append(VirtiofsdProcess(ours))
        return self.started[-1]

    def find(self, device_ids: Iterable[str] | None = None) -> Mapping[str, int]:
        return {name: 1 for name in self.running if device_ids is None or name in device_ids}

    def end(self, device_ids: Iterable[str]) -> None:
        for device_id in device_ids:
            self.running.pop(device_id, None)

    def open_connections(self) -> int:
        return sum(started.connection.fileno() >= 0 for started in self.started)


DAEMON = VirtiofsdSpec(
    program="/usr/lib/virtiofsd",
    options=frozenset(),
    directory="/srv",
    cache="auto",
    read_only=False,
)


def cold(daemons: FakeDaemons | None = None, **spec: Any) -> ColdQemu:
    vm = VmSpec(name="sb1", **spec)
    return ColdQemu(vm, Path("/nowhere"), daemons or FakeDaemons(), NEW)


def test_what_is_plugged_is_on_the_command_line_in_its_order() -> None:
    qemu = cold()
    first, second = drive(), RNGDevice(id=OTHER_ID, filename="/dev/urandom")
    qemu.plug(first, PCI)
    qemu.plug(second, CCW)
    steps = [*plug_steps(first, PCI, NEW), *plug_steps(second, CCW, NEW)]
    assert qemu.arguments() == arguments(steps, {})
    assert qemu.find_devices() == {ID: True, OTHER_ID: True}
    assert qemu.steps(first, PCI) == plug_steps(first, PCI, NEW)
    assert not qemu.request_unplug([ID])
    assert qemu.wait_unplugged([ID], 0) == {}
    assert qemu.arguments() == arguments(plug_steps(second, CCW, NEW), {})
    assert qemu.find_devices() == {OTHER_ID: True}
    assert not qemu.request_unplug([ID])  # once more is as good as once
    assert not qemu.request_unplug(["0000000000000000"])
    assert qemu.find_devices() == {OTHER_ID: True}
    qemu.close()


def test_a_vm_that_is_not_started_has_no_monitor() -> None:
    qemu = cold(machine=Machine.MICROVM)
    assert qemu.endpoint is None
    assert qemu.status() == "cold"
    assert qemu.offer() == cold_offer(qemu.spec)
    assert qemu.arguments() == []
    assert qemu.descriptors() == []
    qemu.plug(drive(), MMIO)
    with pytest.raises(StateError) as refused:
        qemu.resize(ID, 1 << 30)
    assert (refused.value.state, refused.value.required) == ("cold", "running")


def test_a_daemon_runs_from_the_plug_on_and_qemu_inherits_its_connection() -> None:
    daemons = FakeDaemons()
    with cold(daemons) as qemu:
        plug = virtio_fs(None, daemon=DAEMON)
        assert qemu.steps(plug, PCI)[0].do.execute == "start-daemon"
        assert daemons.running == {}
        qemu.plug(plug, PCI)
        assert daemons.running == {ID: DAEMON}
        (descriptor,) = qemu.descriptors()
        assert descriptor == daemons.started[0].descriptor
        found = Read(qemu.arguments())
        assert found.groups == {("chardev", f"{NAME}-link"): {"": "socket", "fd": str(descriptor)}}
        qemu.started()
        assert daemons.open_connections() == 0
    assert daemons.running == {ID: DAEMON}


def test_a_daemon_ends_when_qemu_was_not_started() -> None:
    daemons = FakeDaemons()
    with cold(daemons) as qemu:
        qemu.plug(virtio_fs(None, daemon=DAEMON), PCI)
    assert daemons.running == {}
    assert daemons.open_connections() == 0


def test_a_daemon_ends_with_the_device_that_is_left_out() -> None:
    daemons = FakeDaemons()
    with cold(daemons) as qemu:
        qemu.plug(virtio_fs(None, daemon=DAEMON), PCI)
        assert not qemu.request_unplug([ID])
        assert daemons.running == {}
        assert daemons.open_connections() == 0
        assert (qemu.descriptors(), qemu.arguments(), qemu.find_devices()) == ([], [], {})


def test_a_connection_of_another_process_is_inherited_and_not_closed() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with cold() as qemu:
            qemu.plug(virtio_fs(None, descriptor=ours.fileno()), PCI)
            assert qemu.descriptors() == [ours.fileno()]
        assert ours.fileno() >= 0
        ours.sendall(b"x")


def test_a_daemon_that_does_not_start_leaves_nothing() -> None:
    failure = BackendError("virtiofsd", "it cannot be started")
    with cold(FakeDaemons(failure)) as qemu:
        with pytest.raises(BackendError):
            qemu.plug(virtio_fs(None, daemon=DAEMON), PCI)
        assert (qemu.descriptors(), qemu.arguments(), qemu.find_devices()) == ([], [], {})


def test_memory_whose_file_has_gone_is_refused(tmp_path: Path) -> None:
    """QEMU would make an empty file of that name."""
    qemu = cold()
    path = tmp_path / "gone.img"
    with pytest.raises(CannotPlug) as refused:
        qemu.plug(drive(str(path), driver=DiskFrontend.NVDIMM), MEMORY)
    assert refused.value.reason == "no-such-file"
    assert (qemu.arguments(), qemu.find_devices()) == ([], {})
    path.touch()
    qemu.plug(drive(str(path), driver=DiskFrontend.NVDIMM), MEMORY)
    assert qemu.find_devices() == {ID: True}
