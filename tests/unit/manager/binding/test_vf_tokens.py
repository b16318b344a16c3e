"""A physical function and its virtual ones share a token, which nobody is shown.

The kernel is a tree, the VMs are in memory; `tests/lab/test_vf_tokens.py` has the real ones.
"""

import os
import stat
from pathlib import Path

import pytest

from tests.support.fake_kernel import FakeKernel
from tests.support.pci_tree import PciTree
from vmplug.address import Bdf
from vmplug.errors import CommandError, InUse
from vmplug.host.finding import Code
from vmplug.host.pci.mdev import UUID
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.hypervisor.fake.monitor import FakeHypervisor
from vmplug.hypervisor.qemu.start.cold import ColdQemu
from vmplug.hypervisor.qemu.start.machine import VmSpec
from vmplug.journal.journal import Journal
from vmplug.manager.binding.binder import Binder
from vmplug.manager.binding.subdevices import divide
from vmplug.manager.manager import DeviceManager
from vmplug.manager.setup import Setup
from vmplug.oci.requests import VfioInfo
from vmplug.vms.check import check_requests

PHYSFN, FIRST, SECOND, NIC = "0000:03:00.0", "0000:03:10.0", "0000:03:10.1", "0000:04:00.0"
BOOT_ID = "11111111-2222-3333-4444-555555555555\n"
PARAMETER = "/sys/module/vfio_pci/parameters/enable_sriov"


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    """A physical function with vfio-pci that can have virtual ones, and another NIC there."""
    tree = PciTree(tmp_path / "host").file("/proc/sys/kernel/random/boot_id", BOOT_ID)
    tree.pci_function(PHYSFN, class_code=0x020000, driver="vfio-pci", group=4)
    tree.pci_function(NIC, class_code=0x020000, driver="vfio-pci", group=5)
    tree.sriov(PHYSFN).file(PARAMETER, "Y\n")
    return FakeKernel(tree, takes={"igb": [PHYSFN]}, of_virtual="vfio-pci")


class Vm:
    """A VM in memory with its manager, which may be another each time."""

    def __init__(self, name: str, kernel: FakeKernel, journal: Journal, *, able: bool = True):
        self.name = name
        self.qemu = FakeHypervisor(vf_token=able, iommufd=True)
        self._parts = kernel, journal

    @property
    def devices(self) -> DeviceManager:
        kernel, journal = self._parts
        return DeviceManager(vm=self.name, host=kernel, hypervisor=self.qemu, journal=journal)

    def attach(self, bdf: str, *allow: Code) -> str:
        return self.devices.attach(want(bdf), allow=allow).id

    @property
    def tokens(self) -> dict[str, str | None]:
        """What its QEMU was given, by function."""
        plugged = (device.properties for device in self.qemu.monitor.devices.values())
        return {d["host"]: d.get("vf-token") for d in plugged if "host" in d}


def want(bdf: str) -> VfioInfo:
    return VfioInfo(label=bdf.replace(":", "-"), device=bdf)


def make_virtfns(kernel: FakeKernel, journal: Journal) -> None:
    divide(Bdf.parse(PHYSFN), 2, journal=journal, host=kernel)


@pytest.fixture
def owner(kernel: FakeKernel, journal: Journal) -> Vm:
    return Vm("owner", kernel, journal)


@pytest.fixture
def user(kernel: FakeKernel, journal: Journal) -> Vm:
    return Vm("user", kernel, journal)


def refused(vm: Vm, bdf: str) -> str:
    """Why the VM is not given a function, as check says too; and nothing has changed."""
    (checked,) = vm.devices.check_places([want(bdf)])
    with pytest.raises(InUse) as caught:
        vm.attach(bdf)
    assert caught.value.codes == (Code.PHYSFN_WITH_VFIO,)
    (finding,) = checked.findings
    assert finding.message in caught.value.message
    assert bdf not in vm.tokens
    return f"{finding.message}; {finding.hint}"


