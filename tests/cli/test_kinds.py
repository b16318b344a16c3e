"""Every kind of device under every verb: the shapes of answers, and what is refused how."""

import json
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from tests.cli.command import Result, Vmplug, config, device
from tests.cli.started import StartedVm, booted, ending, sharers_of, started
from tests.contract.world import journal_rows
from tests.support.daemons import storage_daemon, vhost_user_backend, virtiofsd
from tests.support.disks import disk_image

pytestmark = [pytest.mark.root, pytest.mark.qemu]

MAC = "52:54:00:0a:0b:10"
BLK, SCSI = "241:1", "242:2"
PFN_OFFSET_BYTES = 4096
PFN_SIGNATURE = b"NVDIMM_PFN_INFO\0"

ATTACHMENT_KEYS = {
    *("id", "vm", "owner", "name", "container_path", "host_path", "kind"),
    *("read_only", "count", "state", "guest"),
}
GUEST_KEYS = {
    *("pci_path", "scsi_address", "ccw_devno", "virt_path"),
    *("nvdimm_id", "mount_tag", "mac_address", "agent"),
}
AGENT_KEYS = {"type", "vm_path", "id", "options"}
"""Version 1 has these; there may be more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A request, and what each verb answers; `{}` is the directory of the world.

    `guest` are parts of the guest's address, and `agent` what the agent is told, None for nothing.
    `steps` are commands with those that take them back.
    """

    words: str
    name: str
    kind: str
    host_path: str
    steps: tuple[tuple[str, str | None], ...]
    guest: Mapping[str, str]
    agent: Mapping[str, object] | None
    read_only: bool = False
    is_retained: bool = False

    @property
    def container_path(self) -> str | None:
        """Only a path is one."""
        return self.name if self.name.startswith("/") else None


CHARDEV = ("chardev-add", "chardev-remove")
DEVICE = ("device_add", "device_del")
OBJECT = ("object-add", "object-del")
FS_AGENT = {"type": "virtio-fs", "id": "work", "vm_path": "", "fstype": "virtiofs"}

KINDS = {
    "net": Kind(
        words=f"--device net:{{}}/eth0.sock -o mac={MAC}",
        name="net:eth0",
        kind="virtio-net-pci",
        host_path="{}/eth0.sock",
        steps=(CHARDEV, ("netdev_add", "netdev_del"), DEVICE),
        guest={"pci_path": "04/00", "mac_address": MAC},
        agent=None,
    ),
    "share": Kind(
        words="--device share:{}/work:work -o cache=never -o queue-size=64",
        name="share:work",
        kind="vhost-user-fs-pci",
        host_path="{}/work",
        steps=(("start-daemon", "end-daemon"), ("getfd", "closefd"), CHARDEV, DEVICE),
        guest={"pci_path": "04/00", "mount_tag": "work"},
        agent={**FS_AGENT, "options": []},
    ),
    "read-only share": Kind(
        words="--device share:{}/work:work --read-only",
        name="share:work",
        kind="vhost-user-fs-pci",
        host_path="{}/work",
        steps=(("start-daemon", "end-daemon"), ("getfd", "closefd"), CHARDEV, DEVICE),
        guest={"pci_path": "04/00", "mount_tag": "work"},
        agent={**FS_AGENT, "options": ["ro"]},
        read_only=True,
    ),
    "rng": Kind(
        words="--device rng:/dev/random -o max-bytes=4K -o period=100",
        name="rng:rng0",
        kind="virtio-rng-pci",
        host_path="/dev/random",
        steps=(OBJECT, DEVICE),
        guest={"pci_path": "04/00"},
        agent=None,
        read_only=True,
    ),
    "vhost-user-blk": Kind(
        words=f"--device b:{BLK}:/dev/xvda --vhost-user-store {{}}/store -o fstype=ext4",
        name="/dev/xvda",
        kind="vhost-user-blk-pci",
        host_path="{}/store/block/sockets/blk",
        steps=(CHARDEV, DEVICE),
        guest={"pci_path": "04/00"},
        agent={"type": "blk", "id": "04/00", "vm_path": "", "fstype": "ext4", "options": []},
    ),
    "vhost-user-scsi": Kind(
        words=f"--device b:{SCSI} --vhost-user-store {{}}/store -o num-queues=1",
        name=f"/dev/block/{SCSI}",
        kind="vhost-user-scsi-pci",
        host_path="{}/store/block/sockets/scsi",
        steps=(CHARDEV, DEVICE),
        guest={"pci_path": "04/00"},
        agent=None,
    ),
    "nvdimm": Kind(
        words="--device nvdimm:{}/memory.img:/dev/pmem0 -o fstype=ext4 --read-only",
        name="/dev/pmem0",
        kind="block",
        host_path="{}/memory.img",
        steps=(("getfd", "closefd"), OBJECT, ("device_add", None)),
        guest={"nvdimm_id": "0"},
        agent={
            "type": "nvdimm",
            "id": "",
            "vm_path": "/dev/pmem0",
            "fstype": "ext4",
            "options": ["dax", "ro"],
        },
        read_only=True,
        is_retained=True,
    ),
}
NAMES = list(KINDS)
GUEST_TEXTS = {
    "net": f"PCI 04/00 {MAC}",
    "share": "PCI 04/00 tag work",
    "read-only share": "PCI 04/00 tag work",
    "rng": "PCI 04/00",
    "vhost-user-blk": "PCI 04/00",
    "vhost-user-scsi": "PCI 04/00",
    "nvdimm": "/dev/pmem0",
}


