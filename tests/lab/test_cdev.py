"""On a kernel with iommufd: devices of VFIO by themselves, with nodes of their own.

A QEMU that has iommufd gets such a node and the VM's one iommufd; one that has none, as it says
itself, is told so and gets the group.
"""

import json
import os
import pwd
import resource
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from lab import topology
from tests.cli.command import Vmplug
from tests.cli.result import Result
from tests.contract.sandbox import Through
from tests.lab.nested import MEMORY, NestedGuest, devices, paused_vm
from tests.support.raw_qmp import RawQmp
from tests.support.vm import QEMU, GuestVm, start_vm
from vmplug import (
    Code,
    CommandError,
    DeviceInfo,
    DeviceManager,
    DevNum,
    DevType,
    HostRoot,
    InUse,
    Qemu,
    UnplugTimeout,
    VfioGroup,
    resolve,
)
from vmplug.drivers.ports import Command
from vmplug.host.pci.iommu import IOMMU_NODE
from vmplug.host.pci.vfio import open_nodes
from vmplug.hypervisor.qemu.abilities import of_program
from vmplug.hypervisor.qmp.client import QmpMonitor
from vmplug.hypervisor.qmp.monitor import Monitor

MULTI = (topology.MULTI_NVME, topology.MULTI_EDU, topology.MULTI_NIC)
MDEVS = Path("/sys/bus/mdev/devices")
ROUNDS = 20
MIB = 1 << 20
UNPLUG_S = 60.0
AWAY = ".away"
"""Behind the name of a node that is to be missing."""

ABLE = of_program(QEMU).iommufd
"""Whether this QEMU has iommufd."""


@pytest.fixture(scope="module", autouse=True)
def modules() -> None:
    names = ("iommufd", "vfio-pci", "nvme", "e1000e", "mtty")
    subprocess.run(["modprobe", "--all", *names], check=True)


@pytest.fixture(scope="module")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The group of three and the NVMe in the hands of VFIO; gives the state directory of that."""
    state = tmp_path_factory.mktemp("bindings")
    for bdf in (MULTI[0], topology.NVME):
        vmplug(state, "bind", bdf)
    yield state
    for bdf in (MULTI[0], topology.NVME):
        vmplug(state, "unbind", bdf)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory of the test's own."""
    return tmp_path / "state"


@pytest.fixture
def bound(bindings: Path, state: Path) -> Path:
    """The same, with the functions in the hands of VFIO; nothing is done to them at the end."""
    assert bindings != state
    return state


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[GuestVm]:
    with paused_vm(tmp_path) as vm:
        yield vm


def vmplug(state: Path, *words: str, check: bool = True) -> Any:
    """The verb's JSON answer, or its error."""
    return said(Vmplug(state)(*in_json(words)), check=check)


def in_json(words: Sequence[str]) -> list[str]:
    verb = words[:2] if words[0] in {"vm", "mdev"} else words[:1]
    return [*verb, "--json", *words[len(verb) :]]


def said(done: Result, *, check: bool = True) -> Any:
    assert not check or done.status == 0, done
    return json.loads(done.stdout or done.stderr)


def reconcile(state: Path) -> Any:
    return vmplug(state, "reconcile")


def node_of(device: str) -> str:
    """The node of a device's own, as the kernel says."""
    path = next(p for p in (Path(f"/sys/bus/pci/devices/{device}"), MDEVS / device) if p.exists())
    (directory,) = (path / "vfio-dev").iterdir()
    return f"/dev/vfio/devices/{directory.name}"


def number_of(node: str) -> DevNum:
    number = os.stat(node).st_rdev
    return DevNum(os.major(number), os.minor(number))


def group_of(device: str) -> str:
    path = next(p for p in (Path(f"/sys/bus/pci/devices/{device}"), MDEVS / device) if p.exists())
    return f"/dev/vfio/{(path / 'iommu_group').resolve().name}"


def ask(device: str) -> DeviceInfo:
    """What a container asks for that names the device by its own node."""
    node = node_of(device)
    return DeviceInfo(container_path=node, dev_type=DevType.CHAR, devnum=number_of(node))


def words_for(device: str) -> tuple[str, str]:
    """The same for the command line."""
    node = node_of(device)
    return ("--device", f"c:{number_of(node)}:{node}")


def manager(vm: GuestVm, state: Path, monitor: Monitor | None = None) -> DeviceManager:
    qemu = Qemu(monitor) if monitor else Qemu.connect(str(vm.qmp_path))
    return DeviceManager.open(vm="sb1", host=HostRoot(), hypervisor=qemu, state_dir=state)


