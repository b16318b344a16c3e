"""Virtual functions and mediated devices, made and taken away on a kernel that is a tree."""

import errno
from pathlib import Path

import pytest

from tests.contract.binding import held_by_vm
from tests.support.fake_ip import FakeIp, fake_ip
from tests.support.fake_kernel import FakeKernel, Fault
from tests.support.pci_tree import PciTree
from vmplug.address import Bdf
from vmplug.errors import BindError, InUse, NoSuchDevice, SpecError, StateError
from vmplug.host import program
from vmplug.host.finding import Code
from vmplug.host.pci.iommu import find_group
from vmplug.host.pci.mdev import MDEV_DEVICES, UUID, read_mdev_types
from vmplug.host.pci.mdev_create import create_mediated
from vmplug.host.pci.sriov import (
    VfSettings,
    VirtualFunction,
    find_interface,
    read_sriov,
    read_virtual,
    set_virtual,
)
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.journal.journal import Journal
from vmplug.manager.binding.binder import Binder
from vmplug.manager.binding.subdevices import divide, find_sriov, read_interface, remove_unused

PHYSFN, OTHER, PARENT = "0000:03:00.0", "0000:04:00.0", "0000:00:02.0"
FIRST, SECOND = "0000:03:10.0", "0000:03:10.1"
ANY_UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
TYPE = "i915-GVTg_V5_4"


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    tree = PciTree(tmp_path / "host")
    tree.pci_function(PHYSFN, class_code=0x020000, driver="igb", group=4)
    tree.sriov(PHYSFN, total=4)
    tree.pci_function(OTHER, driver="nvme", group=6)
    tree.pci_function(PARENT, class_code=0x030000, driver="i915", group=7)
    return tree.pci_driver("vfio-pci").pci_driver("igbvf")


@pytest.fixture
def kernel(tree: PciTree) -> FakeKernel:
    return FakeKernel(tree, takes={"igb": [PHYSFN]}, of_virtual="igbvf")


def count_to(
    number: int, journal: Journal, kernel: FakeKernel, *, allow: tuple[Code, ...] = ()
) -> list[str]:
    found = divide(Bdf.parse(PHYSFN), number, journal=journal, host=kernel, allow=allow)
    return [str(bdf) for bdf in found]


def numvfs(kernel: FakeKernel) -> int:
    """The kernel's own count, and the links that there are."""
    base = kernel.tree.path / f"sys/bus/pci/devices/{PHYSFN}"
    number = int((base / "sriov_numvfs").read_text())
    assert len(list(base.glob("virtfn*"))) == number
    return number


# how many


def test_virtual_functions_are_made_and_taken_away(journal: Journal, kernel: FakeKernel) -> None:
    assert count_to(2, journal, kernel) == [FIRST, SECOND]
    assert kernel.driver_of(FIRST) == "igbvf"
    assert find_sriov(Bdf.parse(PHYSFN), kernel).virtfns == (Bdf.parse(FIRST), Bdf.parse(SECOND))
    assert count_to(0, journal, kernel) == []
    assert numvfs(kernel) == 0


def test_the_number_changes_through_zero(journal: Journal, kernel: FakeKernel) -> None:
    count_to(1, journal, kernel)
    count_to(3, journal, kernel)
    assert [write.text for write in kernel.writes] == ["1", "0", "3"]
    assert numvfs(kernel) == 3


def test_the_same_number_is_not_written(journal: Journal, kernel: FakeKernel) -> None:
    count_to(2, journal, kernel)
    kernel.writes.clear()
    assert count_to(2, journal, kernel) == [FIRST, SECOND]
    assert kernel.writes == []


def test_the_hosts_drivers_can_be_kept_from_them(journal: Journal, kernel: FakeKernel) -> None:
    divide(Bdf.parse(PHYSFN), 1, journal=journal, host=kernel, autoprobe=False)
    assert kernel.driver_of(FIRST) is None
    found = read_sriov(Bdf.parse(PHYSFN), kernel)
    assert found
    assert found.autoprobe is False


