"""Binding on a real kernel with a real IOMMU: the contract, and what only real drivers do."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab import topology
from tests.cli.command import Vmplug
from tests.contract.binding import BindingContract, Side, held_by_vm
from tests.support.lab import PCI_DEVICES, namespace_of
from vmplug.address import Bdf
from vmplug.errors import BindError, InUse, StateError
from vmplug.host.block.usage import read_usage
from vmplug.host.check.device import check_device
from vmplug.host.finding import Access, Code, Finding
from vmplug.host.pci.bind import Writer, reset_function
from vmplug.host.pci.function import read_function
from vmplug.host.pci.iommu import find_group
from vmplug.host.pci.mdev import MDEV_DEVICES, read_mdev_types
from vmplug.host.pci.mdev_create import create_mediated
from vmplug.host.pci.sriov import VfSettings, VirtualFunction, read_virtual, set_virtual
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.host.pci.vfio_driver import choose_driver, find_driver
from vmplug.host.root import HostRoot
from vmplug.journal.journal import Journal
from vmplug.manager.binding import users
from vmplug.manager.binding.binder import Binder, BindOutcome
from vmplug.manager.binding.subdevices import divide, find_sriov, remove_unused

MULTI = (topology.MULTI_NVME, topology.MULTI_EDU, topology.MULTI_NIC)
DIED = 77
SETTLE_S = 60.0
SHORT_S = 1.0
"""For a kernel that will not answer while a device is open."""
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


@pytest.fixture
def host() -> HostRoot:
    return HostRoot()


@pytest.fixture
def side(host: HostRoot) -> Iterator[Side]:
    made = Side(host=host, single=topology.NVME, multi=MULTI)
    before = made.picture()
    yield made
    put_back(made, before)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal.open(tmp_path / "state") as store:
        yield store


def put_back(side: Side, before: dict[str, tuple[str | None, str]]) -> None:
    """By hand, whatever a test left."""
    for bdf, (driver, override) in before.items():
        if side.driver_of(bdf) != driver:
            side.override(bdf, driver or "")
            if side.driver_of(bdf):
                side.unbind(bdf)
            if driver:
                side.probe(bdf)
            if driver == "nvme":
                namespace_of(bdf)
        if side.override_of(bdf) != override:
            side.override(bdf, "" if override == "(null)" else override)
    assert side.picture() == before


class TestOnARealKernel(BindingContract):
    pass


@contextmanager
def opened(node: str) -> Iterator[None]:
    """Another process has a node open."""
    script = f"import os, sys; os.open({node!r}, os.O_RDWR); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"\n"
        yield
        process.communicate(b"")


def lspci_driver(bdf: str) -> str | None:
    """What a second reader says."""
    shown = subprocess.run(["lspci", "-vmmks", bdf], capture_output=True, text=True, check=True)
    lines = dict(line.split(":\t", 1) for line in shown.stdout.splitlines() if line)
    return lines.get("Driver")


def test_the_plain_driver_is_chosen_and_loaded(side: Side, journal: Journal) -> None:
    function = read_function(Bdf.parse(side.single), side.host)
    assert choose_driver(function, side.host) == "vfio-pci"
    Binder(journal, side.host).bind(side.group(side.single))
    assert find_driver("vfio_pci", side.host) == "vfio-pci"
    assert lspci_driver(side.single) == "vfio-pci"
    group = find_group(f"/sys/bus/pci/devices/{side.single}", side.host)
    assert Path(f"/dev/vfio/{group}").is_char_device()


def test_a_disk_is_there_again_when_its_driver_is(side: Side, journal: Journal) -> None:
    disk = namespace_of(side.single)
    binder = Binder(journal, side.host)
    binder.bind(side.group(side.single))
    assert not disk.exists()
    binder.unbind(side.group(side.single))
    assert namespace_of(side.single).is_block_device()


@pytest.mark.parametrize("bdf", [topology.EDU, topology.LARGE, topology.CONVENTIONAL[1]])
def test_functions_without_a_driver_have_none_again(
    side: Side, journal: Journal, bdf: str
) -> None:
    before = side.picture()
    assert before[bdf][0] is None
    bound = Binder(journal, side.host).bind(side.group(bdf))
    members = [str(function.bdf) for function in side.group(bdf).functions]
    assert [str(row.bdf) for row in bound] == members
    assert {side.driver_of(member) for member in members} == {"vfio-pci"}
    Binder(journal, side.host).unbind(side.group(bdf))
    assert side.picture() == before


ROOT_SHARE = "0000:00:1d.0"
"""The lab's root file system comes from there."""