@dataclass(frozen=True, slots=True)
class World:
    """The other ends of all kinds, below one directory."""

    directory: Path

    def words(self, text: str) -> list[str]:
        """Words of a command line."""
        return [word.replace("{}", str(self.directory)) for word in text.split()]

    def path(self, text: str) -> str:
        """A path below the directory, or any other."""
        return text.replace("{}", str(self.directory))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="vmplug-", dir="/tmp"))
        )
        (directory / "work").mkdir()
        (directory / "empty").mkdir()
        (directory / "plain").touch()
        memory = disk_image(directory / "memory.img", 2, "memory")
        with memory.open("r+b") as file:
            file.seek(PFN_OFFSET_BYTES)
            file.write(PFN_SIGNATURE)
        disk = disk_image(directory / "disk.img", 1, "disk")
        store = directory / "store" / "block"
        for name in ("devices", "sockets"):
            (store / name).mkdir(parents=True)
        for name, number in (("blk", BLK), ("scsi", SCSI)):
            major, minor = map(int, number.split(":"))
            os.mknod(store / "devices" / name, 0o60600, os.makedev(major, minor))
        stack.enter_context(storage_daemon(disk, socket_path=store / "sockets/blk"))
        stack.enter_context(vhost_user_backend("scsi", disk, socket_path=store / "sockets/scsi"))
        stack.enter_context(vhost_user_backend("net", socket_path=directory / "eth0.sock"))
        with socket.socket(socket.AF_UNIX) as nobody:
            nobody.bind(str(directory / "nobody.sock"))
        yield World(directory)


@pytest.fixture(scope="module")
def vm(world: World) -> Iterator[StartedVm]:
    """A q35 with a guest, for everything to be plugged into in turn."""
    with (
        tempfile.TemporaryDirectory(prefix="vmplug-", dir="/tmp") as directory,
        started(Vmplug(Path(directory) / "state"), "sb1", "--ports", "2", flavour="cloud") as made,
        booted(made) as console,
    ):
        console.run("true")
        yield made


def both(vmplug: Vmplug, *words: str, stdin: str = "") -> tuple[Result, Result]:
    """What a verb says as text and as JSON, after a look at what these have in common."""
    text, told = (vmplug(*words, *more, stdin=stdin) for more in ((), ("--json",)))
    assert "Traceback" not in text.stdout + text.stderr
    assert text.status == told.status
    return text, told


# read


