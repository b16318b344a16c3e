"""A storage that stops answering: what has nothing to do with it goes on, and it is named.

Two disks in one VM with a guest, one of them on a file system whose server has stopped.
"""

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.command import Result, Vmplug
from tests.contract.world import memory_side_vm
from tests.support.disks import disk_image
from tests.support.silent_files import SilentFiles, silent_files
from tests.support.vm import GuestVm

pytestmark = [pytest.mark.qemu, pytest.mark.root]

PATIENCE_S = 60.0
"""Well above what any verb takes here, also on a busy host."""


@dataclass(frozen=True, slots=True)
class World:
    """A VM with the disks `silent` and `other`, by their attachments; `third` is not attached."""

    vm: GuestVm
    vmplug: Vmplug
    files: SilentFiles
    third: Path
    silent: str
    other: str

    def run(self, *words: str) -> Result:
        """A verb as a process, which is killed if it hangs."""
        process = self.vmplug.begin(*words)
        try:
            out, err = process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            self.files.go_on()
            process.communicate()
            pytest.fail(f"vmplug {' '.join(words)} hangs")
        return Result(out.decode(), err.decode(), process.returncode)

    def state_of_silent(self) -> str:
        held = self.run("list", "--json").json()["attachments"]
        (hold,) = (hold for hold in held if hold["id"] == self.silent)
        return str(hold["host"]["state"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("silent")
    below, mounted = directory / "below", directory / "mounted"
    below.mkdir()
    mounted.mkdir()
    disk_image(below / "silent.img", 2, "silent")
    other, third = (disk_image(directory / f"{name}.img", 2, name) for name in ("other", "third"))
    vmplug = Vmplug(directory / "state")

    def attach(path: Path) -> str:
        words = ("attach", "--vm", "sb1", "--owner", "ctr1", "--device", f"file:{path}", "--json")
        return str(vmplug(*words).json()["attachments"][0]["id"])

    with memory_side_vm(directory) as vm, silent_files(below, mounted) as files:
        vm.console.run("true")
        assert vmplug("vm", "adopt", "sb1", "--qmp", str(vm.qmp_path)).status == 0
        yield World(vm, vmplug, files, third, attach(mounted / "silent.img"), attach(other))
        files.go_on()


def test_list_and_watch_name_it_and_do_not_wait_for_it(world: World) -> None:
    assert world.state_of_silent() == "present"
    world.files.stop()
    assert world.state_of_silent() == "not answering"
    begun = time.monotonic()
    watched = world.run("watch", "--timeout", "0", "--json")
    assert time.monotonic() - begun < PATIENCE_S / 2
    told = watched.json()
    assert (told["event"], told["attachment"]["id"]) == ("not answering", world.silent)
    world.files.go_on()
    assert world.state_of_silent() == "present"


def test_other_disks_come_and_go_and_the_guest_goes_on(world: World) -> None:
    world.files.stop()
    detached = world.run("detach", world.other)
    assert (detached.status, detached.stderr) == (0, "")
    device = ("--device", f"file:{world.third}")
    attached = world.run("attach", "--vm", "sb1", "--owner", "ctr1", *device)
    assert (attached.status, attached.stderr) == (0, "")
    for words in (
        ["reconcile"],
        ["vm", "list"],
        ["check", "--device", f"file:{world.third}:/dev/y"],
    ):
        world.run(*words)
    assert world.vm.console.run("echo goes on") == "goes on"


def test_a_disk_there_is_not_plugged_and_nothing_is_left_of_it(world: World) -> None:
    late = world.files.directory / "late.img"
    disk_image(late, 2, "late")
    before = world.run("list", "--json").json()["attachments"]
    world.files.stop()
    words = ("attach", "--vm", "sb1", "--owner", "ctr1")
    refused = world.run(*words, "--device", f"file:{world.files.mounted / late.name}")
    assert refused.status == 4
    assert "its storage does not answer" in refused.stderr
    world.files.go_on()
    after = world.run("list", "--json").json()["attachments"]
    assert [hold["id"] for hold in after] == [hold["id"] for hold in before]