@pytest.mark.parametrize("bdf", [topology.NETWORK, topology.VGA, topology.BRIDGE, ROOT_SHARE])
def test_what_the_host_needs_stays_with_it(side: Side, journal: Journal, bdf: str) -> None:
    before = side.picture()
    with pytest.raises((InUse, BindError)) as caught:
        Binder(journal, side.host).bind(side.group(bdf))
    assert caught.value.hint
    assert side.picture() == before
    assert journal.bindings.all() == []


def test_the_function_of_a_share_is_free_when_that_is_unmounted(side: Side) -> None:
    bdf = "0000:00:1c.0"
    (mounted,) = (
        line
        for line in Path("/proc/mounts").read_text().splitlines()
        if line.startswith("share0 ")
    )
    source, point, fs_type, options, *_ = mounted.split()
    found = {finding.code: finding for finding in codes_of(bdf, side)}
    assert point in found[Code.MOUNTED_ON_HOST].message
    subprocess.run(["sh", "-ec", found[Code.MOUNTED_ON_HOST].hint], check=True)
    try:
        assert Code.MOUNTED_ON_HOST not in {finding.code for finding in codes_of(bdf, side)}
    finally:
        subprocess.run(["mount", "-t", fs_type, "-o", options, source, point], check=True)


def codes_of(bdf: str, side: Side) -> list[Finding]:
    usage = read_usage(side.host)
    access = Access(read_only=False)
    return check_device(side.group(bdf), access, usage=usage, root=side.host)


def test_a_driver_that_was_not_made_for_it_is_not_tried(side: Side, journal: Journal) -> None:
    """The kernel lets any driver try that is named in driver_override: e1000e takes it down."""
    before = side.picture()
    for driver, says in (("e1000e", "not a known"), ("no_such_vfio_pci", "cannot be loaded")):
        with pytest.raises(BindError, match=says):
            Binder(journal, side.host).bind(side.group(side.single), driver=driver)
    assert side.picture() == before
    assert journal.bindings.all() == []


def test_a_disk_that_is_held_exclusively_keeps_its_controller(
    side: Side, journal: Journal
) -> None:
    """As ZFS and others do, which neither mount it nor show in sysfs."""
    before = side.picture()
    disk = namespace_of(side.single)
    holder = os.open(disk, os.O_RDONLY | os.O_EXCL)
    try:
        with pytest.raises(InUse, match=f"{disk} is open exclusively") as caught:
            Binder(journal, side.host).bind(side.group(side.single))
    finally:
        os.close(holder)
    assert caught.value.codes == (Code.OPEN_EXCLUSIVELY,)
    assert side.picture() == before
    Binder(journal, side.host).bind(side.group(side.single))


@pytest.mark.parametrize("found_at", ["nvme/nvme*", "nvme/nvme*/ng*n1"])
def test_a_controller_whose_nodes_are_open_is_kept(
    side: Side, journal: Journal, tmp_path: Path, found_at: str
) -> None:
    """By any name: a container has nodes of its own."""
    namespace_of(side.single)
    (named,) = (PCI_DEVICES / side.single).glob(found_at)  # any controller may have become nvme0
    node = f"/dev/{named.name}"
    other = tmp_path / "node"
    os.mknod(other, 0o20600, os.stat(node).st_rdev)
    before = side.picture()
    with opened(str(other)):
        with pytest.raises(InUse, match=f"{node}, a node of {side.single}, is open") as caught:
            Binder(journal, side.host).bind(side.group(side.single))
        assert caught.value.codes == (Code.OPEN_BY_PROCESS,)
        assert side.picture() == before
    Binder(journal, side.host).bind(side.group(side.single))