def test_both_get_one_token_and_others_none(
    owner: Vm, user: Vm, kernel: FakeKernel, journal: Journal
) -> None:
    owner.attach(PHYSFN)
    owner.attach(NIC)
    make_virtfns(kernel, journal)
    user.attach(FIRST)
    owner.attach(SECOND)
    token = owner.tokens[PHYSFN]
    assert UUID.match(token or "")
    assert user.tokens == {FIRST: token}
    assert owner.tokens == {PHYSFN: token, NIC: None, SECOND: token}


def test_each_plug_of_a_physical_function_has_its_own_token(owner: Vm) -> None:
    hold = owner.attach(PHYSFN)
    first = owner.tokens[PHYSFN]
    owner.devices.detach(hold)
    owner.attach(PHYSFN)
    assert owner.tokens[PHYSFN] not in {first, None}


def test_virtual_functions_that_stay_keep_their_token(
    owner: Vm, user: Vm, kernel: FakeKernel, journal: Journal
) -> None:
    hold = owner.attach(PHYSFN)
    make_virtfns(kernel, journal)
    user.attach(FIRST)
    owner.devices.detach(hold)
    assert f"no VM has {PHYSFN} with a token" in refused(user, SECOND)
    other = Vm("other", kernel, journal)
    other.attach(PHYSFN, Code.HAS_VIRTUAL_FUNCTIONS)
    user.attach(SECOND)
    assert {*other.tokens.values(), *user.tokens.values()} == {user.tokens[FIRST]}


def test_nobody_can_have_virtual_functions_where_the_kernel_makes_none(
    owner: Vm, kernel: FakeKernel
) -> None:
    kernel.tree.file(PARAMETER, "N\n")
    owner.attach(PHYSFN)
    assert owner.tokens == {PHYSFN: None}


def test_a_qemu_that_takes_no_token_gets_the_physical_function_alone(
    user: Vm, kernel: FakeKernel, journal: Journal
) -> None:
    old = Vm("old", kernel, journal, able=False)
    old.attach(PHYSFN)
    make_virtfns(kernel, journal)
    assert old.tokens == {PHYSFN: None}
    assert f"attach {PHYSFN} to a running VM first" in refused(user, FIRST)


def test_a_vm_that_takes_no_token_gets_no_virtual_function(
    owner: Vm, kernel: FakeKernel, journal: Journal
) -> None:
    owner.attach(PHYSFN)
    make_virtfns(kernel, journal)
    old = Vm("old", kernel, journal, able=False)
    assert "QEMU must have vf-token" in refused(old, FIRST)


def test_a_failed_attach_leaves_no_token_to_open_with(
    owner: Vm, user: Vm, kernel: FakeKernel, journal: Journal
) -> None:
    owner.qemu.monitor.fail_at = "device_add"
    with pytest.raises(CommandError):
        owner.attach(PHYSFN)
    make_virtfns(kernel, journal)
    refused(user, FIRST)


def test_a_token_of_an_earlier_boot_is_none(
    owner: Vm, kernel: FakeKernel, journal: Journal, tmp_path: Path
) -> None:
    owner.attach(PHYSFN)
    make_virtfns(kernel, journal)
    kernel.tree.file("/proc/sys/kernel/random/boot_id", BOOT_ID.replace("1", "2"))
    with Journal.open(tmp_path / "state", host=kernel) as later:
        assert later.vf_tokens.find(Bdf.parse(PHYSFN)) is None