@pytest.mark.parametrize("name", NAMES)
def test_info_tells_the_request(vmplug: Vmplug, world: World, name: str) -> None:
    kind = KINDS[name]
    text, answer = both(vmplug, "info", *world.words(kind.words))
    (told,) = answer.json()["devices"]
    assert (told["name"], told["container_path"]) == (kind.name, kind.container_path)
    assert told["read_only"] is kind.read_only
    if kind.container_path is None:
        assert told["host_path"] == world.path(kind.host_path)
        assert (told["device_type"], told["major"], told["minor"]) == (None, None, None)
    words = world.words(kind.words)
    said = [word for option, word in pairwise(words) if option == "-o"]
    assert told["options"] == dict(word.split("=") for word in said)
    _, line = text.answer().splitlines()
    assert line.startswith(f"{kind.name} ")
    assert f" {'ro' if kind.read_only else 'rw'} " in line


def test_a_store_named_from_here_is_found_by_a_qemu_that_works_elsewhere(
    vmplug: Vmplug, world: World
) -> None:
    store = os.path.relpath(world.path("{}/store"))
    told = vmplug("resolve", "--device", f"b:{BLK}", "--vhost-user-store", store, "--json").json()
    assert told["devices"][0]["host_path"].startswith(world.path("{}/store/block/sockets/"))


@pytest.mark.parametrize("name", NAMES)
def test_resolve_tells_the_device(vmplug: Vmplug, world: World, name: str) -> None:
    kind = KINDS[name]
    text, answer = both(vmplug, "resolve", *world.words(kind.words))
    (told,) = answer.json()["devices"]
    assert (told["name"], told["container_path"]) == (kind.name, kind.container_path)
    assert (told["kind"], told["host_path"]) == (kind.kind, world.path(kind.host_path))
    assert told["found_by"] in {"file", "backing-file", "vhost-user-store"}
    _, line = text.answer().splitlines()
    shown = "virtio-fs" if kind.kind == "vhost-user-fs-pci" else kind.kind
    assert line.split()[:3] == [kind.name, world.path(kind.host_path), shown]


@pytest.mark.parametrize("name", NAMES)
def test_check_finds_nothing_against_it(vmplug: Vmplug, world: World, name: str) -> None:
    kind = KINDS[name]
    text, told = both(vmplug, "check", *world.words(kind.words))
    assert (told.status, told.json()) == (0, {"ok": True, "problems": []})
    assert text.answer() == f"{kind.name}: ok, {world.path(kind.host_path)} may be handed over\n"
    assert not vmplug.state_dir.exists()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_is_told_under_its_name(vmplug: Vmplug, world: World, name: str) -> None:
    kind = KINDS[name]
    elsewhere = [
        word.replace(str(world.directory), str(world.directory / "none")).replace(
            "/dev/random", "/dev/none"
        )
        for word in world.words(kind.words)
    ]
    text, told = both(vmplug, "resolve", *elsewhere)
    assert told.status == 4
    (missing,) = told.json()["devices"]
    assert (missing["name"], missing["container_path"]) == (kind.name, kind.container_path)
    assert missing["error"]["code"] == "no-such-device"
    message, hint = missing["error"]["message"], missing["error"]["hint"]
    assert text.stderr == f"vmplug: {message}\nhint: {hint}\n"
    checked = vmplug("check", *elsewhere, "--json")
    assert checked.status == 4
    (problem,) = checked.json()["problems"]
    assert (problem["name"], problem["container_path"]) == (kind.name, kind.container_path)
    assert (problem["code"], problem["severity"]) == ("no-such-device", "error")
    assert (problem["message"], problem["hint"]) == (message, hint)


# plan, attach, list, detach


@contextmanager
def as_it_was(vm: StartedVm) -> Iterator[None]:
    """What is done in the `with` leaves the VM and the journal as they were."""
    before = vm.names(), journal_rows(vm.vmplug.state_dir)
    yield
    assert (vm.names(), journal_rows(vm.vmplug.state_dir)) == before


