"""A verb answers in the tests' process as it does in one of its own, and leaves nothing there."""

import gc
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cli.command import Vmplug, config, device, first_in_path
from tests.cli.monitors import MemoryVm
from tests.contract.world import journal_rows
from tests.support.disks import disk_image
from tests.support.journal import attach_row, device_record, vm_record
from tests.support.pci_tree import PciTree
from vmplug.journal.journal import Journal

NVME = "0000:3b:00.0"
BUNDLE = config(device("/dev/xvda", "8:16"), device("/dev/a\x1b[1m\n\u202e\x9b\u00e9", "8:16"))
BAD_BUNDLE = config({"path": "/dev/xvda", "type": "b", "major": -1, "minor": 0})

OF_THIS_RUN = re.compile(r"\b[0-9a-f]{16}\b|\d{4}-\d\d-\d\dT[0-9:.+]+")
"""Names that are drawn, and the time of day."""

LINES = [
    "--version",
    "frobnicate",
    "info - --root {root}",
    "attach -d file:{nowhere} --vm sb1 --owner c1 --json",
    "watch --timeout 0 --vm sb2 --json",
]
MORE_LINES = [
    "",
    "--help",
    "vm start --help",
    "completion fish --json",
    "host --root {root} --json",
    "resolve -d b:8:16 -d b:8:99 --root {root}",
    "check - --root {root} --json",
    "check -d x:8:0 --json",
    "check -d b:8:16 --policy {nowhere}",
    "plan -d file:{image} --vm sb1",
    "detach --owner nobody --json",
    "list --json",
    "bind {nvme} --root {root}",
    "mdev create {nvme} x --root {root}",
    "reconcile --vm sb1 --json",
    "import-kata {nowhere} --vm sb1",
    "vm list --json",
    "record {image} --root {root}",
    "list --state-dir {image}/state",
]


@pytest.fixture
def vm(vmplug: Vmplug) -> Iterator[MemoryVm]:
    with MemoryVm(vmplug.state_dir.with_name("qmp.sock")) as made:
        yield made


@pytest.fixture
def places(vmplug: Vmplug, vm: MemoryVm, tmp_path: Path) -> dict[str, object]:
    """A host in a tree, a VM that answers, and one that is gone with an attachment."""
    tree = PciTree(tmp_path / "host")
    tree.pci_function(NVME, driver="nvme", group=26)
    tree.block_device("8:16", "sdb", partitions={"8:17": "sdb1"})
    image = disk_image(tmp_path / "a.img", 1, "a")
    vmplug("vm", "adopt", "sb1", "--qmp", vm.socket_path).answer()
    with Journal.open(vmplug.state_dir) as journal:
        journal.add_vm(vm_record("sb2"))
        attach_row(journal, device_record("file:/no/such", "/no/such", vm="sb2"))
    return {"root": tree.path, "nvme": NVME, "image": image, "nowhere": tmp_path / "nowhere"}


@pytest.mark.parametrize(
    "line", [*LINES, *(pytest.param(line, marks=pytest.mark.slow) for line in MORE_LINES)]
)
def test_both_runners_have_one_answer(
    vmplug: Vmplug, places: dict[str, object], line: str
) -> None:
    words = line.format(**places).split()
    before = journal_rows(vmplug.state_dir)
    stdin = BUNDLE if "-" in words else ""
    here, as_process = (run(*words, stdin=stdin) for run in (vmplug.here, vmplug.as_process))
    assert OF_THIS_RUN.sub("*", here.stdout) == OF_THIS_RUN.sub("*", as_process.stdout)
    assert (here.stderr, here.status) == (as_process.stderr, as_process.status)
    assert journal_rows(vmplug.state_dir) == before


def test_both_runners_read_the_same_standard_input(vmplug: Vmplug) -> None:
    for text in ("", BAD_BUNDLE, '{"annotations": {"org.vmplug.rng.a": "\u00e9"}}'):
        assert vmplug.here("check", "-", stdin=text) == vmplug.as_process("check", "-", stdin=text)


def test_both_runners_complete_a_line(vmplug: Vmplug) -> None:
    asked = {"COMP_WORDS": "vmplug vm ", "COMP_CWORD": "2", "_VMPLUG_COMPLETE": "bash_complete"}
    assert vmplug.here(env=asked) == vmplug.as_process(env=asked)
    assert "adopt" in vmplug.here(env=asked).answer()


def test_both_runners_follow_the_environment_that_they_are_given(
    vmplug: Vmplug, tmp_path: Path
) -> None:
    words = ("check", "-d", "c:1:3:/dev/null")
    env = {"VMPLUG_POLICY": str(tmp_path / "policy.toml")}
    here = vmplug.here(*words, env=env)
    assert here == vmplug.as_process(*words, env=env)
    assert "policy.toml" in here.stderr


def test_both_runners_show_the_same_at_a_terminal(
    vmplug: Vmplug, places: dict[str, object]
) -> None:
    for line in ("list", "host --root {root}", "frobnicate"):
        words = line.format(**places).split()
        here = vmplug.at_terminal(*words, columns=60)
        as_process = vmplug.at_terminal_as_process(*words, columns=60)
        assert OF_THIS_RUN.sub("*", here.stdout) == OF_THIS_RUN.sub("*", as_process.stdout)
        assert (here.stderr, here.status) == (as_process.stderr, as_process.status)
    assert "\x1b[31m" in vmplug.at_terminal("list").stdout


def open_descriptors() -> dict[str, str]:
    """What each is open on; that of the directory itself is gone by then."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found


def state_of_this_process() -> tuple[object, ...]:
    """All that a run changes meanwhile, and what it might leave."""
    gc.collect()
    umask = os.umask(0o077)
    os.umask(umask)
    return (
        dict(os.environ),
        Path.cwd(),
        umask,
        [*sys.argv],
        (sys.stdin, sys.stdout, sys.stderr),
        tempfile.tempdir,
        [*logging.root.handlers],
        set(threading.enumerate()),
        open_descriptors(),
    )


LEAVES_NOTHING = [
    "list",
    "host --root {root} --json",
    "frobnicate",
    "check -d x:8:0",
    "list --state-dir {image}/state",
    "plan -d file:{image} --vm sb1",
    "plan -d file:{image} --vm sb2",
    "attach -d file:{image} --vm sb1 --owner c1",
    "watch --timeout 0",
    "vm adopt sb3 --qmp {nowhere}",
]


def test_a_run_here_leaves_this_process_as_it_was(
    vmplug: Vmplug, vm: MemoryVm, places: dict[str, object]
) -> None:
    runs = [line.format(**places).split() for line in LEAVES_NOTHING]
    for words in runs:
        vmplug.here(*words)  # what is imported or opened once stays
    vm.wait_idle()
    before = state_of_this_process()
    for words in runs:
        vmplug.here(*words, env={"TMPDIR": "/", "VMPLUG_OF_A_TEST": "1"})
    vmplug.at_terminal("list")
    vm.wait_idle()
    assert state_of_this_process() == before


def test_a_qemu_is_never_a_child_of_the_tests(vmplug: Vmplug, tmp_path: Path) -> None:
    """`vm start` is run as a process whoever asks; here a program in QEMU's place says whose."""
    fake = tmp_path / "bin" / "qemu-system-x86_64"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "of $PPID"\nexit 1\n')
    fake.chmod(0o755)
    path = first_in_path(fake.parent)
    done = vmplug("vm", "start", "sb1", "--accel", "tcg", env=path)
    assert "QEMU did not start: of " in done.stderr
    assert f"of {os.getpid()}" not in done.stderr
