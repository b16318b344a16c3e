"""What a wrong request is told: one sentence, a remedy, an exit status, and nothing has changed."""

import os
import re
import shlex
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cli.command import Result, Vmplug, config, device, ended, number_of, write_bundle
from tests.cli.monitors import MemoryVm, Talker
from tests.cli.world import Picture, names_in_qemu, take_picture
from tests.contract.world import journal_rows
from tests.support.disks import disk_image, loop_device
from tests.support.raw_qmp import RawQmp
from tests.support.vm import BUILT_GUEST, GuestVm, root_ports, start_vm

USAGE, REQUEST, HOST, HYPERVISOR, STATE = 2, 3, 4, 5, 6

OF_PYTHON = re.compile(
    r"\b[A-Z]\w*(Error|Exception)\b|Errno|Traceback|: Success\b|object at 0x|<class|\bNone\b"
)
"""Words that say nothing to a user."""

NOWHERE = "/nowhere"
"""A path at which there is nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad:
    """A command line that is refused; `{name}` in its words is a place of the world.

    `says` and `hint` are patterns for the sentence and the remedy; without `hint` there must be no
    remedy. `facts` are some of the error's. A `{name}` in them is a place, too.
    """

    command: str
    status: int
    code: str
    says: str
    hint: str | None = None
    facts: Mapping[str, object] = field(default_factory=dict)
    stdin: str = ""

    def __str__(self) -> str:
        asked = re.sub(r'"(type|path|major|minor|ociVersion|linux|devices)": ?', "", self.stdin)
        return f"{self.command} {asked}".strip()


Places = Mapping[str, str]


def refused(vmplug: Vmplug, bad: Bad, places: Places) -> None:
    """Run it for a person and for a program: both are told the same."""
    words = [word.format(**places) for word in shlex.split(bad.command)]
    end = words.index("--") if "--" in words else len(words)
    runs = [words, [*words[:end], "--json", *words[end:]]]
    begun = [vmplug.begin(*run, stdin=bad.stdin) for run in runs]
    text, told = [ended(process) for process in begun]
    assert text.status == told.status == bad.status, (text, told)
    message, hint = sentence(text)
    error = told.error()
    assert error["code"] == bad.code
    assert re.search(bad.says.format(**places), message), message
    if bad.hint is None:
        assert hint is None
    else:
        assert hint
        assert re.search(bad.hint.format(**places), hint), hint
    assert bad.facts.items() <= error["facts"].items()
    if "{" not in bad.says + str(bad.hint):  # what has no random part is the same twice
        assert (error["message"].rstrip("."), error["hint"]) == (message, hint)


def sentence(result: Result) -> tuple[str, str | None]:
    """The one sentence, and the remedy if there is one; nothing else may have been said."""
    assert result.stdout == "", result
    first, *more = result.stderr.removesuffix("\n").split("\n")
    assert first.startswith("vmplug: "), result
    assert len(more) <= 1, result
    assert all(line.startswith("hint: ") for line in more), result
    assert not OF_PYTHON.search(result.stderr), result
    message = first.removeprefix("vmplug: ")
    assert message == message.strip(), result
    assert not message.endswith("."), result
    return message, more[0].removeprefix("hint: ") if more else None


def usage(command: str, says: str, verb: str = "") -> Bad:
    """Words that make no command; the remedy is some verb's help."""
    hint = rf"^vmplug {verb}.*--help$"
    return Bad(command=command, status=USAGE, code="usage", says=says, hint=hint)


def request(command: str, says: str, hint: str | None = None) -> Bad:
    """A request that nothing could fulfil."""
    return Bad(command=command, status=REQUEST, code="bad-request", says=says, hint=hint)


def bundle(stdin: str, says: str, hint: str | None = None) -> Bad:
    """A config.json on standard input, wrong in itself."""
    command = "attach - --vm roomy --owner c1"
    return Bad(
        command=command, status=REQUEST, code="bad-request", says=says, hint=hint, stdin=stdin
    )


