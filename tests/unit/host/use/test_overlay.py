"""A file of an overlay is that of its layer, on the running host."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.checking import WRITING, want_file
from tests.support.disks import disk_image, loop_device
from vmplug.host.block.usage import read_usage
from vmplug.host.check.device import check_device
from vmplug.host.check.relate import relate_device
from vmplug.host.finding import Access, Code, Finding
from vmplug.host.kind import Identity, IdentityKind
from vmplug.host.resolve import resolve
from vmplug.host.root import THIS_HOST
from vmplug.host.use.claim import Claim
from vmplug.host.use.qemu_lock import take_lock

pytestmark = pytest.mark.root

DISK = "images/disk.img"


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    """A file system that can be the upper layer of an overlay, also where /tmp is in one."""
    place = tmp_path / "base"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
    try:
        for name in ("upper/images", "a:b/images", "lower/images", "work", "merged", "other"):
            (place / name).mkdir(parents=True)
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@contextmanager
def overlay(base: Path, *options: str, at: str = "merged") -> Iterator[Path]:
    layers = f"lowerdir={base}/a\\:b:{base}/lower"
    words = [*(options or (f"upperdir={base}/upper,workdir={base}/work",)), layers]
    command = ["mount", "-t", "overlay", "-o", ",".join(words), "none", str(base / at)]
    subprocess.run(command, check=True)
    try:
        yield base / at / DISK
    finally:
        subprocess.run(["umount", base / at], check=True)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A process that has a file open for writing; its pid."""
    with path.open("r+b") as file:
        process = subprocess.Popen(["sleep", "600"], stdin=file)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def findings(path: Path, wish: Access = WRITING, claims: Sequence[Claim] = ()) -> list[Finding]:
    device = resolve(want_file(str(path)), THIS_HOST)
    usage = read_usage(THIS_HOST)
    return check_device(device, wish, usage=usage, claims=claims, root=THIS_HOST)


def names(path: Path) -> set[str]:
    device = resolve(want_file(str(path)), THIS_HOST)
    known = relate_device(device, read_usage(THIS_HOST), THIS_HOST)
    return {one.path for one in known.related_identities if one.path}


@pytest.mark.parametrize("layer", ["upper", "a:b", "lower"])
def test_a_file_that_is_open_through_an_overlay_is_in_use_in_its_layer(
    base: Path, layer: str
) -> None:
    file = disk_image(base / layer / DISK, 1, "layer")
    with overlay(base) as merged:
        assert findings(file) == findings(merged) == []
        merged.open("r+b").close()  # the first writer makes a copy in the upper layer
        shown = base / "upper" / DISK
        with opened(merged) as pid:
            (found,) = findings(shown)
            assert found.code == Code.OPEN_BY_PROCESS
            assert f"process {pid} " in found.message
        with opened(shown) as pid:
            (found,) = findings(merged)
            assert f"process {pid} " in found.message
            if layer != "upper":
                assert findings(file) == []  # the overlay shows the copy, not this file
        assert findings(shown) == findings(merged) == []


def test_the_locks_of_qemu_count_in_both_directions(base: Path) -> None:
    file = disk_image(base / "upper" / DISK, 1, "layer")
    with overlay(base) as merged:
        for locked, asked in ((file, merged), (merged, file)):
            with locked.open("r+b") as held:
                assert take_lock(held.fileno(), read_only=False, share_rw=False)
                assert Code.IMAGE_LOCKED in {each.code for each in findings(asked)}
        assert findings(file) == findings(merged) == []


def test_a_vm_that_has_one_name_keeps_the_other_from_others(base: Path) -> None:
    file = disk_image(base / "upper" / DISK, 1, "layer")
    with overlay(base) as merged:
        assert names(file) == {str(merged)}
        assert names(merged) == {str(file)}
        held = Claim(
            vm="sb1",
            identity=Identity(IdentityKind.FILE, str(merged)),
            read_only=False,
            share_rw=False,
        )
        assert [each.code for each in findings(file, claims=[held])] == [Code.IN_USE_BY_VM]
    assert names(file) == set()


def test_a_loop_device_on_the_file_of_an_overlay_is_on_that_of_the_layer(base: Path) -> None:
    file = disk_image(base / "upper" / DISK, 1, "layer")
    with overlay(base) as merged, loop_device(merged) as node:
        (found,) = findings(file)
        assert found.code == Code.HAS_HOLDERS
        assert str(node) in found.message


@pytest.mark.parametrize(("option", "users"), [("--mount", [True]), ("-Urm", [])])
def test_an_overlay_of_another_mount_namespace_counts(
    base: Path, option: str, users: list[bool]
) -> None:
    """Unless it belongs to users of a namespace of their own, who mount what they want."""
    file = disk_image(base / "upper" / DISK, 1, "layer")
    options = f"upperdir={base}/upper,workdir={base}/work,lowerdir={base}/lower"
    script = (
        f"mount -t overlay -o {options} none {base}/merged; exec 3<>{base}/merged/{DISK}; "
        "echo ready; read line || true"
    )
    command = ["unshare", option, "sh", "-ec", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        found = findings(file)
        assert [f"process {process.pid} " in each.message for each in found] == users
        process.communicate()
    assert findings(file) == []


def test_a_lower_layer_that_two_overlays_share_makes_them_no_relatives(base: Path) -> None:
    file = disk_image(base / "lower" / DISK, 1, "layer")
    with overlay(base) as merged, overlay(base, "ro", at="other") as other:
        assert names(merged) == {str(file)}
        assert names(file) == {str(merged), str(other)}


def test_a_file_that_the_overlay_hides_is_no_part_of_it(base: Path) -> None:
    file = disk_image(base / "lower" / DISK, 1, "layer")
    with overlay(base) as merged:
        merged.unlink()
        assert names(file) == set()