def wait_left_network_namespace(pid: int) -> None:
    ours = os.stat("/proc/self/ns/net").st_ino
    deadline = time.monotonic() + SETTLE_S
    while os.stat(f"/proc/{pid}/ns/net").st_ino == ours:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_interface_that_a_container_has_is_named_and_taken_back_as_told(
    side: Side, journal: Journal
) -> None:
    before = side.picture()
    with subprocess.Popen(["unshare", "--net", "sleep", "infinity"]) as container:
        try:
            wait_left_network_namespace(container.pid)
            (interface,) = os.listdir(f"/sys/bus/pci/devices/{topology.NIC}/net")
            move = ["ip", "link", "set", interface, "netns", str(container.pid)]
            subprocess.run(move, check=True)
            with pytest.raises(InUse, match=f"the network interface {interface}") as caught:
                Binder(journal, side.host).bind(side.group(topology.NIC))
            assert caught.value.codes == (Code.NETWORK_IN_USE,)
            assert f"/proc/{container.pid}/ns/net" in caught.value.message
            assert side.picture() == before
            assert caught.value.hint
            remedy = caught.value.hint.partition("nsenter ")[2].partition(";")[0]
            subprocess.run(["nsenter", *remedy.split()], check=True)
        finally:
            container.kill()
    Binder(journal, side.host).bind(side.group(topology.NIC))


@pytest.mark.parametrize("kind", ["macvlan", "ipvlan", "vlan id 7"])
def test_an_interface_of_which_a_container_has_a_part_stays_with_the_host(
    side: Side, journal: Journal, kind: str
) -> None:
    before = side.picture()
    with subprocess.Popen(["unshare", "--net", "sleep", "infinity"]) as container:
        try:
            wait_left_network_namespace(container.pid)
            (interface,) = os.listdir(f"/sys/bus/pci/devices/{topology.NIC}/net")
            add = ["ip", "link", "add", "link", interface, "name", "pod0", "type", *kind.split()]
            subprocess.run(add, check=True)
            move = ["ip", "link", "set", "pod0", "netns", str(container.pid)]
            subprocess.run(move, check=True)
            with pytest.raises(InUse, match=f"{interface}, on which pod0 in the") as caught:
                Binder(journal, side.host).bind(side.group(topology.NIC))
            assert caught.value.codes == (Code.NETWORK_IN_USE,)
            assert f"/proc/{container.pid}/ns/net" in caught.value.message
            assert side.picture() == before
            assert caught.value.hint
            remedy = caught.value.hint.partition("nsenter ")[2].partition(";")[0]
            subprocess.run(["nsenter", *remedy.split()], check=True)
        finally:
            container.kill()
    Binder(journal, side.host).bind(side.group(topology.NIC))


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("addr add 198.51.100.7/24 dev {} noprefixroute", "an address"),
        ("addr add 169.254.3.3/32 dev {} scope link", "an address"),
        ("addr add 2001:db8::7/64 dev {} noprefixroute nodad", "an address"),
        ("route add 198.51.100.0/24 dev {} scope link", "an address"),
        ("route add 198.51.100.0/24 dev {} scope link table 77", "a route"),
        ("-6 route add 2001:db8:7::/64 dev {}", "a route"),
        ("route add 198.51.100.0/24 nexthop dev {} nexthop dev lo", "an address"),
        ("route add 198.51.100.0/24 nexthop dev lo nexthop dev {}", "a route"),
        ("link add tun0 type gre local 192.0.2.1 remote 192.0.2.2 dev {}", "a place in tun0"),
    ],
)
def test_an_interface_with_an_address_or_a_route_alone_stays_with_the_host(
    side: Side, journal: Journal, words: str, what: str
) -> None:
    (interface,) = os.listdir(f"/sys/bus/pci/devices/{topology.NIC}/net")
    subprocess.run(["ip", "link", "set", interface, "up"], check=True)
    subprocess.run(["ip", *words.format(interface).split()], check=True)
    before = side.picture()
    with pytest.raises(InUse, match=f"{interface}, which has {what}") as caught:
        Binder(journal, side.host).bind(side.group(topology.NIC))
    assert caught.value.codes == (Code.NETWORK_IN_USE,)
    assert side.picture() == before
    assert caught.value.hint
    remedy = caught.value.hint.partition("first: ")[2].partition("; or accept")[0]
    subprocess.run(["sh", "-ec", remedy], check=True)
    Binder(journal, side.host).bind(side.group(topology.NIC))


