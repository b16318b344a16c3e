"""Functions of the lab's host go into a real QEMU that stands still, by every shape of plug.

QEMU opens the group, maps the guest's memory through the IOMMU and reads the device: everything
but the guest's own part, which `test_guest.py` has.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import topology
from tests.cli.command import Vmplug
from tests.support.vm import Device, GuestVm, start_vm
from vmplug import Code, DeviceManager, HostRoot, InUse, NoFreePort, Qemu, VfioInfo
from vmplug.errors import CannotPlug, CommandError

GIB = 1 << 30
MTTY_TYPE = "mtty-1"
UUID = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"


@pytest.fixture(scope="module", autouse=True)
def modules() -> None:
    for module in ("vfio-pci", "nvme", "e1000e", "mtty"):
        subprocess.run(["modprobe", module], check=True)


def port(index: int, **more: int) -> Device:
    return {
        "driver": "pcie-root-port",
        "id": f"rp{index}",
        "bus": "pcie.0",
        "addr": hex(0x10 + index),
        "chassis": index + 1,
        **more,
    }


PORTS: list[Device] = [
    port(0),
    port(1),
    port(2),
    port(3, **{"pref64-reserve": 16 * GIB}),
    {"driver": "pcie-pci-bridge", "id": "br0", "bus": "pcie.0", "addr": "0x14"},
]


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[GuestVm]:
    """A QEMU with ports and a bridge, which stands still."""
    with start_vm(tmp_path, devices=PORTS, guest=False, paused=True, memory="128M") as vm:
        yield vm


@pytest.fixture
def devices(vm: GuestVm, tmp_path: Path) -> Iterator[DeviceManager]:
    with manage(vm, tmp_path) as devices:
        yield devices


def manage(vm: GuestVm, directory: Path) -> DeviceManager:
    return DeviceManager.open(
        vm="sb1",
        host=HostRoot(),
        hypervisor=Qemu.connect(str(vm.qmp_path)),
        state_dir=directory / "state",
    )


def vfio(device: str, **options: str) -> VfioInfo:
    return VfioInfo(
        label="dev0",
        device=device,
        driver_options={key.replace("_", "-"): value for key, value in options.items()},
    )


def driver_of(bdf: str) -> str | None:
    link = Path(f"/sys/bus/pci/devices/{bdf}/driver")
    return link.resolve().name if link.exists() else None


def drivers(*bdfs: str) -> list[str | None]:
    return [driver_of(bdf) for bdf in bdfs]


def hosts_in(vm: GuestVm) -> dict[str, str]:
    """The host's functions that QEMU has, by the bus and address that QEMU gives them."""
    found = {}
    for entry in vm.oracle.execute("qom-list", path="/machine/peripheral"):
        if entry["type"] == "child<vfio-pci>":
            path = f"/machine/peripheral/{entry['name']}"
            bus = vm.oracle.execute("qom-get", path=path, property="parent_bus")
            devfn = vm.oracle.execute("qom-get", path=path, property="addr")
            host = vm.oracle.execute("qom-get", path=path, property="host")
            found[f"{bus.rpartition('/')[2]}/{devfn >> 3:02x}.{devfn & 7}"] = host
    return found


def end(vm: GuestVm, directory: Path) -> None:
    """The VM ends as in a crash, and what it held goes back to the host."""
    vm.kill()
    assert Vmplug(directory / "state")("reconcile").status == 0


def test_a_bundle_with_nothing_but_a_cdi_annotation_plugs_a_function(
    vm: GuestVm, tmp_path: Path
) -> None:
    """The spec has the nodes that a device plugin hands out: VFIO's own, and the group's."""
    vmplug = Vmplug(tmp_path / "state")
    vmplug("vm", "adopt", "sb1", "--qmp", vm.qmp_path).answer()
    vmplug("bind", topology.NVME).answer()
    group = os.readlink(f"/sys/bus/pci/devices/{topology.NVME}/iommu_group").rpartition("/")[2]
    asked = write_cdi_spec(tmp_path, f"/dev/vfio/{group}")
    told = vmplug("attach", *asked, "--vm", "sb1", "--json").json()
    counted, plugged = told["attachments"]
    assert (counted["name"], counted["guest"]) == ("/dev/vfio/vfio", None)
    assert (plugged["name"], plugged["kind"]) == (f"/dev/vfio/{group}", "vfio")
    assert plugged["guest"]["agent"]["type"] == "vfio-pci-gk"
    assert told["resolved_annotations"] == ["cdi.k8s.io/vmplug_nvme"]
    assert hosts_in(vm) == {"rp0/00.0": topology.NVME}
    vm.kill()
    assert vmplug("reconcile").status == 0
    vmplug("unbind", topology.NVME).answer()
    absent = vmplug("check", *asked)
    assert absent.status == 3
    assert f"deviceNodes[1].path: /dev/vfio/{group} is not a device node" in absent.stderr
    assert driver_of(topology.NVME) == "nvme"