def one(path: str = "/dev/xvda", **fields: object) -> str:
    """A config.json that asks for one device with these fields."""
    return config({"path": path, "type": "b", **fields})


def absent(command: str, says: str, hint: str) -> Bad:
    """The host does not have it."""
    return Bad(command=command, status=HOST, code="no-such-device", says=says, hint=hint)


def in_use(command: str, says: str, hint: str, *codes: str) -> Bad:
    """The host has it, and may not give it."""
    facts = {"codes": list(codes)}
    return Bad(command=command, status=HOST, code="in-use", says=says, hint=hint, facts=facts)


def state(command: str, says: str, hint: str | None, code: str = "wrong-state") -> Bad:
    """The wrong moment."""
    return Bad(command=command, status=STATE, code=code, says=says, hint=hint)


def connect(command: str, says: str, hint: str) -> Bad:
    """No conversation with the VM can be had."""
    return Bad(
        command=command, status=HYPERVISOR, code="cannot-connect", says=says, hint=hint
    )


NUMBERED = {"major": 8, "minor": 99}

WORDS = [
    usage("frobnicate", "frobnicate"),
    usage("vm frobnicate", "frobnicate", "vm "),
    usage("--frobnicate", "--frobnicate"),
    usage("check --frobnicate", "--frobnicate", "check "),
    usage("info", "BUNDLE.*--device", "info "),
    usage("resolve", "BUNDLE.*--device", "resolve "),
    usage("check", "BUNDLE.*--device", "check "),
    usage("check a b", r"\bb\b", "check "),
    usage("check --device", "argument"),
    usage("resolve --root {nowhere} --device b:8:99", "{nowhere}", "resolve "),
    usage("attach --device b:8:99", "--vm", "attach "),
    usage("attach --device b:8:99 --vm roomy", "--owner", "attach "),
    usage("attach - --vm roomy", "--owner", "attach "),
    usage("plan --device b:8:99", "--vm", "plan "),
    usage("detach", "--owner", "detach "),
    usage("detach {held_id} --owner ctr0", "--owner", "detach "),
    usage("detach {held_id} --timeout soon", "soon", "detach "),
    usage("detach {held_id} --timeout -1", "-1", "detach "),
    usage("list --state-dir {free}", "{free}", "list "),
    usage("resize", "ATTACHMENT", "resize "),
    usage("resize {held_id} --size 0", "--size", "resize "),
    usage("resize {held_id} --size 1G", "1G", "resize "),
    usage("vm start", "NAME", "vm start "),
    usage("vm start new --kernel {nowhere}", "{nowhere}", "vm start "),
    usage("vm start new --ports 28", "28", "vm start "),
    usage("vm start new --memory 1", "--memory", "vm start "),
    usage("vm start new --accel xen", "xen.*kvm.*tcg", "vm start "),
    usage("vm start new -machine pc", "-m", "vm start "),
    usage("vm adopt new", "--qmp", "vm adopt "),
    usage("vm stop", "NAME", "vm stop "),
    usage("vm stop full --timeout -1", "-1", "vm stop "),
]

