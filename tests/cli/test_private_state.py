"""What `vmplug` keeps of VMs is for its user alone; what is not is refused or told."""

import os
import stat
from collections.abc import Iterator

import pytest

from tests.cli.command import Vmplug
from tests.cli.monitors import MemoryVm
from tests.cli.started import no_qemu_left, start_words
from tests.support.journal import lay_journal

STATE = 6


@pytest.fixture
def lax_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.qemu
@pytest.mark.usefixtures("lax_umask")
def test_every_file_of_a_vm_that_is_started_is_this_users_alone(vmplug: Vmplug) -> None:
    with no_qemu_left(vmplug.state_dir.parent):
        vmplug(*start_words("sb1", vmplug.state_dir.parent)).json()
        oracle = vmplug.state_dir.with_name("sb1-oracle.sock")
        paths = [vmplug.state_dir, *vmplug.state_dir.rglob("*"), oracle]
        found = {path.name: path.lstat().st_mode for path in paths}
        assert found.keys() >= {"state", "vm", "sb1", "journal.db", "qmp.sock", "qemu.log"}
        assert "console.log" in found
        for name, mode in found.items():
            assert not mode & 0o077, f"{name}: {stat.filemode(mode)}"
        assert stat.S_ISSOCK(found["qmp.sock"])
        assert vmplug("vm", "stop", "sb1", "--timeout", "0").status == 0


@pytest.mark.parametrize(
    "words", [("list",), ("reconcile",), ("vm", "list"), ("check", "-d", "rng")]
)
def test_a_state_directory_that_is_open_to_others_is_refused(
    vmplug: Vmplug, words: tuple[str, ...]
) -> None:
    lay_journal(vmplug.state_dir)
    vmplug.state_dir.chmod(0o755)
    before = {path: path.stat().st_mtime_ns for path in vmplug.state_dir.rglob("*")}
    done = vmplug(*words)
    assert (done.stdout, done.status) == ("", STATE)
    message, hint = done.stderr.splitlines()
    assert message == (
        f"vmplug: the state directory {vmplug.state_dir} is accessible to others (mode 0755): "
        "vmplug refuses to use it"
    )
    assert f"chmod 700 {vmplug.state_dir}" in hint
    assert {path: path.stat().st_mtime_ns for path in vmplug.state_dir.rglob("*")} == before
    vmplug.state_dir.chmod(0o700)
    assert vmplug(*words).status == 0


@pytest.mark.root
def test_a_state_directory_that_somebody_else_put_there_is_refused(vmplug: Vmplug) -> None:
    """In /tmp, say, where everybody may make one before root does."""
    vmplug.state_dir.mkdir(mode=0o700)
    os.chown(vmplug.state_dir, 12345, 12345)
    done = vmplug("list")
    assert done.status == STATE
    assert f"{vmplug.state_dir} belongs to user 12345: vmplug refuses to use it" in done.stderr
    assert list(vmplug.state_dir.iterdir()) == []


def test_a_socket_that_everybody_can_connect_to_is_told_of(vmplug: Vmplug) -> None:
    for mode, is_open in ((0o666, True), (0o600, False)):
        socket = vmplug.state_dir.with_name(f"{mode:o}.sock")
        with MemoryVm(socket):
            socket.chmod(mode)
            told = vmplug("vm", "adopt", f"sb{mode}", "--qmp", socket, "--json").json()
            assert told["vm"]["qmp_open_to_all"] is is_open
            vmplug("vm", "stop", f"sb{mode}").answer()
            done = vmplug("vm", "adopt", f"sb{mode}", "--qmp", socket)
            assert done.status == 0
            assert (f"hint: chmod 600 {socket}\n" in done.stderr) is is_open
            assert is_open or not done.stderr