@pytest.mark.parametrize("name", NAMES)
def test_plan_tells_each_step_and_its_undo(vm: StartedVm, world: World, name: str) -> None:
    kind = KINDS[name]
    asked = ("plan", *world.words(kind.words), "--vm", "sb1")
    with as_it_was(vm):
        document = vm.vmplug(*asked, "--json").json()
        text = vm.vmplug(*asked).answer()
        commands = vm.vmplug(*asked, "-v").stdout
        assert sharers_of(world.directory) == set()
    assert document.keys() == {"vm", "steps"}
    steps = tuple(
        (step["do"]["execute"], step["undo"] and step["undo"]["execute"])
        for step in document["steps"]
    )
    assert steps == kind.steps
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[::2]] == [str(n) for n in range(1, len(steps) + 1)]
    assert all(line.startswith("    undo: ") for line in lines[1::2])
    undone = [line.partition("undo: ")[2] for line in lines[1::2]]
    assert [words.startswith("none, ") for words in undone] == [not undo for _, undo in steps]
    assert not any("{" in line or "for it" in line for line in lines)
    told = [line.split()[0] for line in commands.splitlines() if line.startswith(" " * 8)]
    assert told == [execute for step in steps for execute in step if execute]


@pytest.mark.parametrize("name", NAMES)  # the NVDIMM comes last: it stays
def test_attach_list_and_detach(vm: StartedVm, world: World, name: str) -> None:
    kind, vmplug = KINDS[name], vm.vmplug
    names = vm.names()
    words = world.words(kind.words)
    hold = vm.attached(*words)
    assert hold.keys() >= ATTACHMENT_KEYS
    assert {
        "vm": "sb1",
        "owner": "ctr1",
        "name": kind.name,
        "container_path": kind.container_path,
        "host_path": world.path(kind.host_path),
        "kind": kind.kind,
        "read_only": kind.read_only,
        "count": 1,
        "state": "attached",
    }.items() <= hold.items()
    assert hold["guest"].keys() >= GUEST_KEYS
    known = {k: v for k, v in hold["guest"].items() if k in GUEST_KEYS - {"agent"} and v}
    assert known == kind.guest
    assert hold["guest"]["agent"] == kind.agent
    assert kind.agent is None or kind.agent.keys() >= AGENT_KEYS
    assert len(vm.vmplugs_devices()) == 1

    present = {"host": {"state": "present", "detail": None}}
    listed = {"attachments": [hold | present], "ended_vms": [], "stopped_vms": {}}
    assert vmplug("list", "--json").json() == listed
    heading, line = vmplug("list").answer().splitlines()
    assert heading.split()[:3] == ["VM", "ATTACHMENT", "OWNER"]
    assert line.split()[:5] == ["sb1", hold["id"], "ctr1", kind.name, hold["host_path"]]
    assert line.split("  ")[-1] == "present"
    assert f"  {GUEST_TEXTS[name]}  " in line
    assert vmplug("reconcile", "--json").json() == {"repairs": [], "bindings": [], "errors": []}

    again = vm.attached(*words)
    assert (again["id"], again["count"]) == (hold["id"], 2)
    assert len(vm.vmplugs_devices()) == 1
    (still,) = vmplug("detach", hold["id"], "--json").json()["detached"]
    assert (still["still_held"], still["retained"]) == (True, False)

    with ending(sharers_of(world.directory)):
        text = vmplug("detach", hold["id"]).answer()
    verb = "released" if kind.is_retained else "detached"
    assert text.startswith(f"{verb} {hold['id']}  {hold['host_path']}  ")
    if kind.is_retained:
        assert vm.states() == {kind.name: "retained"}
        return
    assert vmplug("list").answer() == "nothing is attached\n"
    assert vm.names() == names


def test_everything_of_an_owner_goes_at_once(vm: StartedVm, world: World) -> None:
    """And the last word of attach is a table for people."""
    asked = world.words("--device rng --device share:{}/work:work")
    lines = vm.vmplug("attach", *asked, "--vm", "sb1", "--owner", "ctr2").answer().splitlines()
    assert lines[0].split()[:2] == ["ATTACHMENT", "OWNER"]
    assert [line.split()[2] for line in lines[1:]] == ["rng:rng0", "share:work"]
    with ending(sharers_of(world.directory)):
        detached = vm.vmplug("detach", "--owner", "ctr2", "--json").json()["detached"]
    assert [hold["name"] for hold in detached] == ["rng:rng0", "share:work"]
    assert all(hold.keys() >= ATTACHMENT_KEYS for hold in detached)