def test_an_interface_with_soft_rdma_stays_with_the_host(side: Side, journal: Journal) -> None:
    subprocess.run(["modprobe", "rdma_rxe"], check=True)
    (interface,) = os.listdir(f"/sys/bus/pci/devices/{topology.NIC}/net")
    add = ["rdma", "link", "add", "rxe7", "type", "rxe", "netdev", interface]
    subprocess.run(add, check=True)
    before = side.picture()
    with pytest.raises(InUse, match=f"{interface}, which has a place in rxe7") as caught:
        Binder(journal, side.host).bind(side.group(topology.NIC))
    assert caught.value.codes == (Code.NETWORK_IN_USE,)
    assert side.picture() == before
    assert caught.value.hint
    remedy = caught.value.hint.partition("first: ")[2].partition("; or accept")[0]
    subprocess.run(["sh", "-ec", remedy], check=True)
    Binder(journal, side.host).bind(side.group(topology.NIC))


def test_what_is_open_is_not_given_back_and_then_is(side: Side, journal: Journal) -> None:
    before = side.picture()
    binder = Binder(journal, side.host)
    binder.bind(side.group(side.single))
    number = find_group(f"/sys/bus/pci/devices/{side.single}", side.host)
    node = f"/dev/vfio/{number}"
    with opened(node):
        with pytest.raises(InUse) as caught:
            binder.unbind(side.group(side.single))
        assert caught.value.codes == (Code.OPEN_BY_PROCESS,)
        assert side.driver_of(side.single) == "vfio-pci"
    binder.unbind(side.group(side.single))
    assert side.picture() == before


HOLD_DEVICE = """
import fcntl, os, sys
group_node, bdf, hide = sys.argv[1:]
container, group = os.open("/dev/vfio/vfio", os.O_RDWR), os.open(group_node, os.O_RDWR)
SET_CONTAINER, SET_IOMMU, GET_DEVICE = 0x3B68, 0x3B66, 0x3B6A
fcntl.ioctl(group, SET_CONTAINER, container.to_bytes(4, "little"))
fcntl.ioctl(container, SET_IOMMU, 1)
device = fcntl.ioctl(group, GET_DEVICE, bytearray(bdf.encode() + b"\\0"))
if hide == "hide":
    os.close(group)
print(flush=True)
sys.stdin.read()
"""
"""What a VM does: the device itself is open. Source: include/uapi/linux/vfio.h."""


@contextmanager
def device_open(side: Side, bdf: str, *, hidden: bool) -> Iterator[None]:
    """Another process has a device open; a hidden one has closed the group's node since."""
    number = find_group(f"/sys/bus/pci/devices/{bdf}", side.host)
    words = [f"/dev/vfio/{number}", bdf, "hide" if hidden else "show"]
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_DEVICE, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"\n"
        yield
        holder.communicate(b"")


@pytest.mark.parametrize("hidden", [False, True])
def test_what_a_process_has_open_is_not_taken_from_it(
    side: Side, journal: Journal, *, hidden: bool
) -> None:
    before = side.picture()
    patient, binder = Binder(journal, side.host), Binder(journal, side.host, timeout_s=SHORT_S)
    patient.bind(side.group(side.single), device_id="d1")
    between = side.picture()
    with device_open(side, side.single, hidden=hidden):
        (told,) = binder.give_back("d1")
        assert told.error
        assert "process " in told.reason
        assert (told.error.step, told.error.errno) == ("unbind", errno.EBUSY)
        (told,) = binder.recover()
        assert told.outcome is BindOutcome.STILL_OPEN
        assert side.picture() == between
    (told,) = patient.recover()
    assert told.outcome is BindOutcome.GIVEN_BACK
    assert side.picture() == before