REQUESTS = [
    *(
        request(f"{verb} {{empty}}", "{empty}/config.json: .*No such file", "a bundle is a dir")
        for verb in ("info", "resolve", "check", "plan --vm roomy", "attach --vm roomy")
    ),
    request("info {nowhere}", "{nowhere}: .*No such file", "a bundle is a directory"),
    request("info {odd}", "{odd}/config.json: .*[Ii]s a directory", "a bundle is a directory"),
    request("attach {blank} --vm roomy", "the configuration is empty.*config.json"),
    bundle("", "the configuration is empty.*config.json"),
    bundle("{", "not JSON: .*line 1"),
    bundle('{"linux": {"devices": [}', "not JSON: .*column 23"),
    bundle("[]", r"\$: .*object.*array"),
    bundle('{"linux": {"devices": {}}}', r"\$\.linux\.devices: .*array.*object"),
    bundle(one(), r"\$\.linux\.devices\[0\]\.major: missing.*needs major and minor"),
    bundle(one(major=8), r"\$\.linux\.devices\[0\]\.minor: missing"),
    bundle(one(**NUMBERED, type="x"), r"devices\[0\]\.type: 'x' .*expected b, c, u or p"),
    bundle(one(major=-1, minor=0), r"devices\[0\]\.major: .*-1 .*0\.\.4095"),
    bundle(one(major=8, minor=1 << 20), r"devices\[0\]\.minor: .*1048576 .*0\.\.1048575"),
    bundle(one(major="8", minor=0), r"devices\[0\]\.major: .*int.*str"),
    bundle(one("/dev/../etc/passwd", **NUMBERED), r"\[0\]\.path: .*'\.\.'", "without detours"),
    bundle(one("dev/xvda", **NUMBERED), r"\[0\]\.path: .*not an absolute path"),
    bundle(one("", **NUMBERED), r"\[0\]\.path: .*empty", "path in the container"),
    bundle(one(**NUMBERED, fileMode=0o20660), r"\[0\]\.fileMode: .*type b"),
    bundle(one(**NUMBERED, uid=-1), r"\[0\]\.uid: .*>= 0"),
    bundle(
        config(device("/dev/xvda", "8:1"), device("/dev/xvda", "8:2")),
        r"devices\[1\]\.path: /dev/xvda .*twice.*8:1.*8:2",
    ),
    request("check --device b:8", "--device b:8: .*MAJOR:MINOR", "write b:7:0"),
    request("check --device b:-1:0", "--device b:-1:0: ", "write b:7:0"),
    request("check --device b:4096:0", "--device b:4096:0: .*4096 .*0..4095", "write b:7:0"),
    request("check --device x:8:0", "--device x:8:0: 'x'", "write b:7:0"),
    request("check --device 8:0", "--device 8:0: '8'", "write b:7:0"),
    request("check --device ''", "--device", "write b:7:0"),
    request("check --device p:0:0", "type p has no number"),
    request("check --device b:8:0:xvda", "'xvda' is not an absolute path"),
    request("check --device b:8:0:/dev/../x", "'..'", "without detours"),
    request("check --device file:", "--device file:", "file:/"),
    request("check --device b:8:99 -o cache", "--option cache: .*KEY=VALUE"),
    request("check --device b:8:99 -o cash=none", "option cash: unknown", "cache, aio"),
    request("check --device b:8:99 -o cache=nine", "option cache: 'nine' .*writeback"),
    request("check --device b:8:99 -o bps-total=fast", "option bps-total: 'fast' .*number"),
    request("check --device b:8:99 -o aio=native -o aio=threads", "aio: said twice"),
    request(
        "check --device b:8:99 -o cache=writeback -o aio=native",
        "option aio: native .*cache=writeback",
        "cache=none",
    ),
    request(
        "check --device b:8:99 -o block-driver=nvdimm", "block-driver: nvdimm", "virtio-scsi"
    ),
    request("check --device b:8:99 --allow mounted", "--allow mounted: ", "mounted-on-host"),
    request("check --device b:8:99 --allow all", "--allow all: ", "mounted-on-host"),
    request("check --device b:8:99 --allow size-zero", "--allow size-zero: ", "mounted-on-host"),
    request(
        "attach --device file:{free} --vm roomy --owner c1 -o serial=0123456789abcdef01234",
        "serial: .*20 bytes",
    ),
    request("vm adopt 'a b' --qmp {nowhere}", "'a b'.*letters, digits"),
    request("vm adopt ../sb1 --qmp {nowhere}", "'../sb1'.*letters, digits"),
    request("vm start ''", "''.*letters, digits"),
    request("vm start new --state-dir {long}", "{long}.*107 bytes", "shorter"),
    Bad(
        command="resize {held_id} --size 512",
        status=REQUEST,
        code="not-allowed",
        says="{held} .*1048576.* would lose data",
        hint="detach it first",
    ),
]

