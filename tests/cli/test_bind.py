"""bind, unbind, sriov and mdev: what is refused, that it changes nothing, and what is shown.

What they do is tested where a kernel does it, in tests/unit/manager/binding and tests/lab.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.command import Vmplug
from tests.cli.test_bad_input import HOST, REQUEST, STATE, USAGE, Bad, refused, sentence
from tests.contract.binding import held_by_vm
from tests.support.pci_tree import PciTree
from vmplug.address import Bdf
from vmplug.host.pci.bind import FormerBinding
from vmplug.journal.bindings import Binding, BindingState
from vmplug.journal.journal import Journal

DISK, BRIDGE, PHYSFN, VIRTFN = "0000:01:00.0", "0000:00:1c.0", "0000:03:00.0", "0000:03:10.0"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
BOUND, BOOT_ID = "0000:05:00.0", "11111111-2222-3333-4444-555555555555"


@pytest.fixture
def host(tmp_path: Path) -> PciTree:
    """A host with a used disk, virtual functions, a bound function and a mediated device."""
    tree = PciTree(tmp_path / "host")
    tree.pci_function(BRIDGE, class_code=0x060400, driver="pcieport", group=1)
    tree.pci_function(DISK, driver="nvme", group=2)
    tree.pci_disk(DISK, "259:0", "nvme0n1").mount("/dev/nvme0n1", "/data", "259:0")
    tree.pci_function(PHYSFN, class_code=0x020000, driver="igb", group=3)
    tree.sriov(PHYSFN, VIRTFN, driver="igbvf", group=4)
    tree.network(VIRTFN, "eth7").route("eth7")
    tree.pci_function("0000:04:00.0", driver="nvme", group=6)
    tree.pci_function(BOUND, driver="mlx5_vfio_pci", group=7, cdev=0)
    tree.mdev_type(DISK, "half", available=0).mdev(UUID, DISK, "half", group=8)
    return tree.file("/proc/sys/kernel/random/boot_id", f"{BOOT_ID}\n")


def snapshot(directory: str | Path) -> dict[str, str]:
    """Every link and every file's text below a directory."""
    found = {}
    for entry in os.scandir(directory):
        if entry.is_symlink():
            found[entry.path] = f"-> {os.readlink(entry.path)}"
        elif entry.is_dir():
            found |= snapshot(entry.path)
        elif entry.is_file():
            with open(entry.path, "rb", buffering=0) as file:
                found[entry.path] = file.read().hex()
    return found


def bad(command: str, status: int, code: str, says: str, hint: str | None = None) -> Bad:
    return Bad(command=command, status=status, code=code, says=says, hint=hint)


def no_request(command: str, says: str, hint: str | None = None) -> Bad:
    return bad(command, REQUEST, "bad-request", says, hint)


def no_usage(command: str, says: str) -> Bad:
    return bad(command, USAGE, "usage", says, "--help$")