@pytest.mark.parametrize(
    ("bdf", "says"),
    [(OTHER, "cannot have virtual functions"), ("0000:7f:00.0", "no PCI function")],
)
def test_a_function_without_virtual_functions_is_an_error(
    journal: Journal, kernel: FakeKernel, bdf: str, says: str
) -> None:
    with pytest.raises((BindError, NoSuchDevice), match=says) as caught:
        divide(Bdf.parse(bdf), 1, journal=journal, host=kernel)
    assert caught.value.hint
    assert kernel.writes == []


def test_a_virtual_function_has_none_of_its_own(journal: Journal, kernel: FakeKernel) -> None:
    count_to(1, journal, kernel)
    with pytest.raises(BindError, match=f"it is one of {PHYSFN}"):
        divide(Bdf.parse(FIRST), 1, journal=journal, host=kernel)


def test_more_than_there_can_be_is_refused(journal: Journal, kernel: FakeKernel) -> None:
    count_to(1, journal, kernel)
    with pytest.raises(BindError, match="can have 4 virtual functions, not 5"):
        count_to(5, journal, kernel)
    assert numvfs(kernel) == 1


@pytest.mark.parametrize(
    "what",
    [errno.ENOMEM, errno.ENOENT, pytest.param(Fault.NOTHING_HAPPENS, marks=pytest.mark.slow)],
)
def test_a_failure_half_way_puts_the_former_number_back(
    journal: Journal, kernel: FakeKernel, what: int | Fault
) -> None:
    count_to(2, journal, kernel)
    kernel.fail_at(len(kernel.writes) + 1, what)
    with pytest.raises(BindError) as caught:
        divide(Bdf.parse(PHYSFN), 4, journal=journal, host=kernel, autoprobe=None)
    assert caught.value.step == "sriov_numvfs"
    assert caught.value.hint
    assert numvfs(kernel) == 2


def test_a_former_number_that_cannot_be_put_back_is_told(
    journal: Journal, kernel: FakeKernel
) -> None:
    count_to(2, journal, kernel)
    for number in (1, 2):
        kernel.fail_at(len(kernel.writes) + number, errno.ENOMEM)
    with pytest.raises(BindError) as caught:
        count_to(4, journal, kernel)
    assert caught.value.hint
    assert "could not restore the former number" in caught.value.hint
    assert numvfs(kernel) == 0


# in use


def refused(journal: Journal, kernel: FakeKernel, *codes: Code) -> None:
    kernel.writes.clear()
    before = kernel.picture()
    for number in (0, 3):
        with pytest.raises(InUse) as caught:
            count_to(number, journal, kernel)
        assert caught.value.codes == codes
        assert caught.value.hint
    assert kernel.writes == []
    assert kernel.picture() == before
    assert numvfs(kernel) == 2
    assert count_to(2, journal, kernel) == [FIRST, SECOND]


def test_the_number_stays_while_a_vm_has_one(journal: Journal, kernel: FakeKernel) -> None:
    count_to(2, journal, kernel)
    held_by_vm(journal, f"vfio:{SECOND}")
    refused(journal, kernel, Code.IN_USE_BY_VM)


def test_the_number_stays_while_a_process_has_one(
    journal: Journal, kernel: FakeKernel, tree: PciTree
) -> None:
    count_to(2, journal, kernel)
    number = find_group(f"/sys/bus/pci/devices/{SECOND}", kernel)
    tree.process(77, "qemu", f"/dev/vfio/{number}")
    refused(journal, kernel, Code.OPEN_BY_PROCESS)


def test_the_number_stays_while_a_container_has_an_interface(
    journal: Journal, kernel: FakeKernel, tree: PciTree
) -> None:
    count_to(2, journal, kernel)
    tree.moved_network(FIRST)
    refused(journal, kernel, Code.NETWORK_IN_USE)
    assert count_to(1, journal, kernel, allow=(Code.NETWORK_IN_USE,)) == [FIRST]