def test_a_socket_of_a_virtiofsd_is_a_share_too(vm: StartedVm, world: World) -> None:
    names = vm.names()
    path = world.directory / "fs.sock"
    with virtiofsd(world.directory / "work", socket_path=path) as daemon:
        asked = ("--device", f"share:{path}:theirs")
        assert vm.vmplug("check", *asked).status == 0
        hold = vm.attached(*asked)
        assert (hold["kind"], hold["host_path"]) == ("vhost-user-fs-pci", str(path))
        assert hold["guest"]["mount_tag"] == "theirs"
        assert daemon.is_running
        assert vm.vmplug("detach", hold["id"]).status == 0
        assert daemon.wait_ended() == 0
    assert vm.names() == names


# refused


@dataclass(frozen=True, slots=True)
class Sentence:
    """An error: its one sentence, and its hint or None."""

    message: str
    hint: str | None


def refused(vmplug: Vmplug, *words: str, status: int, stdin: str = "") -> Sentence:
    """The same sentence and hint as text and as JSON, and no traceback in either."""
    text, told = both(vmplug, *words, stdin=stdin)
    assert (text.status, text.stdout) == (status, ""), text
    first, *hints = text.stderr.splitlines()
    assert first.startswith("vmplug: ")
    assert len(hints) <= 1, text
    assert all(hint.startswith("hint: ") for hint in hints)
    assert "a bug of vmplug" not in text.stderr
    error = told.error()
    hint = hints[0].removeprefix("hint: ") if hints else None
    assert (error["message"], error["hint"]) == (first.removeprefix("vmplug: "), hint)
    assert vmplug.state_dir.exists() is False
    return Sentence(error["message"], hint)


LONG_TAG = "ä" * 18 + "b"
"""37 bytes, and fewer letters."""


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ("--device net:", "is not complete", "write net:/run/vpp/eth0.sock"),
        ("--device net", "is not complete", "write net:/run/vpp/eth0.sock"),
        ("--device net:/run/", "is not complete", "write net:/run/vpp/eth0.sock"),
        ("--device share:", "is not complete", "write share:/srv/work:work"),
        ("--device share:/x", "is not complete", "write share:/srv/work:work"),
        ("--device share::t", "is not complete", "write share:/srv/work:work"),
        ("--device share:/x:", "is not complete", "write share:/srv/work:work"),
        ("--device share:/x:a/b", "share 'a/b': a name must be printable", None),
        (f"--device share:/x:{LONG_TAG}", "a mount tag has at most 36 bytes", None),
        (
            "--device fd:99:t",
            "'fd' is not b, c, file, nvdimm, vfio, net, share, rng",
            "write /dev/sdb, b:8:16",
        ),
        ("--device share:fd:x:t", "share:t: 'fd:x' is not an absolute path", None),
        ("--device share:fd:-1:t", "share:t: 'fd:-1' is not an absolute path", None),
        (f"--device share:fd:{'9' * 20}:t", "is not an absolute path", None),
        ("--device rng --device rng:/dev/random", "rng:rng0: is asked for twice: .*random", None),
        ("--device net:/a/x.sock --device net:/b/x.sock", "net:x: is asked for twice", None),
        ("--device share:/a:t --device share:/b:t", "share:t: is asked for twice", None),
        (
            "--device b:8:0:/x:ro --device b:8:0:/x",
            "/x: is asked for twice: block device 8:0, read-only and block device 8:0$",
            None,
        ),
        (
            "--device nvdimm:/a:/x --device file:/a:/x",
            "/x: is asked for twice: NVDIMM /a and file /a$",
            None,
        ),
        ("--device rng -o period", "--option period: write it as KEY=VALUE", None),
    ],
)
def test_a_request_that_makes_no_sense(
    vmplug: Vmplug, words: str, message: str, hint: str | None
) -> None:
    """The host is not asked."""
    told = refused(vmplug, "info", *words.split(), status=3)
    assert re.search(message, told.message)
    assert (told.hint or "").startswith(hint or "")
    assert bool(told.hint) == bool(hint)


