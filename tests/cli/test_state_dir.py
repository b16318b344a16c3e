"""The state directory of a reading verb: it is never made, and a mistyped one is an error."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.command import VMPLUG, Result, Vmplug
from tests.support.journal import attach_row, device_record, lay_journal, vm_record
from vmplug import Setup, watch
from vmplug.errors import StoreError
from vmplug.journal.journal import Journal
from vmplug.manager.watching.notice import EventKind

READING = {
    "list": "nothing is attached\n",
    "vm list": "no VM is known\n",
    "reconcile": "the journal and the VMs agree\n",
    "watch --timeout 0": "nothing is attached\n",
    "check -d c:1:3": "/dev/char/1:3: ok, /dev/null is counted, not given to the VM\n",
    "host /dev/null": None,
}
"""Verbs that change nothing, and what they print where nothing is attached: None for any."""
OTHER = (
    "plan -d rng --vm sb1",
    "attach -d rng --vm sb1 --owner c1",
    "check -d rng --vm sb1",
    "detach 0123456789abcdef",
    "detach --owner c1",
    "resize 0123456789abcdef",
    "vm stop sb1",
    "vm resume sb1",
    "import-kata /nowhere --vm sb1",
)
"""Verbs that have nothing to change without a VM or an attachment."""


@pytest.mark.parametrize("verb", [*READING, *OTHER])
def test_a_directory_that_was_named_and_is_missing_is_an_error(
    tmp_path: Path, vmplug: Vmplug, verb: str
) -> None:
    typo = tmp_path / "typo"
    told = vmplug(*verb.split(), "--state-dir", typo)
    if not verb.startswith("import-kata"):  # which cannot read what it takes over
        assert told.stderr.startswith(f"vmplug: there is no state directory {typo}\nhint: pass ")
        assert (told.status, told.stdout) == (6, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", [*READING, *OTHER])
def test_an_empty_directory_stays_empty(vmplug: Vmplug, verb: str) -> None:
    vmplug.state_dir.mkdir(mode=0o700)
    told = vmplug(*verb.split())
    expected = READING.get(verb)
    assert expected is None or (told.stdout, told.status) == (expected, 0)
    assert not list(vmplug.state_dir.iterdir())


@pytest.mark.parametrize("verb", [*READING, *OTHER])
def test_the_directory_of_the_environment_is_not_made(vmplug: Vmplug, verb: str) -> None:
    """As the default one: nothing is attached as long as vmplug never ran."""
    told = vmplug(*verb.split())
    expected = READING.get(verb)
    assert expected is None or (told.stdout, told.status) == (expected, 0)
    assert "state directory" not in told.stderr
    assert not vmplug.state_dir.exists()


@pytest.mark.root
@pytest.mark.parametrize("verb", [*READING, *OTHER])
def test_the_default_directory_is_not_made_either(verb: str) -> None:
    told = on_new_host(f"{VMPLUG} {verb}; echo status $?; ls -A /run")
    expected = READING.get(verb)
    assert "state directory" not in told.stderr
    assert told.stdout.splitlines()[-1].startswith("status ")
    assert expected is None or told.stdout == f"{expected}status 0\n"


@pytest.mark.root
def test_the_library_has_its_default_where_the_environment_names_another() -> None:
    """The variable is the command line's: a library call without a Setup names no directory."""
    ask = "import vmplug; print(vmplug.list_vms())"
    told = on_new_host(f"VMPLUG_STATE_DIR=/elsewhere {sys.executable} -c '{ask}'")
    assert told == Result("[]\n", "", 0)


def test_the_hint_names_the_directory_that_is_taken_without_the_option(
    tmp_path: Path, vmplug: Vmplug
) -> None:
    told = vmplug("list", "--state-dir", tmp_path / "typo")
    assert told.stderr.endswith(f"without one it is {vmplug.state_dir}\n")


def on_new_host(script: str) -> Result:
    """Run a script where /run is empty, as on a host on which vmplug never ran."""
    words = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs none /run && {script}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=90)
    return Result(done.stdout, done.stderr, done.returncode)


def test_a_directory_that_cannot_be_read_may_have_a_journal(tmp_path: Path) -> None:
    """A name that is too long stands for it: root may read everything else."""
    with pytest.raises(StoreError, match="File name too long"):
        Journal.open_existing(tmp_path / ("x" * 300))


def test_a_watch_that_began_before_there_was_a_journal_follows_it(tmp_path: Path) -> None:
    with watch(timeout_s=60, setup=Setup(state_dir=tmp_path)) as events, made_meanwhile(tmp_path):
        told = next(events)
    assert (told.what, told.attachment and told.attachment.host_path) == (
        EventKind.DELETED,
        "/nowhere/a.img",
    )


@contextmanager
def made_meanwhile(state_dir: Path) -> Iterator[None]:
    """A journal with a VM whose disk does not exist."""
    lay_journal(state_dir)
    with Journal.open(state_dir) as journal:
        journal.add_vm(vm_record())
        attach_row(journal, device_record("file:/nowhere/a.img", "/nowhere/a.img"))
    yield