def test_the_number_stays_while_the_host_uses_one(
    journal: Journal, kernel: FakeKernel, tree: PciTree
) -> None:
    count_to(2, journal, kernel)
    tree.network(FIRST, "eth1").route("eth1", target="0000A8C0")
    refused(journal, kernel, Code.NETWORK_IN_USE)
    assert count_to(1, journal, kernel, allow=(Code.NETWORK_IN_USE,)) == [FIRST]


def test_the_physical_functions_own_uses_do_not_count(
    journal: Journal, kernel: FakeKernel, tree: PciTree
) -> None:
    tree.network(PHYSFN, "eth0").route("eth0")
    count_to(2, journal, kernel)
    count_to(0, journal, kernel)


def test_the_number_stays_while_one_is_bound(journal: Journal, kernel: FakeKernel) -> None:
    count_to(2, journal, kernel)
    Binder(journal, kernel).bind(find_vfio_device(SECOND, kernel))
    before = kernel.picture()
    with pytest.raises(StateError, match=SECOND) as caught:
        count_to(0, journal, kernel)
    assert caught.value.hint == f"give it back first: vmplug unbind {SECOND}"
    assert kernel.picture() == before
    assert numvfs(kernel) == 2


# what each is told


@pytest.fixture
def ip(tmp_path: Path, tree: PciTree, monkeypatch: pytest.MonkeyPatch) -> FakeIp:
    tree.network(PHYSFN, "eth0")
    made = fake_ip(tmp_path / "bin", "eth0", 2)
    monkeypatch.setattr(program, "PROGRAM_PATH", f"{made.directory}:{program.PROGRAM_PATH}")
    return made


def test_a_virtual_function_is_told_and_read_back(ip: FakeIp) -> None:
    wanted = VfSettings(mac="02-00-00-00-00-0A", vlan=100, trust=True)
    told = set_virtual("eth0", 1, wanted)
    assert told == VirtualFunction(number=1, mac="02:00:00:00:00:0a", vlan=100, trust=True)
    assert read_virtual("eth0") == [
        VirtualFunction(number=0, mac="00:00:00:00:00:00", vlan=0, trust=False),
        told,
    ]
    assert ip.commands() == [
        "link set dev eth0 vf 1 mac 02:00:00:00:00:0a",
        "link set dev eth0 vf 1 vlan 100",
        "link set dev eth0 vf 1 trust on",
    ]


def test_unnamed_settings_stay(ip: FakeIp) -> None:
    set_virtual("eth0", 0, VfSettings(vlan=5))
    set_virtual("eth0", 0, VfSettings(trust=True))
    assert read_virtual("eth0")[0] == VirtualFunction(
        number=0, mac="00:00:00:00:00:00", vlan=5, trust=True
    )
    set_virtual("eth0", 0, VfSettings(vlan=0))
    assert read_virtual("eth0")[0].vlan == 0


@pytest.mark.parametrize(
    "wanted",
    [
        VfSettings(mac="02:00:00:00:00"),
        VfSettings(mac="02:00:00:00:00:00:00"),
        VfSettings(mac="ff:ff:ff:ff:ff:ff"),
        VfSettings(mac="01:00:5e:00:00:01"),
        VfSettings(mac="02:00:00:00:00:0g"),
        VfSettings(mac="02:00:00:00:00:00\n"),
        VfSettings(vlan=-1),
        VfSettings(vlan=4095),
    ],
)
def test_malformed_settings_are_not_sent(ip: FakeIp, wanted: VfSettings) -> None:
    with pytest.raises(SpecError):
        set_virtual("eth0", 0, wanted)
    assert ip.commands() == []


def test_an_unsupported_setting_reverts_the_others(ip: FakeIp) -> None:
    before = ip.functions()
    ip.set(unsupported=["trust"])
    with pytest.raises(BindError, match="Operation not supported") as caught:
        set_virtual("eth0", 1, VfSettings(mac="02:00:00:00:00:01", vlan=7, trust=True))
    assert caught.value.hint
    assert "does not support this setting" in caught.value.hint
    assert ip.functions() == before