WRONG = [
    no_request("bind 26", "not the address of a PCI function or a node", "/dev/vfio/26"),
    no_request("bind 0000:01:00", "not the address", "3b:00.0"),
    no_request("bind /dev/vfio/vfio", "or a node of VFIO", "/dev/vfio/26"),
    no_request("bind /dev/vfio/../sda", "or a node of VFIO", "/dev/vfio/26"),
    no_request("bind 01:00.0 --allow all", "not a finding", "mounted-on-host"),
    no_request("bind 01:00.0 --allow no-iommu", "not a finding", "mounted-on-host"),
    bad("bind 7f:00.0", HOST, "no-such-device", "no PCI function 0000:7f:00.0", "vmplug host"),
    bad("bind /dev/vfio/99", HOST, "no-such-device", "no device behind", "vmplug host"),
    bad("bind 00:1c.0", HOST, "bind-failed", "is a PCI bridge", "behind it"),
    bad("bind /dev/vfio/1", HOST, "bind-failed", "is a PCI bridge", "behind it"),
    bad("bind 01:00.0", HOST, "in-use", "/dev/nvme0n1 is mounted", "--allow mounted-on-host"),
    bad("bind 03:00.0", HOST, "in-use", "has 1 virtual function, which", "vmplug sriov"),
    bad("bind 04:00.0", HOST, "bind-failed", "vfio-pci cannot be loaded", "CONFIG_VFIO_PCI"),
    bad(
        "bind 04:00.0 --driver nvme",
        HOST,
        "bind-failed",
        "nvme is not a known",
        "chooses vfio-pci",
    ),
    bad("bind 04:00.0 --driver ../x", HOST, "bind-failed", "is not a known", "chooses vfio-pci"),
    bad("bind 04:00.0 --driver x_vfio_pci", HOST, "bind-failed", "cannot be loaded", "modules"),
    bad("bind 04:00.0 --driver -r_vfio_pci", HOST, "bind-failed", "cannot be loaded", "modules"),
    bad("unbind 01:00.0", STATE, "wrong-state", "did not bind any function", "vmplug host"),
    bad("unbind 7f:00.0", HOST, "no-such-device", "no PCI function", "vmplug host"),
    bad("unbind 05:00.0", HOST, "in-use", "already handed to VM 'sb1'", "vmplug detach"),
    bad("unbind /dev/vfio/7", HOST, "in-use", "already handed to VM 'sb1'", "vmplug detach"),
    no_request("unbind 26", "not the address", "/dev/vfio/26"),
    no_request("sriov /dev/vfio/3", "not the address of a PCI function", "3b:00.0"),
    bad("sriov 7f:00.0", HOST, "no-such-device", "no PCI function", "vmplug host"),
    bad("sriov 01:00.0", HOST, "bind-failed", "cannot have virtual functions", "vmplug host"),
    bad("sriov 03:10.0 --count 1", HOST, "bind-failed", "it is one of 0000:03:00.0", "host"),
    bad("sriov 03:00.0 --count 9", HOST, "in-use", "eth7", "--allow network-in-use"),
    bad("sriov 03:00.0 --count 0", HOST, "in-use", "eth7", "ip addr flush"),
    bad(
        "sriov 03:00.0 --count 9 --allow network-in-use",
        HOST,
        "bind-failed",
        "can have 8 virtual functions, not 9",
    ),
    bad("sriov 03:00.0 --vf 0 --vlan 1", HOST, "bind-failed", "no network interface", "driver"),
    no_request("sriov 03:00.0 --vf 0 --vlan 4095", "4095 is not in 0..4094"),
    no_request("sriov 03:00.0 --vf 0 --mac 01:02", "'01:02' is not the address", "02:00"),
    no_request("sriov 03:00.0 --vf 0 --mac ff:ff:ff:ff:ff:ff", "not the address of one", "even"),
    no_usage("sriov 03:00.0 --vf 0", "pass --mac, --vlan or --trust"),
    no_usage("sriov 03:00.0 --mac 02:00:00:00:00:01", "pass --vf"),
    no_usage("sriov 03:00.0 --vf 0 --count 2", "one at a time"),
    no_usage("sriov 03:00.0 --count 2 --vlan 1", "one at a time"),
    no_usage("sriov 03:00.0 --autoprobe off", "goes with --count"),
    no_usage("sriov 03:00.0 --count -1", "-1 is not in the range"),
    no_usage("sriov 03:00.0 --vf 0 --trust maybe", "'maybe' is not one of"),
]


def journal_of(vmplug: Vmplug) -> Journal:
    return Journal.open(vmplug.state_dir)


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_is_refused_changes_nothing(vmplug: Vmplug, host: PciTree, wrong: Bad) -> None:
    former = FormerBinding(bdf=Bdf.parse(BOUND), driver="nvme", driver_override=None)
    row = Binding(former=former, state=BindingState.BOUND, device_id=None, boot_id=BOOT_ID)
    with journal_of(vmplug) as journal:
        journal.bindings.put([row])
        held_by_vm(journal, f"vfio:{BOUND}")
    before = snapshot(host.path)
    refused(vmplug, replace(wrong, command=f"{wrong.command} --root {host.path}"), {})
    assert snapshot(host.path) == before
    with journal_of(vmplug) as journal:
        assert journal.bindings.all() == [row]


WRONG_MDEV = [
    no_request(f"create 01:00.0 half --uuid {UUID}0", "is not a UUID", "generates"),
    bad("create 04:00.0 half", HOST, "no-such-device", "makes no mediated", f"{DISK} do"),
    bad("create 01:00.0 third", HOST, "no-such-device", "of type 'third'", "it makes half"),
    bad("create 01:00.0 half", HOST, "bind-failed", "cannot make another", "vmplug mdev remove"),
    bad(f"create 01:00.0 half --uuid {UUID}", HOST, "bind-failed", "already", "another UUID"),
    bad("remove x", HOST, "no-such-device", "no mediated device x", "vmplug host"),
    bad(f"remove {UUID[::-1]}", HOST, "no-such-device", "no mediated device", "vmplug host"),
    bad(f"remove {UUID}", HOST, "in-use", "already handed to VM 'sb1'", "vmplug detach"),
    no_usage("create 01:00.0", "missing argument 'TYPE'"),
]