def write_cdi_spec(directory: Path, node: str) -> tuple[str, ...]:
    """A bundle for that device, and the policy that knows its name: words for vmplug."""
    specs, bundle, policy = directory / "cdi", directory / "ctr1", directory / "policy.toml"
    specs.mkdir()
    bundle.mkdir()
    edits = {"deviceNodes": [{"path": "/dev/vfio/vfio"}, {"path": node}]}
    devices = [{"name": "a", "containerEdits": edits}]
    spec = {"cdiVersion": "0.5.0", "kind": "vmplug.example/nvme", "devices": devices}
    (specs / "nvme.json").write_text(json.dumps(spec))
    policy.write_text(
        f'[cdi]\ndirectories = ["{specs}"]\n'
        '[[rule]]\nname = "named"\ncdi-kinds = ["vmplug.example/nvme"]\n'
    )
    annotations = {
        "cdi.k8s.io/vmplug_nvme": "vmplug.example/nvme=a",
        f"org.vmplug.options.{node}": '{"mode": "guest-kernel"}',
    }
    config = {"ociVersion": "1.0.2", "annotations": annotations}
    (bundle / "config.json").write_text(json.dumps(config))
    return (str(bundle), "--policy", str(policy))


MULTI = (topology.MULTI_NVME, topology.MULTI_EDU, topology.MULTI_NIC)
NVME_AND_NIC = ["nvme", None, "e1000e"]


def test_one_function_is_bound_plugged_and_given_back(
    vm: GuestVm, devices: DeviceManager, tmp_path: Path
) -> None:
    assert driver_of(topology.NVME) == "nvme"
    held = devices.attach(vfio(topology.NVME), managed=True)
    assert (held.guest_address and str(held.guest_address)) == "PCI 10/00"
    assert hosts_in(vm) == {"rp0/00.0": topology.NVME}
    assert driver_of(topology.NVME) == "vfio-pci"
    end(vm, tmp_path)
    assert driver_of(topology.NVME) == "nvme"


def test_a_group_of_three_functions_is_one_slot_in_the_guest(
    vm: GuestVm, devices: DeviceManager, tmp_path: Path
) -> None:
    assert drivers(*MULTI) == NVME_AND_NIC
    held = devices.attach(vfio(topology.MULTI_EDU), managed=True)
    assert held.guest_address
    assert [(f.host, str(f.pci_path)) for f in held.guest_address.functions] == [
        (MULTI[0], "10/00"),
        (MULTI[1], "10/00.1"),
        (MULTI[2], "10/00.2"),
    ]
    assert hosts_in(vm) == {f"rp0/00.{number}": bdf for number, bdf in enumerate(MULTI)}
    end(vm, tmp_path)
    assert drivers(*MULTI) == NVME_AND_NIC


def test_conventional_functions_go_behind_the_bridge(
    vm: GuestVm, devices: DeviceManager, tmp_path: Path
) -> None:
    devices.attach(vfio(topology.CONVENTIONAL[1]), managed=True)
    assert hosts_in(vm) == {
        "br0/01.0": topology.CONVENTIONAL[0],
        "br0/02.0": topology.CONVENTIONAL[1],
    }
    end(vm, tmp_path)
    assert drivers(*topology.CONVENTIONAL) == [None, None]
    assert driver_of(topology.BRIDGE) != "vfio-pci"


def test_the_large_bar_goes_where_the_window_is(
    vm: GuestVm, devices: DeviceManager, tmp_path: Path
) -> None:
    devices.attach(vfio(topology.LARGE, port="root-port"), managed=True)
    assert hosts_in(vm) == {"rp3/00.0": topology.LARGE}
    end(vm, tmp_path)
    assert driver_of(topology.LARGE) is None


def test_a_second_large_bar_finds_no_port_and_nothing_was_bound(
    vm: GuestVm, devices: DeviceManager, tmp_path: Path
) -> None:
    vm.oracle.execute("device_add", driver="pci-testdev", id="other", bus="rp3", addr="0x0")
    with pytest.raises(NoFreePort, match="window large enough"):
        devices.attach(vfio(topology.LARGE, port="root-port"), managed=True)
    assert driver_of(topology.LARGE) is None
    (examined,) = devices.check_places([vfio(topology.LARGE, port="root-port")], managed=True)
    assert Code.NO_PORT in [finding.code for finding in examined.findings]
    end(vm, tmp_path)


def test_without_managed_an_unbound_function_is_refused_and_nothing_changed(
    vm: GuestVm, devices: DeviceManager, tmp_path: Path
) -> None:
    with pytest.raises(InUse) as refusal:
        devices.attach(vfio(topology.EDU))
    assert refusal.value.codes == (Code.NOT_BOUND,)
    assert (hosts_in(vm), driver_of(topology.EDU)) == ({}, None)


def test_what_qemu_refuses_is_given_back_at_once(
    vm: GuestVm, devices: DeviceManager, tmp_path: Path
) -> None:
    """Somebody else has the group open."""
    with open_group(topology.EDU), pytest.raises((CommandError, InUse)):
        devices.attach(vfio(topology.EDU), managed=True)
    assert (hosts_in(vm), devices.attachments()) == ({}, [])


