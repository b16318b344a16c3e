"""`vmplug cdi write --watch`: names follow the devices of the running host, until a signal.

udev is a directory of the test's own, in a mount namespace of the verb's own.
"""

import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import VMPLUG, Result, Vmplug
from tests.cli.watching import DEADLINE_S, Watching
from tests.support.disks import disk_image, loop_device
from vmplug import cdi
from vmplug.manager.naming.keep import LOOK_INTERVAL_S

pytestmark = pytest.mark.root

ALLOW = """
[[rule]]
name = "loop devices"
kinds = ["block"]
numbers = ["b:7"]
"""
NOTHING = '[[rule]]\nname = "a"\nkinds = ["virtio-9p"]\n'
_ALONE = """
set -e
mount -t tmpfs tmpfs /run
mkdir /run/udev
mount --bind "$1" /run/udev
shift
exec "$@"
"""
FILE = "vmplug.org-disk.yaml"
HOST, STATE = 4, 6


class World:
    """A loop device that udev names, and what runs in that namespace."""

    def __init__(self, path: Path, vmplug: Vmplug) -> None:
        self.udev = path / "udev"
        (self.udev / "data").mkdir(parents=True)
        self.directory = path / "cdi"
        self.policy = path / "policy.toml"
        self._vmplug = vmplug
        self.allow(ALLOW)

    def allow(self, text: str) -> None:
        draft = self.policy.with_suffix(".draft")
        draft.write_text(text)
        draft.chmod(0o600)
        draft.rename(self.policy)

    def name(self, node: Path, *names: str) -> None:
        """What udev says of a loop device; nothing without a name."""
        file = self.udev / "data" / f"b7:{node.name.removeprefix('loop')}"
        if names:
            draft = self.udev / "draft"
            draft.write_text("".join(f"S:disk/by-id/{each}\n" for each in names))
            draft.rename(file)
        else:
            file.unlink()

    def begin(self, *words: str) -> "subprocess.Popen[bytes]":
        alone = ("unshare", "--mount", "--propagation", "private", "sh", "-c", _ALONE, "sh")
        where = ("--directory", self.directory, "--policy", self.policy)
        return subprocess.Popen(
            [*alone, self.udev, VMPLUG, "cdi", "write", "--json", *where, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._vmplug.environment,
        )

    def run(self, *words: str) -> Result:
        out, err = (process := self.begin(*words)).communicate(timeout=DEADLINE_S)
        return Result(out.decode(), err.decode(), process.returncode)

    @contextmanager
    def watching(self) -> Iterator[Watching]:
        process = self.begin("--watch")
        try:
            yield Watching(process)
        finally:
            process.kill()
            process.communicate(timeout=DEADLINE_S)

    def named(self) -> dict[str, str]:
        """The devices in the files, with their nodes."""
        registry = cdi.read_directories([self.directory])
        assert not registry.problems
        return {
            name.removeprefix("vmplug.org/disk="): each.device.container_edits.device_nodes[
                0
            ].host_path
            for name, each in registry.devices.items()
        }


@pytest.fixture
def world(tmp_path: Path, vmplug: Vmplug) -> World:
    return World(tmp_path, vmplug)


@pytest.fixture
def disk(tmp_path: Path, world: World) -> Iterator[Path]:
    with loop_device(disk_image(tmp_path / "a.img", 1, "a")) as node:
        world.name(node, "first")
        yield node


def changes(told: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The names of the files that were written, and of those that were removed."""
    written, removed = ([Path(path).name for path in told[key]] for key in ("written", "removed"))
    return written, removed


def is_told(watch: Watching) -> bool:
    """Whether anything is, in the time of two looks."""
    assert watch.process.stdout
    return bool(select.select([watch.process.stdout], [], [], 2 * LOOK_INTERVAL_S)[0])


def test_names_come_and_go(world: World, disk: Path, tmp_path: Path) -> None:
    with world.watching() as watch:
        assert changes(watch.next()) == ([FILE], [])
        assert world.named() == {"first": str(disk)}
        with loop_device(disk_image(tmp_path / "b.img", 1, "b")) as other:
            world.name(other, "second")
            assert changes(watch.next()) == ([FILE], [])
            assert world.named() == {"first": str(disk), "second": str(other)}
            world.name(other)
            assert changes(watch.next()) == ([FILE], [])
        world.name(disk)
        assert changes(watch.next()) == ([], [FILE])
        assert [*world.directory.iterdir()] == []
        world.name(disk, "again")
        assert changes(watch.next()) == ([FILE], [])
        assert world.named() == {"again": str(disk)}


def test_a_directory_that_goes_is_made_again(world: World, disk: Path) -> None:
    with world.watching() as watch:
        watch.next()
        shutil.rmtree(world.directory.rename(world.directory.with_name("gone")))
        assert changes(watch.next()) == ([FILE], [])
        assert world.named() == {"first": str(disk)}
        assert world.run().status == STATE  # the lock is on the new one too


def test_what_goes_wrong_is_told_once_and_tried_again(world: World, disk: Path) -> None:
    with world.watching() as watch:
        watch.next()
        before = world.named()
        world.allow("[[rules]]")
        told = watch.next()
        assert told["error"]["code"] == "not-allowed"
        assert not is_told(watch)
        assert world.named() == before
        world.allow(ALLOW)
        told = watch.next()
        assert (told["ok"], changes(told)) == (True, ([], []))
        assert not is_told(watch)
        world.allow(NOTHING)
        assert changes(watch.next()) == ([], [FILE])
        world.name(disk, "second")
        world.allow(ALLOW)
        assert changes(watch.next()) == ([FILE], [])
        assert world.named() == {"second": str(disk)}


def test_it_waits_for_the_first_device(world: World, tmp_path: Path) -> None:
    with world.watching() as watch, loop_device(disk_image(tmp_path / "a.img", 1, "a")) as node:
        assert (watch.next()["devices"], world.named()) == ([], {})
        world.name(node, "first")
        assert changes(watch.next()) == ([FILE], [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_the_files_stay(
    world: World, disk: Path, number: signal.Signals
) -> None:
    with world.watching() as watch:
        watch.next()
        watch.process.send_signal(number)
        _, err = watch.process.communicate(timeout=DEADLINE_S)
        assert (watch.process.returncode, err) == (0, b"")
    assert [path.name for path in world.directory.iterdir()] == [FILE]
    assert world.named() == {"first": str(disk)}
    assert world.run().status == 0  # the lock has gone with it


def test_what_is_wrong_at_the_start_is_an_error(world: World, disk: Path) -> None:
    world.directory = world.directory / "not" / "there"
    done = world.run("--watch")
    assert (done.error()["code"], done.status) == ("host-error", HOST)
    assert not world.directory.parent.exists()
    assert disk.is_block_device()