@pytest.mark.parametrize("verb", ["resolve", "check", "plan", "attach"])
def test_every_verb_that_takes_a_request_says_the_same_of_it(vmplug: Vmplug, verb: str) -> None:
    more = {"plan": ("--vm", "x"), "attach": ("--vm", "x", "--owner", "o")}.get(verb, ())
    told = refused(vmplug, verb, "--device", "share:/x", *more, status=3)
    assert told == refused(vmplug, "info", "--device", "share:/x", status=3)


NET = "--device net:{}/eth0.sock"
SHARE = "--device share:{}/work:t"
VIRTIO_9P = f"{SHARE} -o filesystem=virtio-9p"
DISK = f"--vhost-user-store {{}}/store --device b:{BLK}"


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (f"{NET} -o mac=01:00:5e:00:00:01", "option mac: .*multicast address", "mac: "),
        (f"{NET} -o mac=00:00:00:00:00:00", "option mac: .*or zero", "mac: "),
        (f"{NET} -o mac=52:54:00", "option mac: '52:54:00' is not a MAC address", "mac: "),
        (f"{NET} -o mac=52-54-00-00-00-01", "option mac: .* is not a MAC address", "mac: "),
        (f"{NET} -o queues=0", "option queues: '0' is not a number from 1 to 256", "queues: "),
        (
            f"{NET} -o cache=none",
            "option cache: unknown for a virtio-net-pci",
            "known options: mac",
        ),
        (
            f"{SHARE} -o queue-size=3",
            "option queue-size: '3' is not a power of two",
            "queue-size: ",
        ),
        (f"{SHARE} -o queue-size=2048", "a power of two from 1 to 1024", "queue-size: "),
        (f"{SHARE} -o queue-size=0", "a power of two from 1 to 1024", "queue-size: "),
        (f"{SHARE} -o cache=writeback", "'writeback' is not one of none, never, auto", "cache: "),
        (
            f"{SHARE} -o mac={MAC}",
            "option mac: unknown for a share",
            "known options: file",
        ),
        (f"{VIRTIO_9P} -o cache=auto", "virtio-9p has no cache", "leave them out"),
        ("--device share:{}/eth0.sock:t -o cache=auto", "belongs to the virtiofsd", "start that"),
        ("--device share:{}/eth0.sock:t -o filesystem=virtio-9p", "not a socket", None),
        (
            "--device share:fd:99:t",
            "share:t: descriptor 99 is not an open socket: found nothing",
            None,
        ),
        (
            "--device rng -o max-bytes=0",
            "option max-bytes: '0' is not a number from 1",
            "max-bytes: ",
        ),
        ("--device rng -o period=5", "option period: has no effect without max-bytes", None),
        (
            "--device rng -o queues=1",
            "option queues: unknown for a random",
            "known options: max-bytes",
        ),
        (
            f"{DISK} -o num-queues=0",
            "option num-queues: '0' is not a number from 1",
            "num-queues: ",
        ),
        (
            f"{DISK} -o cache=none",
            "option cache: unknown for a vhost-user-blk-pci",
            "known options: num",
        ),
        (
            f"{DISK} -o reconnect=-1",
            "option reconnect: '-1' is not a number from 0",
            "reconnect: ",
        ),
        (
            "--device file:{}/memory.img -o cache=none -o block-driver=nvdimm",
            "option cache: does not apply to an NVDIMM",
            "leave it out, or set block-driver=virtio-blk",
        ),
    ],
)
def test_an_option_that_makes_no_sense(
    vmplug: Vmplug, world: World, words: str, message: str, hint: str | None
) -> None:
    told = refused(vmplug, "check", *world.words(words), status=3)
    assert re.search(message, told.message)
    assert (told.hint or "").startswith(hint or "")
    assert bool(told.hint) == bool(hint)


