"""A file of an overlay is that of its layer, on the running host."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations, product
from pathlib import Path

import pytest

from tests.support.checking import WRITING, want_file
from tests.support.disks import disk_image, loop_device
from tests.support.silent_files import silent_files
from vmplug.host.block.usage import read_usage
from vmplug.host.check.device import check_device
from vmplug.host.check.relate import relate_device
from vmplug.host.finding import Access, Code, Finding
from vmplug.host.kind import Identity, IdentityKind
from vmplug.host.resolve import resolve
from vmplug.host.root import THIS_HOST, HostRoot
from vmplug.host.use.claim import Claim
from vmplug.host.use.overlay import find_other_names, joins_layers, read_overlays
from vmplug.host.use.qemu_lock import take_lock
from vmplug.manager.examine import examine
from vmplug.oci.info import DeviceInfo, DevType

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
    with mounted("-t", "overlay", "-o", ",".join(words), "none", at=base / at) as merged:
        yield merged / DISK


@contextmanager
def mounted(*words: str, at: Path, cwd: Path | None = None) -> Iterator[Path]:
    subprocess.run(["mount", *words, at], cwd=cwd, check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", at], check=True)  # a look may wait in it


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


@pytest.mark.parametrize("upper", ["u\\,v", "u\\:v", "u:v", "u\\\\v", "u v", "u\nv"])
def test_an_upper_layer_may_have_any_name(base: Path, upper: str) -> None:
    plain = upper.replace("\\\\", "!").replace("\\", "").replace("!", "\\")
    (base / plain / "images").mkdir(parents=True)
    file = disk_image(base / plain / DISK, 1, "layer")
    with overlay(base, f"upperdir={base}/{upper},workdir={base}/work") as merged:
        assert names(merged) == {str(file)}
        assert names(file) == {str(merged)}


def test_a_lower_layer_may_have_any_name(base: Path) -> None:
    """Also one that ends with what is written before a colon."""
    for plain in ("l\\", "l,", "l\n l", "l:"):
        (base / plain / "images").mkdir(parents=True)
        file = disk_image(base / plain / DISK, 1, "layer")
        name = plain.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
        words = f"lowerdir={base}/{name}:{base}/lower"
        with mounted("-t", "overlay", "-o", words, "none", at=base / "merged") as at:
            assert names(at / DISK) == {str(file)}
            assert names(file) == {str(at / DISK)}


@pytest.mark.parametrize("upper", ["id/diff", "{base}/id/diff"])
def test_layers_may_have_relative_names_as_docker_and_containerd_give_them(
    base: Path, upper: str
) -> None:
    for name in ("id/diff/images", "id/work", "id/merged", "l", "low/diff/images"):
        (base / name).mkdir(parents=True)
    (base / "l/ABC").symlink_to("../low/diff")
    file, lower = base / "id/diff" / DISK, disk_image(base / "low/diff" / DISK, 1, "lower")
    words = f"upperdir={upper.format(base=base)},workdir={base}/id/work,lowerdir=l/ABC:lower"
    with mounted("-t", "overlay", "-o", words, "none", at=base / "id/merged", cwd=base) as at:
        assert names(lower) == {str(at / DISK)}
        assert {str(Path(name).resolve()) for name in names(at / DISK)} == {str(lower)}
        (at / DISK).open("r+b").close()
        assert names(file) == {str(at / DISK)}
        assert names(at / DISK) == {str(file)}
        assert names(lower) == set()


def places_to_bind(base: Path) -> tuple[Path, Path, Path]:
    """An image in a layer; and where one file, and a directory, can be mounted."""
    file, single, part = (
        disk_image(base / "upper" / DISK, 1, "layer"),
        base / "disk",
        base / "part",
    )
    part.mkdir()
    single.touch()
    return file, single, part


def test_a_mount_of_a_part_of_an_overlay_counts(base: Path) -> None:
    """Of a directory of it, and of one file."""
    file, single, part = places_to_bind(base)
    with (
        overlay(base) as merged,
        mounted("--bind", str(merged), at=single),
        mounted("--bind", str(merged.parent), at=part),
    ):
        shown = {str(merged), str(single), str(part / "disk.img")}
        assert names(file) == shown
        for name in shown:
            assert str(file) in names(Path(name))


def test_what_covers_an_overlay_is_no_part_of_it(base: Path) -> None:
    file = disk_image(base / "upper" / DISK, 1, "layer")
    with overlay(base) as merged, mounted("-t", "tmpfs", "none", at=base / "merged"):
        merged.parent.mkdir()
        disk_image(merged, 1, "cover")
        assert names(merged) == names(file) == set()


def test_an_overlay_may_be_a_layer_of_another(base: Path) -> None:
    file = disk_image(base / "upper" / DISK, 1, "layer")
    with overlay(base) as merged:
        words = f"lowerdir={base}/merged:{base}/work"
        with mounted("-t", "overlay", "-o", words, "none", at=base / "other") as at:
            upper = at / DISK
            assert names(file) == {str(merged), str(upper)}
            assert names(merged) == {str(file), str(upper)}
            assert names(upper) == {str(merged), str(file)}


_CONTAINER = """
import ctypes, os, sys
base, kept, decoys = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    if getattr(libc, name)(*args):
        raise OSError(ctypes.get_errno(), name)