@pytest.mark.parametrize("wrong", WRONG_MDEV, ids=str)
def test_what_is_refused_of_mediated_devices_changes_nothing(
    vmplug: Vmplug, host: PciTree, wrong: Bad
) -> None:
    with journal_of(vmplug) as journal:
        held_by_vm(journal, f"vfio:{UUID}")
    before = snapshot(host.path)
    words = ["mdev", *wrong.command.split(), "--root", str(host.path)]
    text, told = vmplug(*words), vmplug(*words, "--json")
    assert text.status == told.status == wrong.status
    message, hint = sentence(text)
    error = told.error()
    assert (error["code"], error["message"].rstrip("."), error["hint"]) == (
        wrong.code,
        message,
        hint,
    )
    assert wrong.says in message
    assert wrong.hint is None or wrong.hint.strip("$") in (hint or "")
    assert snapshot(host.path) == before


def test_virtual_functions_are_shown(vmplug: Vmplug, host: PciTree) -> None:
    shown = vmplug("sriov", "03:00.0", "--root", host.path).answer()
    assert shown.splitlines() == [
        "0000:03:00.0 has 1 of 8 virtual functions",
        "VF  FUNCTION      DRIVER  GROUP  MAC  VLAN  TRUST",
        "0   0000:03:10.0  igbvf   4      -    -     -",
    ]
    assert vmplug("sriov", "03:00.0", "--root", host.path, "--json").json() == {
        "address": "0000:03:00.0",
        "total": 8,
        "autoprobe": True,
        "interface": None,
        "functions": [
            {
                "number": 0,
                "address": "0000:03:10.0",
                "driver": "igbvf",
                "iommu_group": 4,
                "mac": None,
                "vlan": None,
                "trust": None,
            }
        ],
    }
    assert not vmplug.state_dir.exists()


def test_what_vfio_has_already_is_shown_and_stays(vmplug: Vmplug, host: PciTree) -> None:
    before = snapshot(host.path)
    words = ["bind", "05:00.0", "--root", str(host.path)]
    assert vmplug(*words).answer().splitlines() == [
        "FUNCTION      FORMER         NOW",
        "0000:05:00.0  mlx5_vfio_pci  mlx5_vfio_pci",
    ]
    assert vmplug(*words, "--json").json() == {
        "iommu_group": 7,
        "group_node": "/dev/vfio/7",
        "functions": [
            {
                "address": "0000:05:00.0",
                "former_driver": "mlx5_vfio_pci",
                "driver": "mlx5_vfio_pci",
                "bound_by_vmplug": False,
            }
        ],
    }
    assert snapshot(host.path) == before


@pytest.mark.parametrize("name", [UUID, "/dev/vfio/8"])
def test_a_mediated_device_needs_no_binding(vmplug: Vmplug, host: PciTree, name: str) -> None:
    shown = vmplug("bind", name, "--root", host.path).answer()
    assert shown == f"{UUID} is a mediated device: it needs no binding\n"


def drivers_of_this_host() -> dict[str, tuple[str | None, str]]:
    found = {}
    for path in Path("/sys/bus/pci/devices").iterdir():
        link = path / "driver"
        driver = os.readlink(link) if link.is_symlink() else None
        found[path.name] = (driver, (path / "driver_override").read_text())
    return found


FUNCTIONS = sorted(os.listdir("/sys/bus/pci/devices")) if os.path.isdir("/sys/bus/pci") else []


@pytest.mark.skipif(
    not FUNCTIONS or any(os.scandir("/sys/kernel/iommu_groups")),
    reason="needs a host with PCI functions and without IOMMU, where none of them can be bound",
)
def test_on_this_host_nothing_is_changed(vmplug: Vmplug) -> None:
    before = drivers_of_this_host()
    for bdf in FUNCTIONS:
        bound, unbound = vmplug("bind", bdf, "--json"), vmplug("unbind", bdf, "--json")
        assert (bound.status, bound.error()["code"] in {"in-use", "bind-failed"}) == (HOST, True)
        assert unbound.status in {HOST, STATE}
        assert vmplug("sriov", bdf, "--count", "1").status == HOST
        assert vmplug("mdev", "create", bdf, "x").status == HOST
    assert drivers_of_this_host() == before


def test_reconcile_forgets_what_an_earlier_boot_left(vmplug: Vmplug) -> None:
    former = FormerBinding(bdf=Bdf.parse("ffff:ff:1f.7"), driver="nvme", driver_override=None)
    row = Binding(former=former, state=BindingState.BOUND, device_id=None, boot_id="earlier")
    with journal_of(vmplug) as journal:
        journal.bindings.put([row])
    told = vmplug("reconcile", "--json").json()
    assert told["bindings"] == [
        {
            "address": "ffff:ff:1f.7",
            "driver": "nvme",
            "outcome": "forgotten",
            "reason": "the host has booted since",
        }
    ]
    assert vmplug("reconcile").answer() == "the journal and the VMs agree\n"
