"""A function leased to a QEMU that vmplug did not start: it comes back once, and never earlier."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from lab import topology
from tests.cli.command import Vmplug
from tests.lab.conftest import HAS_IOMMUFD
from tests.support.lab import namespace_of
from vmplug.host.process import wait_for_end

WAIT_S = 120.0
QEMU = (
    *("qemu-system-x86_64", "-S", "-nodefaults", "-display", "none"),
    *("-machine", "q35", "-accel", "tcg", "-m", "64"),
)
WORDS = ["{qemu-args}"]
BY_GROUP = ["{vfio -device vfio-pci,host={bdf}}"]
BY_NODE = ["-object", "iommufd,id=i0", "{vfio -device vfio-pci,iommufd=i0,fd={descriptor}}"]


@pytest.fixture
def vmplug(tmp_path: Path) -> Vmplug:
    return Vmplug(tmp_path / "state")


def driver() -> str:
    return os.path.basename(os.path.realpath(f"/sys/bus/pci/devices/{topology.NVME}/driver"))


def has_open(pid: int) -> bool:
    """Whether a process has a node of VFIO open besides the container."""
    links = set[str]()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was just closed
            links.add(os.readlink(link))
    return any(link.startswith("/dev/vfio/") for link in links - {"/dev/vfio/vfio"})


@contextmanager
def leased(vmplug: Vmplug, words: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`vmplug lease`, and the QEMU that has the function."""
    asked = ["--owner", "job", "--device", f"vfio:{topology.NVME}", "--managed"]
    with vmplug.begin("lease", *asked, "--", *QEMU, *words) as process:
        deadline, pid = time.monotonic() + WAIT_S, None
        try:
            while pid is None or not has_open(pid):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                found = vmplug("lease", "list", "--json").json()["leases"]
                pid = next((one["process"] for one in found if one["state"] == "held"), None)
                time.sleep(0.1)
            yield process, pid
        finally:
            process.kill()
            if pid:
                with suppress(ProcessLookupError):  # it has ended
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("words", [BY_GROUP, WORDS, *([BY_NODE] if HAS_IOMMUFD else [])])
def test_it_outlives_vmplug_and_ends_with_qemu(vmplug: Vmplug, words: list[str]) -> None:
    namespace_of(topology.NVME)
    assert driver() == "nvme"
    with leased(vmplug, words) as (process, pid):
        process.kill()
        process.wait()
        assert vmplug("reconcile").answer() == "the journal and the VMs agree\n"
        assert driver() == "vfio-pci"
        assert vmplug("lease", "end", "job").status == 6
        os.kill(pid, signal.SIGKILL)
        assert wait_for_end(pid, WAIT_S)
        done = vmplug("reconcile", "--json").json()
        assert [repair["outcome"] for repair in done["repairs"]] == ["forgotten"]
        (returned,) = done["bindings"]
        assert (returned["address"], returned["outcome"]) == (topology.NVME, "given back")
    assert driver() == "nvme"
    assert namespace_of(topology.NVME).is_block_device()
    assert vmplug("reconcile").answer() == "the journal and the VMs agree\n"


def test_a_vm_that_is_adopted_has_it_until_its_process_ends(
    vmplug: Vmplug, tmp_path: Path
) -> None:
    namespace_of(topology.NVME)
    path = tmp_path / "qmp.sock"
    with leased(vmplug, ["-qmp", f"unix:{path},server=on,wait=off", *WORDS]) as (process, pid):
        deadline = time.monotonic() + WAIT_S
        while not path.exists():  # a node that it inherits it has before it opens this
            assert time.monotonic() < deadline
            time.sleep(0.1)
        adopted = vmplug("vm", "adopt", "sb", "--qmp", path, "--json").json()
        (held,) = adopted["attachments"]
        (function,) = held["guest"]["functions"]
        assert (function["host"], held["owner"]) == (topology.NVME, "job")
        assert function["pci_path"] == held["guest"]["pci_path"]
        assert vmplug("lease", "list").answer() == "nothing is leased\n"
        assert vmplug("reconcile").answer() == "the journal and the VMs agree\n"
        os.kill(pid, signal.SIGKILL)
        assert process.wait(WAIT_S) == 128 + signal.SIGKILL
        done = vmplug("reconcile", "--json").json()
        assert [repair["outcome"] for repair in done["repairs"]] == ["forgotten"]
        (returned,) = done["bindings"]
        assert (returned["address"], returned["outcome"]) == (topology.NVME, "given back")
    assert driver() == "nvme"
    assert vmplug("reconcile").answer() == "the journal and the VMs agree\n"