def opened(pid: int) -> Counter[str]:
    """The nodes of VFIO and iommufd that a process has open."""
    found = Counter[str]()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(entry.readlink()).removesuffix(AWAY)
        except FileNotFoundError:
            continue
        if target.startswith(("/dev/vfio/", "/dev/iommu")) and target != "/dev/vfio/vfio":
            found[target] += 1
    return found


def expected(*names: str) -> Counter[str]:
    """What QEMU has open of these devices when it has them."""
    if ABLE:
        return Counter([IOMMU_NODE, *(node_of(name) for name in names)])
    return Counter({group_of(name) for name in names})


def left() -> Counter[str]:
    """What it has open when it has given all devices back."""
    return Counter([IOMMU_NODE] if ABLE else [])


def detach(devices: DeviceManager, vm: GuestVm, *ids: str) -> None:
    """Out of a VM that stands still, for whose guest the tests let go."""
    with pytest.raises(UnplugTimeout):
        devices.detach_all(ids, timeout_s=0)
    eject(vm.oracle)
    devices.detach_all(ids)


ACPI_PORTS = 0xCC0
"""Of a q35's PCI hotplug: at 4 the slots that are to go, at 8 those that may, at 16 the bus.

Source: QEMU docs/specs/acpi_pci_hotplug.rst, include/hw/acpi/ich9.h.
"""


def eject(monitor: RawQmp) -> None:
    """What a guest's firmware does for a slot that is to go. QEMU 10 aborts if it is reset so."""

    def run(line: str) -> str:
        said = monitor.execute("human-monitor-command", {"command-line": line})
        return str(said)

    for bus in range(16):
        run(f"o /w {ACPI_PORTS + 16:#x} {bus}")
        leaving = run(f"i /w {ACPI_PORTS + 4:#x}").rpartition("= ")[2].strip()
        if int(leaving, 16):
            run(f"o /w {ACPI_PORTS + 8:#x} {leaving}")


def detach_cold(state: Path, qmp: str, attachment: str) -> None:
    """The same for a VM that `vm start` made."""
    vmplug(state, "detach", attachment, "--timeout", "0", check=False)
    with RawQmp.connect(Path(qmp)) as monitor:
        eject(monitor)
    vmplug(state, "detach", attachment)


def objects(vm: GuestVm) -> list[str]:
    entries = vm.oracle.execute("qom-list", path="/objects")
    return [entry["name"] for entry in entries if entry["name"].startswith("vmplug")]


# what is asked for


def test_a_functions_own_node_names_the_whole_group(bound: Path) -> None:
    group = resolve(ask(MULTI[1]), HostRoot())
    assert isinstance(group, VfioGroup)
    assert group.members == MULTI
    assert dict(group.cdev_nodes) == {bdf: node_of(bdf) for bdf in MULTI}
    assert group.host_path == node_of(MULTI[1])


def test_nodes_open_as_qemu_gets_them(bound: Path) -> None:
    nodes = {"iommu": IOMMU_NODE, **{bdf: node_of(bdf) for bdf in MULTI}}
    with open_nodes(nodes, HostRoot()) as files:
        for name, descriptor in files.items():
            assert os.fstat(descriptor).st_rdev == os.stat(nodes[name]).st_rdev