ON_THE_HOST = [
    absent("attach --device b:8:99 --vm roomy --owner c1", "no block device 8:99 .*sysfs", "ls -l"),
    absent(
        "attach --device b:1:3:/dev/null --vm roomy --owner c1",
        "no block device 1:3 .*/dev/null there is char device 1:3",
        "numbers",
    ),
    absent("plan --device c:8:99 --vm roomy", "no char device 8:99 .*sysfs", "ls -l"),
    absent(
        "attach --device file:{nowhere} --vm roomy --owner c1",
        "{nowhere} .*nothing.*regular file",
        "absolute path",
    ),
    absent(
        "attach --device file:{empty} --vm roomy --owner c1",
        "{empty} .*a directory.*regular file",
        "absolute path",
    ),
    absent(
        "attach --device b:241:0 --vhost-user-store {nowhere} --vm roomy --owner c1",
        "vhost-user store {nowhere} is not there",
        "--vhost-user-store",
    ),
    absent(
        "attach --device b:241:7 --vhost-user-store {store} --vm roomy --owner c1",
        "vhost-user store {store} has no .*241:7",
        "mknod",
    ),
    in_use(
        "attach --device file:{void} --vm roomy --owner c1",
        "{void} is empty",
        "truncate",
        "size-zero",
    ),
    in_use(
        "attach --device file:{qcow2} --vm roomy --owner c1",
        "{qcow2} .*qcow2.*format is not stated",
        "format=qcow2.*--allow format-not-stated",
        "format-not-stated",
    ),
    in_use(
        "attach --device file:{free} -o format=qcow2 --vm roomy --owner c1",
        "{free} is not a qcow2 image",
        "format=raw",
        "not-that-format",
    ),
    in_use(
        "attach --device file:{held} --vm roomy --owner c1",
        "{held} is already handed to VM '?full'?",
        "--allow in-use-by-vm",
        "in-use-by-vm",
    ),
    in_use(
        "attach --device file:{read} --vm full --owner c1",
        "{read} is already handed to VM '?roomy'? for reading",
        "share it read-only",
        "in-use-by-vm",
    ),
    in_use(
        "attach --device file:{free} --device file:{void} --device file:{held} "
        "--vm roomy --owner c1",
        "{void} is empty; .*{held} is already handed",
        "vmplug check",
        "size-zero",
        "in-use-by-vm",
    ),
]

IN_THE_VM = [
    connect("vm adopt new --qmp {nowhere}", "{nowhere}: No such file", "-qmp unix:"),
    connect("vm adopt new --qmp {free}", "{free}: Connection refused", "-qmp unix:"),
    connect("vm adopt new --qmp {long}", "{long}: .*too long", "-qmp unix:"),
    connect("vm adopt new --qmp {garbage}", "{garbage}: .*(greet|QMP)", "is this its QMP socket"),
    connect("vm adopt new --qmp {other_json}", "{other_json}: .*greet", "its QMP socket"),
    connect("vm adopt new --qmp {closing}", "{closing}: .*(hung up|closed)", "its QMP socket"),
    *(
        connect(f"{command} --device file:{{free}} --vm dead", "dead.*", "vmplug reconcile")
        for command in ("plan", "attach --owner c1")
    ),
    connect("detach --owner ctr3", "dead", "vmplug reconcile"),
    Bad(
        command="attach --device file:{free} --vm full --owner c1",
        status=HYPERVISOR,
        code="no-free-port",
        says="full|no free port left",
        hint="detach something.*--ports",
    ),
    Bad(
        command="attach --device file:{free} --vm full --owner c1 -o block-driver=virtio-scsi",
        status=HYPERVISOR,
        code="no-free-port",
        says="no virtio-scsi controller",
        hint="virtio-blk",
    ),
    Bad(
        command="attach --device file:{free} --device file:{free2} --vm spare --owner c1",
        status=HYPERVISOR,
        code="no-free-port",
        says="no free port left",
        hint="detach something",
    ),
]