def test_a_setting_that_the_driver_ignores_is_noticed(ip: FakeIp) -> None:
    before = ip.functions()
    ip.set(ignored=["trust"])
    with pytest.raises(BindError, match="took trust True"):
        set_virtual("eth0", 1, VfSettings(vlan=7, trust=True))
    assert ip.functions() == before


@pytest.mark.parametrize(("interface", "number"), [("eth0", 2), ("eth9", 0), ("eth0", -1)])
def test_a_virtual_function_that_is_not_there_is_told(
    ip: FakeIp, interface: str, number: int
) -> None:
    with pytest.raises(BindError):
        set_virtual(interface, number, VfSettings(vlan=7))
    assert ip.commands() == []


def test_nonsense_from_ip_is_an_error(ip: FakeIp) -> None:
    ip.set(broken=True)
    with pytest.raises(BindError, match="makes no sense"):
        read_virtual("eth0")


def test_the_interface_is_the_physical_functions_own(
    tree: PciTree, kernel: FakeKernel, journal: Journal
) -> None:
    for name, port in (("eth0_0", "pf0vf0\n"), ("eth0_1", "c1pf0vf1\n"), ("eth1", "p0\n")):
        tree.network(PHYSFN, name)
        tree.file(f"{tree.real(PHYSFN)}/net/{name}/phys_port_name", port)
    assert find_interface(Bdf.parse(PHYSFN), kernel) == "eth1"
    assert read_interface(Bdf.parse(PHYSFN), kernel) == "eth1"


def test_a_function_without_an_interface_is_told(kernel: FakeKernel) -> None:
    with pytest.raises(BindError, match="no network interface"):
        read_interface(Bdf.parse(PHYSFN), kernel)


# mediated devices


def available(kernel: FakeKernel) -> int | None:
    (offered,) = read_mdev_types(kernel)
    return offered.available


@pytest.fixture
def parent(tree: PciTree) -> PciTree:
    return tree.mdev_type(PARENT, TYPE, available=2)


@pytest.mark.parametrize("uuid", [ANY_UUID, ANY_UUID.upper(), None])
def test_a_mediated_device_is_made_and_taken_away(
    parent: PciTree, kernel: FakeKernel, journal: Journal, uuid: str | None
) -> None:
    made = create_mediated(PARENT, TYPE, kernel, uuid=uuid)
    assert made == uuid.lower() if uuid else UUID.match(made)
    group = find_vfio_device(made, kernel)
    assert group.mediated
    assert (group.mediated.parent, group.number is not None) == (PARENT, True)
    assert available(kernel) == 1
    remove_unused(made, journal=journal, host=kernel)
    assert kernel.list_dir(MDEV_DEVICES) == []
    assert available(kernel) == 2


@pytest.mark.parametrize(
    ("parent_name", "type_name", "hint"),
    [
        (PARENT, "other", TYPE),
        (OTHER, TYPE, PARENT),
        ("../mdev_bus/" + PARENT, TYPE, PARENT),
        (PARENT, f"../mdev_supported_types/{TYPE}", TYPE),
    ],
)
def test_a_type_that_is_not_offered_is_not_made(
    parent: PciTree, kernel: FakeKernel, parent_name: str, type_name: str, hint: str
) -> None:
    with pytest.raises(NoSuchDevice) as caught:
        create_mediated(parent_name, type_name, kernel)
    assert caught.value.hint
    assert hint in caught.value.hint
    assert kernel.writes == []


def test_a_host_without_parents_says_so(kernel: FakeKernel) -> None:
    with pytest.raises(NoSuchDevice, match="makes no mediated devices"):
        create_mediated(PARENT, TYPE, kernel)


@pytest.mark.parametrize("uuid", ["x", ANY_UUID + "0", ANY_UUID + "\n", "../" + ANY_UUID[3:]])
def test_text_that_is_not_a_uuid_is_not_written(
    parent: PciTree, kernel: FakeKernel, journal: Journal, uuid: str
) -> None:
    with pytest.raises(SpecError):
        create_mediated(PARENT, TYPE, kernel, uuid=uuid)
    with pytest.raises(NoSuchDevice):
        remove_unused(uuid, journal=journal, host=kernel)
    assert kernel.writes == []