def test_it_comes_back_when_its_command_ends(vmplug: Vmplug) -> None:
    namespace_of(topology.NVME)
    asked = ("--device", f"vfio:{topology.NVME}", "--managed")
    done = vmplug("lease", *asked, "--", "sh", "-c", 'test -e "$0"', "{vfio.group_node}")
    assert (done.stderr, done.status) == ("", 0)
    assert driver() == "nvme"
    assert namespace_of(topology.NVME).is_block_device()


USER = ("python3", str(Path(__file__).with_name("vfio_user.py")))
GROUP, OWN_NODE = "{vfio.group_node}", "{vfio.cdev_node}"


@contextmanager
def left_to_a_child(vmplug: Vmplug, how: str, node: str) -> Iterator[tuple[int, str]]:
    """A child that uses the function without a descriptor, and what `vmplug lease` said of it."""
    asked = ("--owner", "job", "--device", f"vfio:{topology.NVME}", "--managed")
    done = vmplug.as_process("lease", *asked, "--", *USER, how, node, topology.NVME)
    assert done.status == 0, done
    child = int(done.stdout)
    try:
        yield child, done.stderr
    finally:
        os.kill(child, signal.SIGKILL)
        assert wait_for_end(child, WAIT_S)


@pytest.mark.parametrize("node", [GROUP, *([OWN_NODE] if HAS_IOMMUFD else [])])
def test_whoever_has_it_mapped_has_the_lease(vmplug: Vmplug, node: str) -> None:
    """Its descriptors are closed, and the maker and the command have ended."""
    namespace_of(topology.NVME)
    with left_to_a_child(vmplug, "mapped", node) as (child, said):
        assert f"process {child} (python3) has it " in said
        assert "mapped: the lease is its now" in said
        (lease,) = vmplug("lease", "list", "--json").json()["leases"]
        assert (lease["state"], lease["process"]) == ("held", child)
        assert vmplug("reconcile").answer() == "the journal and the VMs agree\n"
        refused = vmplug("lease", "end", "job")
        assert (refused.status, f"process {child}" in refused.stderr) == (6, True)
        assert driver() == "vfio-pci"
    done = vmplug("reconcile", "--json").json()
    assert [one["outcome"] for one in done["bindings"]] == ["given back"]
    assert driver() == "nvme"
    assert namespace_of(topology.NVME).is_block_device()


def test_while_it_is_sent_to_nobody_it_is_not_unbound(vmplug: Vmplug) -> None:
    """No process shows it: the kernel alone knows that somebody has it."""
    namespace_of(topology.NVME)
    with left_to_a_child(vmplug, "sent", GROUP) as (_, said):
        assert said == "vmplug: a process that vmplug cannot name has it open or mapped\n"
        (repair,) = vmplug("reconcile", "--json").json()["repairs"]
        assert repair["outcome"] == "in progress"
        assert vmplug("lease", "end", "job").status == 6
        assert driver() == "vfio-pci"
    assert [one["outcome"] for one in vmplug("reconcile", "--json").json()["bindings"]] == [
        "given back"
    ]
    assert driver() == "nvme"


def test_what_was_bound_by_hand_is_not_unbound_while_it_is_mapped(vmplug: Vmplug) -> None:
    namespace_of(topology.NVME)
    assert vmplug("bind", topology.NVME).status == 0
    node = f"/dev/vfio/{Path(f'/sys/bus/pci/devices/{topology.NVME}/iommu_group').resolve().name}"
    words = [*USER, "mapped", node, topology.NVME]
    child = int(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
    try:
        refused = vmplug("unbind", topology.NVME)
        assert (refused.status, f"process {child} (python3)" in refused.stderr) == (4, True)
        assert driver() == "vfio-pci"
    finally:
        os.kill(child, signal.SIGKILL)
        assert wait_for_end(child, WAIT_S)
    assert vmplug("unbind", topology.NVME).status == 0
    assert driver() == "nvme"
