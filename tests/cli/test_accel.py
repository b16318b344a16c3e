"""KVM is taken where it runs a guest; TCG, which always does, stands for a good one."""

import json
import os
from pathlib import Path

import pytest

from tests.cli.command import Vmplug
from tests.cli.started import no_qemu_left
from tests.support.tree import HostTree
from vmplug.host.root import HostRoot
from vmplug.hypervisor.qemu.start.accel import Accel, choose_accel, why_not

pytestmark = pytest.mark.qemu

X86, S390 = "qemu-system-x86_64", "qemu-system-s390x"
PATIENCE_S = 60.0
NO_KVM_HERE = "qemu-system-s390x: -accel kvm: invalid accelerator kvm"
"""The program for the other architecture says at once that it cannot."""


@pytest.mark.parametrize("program", [X86, S390])
def test_the_guest_of_each_machine_ends_by_itself(program: str) -> None:
    assert why_not(program, "tcg", timeout_s=PATIENCE_S) is None


@pytest.mark.parametrize("program", [X86, S390])
def test_a_guest_that_does_not_end_is_no_proof(program: str) -> None:
    said = why_not(program, "tcg", timeout_s=0.001)
    assert said == "a guest that counts to ten million did not end within 0.001 s"


def test_qemus_own_refusal_is_the_reason() -> None:
    assert why_not(S390, "kvm", timeout_s=PATIENCE_S) == NO_KVM_HERE


@pytest.fixture
def host(tree: HostTree) -> HostRoot:
    """A host whose KVM opens."""
    tree.file("/dev/kvm").file("/proc/sys/kernel/random/boot_id", "first\n")
    return HostRoot(tree.path)


def keep(directory: Path, **changes: object) -> None:
    """Change the verdict that is kept."""
    file = directory / "kvm.json"
    verdict = json.loads(file.read_bytes())[S390]
    file.write_text(json.dumps({S390: {**verdict, **changes}}))


def choose(host: HostRoot, directory: Path) -> Accel:
    return choose_accel(S390, directory, host)


def test_a_refusal_is_kept_for_an_hour(host: HostRoot, tmp_path: Path) -> None:
    assert choose(host, tmp_path) == Accel(name="tcg", why_not_kvm=NO_KVM_HERE)
    assert (tmp_path / "kvm.json").stat().st_mode & 0o777 == 0o600
    keep(tmp_path, why_not_kvm="kept")
    assert choose(host, tmp_path).why_not_kvm == "kept"
    at = json.loads((tmp_path / "kvm.json").read_bytes())[S390]["at"]
    keep(tmp_path, at=at - 3600)
    assert choose(host, tmp_path).why_not_kvm == NO_KVM_HERE


def test_that_kvm_runs_a_guest_is_kept_until_something_changes(
    host: HostRoot, tree: HostTree, tmp_path: Path
) -> None:
    choose(host, tmp_path)
    keep(tmp_path, why_not_kvm=None, at=-1e6)
    assert choose(host, tmp_path) == Accel(name="kvm", why_not_kvm=None)
    tree.file("/proc/sys/kernel/random/boot_id", "second\n")
    assert choose(host, tmp_path).name == "tcg"
    keep(tmp_path, why_not_kvm=None)
    assert choose(host, tmp_path).name == "kvm"
    os.chmod(tree.path / "dev/kvm", 0o640)  # another ctime, as after `modprobe -r kvm`
    assert choose(host, tmp_path).name == "tcg"


@pytest.mark.parametrize("kept", [b"", b"{", b"[]", b'{"qemu-system-s390x": {}}'])
def test_a_damaged_verdict_is_none(host: HostRoot, tmp_path: Path, kept: bytes) -> None:
    (tmp_path / "kvm.json").write_bytes(kept)
    assert choose(host, tmp_path).why_not_kvm == NO_KVM_HERE


def kvm_opens() -> bool:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
    except OSError:
        return False
    return True


def test_vm_start_finds_out_once_and_says_which(vmplug: Vmplug) -> None:
    with no_qemu_left(vmplug.state_dir.parent):
        first = vmplug("vm", "start", "sb1", "--", "-S").answer().splitlines()
        file = vmplug.state_dir / "kvm.json"
        assert file.exists() is kvm_opens()
        kept = file.read_bytes() if kvm_opens() else None
        told = vmplug("vm", "start", "sb2", "--json", "--", "-S").json()["vm"]
        accel, why = told["accel"], told["why_not_kvm"]
        assert first[0].startswith(f"VM sb1 runs with {accel.upper()} as process ")
        expected = [] if accel == "kvm" else [f"TCG is slow, and KVM cannot be used: {why}"]
        assert (first[1:], why is None) == (expected, accel == "kvm")
        assert kept is None or file.read_bytes() == kept
        named = vmplug("vm", "start", "sb3", "--accel", "tcg", "--memory", "1G", "--", "-S")
        (line,) = named.answer().splitlines()
        assert line.startswith("VM sb3 runs with TCG as process ")
        pid = line.partition(" process ")[2].partition(";")[0]
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        assert words[words.index("-m") + 1].startswith("1024M,")