def test_an_open_node_is_told_with_its_process(bound: Path) -> None:
    node = node_of(MULTI[0])
    holder = subprocess.Popen(
        ["sh", "-c", f"exec 3<>{node}; echo; exec sleep 100"], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout
        holder.stdout.readline()
        told = vmplug(bound, "check", *words_for(MULTI[0]), check=False)
    finally:
        holder.kill()
        holder.communicate()
    (problem,) = [p for p in told["problems"] if p["severity"] == "error"]
    assert problem["code"] == "open-by-process"
    assert f"process {holder.pid}" in problem["message"]


# hot


def test_a_whole_group_comes_and_goes(vm: GuestVm, bound: Path) -> None:
    with manager(vm, bound) as devices:
        held = devices.attach(ask(MULTI[1]))
        assert held.guest_address
        assert [f.host for f in held.guest_address.functions] == list(MULTI)
        assert opened(vm.pid) == expected(*MULTI)
        detach(devices, vm, held.id)
        assert opened(vm.pid) == left()
        assert devices.reconcile() == []
    assert objects(vm) == (["vmplug.iommufd"] if ABLE else [])


def test_twenty_rounds_leave_no_more_than_one(vm: GuestVm, bound: Path, bindings: Path) -> None:
    with manager(vm, bound) as devices:
        for _ in range(ROUNDS):
            held = devices.attach(ask(topology.NVME))
            assert opened(vm.pid) == expected(topology.NVME)
            detach(devices, vm, held.id)
            assert opened(vm.pid) == left()
    vmplug(bindings, "unbind", topology.NVME)  # for which VFIO waits until nobody has it open
    vmplug(bindings, "bind", topology.NVME)


def test_groups_and_nodes_may_be_mixed(vm: GuestVm, bound: Path) -> None:
    with manager(vm, bound) as devices:
        held = devices.attach(ask(topology.NVME))
        by_group = devices.attach(
            DeviceInfo(
                container_path=group_of(MULTI[0]),
                dev_type=DevType.CHAR,
                devnum=number_of(group_of(MULTI[0])),
            )
        )
        assert opened(vm.pid) == expected(topology.NVME) + Counter([group_of(MULTI[0])])
        detach(devices, vm, held.id, by_group.id)
        assert opened(vm.pid) == left()


def test_the_guest_reads_the_nvme_and_loses_it_again(guest: NestedGuest, bound: Path) -> None:
    marker = topology.NVME_MARKER.encode()
    with manager(guest.vm, bound) as devices:
        held = devices.attach(ask(topology.NVME))
        assert opened(guest.vm.pid) == expected(topology.NVME)
        assert guest.read_nvme(len(marker)) == marker
        devices.detach(held.id, timeout_s=UNPLUG_S)
        assert opened(guest.vm.pid) == left()


# cold


@contextmanager
def started(state: Path, *words: str, qemu: Sequence[str] = ("-S",)) -> Iterator[Any]:
    """What `vm start` answers; the VM stands still, unless it is told otherwise, and ends."""
    small = ("--accel", "tcg", "--memory", "128", "--ports", "4", "--owner", "ctr1")
    told = vmplug(state, "vm", "start", "sb1", *small, *words, "--", *qemu)
    try:
        yield told
    finally:
        vmplug(state, "vm", "stop", "sb1", "--timeout", "0")


def test_a_vm_starts_with_a_group_and_takes_more_with_the_same_iommufd(bound: Path) -> None:
    with started(bound, *words_for(MULTI[0])) as told:
        pid = told["vm"]["pid"]
        (held,) = told["attachments"]
        assert [f["host"] for f in held["guest"]["functions"]] == list(MULTI)
        assert opened(pid) == expected(*MULTI)
        more = ("--vm", "sb1", "--owner", "ctr2")
        (second,) = vmplug(bound, "attach", *words_for(topology.NVME), *more)["attachments"]
        assert opened(pid) == expected(*MULTI, topology.NVME)
        for attachment in (second["id"], held["id"]):
            detach_cold(bound, told["vm"]["qmp"], attachment)
        assert opened(pid) == left()
        assert reconcile(bound)["repairs"] == []


def test_a_vm_that_does_not_start_leaves_no_node_open(bound: Path) -> None:
    small = ("--accel", "tcg", "--memory", "128", "--owner", "ctr1")
    bad = ("--", "-device", "no-such-device")
    words = ("vm", "start", "sb1", *small, *words_for(MULTI[0]), *bad)
    assert vmplug(bound, *words, check=False)["error"]["code"]
    assert vmplug(bound, "check", *words_for(MULTI[0]))["ok"]


# mediated devices


@pytest.fixture
def mediated(state: Path) -> Iterator[str]:
    """The UUID of a serial port that the kernel plays."""
    uuid = vmplug(state, "mdev", "create", "mtty", "mtty-1")["uuid"]
    yield uuid
    vmplug(state, "mdev", "remove", uuid)


def test_a_mediated_device_comes_and_goes(vm: GuestVm, state: Path, mediated: str) -> None:
    with manager(vm, state) as devices:
        held = devices.attach(ask(mediated))
        assert opened(vm.pid) == expected(mediated)
        detach(devices, vm, held.id)
        assert opened(vm.pid) == left()


def test_a_vm_starts_with_a_mediated_device(state: Path, mediated: str) -> None:
    with started(state, *words_for(mediated)) as told:
        assert opened(told["vm"]["pid"]) == expected(mediated)


# a QEMU without rights


@contextmanager
def unprivileged(memlock_bytes: int) -> Iterator[GuestVm]:
    """A QEMU that may open no node and lock no more than that."""
    nobody = pwd.getpwnam("nobody").pw_uid
    with TemporaryDirectory(dir="/tmp") as open_to_all:
        os.chmod(open_to_all, 0o777)
        qemu = Path(open_to_all) / "qemu"
        drop = f"setpriv --reuid={nobody} --regid={nobody} --clear-groups"
        qemu.write_text(f'#!/bin/sh\nexec {drop} {QEMU} "$@"\n')
        qemu.chmod(0o755)
        still = {"guest": False, "paused": True, "memory": MEMORY, "qemu": str(qemu)}
        with start_vm(Path(open_to_all), devices=devices(), **still) as vm:  # type: ignore[arg-type]
            assert f"Uid:\t{nobody}" in Path(f"/proc/{vm.pid}/status").read_text()
            resource.prlimit(vm.pid, resource.RLIMIT_MEMLOCK, (memlock_bytes, memlock_bytes))
            yield vm


def test_qemu_needs_no_right_to_the_nodes_and_the_memory_counts_once(bound: Path) -> None:
    """The guest has 128 MiB, and QEMU may not lock as much twice."""
    with unprivileged(200 * MIB) as vm, manager(vm, bound) as devices:
        if not ABLE:
            with pytest.raises(CommandError, match="Permission denied"):
                devices.attach(ask(topology.NVME))
            assert opened(vm.pid) == left()
            return
        held = devices.attach_all([ask(topology.NVME), ask(MULTI[0])])
        assert opened(vm.pid) == expected(topology.NVME, *MULTI)
        detach(devices, vm, *(hold.id for hold in held))
        assert opened(vm.pid) == left()


def test_a_qemu_that_may_lock_too_little_is_refused_before_anything_is_done(
    bound: Path,
) -> None:
    with unprivileged(8 * MIB) as vm, manager(vm, bound) as devices:
        with pytest.raises(InUse, match="lock 8192 KiB") as caught:
            devices.attach(ask(topology.NVME))
        assert caught.value.hint
        assert opened(vm.pid) == Counter()
        assert objects(vm) == []
        (examined,) = devices.check([ask(topology.NVME)])
        assert Code.MEMLOCK_LIMIT in [finding.code for finding in examined.findings]
        remedy = caught.value.hint.partition(", or ")[0]
        assert remedy.startswith("prlimit")
        subprocess.run(["sh", "-ec", remedy], check=True)
        (examined,) = devices.check([ask(topology.NVME)])
        assert Code.MEMLOCK_LIMIT not in [finding.code for finding in examined.findings]


@pytest.mark.parametrize("device", [topology.NVME, MULTI[0]])
def test_what_the_kernel_refuses_is_undone(bound: Path, device: str) -> None:
    """QEMU may lock less than was seen, and says so too late."""
    with unprivileged(8 * MIB) as vm, manager(vm, bound) as devices:
        with pytest.raises(CommandError) as caught:
            devices.attach(ask(device), allow=[Code.MEMLOCK_LIMIT])
        assert "Cannot allocate memory" in caught.value.desc or not ABLE
        assert caught.value.hint
        assert devices.attachments() == []
        assert opened(vm.pid) == left()
        resource.prlimit(vm.pid, resource.RLIMIT_MEMLOCK, (200 * MIB, 200 * MIB))
        if ABLE:
            detach(devices, vm, devices.attach(ask(device)).id)
            assert opened(vm.pid) == left()


# crashes


class Killing(Through):
    """The process is killed by SIGKILL after its `count`-th command that changes the VM."""

    def __init__(self, inner: Monitor, count: int) -> None:
        super().__init__(inner)
        self._left = count

    def answer(self, command: Command) -> Any:
        """See Through."""
        answer = super().answer(command)
        self._left -= command.execute in {"getfd", "object-add", "device_add"}
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer


def attach_and_die(vm: GuestVm, state: Path, device: str, count: int) -> None:
    """In a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            monitor = Killing(QmpMonitor.connect(str(vm.qmp_path)), count)
            with manager(vm, state, monitor) as devices:
                devices.attach(ask(device))
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), f"it had less than {count} steps"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6] if ABLE else [1])
def test_reconcile_is_right_after_a_kill(vm: GuestVm, bound: Path, count: int) -> None:
    """At the open /dev/iommu, the object, an open node, and devices: then all is as it was."""
    with manager(vm, bound):
        pass  # the VM is known
    attach_and_die(vm, bound, MULTI[0], count)
    vmplug(bound, "reconcile", "--timeout", "0", check=False)
    eject(vm.oracle)
    reconcile(bound)
    nodes = opened(vm.pid)
    assert nodes.keys() <= left().keys()
    assert vmplug(bound, "check", "--vm", "sb1", *words_for(MULTI[0]))["ok"]
    with manager(vm, bound) as devices:
        held = devices.attach(ask(MULTI[0]))
        assert opened(vm.pid) == expected(*MULTI)
        detach(devices, vm, held.id)
        assert opened(vm.pid) == left()


def test_the_iommufd_is_not_taken_from_under_another_device(vm: GuestVm, bound: Path) -> None:
    with manager(vm, bound) as devices:
        held = devices.attach(ask(topology.NVME))
    attach_and_die(vm, bound, MULTI[0], 2)
    vmplug(bound, "reconcile", "--timeout", "0", check=False)
    eject(vm.oracle)
    reconcile(bound)
    assert opened(vm.pid) == expected(topology.NVME)
    assert objects(vm) == (["vmplug.iommufd"] if ABLE else [])
    with manager(vm, bound) as devices:
        detach(devices, vm, held.id)
    assert opened(vm.pid) == left()


def test_processes_that_attach_at_once_share_it(vm: GuestVm, bound: Path) -> None:
    with manager(vm, bound):
        pass
    answers: list[Any] = []

    def attach(device: str) -> None:
        words = ("--vm", "sb1", "--owner", device)
        done = Vmplug(bound).as_process(*in_json(["attach", *words_for(device), *words]))
        answers.append(said(done))

    names = (topology.NVME, MULTI[0])
    threads = [threading.Thread(target=attach, args=[name]) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(answer["attachments"]) for answer in answers] == [1, 1]
    assert opened(vm.pid) == expected(topology.NVME, *MULTI)
    with manager(vm, bound) as devices:
        detach(devices, vm, *(hold.id for hold in devices.attachments()))
    assert opened(vm.pid) == left()


def test_a_vm_that_died_gives_all_back(vm: GuestVm, bound: Path) -> None:
    with manager(vm, bound) as devices:
        devices.attach_all([ask(topology.NVME), ask(MULTI[0])])
    vm.kill()
    reconcile(bound)
    assert vmplug(bound, "list")["attachments"] == []
    assert vmplug(bound, "check", *words_for(MULTI[0]))["ok"]


# what cannot be


@contextmanager
def without(*nodes: str) -> Iterator[None]:
    """These nodes have other names: the kernel would never remove one that somebody else made."""
    with ExitStack() as stack:
        for node in nodes:
            os.rename(node, node + AWAY)
            stack.callback(os.rename, node + AWAY, node)
        yield


def problems(state: Path, device: str) -> list[tuple[str, str]]:
    told = vmplug(state, "check", "--vm", "sb1", *words_for(device), check=False)
    assert all(problem["hint"] for problem in told["problems"])
    return [(problem["code"], problem["severity"]) for problem in told["problems"]]


def test_a_vm_without_iommufd_is_told_of_and_gets_the_group(vm: GuestVm, bound: Path) -> None:
    with manager(vm, bound) as devices:
        assert problems(bound, topology.NVME) == ([] if ABLE else [("no-iommufd", "warning")])
        detach(devices, vm, devices.attach(ask(topology.NVME)).id)


def test_a_host_without_iommufd_is_told_of_and_gives_the_group(vm: GuestVm, bound: Path) -> None:
    request, group = ask(topology.NVME), group_of(topology.NVME)
    with manager(vm, bound) as devices, without(IOMMU_NODE):
        assert problems(bound, topology.NVME) == [("no-iommufd", "warning")]
        held = devices.attach(request)
        assert opened(vm.pid) == Counter([group])
        detach(devices, vm, held.id)
        assert opened(vm.pid) == Counter()


def test_what_can_be_had_neither_way_is_refused(vm: GuestVm, bound: Path) -> None:
    """A newer kernel may have no nodes of groups."""
    request, group = ask(topology.NVME), group_of(topology.NVME)
    neither = [("no-iommufd", "error"), ("no-node", "error")]
    with manager(vm, bound) as devices:
        with without(group):
            found = problems(bound, topology.NVME)
            assert sorted(found) == ([] if ABLE else neither)
            if ABLE:
                detach(devices, vm, devices.attach(request).id)
        with without(group, IOMMU_NODE):
            found = problems(bound, topology.NVME)
            assert sorted(found) == neither
            with pytest.raises(InUse, match=IOMMU_NODE):
                devices.attach(request)
            assert opened(vm.pid) == left()
