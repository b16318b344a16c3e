"""What a pod was given is in nobody else's VM, before anything has opened it."""

from collections.abc import Iterator

import pytest

from tests.unit.kubernetes.world import (
    DISK_LINES,
    DISKS,
    GPU,
    GPUS,
    MANAGED_LINES,
    NET,
    NIC_LINES,
    NICS,
    OTHER_NET,
    SOUND,
    Node,
)
from vmplug.devnum import DevNum
from vmplug.errors import InUse
from vmplug.host.finding import Code
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.hypervisor.fake.monitor import FakeHypervisor
from vmplug.journal.journal import Journal
from vmplug.kubernetes.keeper import Keeper
from vmplug.manager.binding.binder import Binder
from vmplug.manager.host_listing import show_thing
from vmplug.manager.manager import DeviceManager
from vmplug.manager.setup import Setup
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import VfioInfo
from vmplug.vms.check import check_requests

LINES = NIC_LINES + MANAGED_LINES + DISK_LINES


@pytest.fixture
def journal(node: Node) -> Iterator[Journal]:
    with node.journal() as journal:
        yield journal


@pytest.fixture
def keeper(node: Node, journal: Journal) -> Keeper:
    return node.keeper(LINES, journal=journal)


@pytest.fixture
def manager(node: Node, journal: Journal) -> DeviceManager:
    vm = FakeHypervisor(root_ports=4)
    return DeviceManager(vm="sb1", host=node.kernel, hypervisor=vm, journal=journal)


def function(bdf: str) -> VfioInfo:
    return VfioInfo(label=bdf, device=bdf)


def disk(number: str) -> DeviceInfo:
    devnum = DevNum.parse(number)
    return DeviceInfo(container_path="/dev/x", dev_type=DevType.BLOCK, devnum=devnum)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ((NICS, "27"), function(NET)),
        ((GPUS, "26"), function(SOUND)),
        ((DISKS, "nvme-disk_S1"), disk("259:0")),
        ((DISKS, "nvme-disk_S1"), disk("259:1")),  # a part of it
    ],
)
def test_it_is_refused_in_the_name_of_its_device(
    node: Node,
    keeper: Keeper,
    manager: DeviceManager,
    given: tuple[str, str],
    wanted: VfioInfo | DeviceInfo,
) -> None:
    resource, id_ = given
    for make_ready in (keeper.allocate, keeper.prepare):
        make_ready(resource, [id_])
        _refuse(node, manager, f"{resource}={id_}", wanted)


def _refuse(node: Node, manager: DeviceManager, name: str, wanted: VfioInfo | DeviceInfo) -> None:
    before = node.kernel.picture(), node.states()
    with pytest.raises(InUse, match=f"is given to a pod of Kubernetes as {name}") as no:
        manager.attach(wanted, managed=True)
    assert Code.GIVEN_TO_POD in no.value.codes
    assert (node.kernel.picture(), node.states()) == before
    assert manager.attachments() == []


def test_the_pods_own_vm_is_let_in_and_an_opener_is_still_found(
    node: Node, keeper: Keeper, manager: DeviceManager
) -> None:
    keeper.allocate(NICS, ["27", "28"])
    keeper.prepare(NICS, ["27", "28"])
    node.open("/dev/vfio/28", name="dpdk")
    with pytest.raises(InUse, match="dpdk"):
        manager.attach(function(OTHER_NET), allow=[Code.GIVEN_TO_POD])
    assert manager.attach(function(NET), allow=[Code.GIVEN_TO_POD]).host_path == "/dev/vfio/27"


def test_what_no_pod_has_is_not_refused(
    node: Node, keeper: Keeper, manager: DeviceManager
) -> None:
    keeper.allocate(NICS, ["27"])
    manager.attach(function(OTHER_NET))
    for _ in range(2):
        keeper.note_pods({}, has_any=True, is_settled=True)
    keeper.give_back_unused()
    assert manager.attach(function(NET)).host_path == "/dev/vfio/27"


def test_a_device_that_is_only_offered_is_not_a_pods(node: Node, journal: Journal) -> None:
    keeper = node.keeper(MANAGED_LINES.replace("pre-start", "start"), journal=journal)
    keeper.bind_offered()
    assert node.states() == {"26": "offered"}
    assert journal.pod_devices.claims(journal.worker.boot_id) == []


def test_after_a_boot_a_function_is_a_pods_still(node: Node, keeper: Keeper) -> None:
    keeper.allocate(NICS, ["27"])
    keeper.allocate(DISKS, ["nvme-disk_S1"])
    node.boot()
    with node.journal() as journal:
        claims = journal.pod_devices.claims(journal.worker.boot_id)
        assert [str(claim.identity) for claim in claims] == [f"vfio:{NET}"]


def test_neither_bind_nor_unbind_takes_it(node: Node, keeper: Keeper, journal: Journal) -> None:
    binder = Binder(journal, node.kernel)
    group = find_vfio_device(GPU, node.kernel)
    keeper.allocate(GPUS, ["26"])
    before = node.kernel.picture()
    with pytest.raises(InUse, match="a pod of Kubernetes"):
        binder.bind(group)
    assert node.kernel.picture() == before
    keeper.prepare(GPUS, ["26"])
    with pytest.raises(InUse, match="a pod of Kubernetes"):
        binder.unbind(group)
    assert node.drivers()[GPU] == "vfio-pci"


def test_check_and_host_say_it_too(node: Node, keeper: Keeper) -> None:
    keeper.allocate(NICS, ["27"])
    setup = Setup(host=node.kernel, state_dir=node.state)
    (checked,) = check_requests([function(NET)], setup=setup)
    (found,) = (each for each in checked.findings if each.code is Code.GIVEN_TO_POD)
    assert found.hint == "delete that pod; for its own VM, pass --allow given-to-pod"
    thing = show_thing(NET, setup=setup)
    assert f"a pod of Kubernetes as {NICS}=27" in str(thing)