def test_a_file_is_no_share_by_descriptor(vmplug: Vmplug, world: World) -> None:
    with open(world.path("{}/plain")) as file:
        words = ["--device", f"share:fd:{file.fileno()}:t"]
        told = refused(vmplug, "check", *words, status=3)
        found = f"descriptor {file.fileno()} is not an open socket: found a regular file"
    assert found in told.message
    assert told.hint is None


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            "--device rng:/etc",
            "no-such-device",
            "/etc is not a source of random numbers: found a directory",
        ),
        ("--device rng:{}/plain", "no-such-device", "found a regular file"),
        ("--device net:{}/work", "no-such-device", "is not the socket .*: found a directory"),
        ("--device net:{}/plain", "no-such-device", "is not the socket .*: found a regular file"),
        ("--device share:{}/plain:t", "no-such-device", "cannot be shared: found a regular file"),
        ("--device net:{}/nobody.sock", "no-backend", "no process listens on it"),
        ("--device share:{}/nobody.sock:t", "no-backend", "nobody|no process listens"),
        (f"{NET} --read-only", None, ""),
        ("--device b:242:1 --vhost-user-store {}/store", "no-such-device", "no block device node"),
        (f"{DISK} --read-only", "cannot-be-read-only", "is requested read-only"),
        (
            f"{DISK} -o num-queues=200",
            "too-many-queues",
            "serves 1 queues; the request is for 200",
        ),
        (
            "--device share:{}/eth0.sock:t --read-only",
            "cannot-be-read-only",
            "is requested read-only",
        ),
    ],
)
def test_what_cannot_be_had(
    vmplug: Vmplug, world: World, words: str, code: str | None, message: str
) -> None:
    """A finding with its remedy, and attach's refusal would be the same."""
    text, told = both(vmplug, "check", *world.words(words))
    problems = told.json()["problems"]
    if code is None:  # what can only be read and written is not asked for less
        assert (told.status, problems) == (0, [])
        return
    assert told.status == 4
    problem = next(problem for problem in problems if problem["code"] == code)
    assert re.search(message, problem["message"])
    assert problem["hint"]
    assert f" error {code}: {problem['message']}\n" in text.stdout


SHARED = "org.vmplug.share.t"


@pytest.mark.parametrize(
    ("key", "value", "message", "hint"),
    [
        (
            "org.vmplug.disk.x",
            "{}",
            "'disk' is not a kind of annotation",
            "org.vmplug. must be followed",
        ),
        ("org.vmplug.", "{}", "'' is not a kind of annotation", "org.vmplug. must be followed"),
        ("org.vmplug.net", '{"socket": "/x"}', "net '': a name must be printable text", None),
        (
            "org.vmplug.net.a/b",
            '{"socket": "/x"}',
            "net 'a/b': a name must be printable text",
            None,
        ),
        (SHARED, "not JSON", "'not JSON': JSON is malformed", "the value is one JSON object"),
        (SHARED, "", "'': Input data was truncated", "the value is one JSON object"),
        (SHARED, "[]", "Expected `object`, got `array`", "the value is one JSON object"),
        (SHARED, '{"source": null}', "got `null`", "the value is one JSON object"),
        (SHARED, '{"source": "/x", "cache": 1.5}', "got `float`", "the value is one JSON object"),
        (SHARED, "{}", "the member 'source' is missing", None),
        (SHARED, '{"source": 5}', "the member 'source' is 5, expected an absolute path", None),
        (SHARED, '{"source": "x"}', "'source' is 'x', expected an absolute path", None),
        (SHARED, '{"source": "fd:3"}', "'source' is 'fd:3', expected an absolute path", None),
        (SHARED, '{"source": "/x\\u0000"}', r"'/x\\x00' is not an absolute path", None),
        (
            SHARED,
            '{"source": "/x", "read-only": "yes"}',
            "'read-only' is 'yes', expected tr",
            None,
        ),
        ("org.vmplug.net.e", "{}", "the member 'socket' is missing", None),
        ("org.vmplug.net.e", '{"socket": "run/e"}', "'socket' is 'run/e', expected an", None),
        ("org.vmplug.rng.r", '{"source": "urandom"}', "'source' is 'urandom', expected", None),
        (f"org.vmplug.share.{LONG_TAG}", '{"source": "/x"}', "at most 36 bytes", None),
        (
            "org.vmplug.options./dev/no",
            "{}",
            "does not request a device at /dev/no",
            "name the path of",
        ),
        ("org.vmplug.options.x", "{}", "'x' is not an absolute path of a device", None),
        ("org.vmplug.options./dev/../x", "{}", "contains '..'", "give the device's path"),
        ("org.vmplug.options./dev/xvda", '{"a": []}', "got `array`", "the value is one JSON"),
    ],
)
def test_an_annotation_that_makes_no_sense(
    vmplug: Vmplug, key: str, value: str, message: str, hint: str | None
) -> None:
    asked = json.loads(config(device("/dev/xvda", "7:0")))
    bundle = json.dumps({**asked, "annotations": {key: value}})
    told = refused(vmplug, "info", "-", status=3, stdin=bundle)
    assert re.search(message, told.message)
    assert (told.hint or "").startswith(hint or "")
    assert bool(told.hint) == bool(hint)