IN_THE_JOURNAL = [
    *(
        state(command, "no VM 'unheard' is known", "vmplug vm list")
        for command in (
            "attach --device file:{free} --vm unheard --owner c1",
            "plan --device file:{free} --vm unheard",
            "reconcile --vm unheard",
            "vm stop unheard",
        )
    ),
    state("vm adopt full --qmp {full_socket}", "VM full is known already", "vm stop full"),
    state("vm start full --accel tcg", "VM full is known already", "vm stop full"),
    state("vm adopt again --qmp {full_socket}", "VM full", "vmplug attach|--vm full"),
    state("vm stop full", "1 attachment.* VM full", "vmplug detach", "still-attached"),
    state("detach 0123456789abcdef", "no attachment 0123456789abcdef", "list", "not-attached"),
    state("detach {held_id} 0123456789abcdef", "0123456789abcdef", "list", "not-attached"),
    state("detach --owner nobody", "nobody holds no device", "vmplug list", "not-attached"),
    state("detach --owner ctr0 --vm spare", "ctr0 holds no device of VM spare", "list", "not-attached"),
    state("resize 0123456789abcdef", "no attachment 0123456789abcdef", "list", "not-attached"),
    state(
        "attach --device file:{read} --vm roomy --owner c1",
        "{read} is plugged read-only and is now wanted for writing",
        "detach it .*read-only",
    ),
    state(
        "attach --device file:{held} -o cache=unsafe --vm full --owner c1",
        "{held} is plugged with other options",
        "leave the options out",
    ),
    *(
        state(f"{command} --state-dir {{below_file}}", "{below_file}/journal.db.*: Not a dir", "writable", "bad-state")
        for command in (
            "list",
            "vm list",
            "reconcile",
            "attach --device file:{free} --vm roomy --owner c1",
            "vm start new",
        )
    ),
    *(
        state(f"{command} --state-dir {{{broken}}}", f"{{{broken}}}/journal.db.*: {why}", hint, "bad-state")
        for broken, why, hint in (
            ("scribbled", "file is not a database", "move it away"),
            ("cut", "malformed", "move it away"),
            ("folder", "", "writable"),
        )
        for command in (
            "list",
            "check --device file:{free}",
            "attach --device file:{free} --vm roomy --owner c1",
        )
    ),
    state("list --state-dir {newer}", "{newer}/journal.db .*version 99", "vmplug that wrote it", "bad-state"),
    state("list --state-dir {senseless}", "{senseless}/journal.db", "damaged", "bad-state"),
]


@dataclass(frozen=True, slots=True)
class MemoryWorld:
    """Four VMs in memory, one of them dead, and everything that a table may name."""

    vmplug: Vmplug
    vms: tuple[MemoryVm, ...]
    places: Places

    def picture(self) -> Picture:
        """What a refusal leaves as it is."""
        return Picture(
            journal_rows(self.vmplug.state_dir),
            tuple(vm.names() for vm in self.vms),
            frozenset(),
        )


@pytest.fixture(scope="module")
def world() -> Iterator[MemoryWorld]:
    with ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="vmplug-", dir="/tmp"))
        )
        vmplug = Vmplug(directory / "state")
        vms = {
            name: stack.enter_context(MemoryVm(directory / f"{name}.sock", **size))
            for name, size in {
                "full": {"root_ports": 1, "scsi": False},
                "spare": {"root_ports": 1, "scsi": False},
                "roomy": {"root_ports": 4},
                "dead": {"root_ports": 4},
            }.items()
        }
        for name, vm in vms.items():
            vmplug("vm", "adopt", name, "--qmp", vm.socket_path).answer()
        places = {
            **make_files(directory),
            **make_journals(vmplug, directory),
            **{name: str(path) for name, path in talkers(stack, directory).items()},
            "full_socket": str(vms["full"].socket_path),
            "held_id": attach(vmplug, directory / "held", "full", "ctr0"),
            "read_id": attach(vmplug, directory / "read", "roomy", "ctr0", "--read-only"),
            "lost_id": attach(vmplug, directory / "lost", "dead", "ctr3"),
        }
        vms["dead"].end()
        yield MemoryWorld(vmplug, tuple(vms.values()), places)