call("unshare", 0x20000)
call("mount", None, b"/", None, 0x4C000, None)  # MS_PRIVATE | MS_REC
options = f"upperdir={base}/upper,workdir={base}/work,lowerdir={base}/lower".encode()
root = f"{base}/merged".encode()
call("mount", b"none", root, b"overlay", 0, options)
if decoys == "decoys":
    for name in ("upper/images", "lower", "work"):
        os.makedirs(f"{base}/merged{base}/{name}")
os.makedirs(root + b"/empty")
os.chdir(root)
call("pivot_root", b".", b".")
call("umount2", b".", 2)  # MNT_DETACH
os.chdir("/")
left = os.fork() if kept == "fork" else 0
if left:  # the first process of the namespace sees another root
    os.chroot("/empty")
    os.waitpid(left, 0)
else:
    file = open("/images/disk.img", "r+b")
    os.write(1, f"{os.getpid()}\\n".encode())
    os.read(0, 1)
"""


@pytest.mark.parametrize("decoys", ["", "decoys"])
@pytest.mark.parametrize("kept", ["", "fork"])
def test_an_overlay_that_is_the_root_of_a_container_counts(
    base: Path, kept: str, decoys: str
) -> None:
    """Also where the container has directories with the names of the layers."""
    file = disk_image(base / "upper" / DISK, 1, "layer")
    command = [sys.executable, "-c", _CONTAINER, str(base), kept, decoys]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        (found,) = findings(file)
        assert f"process {pid} " in found.message
        process.communicate()
    assert findings(file) == []


class _CountingRoot(HostRoot):
    looks = 0

    def stat_or_none(self, path: str, *, follow_symlinks: bool = True) -> os.stat_result | None:
        self.looks += 1
        return super().stat_or_none(path, follow_symlinks=follow_symlinks)


def test_many_namespaces_with_many_layers_cost_few_looks(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A namespace costs a few looks for each overlay, whatever layers that has."""
    monkeypatch.setenv("LIBMOUNT_FORCE_MOUNT2", "always")  # fsconfig(2) takes 255 bytes at once
    file, looks = disk_image(base / "upper" / DISK, 1, "layer"), list[int]()
    layers = [base / f"layer{number}" for number in range(20)]
    for layer in layers:
        layer.mkdir()
    words = f"upperdir={base}/upper,workdir={base}/work,lowerdir={':'.join(map(str, layers))}"
    with mounted("-t", "overlay", "-o", words, "none", at=base / "merged") as merged:
        own = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
        for count in (0, 50):
            root, away = _CountingRoot("/"), own.replace(str(base), "/away")
            others = {f"/proc/{'./' * n}{os.getpid()}/mountinfo": away for n in range(count)}
            overlays = read_overlays({"/proc/self/mountinfo": own, **others}, root)
            assert find_other_names(str(file), overlays, root) == [str(merged / DISK)]
            looks.append(root.looks)
    assert looks[0] < 100
    assert looks[1] - looks[0] <= 50 * 2