def test_a_uuid_that_is_there_is_not_made_again(parent: PciTree, kernel: FakeKernel) -> None:
    create_mediated(PARENT, TYPE, kernel, uuid=ANY_UUID)
    with pytest.raises(BindError, match="already"):
        create_mediated(PARENT, TYPE, kernel, uuid=ANY_UUID)
    assert available(kernel) == 1


def test_a_parent_without_room_makes_none(parent: PciTree, kernel: FakeKernel) -> None:
    for _ in range(2):
        create_mediated(PARENT, TYPE, kernel)
    kernel.writes.clear()
    with pytest.raises(BindError, match="cannot make another"):
        create_mediated(PARENT, TYPE, kernel)
    assert kernel.writes == []


@pytest.mark.parametrize("what", [errno.EINVAL, Fault.NOTHING_HAPPENS])
def test_a_mediated_device_that_the_kernel_did_not_make_is_an_error(
    parent: PciTree, kernel: FakeKernel, what: int | Fault
) -> None:
    kernel.fail("create", what)
    with pytest.raises(BindError):
        create_mediated(PARENT, TYPE, kernel, timeout_s=0.05)
    assert available(kernel) == 2


@pytest.mark.parametrize("how", ["claimed", "open"])
def test_a_mediated_device_in_use_stays(
    parent: PciTree, kernel: FakeKernel, journal: Journal, how: str
) -> None:
    create_mediated(PARENT, TYPE, kernel, uuid=ANY_UUID)
    if how == "claimed":
        held_by_vm(journal, f"vfio:{ANY_UUID}")
    else:
        number = find_group(f"{MDEV_DEVICES}/{ANY_UUID}", kernel)
        parent.process(77, "qemu", f"/dev/vfio/{number}")
    with pytest.raises(InUse):
        remove_unused(ANY_UUID, journal=journal, host=kernel)
    assert available(kernel) == 1


@pytest.mark.parametrize("what", [errno.EBUSY, Fault.NOTHING_HAPPENS])
def test_a_mediated_device_that_will_not_go_is_told(
    parent: PciTree, kernel: FakeKernel, journal: Journal, what: int | Fault
) -> None:
    create_mediated(PARENT, TYPE, kernel, uuid=ANY_UUID)
    kernel.fail("remove", what)
    with pytest.raises(BindError) as caught:
        remove_unused(ANY_UUID, journal=journal, host=kernel)
    assert caught.value.hint
    remove_unused(ANY_UUID, journal=journal, host=kernel)


@pytest.mark.parametrize("parent", [PHYSFN, FIRST])
def test_the_number_stays_while_a_mediated_device_is_in_use(
    tree: PciTree, journal: Journal, kernel: FakeKernel, parent: str
) -> None:
    """Of the physical function, or of one of the virtual ones, which would end with it."""
    count_to(1, journal, kernel)
    tree.mdev_type(parent, TYPE).mdev(ANY_UUID, parent, TYPE, group=9)
    kernel.writes.clear()
    held_by_vm(journal, f"vfio:{ANY_UUID}")
    with pytest.raises(InUse, match=f"{ANY_UUID} is .*handed to VM 'sb1'") as caught:
        count_to(0, journal, kernel)
    assert caught.value.codes == (Code.IN_USE_BY_VM,)
    assert kernel.writes == []
    journal.forget_vm("sb1")
    tree.process(77, "qemu", "/dev/vfio/9")
    with pytest.raises(InUse, match="is open in process 77"):
        count_to(0, journal, kernel)
    assert kernel.writes == []
    (tree.path / "proc/77/fd/3").unlink()
    (tree.path / f"sys/bus/mdev/devices/{ANY_UUID}").unlink()
    assert count_to(0, journal, kernel) == []