def test_an_unbind_that_the_kernel_does_not_finish_has_a_deadline_and_is_finished_later(
    side: Side, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody opens it after vmplug has looked. Until it is let go, nobody can read it either."""
    monkeypatch.setattr(users, "is_open", lambda *_: False)
    before = side.picture()
    patient, binder = Binder(journal, side.host), Binder(journal, side.host, timeout_s=SHORT_S)
    patient.bind(side.group(side.single), device_id="d1")
    with device_open(side, side.single, hidden=True):
        (told,) = binder.give_back("d1")
        assert told.error
        assert (told.error.step, told.error.errno) == ("unbind", errno.ETIMEDOUT)
        assert told.error.hint
        assert len(journal.bindings.all()) == 1
        (told,) = binder.recover()
        assert told.outcome is BindOutcome.FAILED
    (told,) = patient.recover()
    assert told.outcome is BindOutcome.GIVEN_BACK
    assert side.picture() == before


class Dying(HostRoot):
    """The live host, for a process that ends at the write of that number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._left = number

    def write_attribute(self, path: str, text: str) -> int | None:
        """See HostRoot."""
        if self._left == 0:
            os._exit(DIED)
        self._left -= 1
        return super().write_attribute(path, text)


def dies(state_dir: Path, number: int, bdf: str, *, unbind: bool) -> bool:
    """Whether a process that binds, or gives back, ends before the write of that number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with Journal.open(state_dir) as journal:
                binder = Binder(journal, Dying(number))
                group = find_vfio_device(bdf, HostRoot())
                binder.unbind(group) if unbind else binder.bind(group)
            status = 0
        finally:
            os._exit(status)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended in {0, DIED}
    return ended == DIED


@pytest.mark.parametrize("unbind", [False, True])
def test_death_at_any_step_is_recovered_from(side: Side, tmp_path: Path, *, unbind: bool) -> None:
    before = side.picture()
    for number in range(20):
        state_dir = tmp_path / f"state-{number}"
        with Journal.open(state_dir) as journal:
            if unbind:
                Binder(journal, side.host).bind(side.group(MULTI[0]))
        died = dies(state_dir, number, MULTI[0], unbind=unbind)
        with Journal.open(state_dir) as journal:
            if not died and not unbind:
                Binder(journal, side.host).unbind(side.group(MULTI[0]))
            Binder(journal, side.host).recover()
            assert journal.bindings.all() == []
        assert side.picture() == before, number
        if not died:
            break
    else:
        pytest.fail("there are more steps than that")
    assert number > 6


# virtual functions


@pytest.fixture
def physfn(side: Side) -> Iterator[Bdf]:
    bdf = Bdf.parse(topology.SRIOV)
    yield bdf
    base = f"/sys/bus/pci/devices/{bdf}"
    Path(f"{base}/sriov_numvfs").write_text("0")
    Path(f"{base}/sriov_drivers_autoprobe").write_text("1")


def numvfs(bdf: Bdf) -> int:
    return int(Path(f"/sys/bus/pci/devices/{bdf}/sriov_numvfs").read_text())


def test_virtual_functions_are_made_bound_reset_and_taken_away(
    side: Side, physfn: Bdf, journal: Journal
) -> None:
    found = find_sriov(physfn, side.host)
    assert (found.total, found.virtfns) == (topology.SRIOV_VFS, ())
    made = divide(physfn, 2, journal=journal, host=side.host, autoprobe=False)
    assert [str(bdf) for bdf in made] == ["0000:09:00.1", "0000:09:00.2"]
    assert numvfs(physfn) == 2
    first = str(made[0])
    before = side.picture()
    binder = Binder(journal, side.host)
    (bound,) = binder.bind(side.group(first))
    assert (bound.former.driver, side.driver_of(first)) == (None, "vfio-pci")
    for count in (0, 4):
        with pytest.raises(StateError, match=first):
            divide(physfn, count, journal=journal, host=side.host)
    assert numvfs(physfn) == 2
    binder.unbind(side.group(first))
    assert side.picture() == before
    assert len(divide(physfn, 4, journal=journal, host=side.host)) == 4
    assert numvfs(physfn) == 4
    assert divide(physfn, 0, journal=journal, host=side.host) == ()
    assert numvfs(physfn) == 0


def test_the_kernel_says_how_many_there_can_be(side: Side, physfn: Bdf, journal: Journal) -> None:
    divide(physfn, 1, journal=journal, host=side.host, autoprobe=False)
    with pytest.raises(BindError, match="can have 4 virtual functions, not 5"):
        divide(physfn, 5, journal=journal, host=side.host)
    assert numvfs(physfn) == 1


class OneFails(HostRoot):
    """The live host, on which one write of a number of virtual functions is refused."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def write_attribute(self, path: str, text: str) -> int | None:
        """See HostRoot."""
        if path.endswith("/sriov_numvfs") and text == self._text:
            return errno.ENOMEM
        return super().write_attribute(path, text)


def test_a_failure_half_way_puts_the_former_number_back(
    side: Side, physfn: Bdf, journal: Journal
) -> None:
    divide(physfn, 2, journal=journal, host=side.host, autoprobe=False)
    before = side.picture()
    with pytest.raises(BindError):
        divide(physfn, 4, journal=journal, host=OneFails("4"))
    assert numvfs(physfn) == 2
    assert side.picture() == before


def test_virtual_functions_that_a_vm_or_a_process_has_stay(
    side: Side, physfn: Bdf, journal: Journal
) -> None:
    made = divide(physfn, 2, journal=journal, host=side.host, autoprobe=False)
    bdf = str(made[1])
    side.override(bdf, "vfio-pci")
    side.probe(bdf)
    number = find_group(f"/sys/bus/pci/devices/{bdf}", side.host)
    with opened(f"/dev/vfio/{number}"), pytest.raises(InUse) as caught:
        divide(physfn, 0, journal=journal, host=side.host)
    assert caught.value.codes == (Code.OPEN_BY_PROCESS,)
    held_by_vm(journal, f"vfio:{bdf}")
    with pytest.raises(InUse) as caught:
        divide(physfn, 0, journal=journal, host=side.host)
    assert caught.value.codes == (Code.IN_USE_BY_VM,)
    assert numvfs(physfn) == 2
    side.unbind(bdf)


def test_a_function_is_reset(side: Side) -> None:
    before = side.picture()
    reset_function(Bdf.parse(topology.NIC), side.host)
    assert side.picture() == before
    with pytest.raises(BindError) as caught:
        Writer(device="0000:00:00.0", root=side.host).write(
            "reset", "/sys/bus/pci/devices/none/reset", "1"
        )
    assert caught.value.errno == errno.ENOENT


# what virtual functions are told


@pytest.fixture
def simulated() -> Iterator[str]:
    """The interface of a card that the kernel plays, with three virtual functions."""
    subprocess.run(["modprobe", "netdevsim"], check=True)
    Path("/sys/bus/netdevsim/new_device").write_text("10 1")
    card = Path("/sys/bus/netdevsim/devices/netdevsim10")
    (card / "sriov_numvfs").write_text("3")
    (interface,) = (card / "net").iterdir()
    yield interface.name
    Path("/sys/bus/netdevsim/del_device").write_text("10")


def test_a_virtual_function_is_told_and_read_back(simulated: str) -> None:
    nothing = [
        VirtualFunction(number=n, mac="00:00:00:00:00:00", vlan=0, trust=False) for n in range(3)
    ]
    assert read_virtual(simulated) == nothing
    wanted = VfSettings(mac="02:00:00:00:00:0A", vlan=100, trust=True)
    told = set_virtual(simulated, 1, wanted)
    assert told == VirtualFunction(number=1, mac="02:00:00:00:00:0a", vlan=100, trust=True)
    assert read_virtual(simulated) == [nothing[0], told, nothing[2]]
    set_virtual(simulated, 1, VfSettings(vlan=0, trust=False))
    set_virtual(simulated, 1, VfSettings(mac="00:00:00:00:00:00"))
    assert read_virtual(simulated) == nothing
    with pytest.raises(BindError, match="has no virtual function 3"):
        set_virtual(simulated, 3, wanted)
    with pytest.raises(BindError, match="has no virtual function 0"):
        set_virtual("lo", 0, wanted)
    assert read_virtual(simulated) == nothing


# mediated devices


@pytest.fixture
def mtty(side: Side) -> Iterator[str]:
    """A parent that is not PCI, and what it offers."""
    subprocess.run(["modprobe", "mtty"], check=True)
    yield "mtty"
    for uuid in side.host.list_dir(MDEV_DEVICES):
        Path(f"{MDEV_DEVICES}/{uuid}/remove").write_text("1")


def test_a_mediated_device_is_made_and_taken_away(side: Side, mtty: str, journal: Journal) -> None:
    offered = [offer for offer in read_mdev_types(side.host) if offer.parent == mtty]
    for offer in offered:
        uuid = create_mediated(mtty, offer.name, side.host)
        group = find_vfio_device(uuid, side.host)
        assert group.mediated
        assert group.mediated.parent == mtty
        assert Path(f"/dev/vfio/{group.number}").is_char_device()
        assert Binder(journal, side.host).bind(group) == []
        with opened(f"/dev/vfio/{group.number}"), pytest.raises(InUse):
            remove_unused(uuid, journal=journal, host=side.host)
        remove_unused(uuid, journal=journal, host=side.host)
        assert side.host.list_dir(MDEV_DEVICES) == []


def test_a_parent_makes_no_more_than_it_has_room_for(side: Side, mtty: str) -> None:
    (offer, *_) = [offer for offer in read_mdev_types(side.host) if offer.parent == mtty]
    assert offer.available
    create_mediated(mtty, offer.name, side.host, uuid=UUID)
    with pytest.raises(BindError, match="already"):
        create_mediated(mtty, offer.name, side.host, uuid=UUID)
    for _ in range(offer.available - 1):
        create_mediated(mtty, offer.name, side.host)
    with pytest.raises(BindError, match="cannot make another"):
        create_mediated(mtty, offer.name, side.host)


# the command line


@pytest.fixture
def vmplug(tmp_path: Path) -> Vmplug:
    return Vmplug(tmp_path / "state")


def test_the_verbs_bind_and_give_back(side: Side, vmplug: Vmplug) -> None:
    before = side.picture()
    shown = vmplug("bind", MULTI[0].removeprefix("0000:")).answer().splitlines()
    assert [line.split() for line in shown[1:]] == [
        [bdf, before[bdf][0] or "-", "vfio-pci"] for bdf in MULTI
    ]
    number = find_group(f"/sys/bus/pci/devices/{MULTI[0]}", side.host)
    assert len(vmplug("bind", f"/dev/vfio/{number}", "--json").json()["functions"]) == 3
    told = vmplug("unbind", f"/dev/vfio/{number}", "--json").json()
    assert {row["outcome"] for row in told["functions"]} == {"given back"}
    assert side.picture() == before
    assert vmplug("unbind", MULTI[1]).status == 6


def test_the_verb_refuses_a_mounted_disk(side: Side, vmplug: Vmplug, tmp_path: Path) -> None:
    before = side.picture()
    disk = namespace_of(side.single)
    subprocess.run(["mkfs.ext4", "-q", "-F", disk], check=True)
    (tmp_path / "mnt").mkdir()
    subprocess.run(["mount", disk, tmp_path / "mnt"], check=True)
    try:
        refused = vmplug("bind", side.single, "--json")
        assert refused.status == 4
        assert refused.error()["facts"]["codes"] == ["mounted-on-host"]
        assert side.picture() == before
    finally:
        subprocess.run(["umount", tmp_path / "mnt"], check=True)


def test_reconcile_gives_back_what_a_crash_left(side: Side, vmplug: Vmplug) -> None:
    before = side.picture()
    assert dies(vmplug.state_dir, 5, MULTI[0], unbind=False)
    assert side.picture() != before
    told = vmplug("reconcile", "--json").json()
    assert [row["outcome"] for row in told["bindings"]] == ["given back"] * 3
    assert side.picture() == before


def test_the_verbs_divide(side: Side, physfn: Bdf, mtty: str, vmplug: Vmplug) -> None:
    told = vmplug("sriov", str(physfn), "--count", "3", "--autoprobe", "off", "--json").json()
    assert [row["address"] for row in told["functions"]] == [
        f"0000:09:00.{number}" for number in (1, 2, 3)
    ]
    assert "has 0 of 4" in vmplug("sriov", str(physfn), "--count", "0").answer()
    (offer, *_) = read_mdev_types(side.host)
    made = vmplug("mdev", "create", mtty, offer.name, "--uuid", UUID, "--json").json()
    assert made["uuid"] == UUID
    assert Path(made["group_node"]).is_char_device()
    assert vmplug("mdev", "remove", UUID).answer() == f"removed {UUID}\n"
