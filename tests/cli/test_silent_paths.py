"""A path whose storage does not answer: each verb says so, and does not wait for it."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.command import VMPLUG, Vmplug
from tests.cli.monitors import MemoryVm
from tests.support.disks import disk_image, loop_device, qcow2_header
from tests.support.silent_files import SilentFiles, silent_files

pytestmark = pytest.mark.root

PATIENCE_S = 120.0
"""Well above the deadline of a look, also on a busy host."""


@contextmanager
def files_in(directory: Path) -> Iterator[SilentFiles]:
    below, mounted = directory / "below", directory / "mounted"
    mounted.mkdir()
    (below / "dir").mkdir(parents=True)
    (below / "config.json").write_text('{"ociVersion": "1.0.2"}')
    disk_image(below / "a.img", 1, "silent")
    with silent_files(below, mounted) as files:
        yield files


@pytest.fixture
def files(tmp_path: Path) -> Iterator[SilentFiles]:
    with files_in(tmp_path) as files:
        yield files


def run(vmplug: Vmplug, files: SilentFiles, *words: str) -> tuple[str, str, int]:
    """A verb as a process, which is killed if it hangs."""
    return end(vmplug.begin(*words), files)


def end(process: "subprocess.Popen[bytes]", files: SilentFiles) -> tuple[str, str, int]:
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        files.go_on()
        process.communicate()
        pytest.fail(f"{process.args!r} hangs")
    return out.decode(), err.decode(), process.returncode


ASKED = {
    "file": ("resolve", "--device", "file:PATH/a.img"),
    "check": ("check", "--device", "file:PATH/a.img"),
    "directory": ("check", "--device", "share:PATH/dir:work"),
    "node": ("check", "--device", "PATH/node"),
    "bundle": ("resolve", "PATH"),
    "thing": ("host", "PATH/a.img"),
    "specs": ("cdi", "list", "--spec-dir", "PATH/dir"),
    "spec": ("cdi", "validate", "PATH/a.json"),
    "config": ("cdi", "inject", "PATH", "a/b=c"),
    "directory of specs": ("cdi", "write", "--directory", "PATH/dir"),
    "socket": ("vm", "adopt", "sb1", "--qmp", "PATH/qmp.sock"),
    "sandbox": ("import-kata", "PATH/dir", "--vm", "sb1", "--qmp", "/run/qmp.sock"),
    "socket of a sandbox": ("import-kata", "/run/vc", "--vm", "sb1", "--qmp", "PATH/qmp.sock"),
    "new record": ("record", "PATH/host.tar"),
    "record": ("host", "--root", "PATH/a.img"),
    "state directory": ("list", "--state-dir", "PATH/dir"),
    "store": ("resolve", "--vhost-user-store", "PATH/dir", "--device", "/dev/null"),
    "policy": ("check", "--policy", "PATH/policy.toml", "--device", "/dev/null"),
    "lease": ("lease", "--describe", "PATH/lease", "--device", "/dev/null", "--", "true"),
}


Begun = dict[str, "subprocess.Popen[bytes]"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SilentFiles, Begun]]:
    """All of them at once, as each waits for seconds."""
    directory, begun = tmp_path_factory.mktemp("asked"), Begun()
    with files_in(directory) as files:
        files.stop()
        try:
            for name, words in ASKED.items():
                said = [word.replace("PATH", str(files.mounted)) for word in words]
                begun[name] = Vmplug(directory / f"state of {name}").begin(*said)
            yield files, begun
        finally:
            for process in begun.values():
                process.kill()
            files.go_on()
            for process in begun.values():
                process.communicate()


@pytest.mark.parametrize("name", ASKED)
def test_a_verb_says_that_the_storage_does_not_answer(
    asked: tuple[SilentFiles, Begun], name: str
) -> None:
    files, begun = asked
    out, err, status = end(begun[name], files)
    assert "its storage does not answer" in out + err
    assert status == 4


DEFAULTS = {
    "state directory": ("/run/vmplug", ("list",)),
    "policy": ("/etc/vmplug", ("check", "--device", "/dev/null")),
}


@pytest.mark.parametrize(("place", "words"), DEFAULTS.values(), ids=DEFAULTS)
def test_a_verb_says_that_its_usual_directory_does_not_answer(
    files: SilentFiles, place: str, words: tuple[str, ...]
) -> None:
    script = (
        'mount -t tmpfs none "${1%/*}"; mkdir "$1"; mount --bind "$2" "$1"; echo; read line;'
        'shift 2; exec "$@"'
    )
    command = ["unshare", "--mount", "sh", "-ec", script, "sh", place, str(files.mounted)]
    process = subprocess.Popen(
        [*command, str(VMPLUG), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={key: value for key, value in os.environ.items() if not key.startswith("VMPLUG")},
    )
    assert process.stdout
    assert process.stdout.readline()
    files.stop()
    try:
        said, _ = process.communicate(b"go\n", timeout=PATIENCE_S)
    finally:
        process.kill()
    assert f"cannot read {place}" in said.decode()
    assert "its storage does not answer" in said.decode()
    assert process.returncode == 4


def test_a_vm_is_named_whose_socket_does_not_answer(
    vmplug: Vmplug, files: SilentFiles, tmp_path: Path
) -> None:
    real, below = tmp_path / "real", files.mounted / "dir"
    real.mkdir()
    subprocess.run(["mount", "--bind", real, below], check=True)
    try:
        image = disk_image(tmp_path / "b.img", 1, "here")
        with MemoryVm(real / "qmp.sock"):
            vmplug("vm", "adopt", "sb1", "--qmp", below / "qmp.sock").answer()
            device = ("--owner", "c", "--device", f"file:{image}")
            vmplug("attach", "--vm", "sb1", *device).answer()
            files.stop()
            listing, reconciling = vmplug.begin("list", "--json"), vmplug.begin("reconcile")
            out, err, status = run(vmplug, files, "vm", "list", "--json")
            (vm,) = json.loads(out)["vms"]
            assert (vm["state"], vm["attachments"], err, status) == ("unreachable", 1, "", 0)
            out, err, status = end(listing, files)
            assert (len(json.loads(out)["attachments"]), err, status) == (1, "", 0)
            out, err, status = end(reconciling, files)
            assert (out, status) == ("", 5)
            assert "its storage does not answer\nhint: bring its server" in err
            files.go_on()
            vmplug("detach", "--owner", "c").answer()
    finally:
        files.go_on()
        subprocess.run(["umount", "--lazy", below], check=True)


@pytest.mark.parametrize("at", ["directory", "node"])
def test_a_cdi_name_is_not_waited_for(
    vmplug: Vmplug, files: SilentFiles, tmp_path: Path, at: str
) -> None:
    policy, specs = tmp_path / "policy.toml", tmp_path / "cdi"
    specs.mkdir(mode=0o755)
    node = {"path": "/dev/x", "hostPath": f"{files.mounted}/node"}
    devices = [{"name": "a", "containerEdits": {"deviceNodes": [node]}}]
    spec = {"cdiVersion": "0.5.0", "kind": "vendor.com/disk", "devices": devices}
    (specs / "a.json").write_text(json.dumps(spec))
    directory = files.mounted / "dir" if at == "directory" else specs
    policy.write_text(f'[cdi]\ndirectories = ["{directory}"]\n')
    files.stop()
    words = ("resolve", "--device", "vendor.com/disk=a", "--policy", str(policy))
    out, err, status = run(vmplug, files, *words)
    assert (out, status) == ("", 4)
    assert "its storage does not answer" in err


def test_an_image_is_not_waited_for_whose_backing_file_does_not_answer(
    vmplug: Vmplug, files: SilentFiles, tmp_path: Path
) -> None:
    top = tmp_path / "top.qcow2"
    top.write_bytes(qcow2_header(backing=bytes(files.mounted / "a.img")).ljust(1 << 20, b"\0"))
    files.stop()
    words = ("check", "--device", f"file:{top}", "-o", "format=qcow2")
    out, err, status = run(vmplug, files, *words)
    assert "its storage does not answer" in out + err
    assert status


def test_another_disk_is_checked_while_a_loop_device_does_not_answer(
    vmplug: Vmplug, files: SilentFiles, tmp_path: Path
) -> None:
    other = disk_image(tmp_path / "b.img", 1, "here")
    with loop_device(files.mounted / "a.img"):
        files.stop()
        begun = time.monotonic()
        out, err, status = run(vmplug, files, "check", "--json", "--device", f"file:{other}")
        assert (json.loads(out)["problems"], err, status) == ([], "", 0)
        assert time.monotonic() - begun < PATIENCE_S
        files.go_on()