@pytest.mark.parametrize(
    ("default", "said", "joined"),
    [
        ("Y", "", [True]),
        ("N", "", [False]),
        ("Y", "metacopy=off", [False]),
        ("N", "metacopy=on", [True]),
    ],
)
def test_a_mount_does_not_say_what_is_the_default_of_the_module(
    tmp_path: Path, default: str, said: str, joined: list[bool]
) -> None:
    parameters = tmp_path / "sys/module/overlay/parameters"
    parameters.mkdir(parents=True)
    (parameters / "metacopy").write_text(f"{default}\n")
    assert joins_layers(["rw", said], HostRoot(str(tmp_path))) in joined


def test_one_request_may_not_have_both_names(base: Path) -> None:
    """Of disks, of NVDIMMs and of one of each; readers may share them."""
    file = disk_image(base / "upper" / DISK, 2, "layer")
    with overlay(base) as merged:
        for asked in permutations((file, merged)):
            for kinds in product(("", "pmem"), repeat=2):
                for read_only in (False, True):
                    wanted = [
                        DeviceInfo(
                            container_path=f"/dev/{number}",
                            dev_type=DevType.BLOCK,
                            host_path=str(path),
                            read_only=read_only,
                            pmem=bool(kind),
                        )
                        for number, (path, kind) in enumerate(zip(asked, kinds, strict=True))
                    ]
                    *_, last = examine(wanted, THIS_HOST)
                    said = [one for one in last.findings if "this request" in one.message]
                    assert bool(said) is not read_only, (asked, kinds, last.findings)


@contextmanager
def namespace_with(base: Path, options: str) -> Iterator[None]:
    """A mount namespace that has an overlay at `other`, which this process does not see."""
    script = f'mount -t overlay -o "{options}" none {base}/other; echo ready; read line || true'
    command = ["unshare", "--mount", "sh", "-ec", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        yield
        process.communicate()


def test_a_layer_whose_server_has_stopped_keeps_nobody_waiting(base: Path) -> None:
    """Neither in an overlay of this process's own namespace nor in that of another."""
    file = disk_image(base / "upper" / DISK, 1, "layer")
    for name in ("served", "silent", "upper2/images", "work2", "merged2", "merged3"):
        (base / name).mkdir(parents=True)
    upper2 = disk_image(base / "upper2" / DISK, 1, "layer")
    layers = f"lowerdir={base}/lower:{base}/silent"
    own = f"upperdir={base}/upper,workdir={base}/work,{layers}"
    other = f"upperdir={base}/upper2,workdir={base}/work2,lowerdir={base}/lower"
    with (
        silent_files(base / "served", base / "silent") as files,
        mounted("-t", "overlay", "-o", own, "none", at=base / "merged"),
        mounted("-t", "overlay", "-o", other, "none", at=base / "merged2") as well,
        namespace_with(base, layers),
    ):
        files.stop()
        begin = time.monotonic()
        assert names(upper2) == {str(well / DISK)}
        names(file)
        assert time.monotonic() - begin < 30
        files.go_on()


def test_a_mount_of_a_part_of_a_layer_counts(base: Path) -> None:
    """Of a directory of it, and of one file: the overlay has what is asked for by that."""
    file, single, part = places_to_bind(base)
    with (
        overlay(base) as merged,
        mounted("--bind", str(file), at=single),
        mounted("--bind", str(file.parent), at=part),
    ):
        assert names(single) == names(part / "disk.img") == {str(merged)}
        with opened(merged) as pid:
            (found,) = findings(part / "disk.img")
            assert f"process {pid} " in found.message