def test_an_annotation_and_the_command_line_may_ask_for_the_same_thing(vmplug: Vmplug) -> None:
    bundle = json.dumps({"ociVersion": "1", "annotations": {"org.vmplug.rng.rng0": "{}"}})
    told = vmplug("info", "-", "--device", "rng", "--json", stdin=bundle).json()
    assert [info["name"] for info in told["devices"]] == ["rng:rng0"] * 2
    other = refused(vmplug, "info", "-", "--device", "rng:/dev/random", status=3, stdin=bundle)
    assert "rng:rng0: is asked for twice" in other.message


def test_katas_words_for_all_shares_are_their_defaults(vmplug: Vmplug) -> None:
    katas = "io.katacontainers.config.hypervisor."
    annotations = {
        f"{katas}virtio_fs_cache": "always",
        f"{katas}virtio_fs_queue_size": "512",
        f"{katas}entropy_source": "/dev/random",
        "org.vmplug.share.a": '{"source": "/a"}',
        "org.vmplug.share.b": '{"source": "/b", "cache": "auto"}',
        "org.vmplug.rng.r": "{}",
    }
    bundle = json.dumps({"ociVersion": "1", "annotations": annotations})
    a, b, rng = vmplug("info", "-", "--json", stdin=bundle).json()["devices"]
    assert a["options"] == {"cache": "always", "queue-size": "512"}
    assert b["options"] == {"cache": "auto", "queue-size": "512"}
    assert rng["host_path"] == "/dev/random"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (SHARE, "--device share:{}/empty:t", "share with the tag t: .*/work"),
        (SHARE, f"{SHARE} -o cache=always", "is plugged with other options"),
        (f"{SHARE} --read-only", SHARE, "is plugged read-only, and the request is for writing"),
        ("--device rng -o max-bytes=5", "--device rng -o max-bytes=6", "with other options"),
    ],
)
def test_what_the_vm_has_already_does_not_serve_a_different_wish(
    vm: StartedVm, world: World, first: str, second: str, message: str
) -> None:
    hold = vm.attached(*world.words(first))
    with as_it_was(vm):
        told = vm.attach(*world.words(second), owner="ctr2")
    assert told.status == 6
    assert re.search(message, told.error()["message"])
    assert told.error()["hint"]
    with ending(sharers_of(world.directory)):
        vm.vmplug("detach", hold["id"]).answer()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (f"{VIRTIO_9P}", "cold-plug-only"),
        ("--device file:{}/disk2.img -o block-driver=virtio-mmio", "no-virtio-mmio"),
        ("--device file:{}/disk2.img -o block-driver=virtio-blk-ccw", "no-channel-subsystem"),
    ],
)
def test_what_this_vm_never_takes(vm: StartedVm, world: World, words: str, reason: str) -> None:
    disk_image(world.directory / "disk2.img", 1, "disk2")
    with as_it_was(vm):
        told = vm.attach(*world.words(words))
    assert told.status == 5
    error = told.error()
    assert (error["code"], error["facts"]) == ("cannot-plug", {"reason": reason})
    assert error["hint"]


def test_a_number_of_the_store_needs_the_store(vm: StartedVm, world: World) -> None:
    with as_it_was(vm):
        told = vm.attach("--device", f"b:{BLK}")
    assert (told.status, told.error()["code"]) == (4, "no-such-device")