def test_a_function_is_in_one_vm_only(vm: GuestVm, devices: DeviceManager, tmp_path: Path) -> None:
    devices.attach(vfio(topology.EDU), managed=True)
    other = tmp_path / "other"
    other.mkdir()
    with (
        start_vm(other, devices=PORTS, guest=False, paused=True, memory="128M") as second,
        DeviceManager.open(
            vm="sb2",
            host=HostRoot(),
            hypervisor=Qemu.connect(str(second.qmp_path)),
            state_dir=tmp_path / "state",
        ) as more,
        pytest.raises(InUse) as refusal,
    ):
        more.attach(vfio(topology.EDU))
    assert refusal.value.codes == (Code.IN_USE_BY_VM,)
    end(vm, tmp_path)


def test_a_guest_iommu_takes_a_group_only_behind_a_bridge(tmp_path: Path) -> None:
    iommu: list[Device] = [{"driver": "intel-iommu", "caching-mode": True}, *PORTS]
    with (
        start_vm(tmp_path, devices=iommu, guest=False, paused=True, memory="128M") as vm,
        manage(vm, tmp_path) as devices,
    ):
        devices.attach(vfio(topology.MULTI_NVME), managed=True)
        assert set(hosts_in(vm)) == {"br0/01.0", "br0/01.1", "br0/01.2"}
        end(vm, tmp_path)


def test_a_guest_iommu_without_a_bridge_is_refused_and_qemu_would_refuse_too(
    tmp_path: Path,
) -> None:
    iommu: list[Device] = [{"driver": "intel-iommu", "caching-mode": True}, port(0), port(1)]
    with (
        start_vm(tmp_path, devices=iommu, guest=False, paused=True, memory="128M") as vm,
        manage(vm, tmp_path) as devices,
    ):
        with pytest.raises(CannotPlug, match="several address spaces"):
            devices.attach(vfio(topology.MULTI_NVME), managed=True)
        assert (hosts_in(vm), drivers(*MULTI)) == ({}, NVME_AND_NIC)


def test_a_virtual_function_goes_alone_and_keeps_the_count_as_it_is(
    vm: GuestVm, devices: DeviceManager, tmp_path: Path
) -> None:
    count = Path(f"/sys/bus/pci/devices/{topology.SRIOV}/sriov_numvfs")
    vmplug = Vmplug(tmp_path / "state")
    assert vmplug("sriov", topology.SRIOV, "--count", "2").status == 0
    virtual = Path(f"/sys/bus/pci/devices/{topology.SRIOV}/virtfn1").resolve().name
    devices.attach(vfio(virtual), managed=True)
    assert list(hosts_in(vm).values()) == [virtual]
    change = ("sriov", topology.SRIOV, "--count", "0")
    assert vmplug(*change).status == 4
    assert count.read_text() == "2\n"
    end(vm, tmp_path)
    assert driver_of(virtual) != "vfio-pci"
    assert vmplug(*change).status == 0
    assert count.read_text() == "0\n"


def test_a_mediated_device_goes_by_its_uuid(
    vm: GuestVm, devices: DeviceManager, tmp_path: Path
) -> None:
    types = Path("/sys/class/mdev_bus/mtty/mdev_supported_types") / MTTY_TYPE
    (types / "create").write_text(UUID)
    try:
        held = devices.attach(vfio(UUID))
        assert held.guest_address
        assert [f.host for f in held.guest_address.functions] == [UUID]
        names = [e["name"] for e in vm.oracle.execute("qom-list", path="/machine/peripheral")]
        (name,) = (name for name in names if name.startswith("vmplug-"))
        sysfsdev = vm.oracle.execute(
            "qom-get", path=f"/machine/peripheral/{name}", property="sysfsdev"
        )
        assert Path(sysfsdev).name == UUID
        end(vm, tmp_path)
    finally:
        Path(f"/sys/bus/mdev/devices/{UUID}/remove").write_text("1")


class open_group:  # noqa: N801  it is used as a function
    """Binds a function by hand and holds its group open, as another VM would."""

    def __init__(self, bdf: str) -> None:
        self._base = Path(f"/sys/bus/pci/devices/{bdf}")

    def __enter__(self) -> None:
        (self._base / "driver_override").write_text("vfio-pci")
        Path("/sys/bus/pci/drivers_probe").write_text(self._base.name)
        group = (self._base / "iommu_group").resolve().name
        self._holder = subprocess.Popen(
            ["sh", "-c", f"exec 3<>/dev/vfio/{group}; echo; exec sleep 100"],
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout
        self._holder.stdout.readline()

    def __exit__(self, *exception: object) -> None:
        self._holder.kill()
        self._holder.communicate()
        (self._base / "driver/unbind").write_text(self._base.name)
        (self._base / "driver_override").write_text("\n")