def test_it_is_in_the_journal_before_qemu_has_it(
    owner: Vm, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = list[object]()

    def plug(*_: object) -> None:
        with Journal.open(os.path.dirname(journal.path)) as other:
            known.append(other._db.execute("SELECT token FROM vf_token").fetchone()["token"])
        raise CommandError("device_add", "GenericError", "the process ends here")

    monkeypatch.setattr(owner.qemu, "plug", plug)
    with pytest.raises(CommandError):
        owner.attach(PHYSFN)
    assert UUID.match(str(known[0]))


# a secret


def test_nobody_is_shown_a_token(
    owner: Vm, user: Vm, kernel: FakeKernel, journal: Journal
) -> None:
    (step,) = owner.devices.plan([want(PHYSFN)])
    assert step.do.arguments["vf-token"] == "(secret)"
    owner.attach(PHYSFN)
    make_virtfns(kernel, journal)
    (step,) = user.devices.plan([want(FIRST)])
    assert step.do.arguments["vf-token"] == "(secret)"
    token = owner.tokens[PHYSFN]
    assert token
    sent = next(c for c in owner.qemu.monitor.sent if c.execute == "device_add")
    assert token in str(sent.arguments)
    assert token not in str(sent.shown)
    shown = (owner.devices.attachments(), journal.devices("owner"), user.devices.attachments())
    assert token not in str(shown)


def test_the_journal_is_for_its_owner_alone(owner: Vm, journal: Journal) -> None:
    owner.attach(PHYSFN)
    for path in Path(journal.path).parent.glob("journal.db*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_no_token_is_on_a_command_line(
    owner: Vm, kernel: FakeKernel, journal: Journal, tmp_path: Path
) -> None:
    spec = VmSpec(name="cold", ports=2)
    with ColdQemu(spec, tmp_path, abilities=owner.qemu.abilities, host=kernel) as cold:
        devices = DeviceManager(vm="cold", host=kernel, hypervisor=cold, journal=journal)
        devices.attach(want(PHYSFN))
        make_virtfns(kernel, journal)
        (checked,) = devices.check_places([want(FIRST)])
        assert [finding.code for finding in checked.findings] == [Code.PHYSFN_WITH_VFIO]
        assert "vf-token" not in str(cold.arguments())


# without a VM, and giving back


def test_check_without_a_vm_knows_the_tokens(
    owner: Vm, kernel: FakeKernel, journal: Journal, tmp_path: Path
) -> None:
    make_virtfns(kernel, journal)
    (tmp_path / "none").mkdir()
    for state_dir, refuses in ((tmp_path / "none", True), (tmp_path / "state", True)):
        setup = Setup(host=kernel, state_dir=str(state_dir))
        (checked,) = check_requests([want(FIRST)], setup=setup)
        assert checked.is_refused is refuses
    owner.attach(PHYSFN, Code.HAS_VIRTUAL_FUNCTIONS)
    (checked,) = check_requests([want(FIRST)], setup=setup)
    assert checked.findings == ()


def test_the_remedy_does_without_a_token(
    user: Vm, kernel: FakeKernel, journal: Journal, tmp_path: Path
) -> None:
    kernel.tree.pci_driver("igb")
    binder, named = Binder(journal, kernel), find_vfio_device(PHYSFN, kernel)
    kernel.write_attribute("/sys/bus/pci/drivers/vfio-pci/unbind", PHYSFN)
    binder.bind(find_vfio_device(PHYSFN, kernel))
    make_virtfns(kernel, journal)
    assert f"vmplug unbind {PHYSFN}" in refused(user, FIRST)
    binder.unbind(named)
    user.attach(FIRST)
    assert user.tokens == {FIRST: None}


def test_a_physical_function_stays_with_vfio_while_a_vm_has_a_virtual_one(
    owner: Vm, user: Vm, kernel: FakeKernel, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To unbind it removes the virtual functions, and the kernel waits for their users."""
    monkeypatch.setattr("vmplug.manager.binding.binder._CLOSE_TIMEOUT_S", 0.01)
    kernel.tree.pci_driver("igb")
    kernel.write_attribute("/sys/bus/pci/drivers/vfio-pci/unbind", PHYSFN)
    Binder(journal, kernel).bind(find_vfio_device(PHYSFN, kernel))
    hold = owner.attach(PHYSFN)
    make_virtfns(kernel, journal)
    used = user.attach(FIRST)
    owner.devices.detach(hold)
    with pytest.raises(InUse, match=f"{FIRST} is handed to VM 'user'"):
        Binder(journal, kernel).unbind(find_vfio_device(PHYSFN, kernel))
    assert kernel.driver_of(PHYSFN) == "vfio-pci"
    user.devices.detach(used)
    Binder(journal, kernel).unbind(find_vfio_device(PHYSFN, kernel))
    assert kernel.driver_of(PHYSFN) != "vfio-pci"
