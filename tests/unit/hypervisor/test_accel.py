"""Without /dev/kvm no QEMU is asked; tests/cli/test_accel.py has what QEMU answers."""

from pathlib import Path

from tests.support.tree import HostTree
from vmplug.host.root import HostRoot
from vmplug.hypervisor.qemu.start.accel import Accel, choose_accel


def test_without_a_node_it_is_tcg(tree: HostTree, tmp_path: Path) -> None:
    chosen = choose_accel("qemu-system-x86_64", tmp_path / "state", HostRoot(tree.path))
    assert chosen == Accel(name="tcg", why_not_kvm="this host has no /dev/kvm")
    assert not (tmp_path / "state").exists()


def test_a_node_that_cannot_be_opened_says_why(tree: HostTree, tmp_path: Path) -> None:
    tree.file("/dev/kvm/x")
    chosen = choose_accel("qemu-system-x86_64", tmp_path, HostRoot(tree.path))
    assert chosen == Accel(name="tcg", why_not_kvm="/dev/kvm cannot be opened: Is a directory")