def attach(vmplug: Vmplug, image: Path, vm: str, owner: str, *more: str) -> str:
    """The id of a new attachment."""
    words = ("--device", f"file:{image}", "--vm", vm, "--owner", owner, *more, "--json")
    (attachment,) = vmplug("attach", *words).json()["attachments"]
    return str(attachment["id"])


def make_files(directory: Path) -> dict[str, str]:
    """Images, directories and bundles; also names at which there is nothing."""
    names = {
        name: directory / name
        for name in ("free", "free2", "held", "read", "lost", "void", "qcow2", "empty", "odd")
    }
    for name in ("free", "free2", "held", "read", "lost"):
        disk_image(names[name], 1, name)
    names["void"].touch()
    names["qcow2"].write_bytes(b"QFI\xfb\0\0\0\3".ljust(1 << 20, b"\0"))
    names["empty"].mkdir()
    (names["odd"] / "config.json").mkdir(parents=True)
    blank = directory / "blank"
    blank.mkdir()
    (blank / "config.json").touch()
    store = directory / "store"
    (store / "block" / "devices").mkdir(parents=True)
    long = directory / ("long" * 30)
    more = {"blank": blank, "store": store, "long": long, "below_file": names["free"] / "state"}
    return {name: str(path) for name, path in {**names, **more}.items()} | {"nowhere": NOWHERE}


def make_journals(vmplug: Vmplug, directory: Path) -> dict[str, str]:
    """State directories whose journal is damaged in several ways."""
    names = {
        name: directory / name for name in ("scribbled", "cut", "folder", "newer", "senseless")
    }
    for name, path in names.items():
        if name == "folder":
            (path / "journal.db").mkdir(parents=True)
            continue
        path.mkdir()
        Vmplug(path)("list").answer()
        assert not list(path.glob("journal.db-*")), "the journal is in one file"
    (names["scribbled"] / "journal.db").write_bytes(b"scribble" * 4096)
    os.truncate(names["cut"] / "journal.db", 5000)
    statements = {
        "newer": "PRAGMA user_version = 99",
        "senseless": "INSERT INTO device VALUES"
        " ('d', 'full', 'block:8:0', 'nonsense', '/dev/sda', 'flying', 0, 0, '{', '-', NULL, NULL)",
    }
    for name, statement in statements.items():
        with sqlite3.connect(names[name] / "journal.db") as db:
            db.execute(statement)
            if name == "senseless":
                db.execute("INSERT INTO attachment VALUES ('a', 'd', 'ctr0', '/dev/xvda', 0, 1)")
        db.close()
    return {name: str(path) for name, path in names.items()}


def talkers(stack: ExitStack, directory: Path) -> dict[str, Path]:
    """Sockets that are not QMP."""
    words = {"garbage": b"SSH-2.0-OpenSSH_9\r\n", "other_json": b'{"hello": 1}\r\n', "closing": b""}
    for name, said in words.items():
        talker = Talker(directory / name, said, stays=name != "closing")
        stack.enter_context(talker)
    return {name: directory / name for name in words}


@pytest.mark.parametrize("bad", [*WORDS, *REQUESTS, *ON_THE_HOST, *IN_THE_VM, *IN_THE_JOURNAL], ids=str)
def test_it_is_refused_in_one_sentence_and_nothing_has_changed(
    world: MemoryWorld, bad: Bad
) -> None:
    before = world.picture()
    refused(world.vmplug, bad, world.places)
    assert world.picture() == before
