"""A real kernel wants the token of a physical function that vfio-pci has, for its virtual ones.

With a QEMU that takes none, as 7.2, vmplug refuses with that reason before QEMU is asked.
"""

import logging
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from lab import topology
from tests.lab.nested import PCI_DEVICES, NestedGuest, paused_vm
from tests.support.raw_qmp import QmpError
from tests.support.vm import QEMU, GuestVm
from vmplug import Code, DeviceManager, HostRoot, InUse, Qemu, VfioInfo
from vmplug.address import Bdf
from vmplug.host.pci.bind import read_driver
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.hypervisor.qemu.abilities import of_program
from vmplug.journal.journal import Journal
from vmplug.manager.binding.binder import Binder
from vmplug.manager.binding.subdevices import divide

PHYSFN = topology.SRIOV
FIRST, SECOND = "0000:09:00.1", "0000:09:00.2"
PARAMETER = Path("/sys/module/vfio_pci/parameters/enable_sriov")
NUMVFS = Path(f"/sys/bus/pci/devices/{PHYSFN}/sriov_numvfs")

NVME_IDS = "1b36:0010"
UNPLUG_S = 60.0

DENIED = r"error getting device from group [0-9]+: Permission denied"

ABLE = of_program(QEMU).vf_token
"""Whether this QEMU takes tokens."""


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """With the physical function with vfio-pci, where it may have virtual ones."""
    subprocess.run(["modprobe", "--all", "vfio-pci", "nvme"], check=True)
    PARAMETER.write_text("Y")
    with Journal.open(tmp_path / "state") as journal:
        binder, group = Binder(journal, HostRoot()), find_vfio_device(PHYSFN, HostRoot())
        binder.bind(group)
        yield journal
        divide(Bdf.parse(PHYSFN), 0, journal=journal, host=HostRoot())
        binder.unbind(group)
    PARAMETER.write_text("N")


@contextmanager
def managed_vm(name: str, directory: Path) -> Iterator[tuple[GuestVm, DeviceManager]]:
    """A VM that stands still; its devices are forgotten when it has ended."""
    (directory / name).mkdir()
    state_dir = directory / "state"
    with paused_vm(directory / name) as vm:
        qemu = Qemu.connect(str(vm.qmp_path))
        manager = DeviceManager.open(
            vm=name, host=HostRoot(), hypervisor=qemu, state_dir=state_dir
        )
        with closing(manager):
            yield vm, manager
    with Journal.open(state_dir) as journal:
        journal.forget_vm(name)


def want(bdf: str) -> VfioInfo:
    return VfioInfo(label=bdf.replace(":", "-"), device=bdf)


def refused(devices: DeviceManager, bdf: str) -> None:
    with pytest.raises(InUse) as refusal:
        devices.attach(want(bdf))
    assert refusal.value.codes == (Code.PHYSFN_WITH_VFIO,)
    assert "vf-token" in (refusal.value.hint or "")
    assert "disk" not in f"{refusal.value} {refusal.value.hint}"


def make_virtfns(journal: Journal) -> None:
    made = divide(Bdf.parse(PHYSFN), 2, journal=journal, host=HostRoot())
    assert [str(bdf) for bdf in made] == [FIRST, SECOND]
    assert {read_driver(bdf, HostRoot()) for bdf in made} == {"vfio-pci"}


def test_the_two_share_a_token_through_vms_that_come_and_go(
    journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with managed_vm("user", tmp_path) as (raw, user):
        with managed_vm("owner", tmp_path) as (_, owner):
            owner.attach(want(PHYSFN))
            make_virtfns(journal)
            token = journal.vf_tokens.find(Bdf.parse(PHYSFN))
            assert (token is not None) == ABLE
            with pytest.raises(QmpError, match=DENIED):
                raw.oracle.execute("device_add", driver="vfio-pci", host=FIRST, bus="rp0")
            if not ABLE:
                refused(user, FIRST)
                return
            user.attach(want(FIRST))
        # The owner's VM has ended. The kernel keeps the token while a virtual function is open.
        refused(user, SECOND)
        with pytest.raises(InUse, match=f"{FIRST} is (open|handed)"):
            Binder(journal, HostRoot()).unbind(find_vfio_device(PHYSFN, HostRoot()))
        assert NUMVFS.read_text() == "2\n"
        with managed_vm("heir", tmp_path) as (other, heir):
            with pytest.raises(QmpError, match=DENIED):
                other.oracle.execute("device_add", driver="vfio-pci", host=PHYSFN, bus="rp0")
            heir.attach(want(PHYSFN), allow=[Code.HAS_VIRTUAL_FUNCTIONS])
            user.attach(want(SECOND))
            assert journal.vf_tokens.find(Bdf.parse(PHYSFN)) == token
    assert "device_add" in caplog.text
    assert token
    assert token not in caplog.text


def test_a_new_token_opens_once_nobody_has_a_virtual_function(
    journal: Journal, tmp_path: Path
) -> None:
    """A VM that had the function before knows the old one."""
    tokens = set()
    for name in ("first", "second"):
        with managed_vm(f"owner-{name}", tmp_path) as (_, owner):
            owner.attach(want(PHYSFN))
            make_virtfns(journal)
            tokens.add(journal.vf_tokens.find(Bdf.parse(PHYSFN)))
            with managed_vm(f"user-{name}", tmp_path) as (_, user):
                if ABLE:
                    user.attach(want(FIRST))
                else:
                    refused(user, FIRST)
        divide(Bdf.parse(PHYSFN), 0, journal=journal, host=HostRoot())
    assert len(tokens) == (2 if ABLE else 1)


def test_a_running_guest_uses_a_virtual_function(
    journal: Journal, guest: NestedGuest, tmp_path: Path
) -> None:
    """Its driver maps the registers. The controller is offline, as nobody has made it ready."""
    qemu = Qemu.connect(str(guest.vm.qmp_path))
    state_dir = tmp_path / "state"
    with (
        managed_vm("owner", tmp_path) as (_, owner),
        closing(
            DeviceManager.open(vm="guest", host=HostRoot(), hypervisor=qemu, state_dir=state_dir)
        ) as user,
    ):
        owner.attach(want(PHYSFN))
        make_virtfns(journal)
        before = guest.pci_ids()
        if not ABLE:
            refused(user, FIRST)
            return
        held = user.attach(want(FIRST))
        guest.wait_until(f"[ $(echo {PCI_DEVICES}/* | wc -w) -gt {len(before)} ]")
        ((bdf, ids),) = guest.pci_ids().items() - before.items()
        assert ids == NVME_IDS
        guest.wait_until(f"dmesg | grep -q 'nvme.*pci function {bdf}'")
        user.detach(held.id, timeout_s=UNPLUG_S)
        assert guest.pci_ids() == before
    journal.forget_vm("guest")


def test_without_a_token_the_reason_is_told_and_nothing_is_asked_of_qemu(
    journal: Journal, tmp_path: Path
) -> None:
    make_virtfns(journal)
    with managed_vm("user", tmp_path) as (raw, user):
        refused(user, FIRST)
        devices = raw.oracle.execute("qom-list", path="/machine/peripheral")
        assert not [entry for entry in devices if entry["name"].startswith("vmplug-")]
