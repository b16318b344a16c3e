"""What a wrong request is told: one sentence, a remedy, a status; and nothing has changed."""

import json
import os
import re
import shlex
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cli.command import PROGRAMS, VMPLUG, Result, Vmplug, config, device, ended, number_of
from tests.cli.monitors import MemoryVm, Talker
from tests.cli.world import Picture, processes_below, take_picture
from tests.contract.world import journal_rows
from tests.support.disks import disk_image, loop_device
from tests.support.journal import lay_journal
from tests.support.memory import MEMORY
from tests.support.raw_qmp import RawQmp
from tests.support.vm import GuestVm, root_ports, start_vm

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
    text, told = [vmplug.here(*words, stdin=bad.stdin) for words in both_ways(bad, places)]
    told_the_same(text, told, bad, places)


def both_ways(bad: Bad, places: Places) -> list[list[str]]:
    """The words as a person and as a program says them."""
    words = [word.format(**places) for word in shlex.split(bad.command)]
    verb = 2 if words[0] == "vm" else 1
    return [words, [*words[:verb], "--json", *words[verb:]]]


def told_the_same(text: Result, told: Result, bad: Bad, places: Places) -> None:
    """One sentence and its remedy, and the same for a program."""
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


def one(path: str = "/dev/xvda", /, **fields: object) -> str:
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
    return Bad(command=command, status=HYPERVISOR, code="cannot-connect", says=says, hint=hint)


NUMBERED: Mapping[str, object] = {"major": 8, "minor": 99}

WORDS = [
    usage("frobnicate", "frobnicate"),
    usage("vm frobnicate", "frobnicate", "vm "),
    usage("--frobnicate", "--frobnicate"),
    usage("info", "BUNDLE.*--device", "info "),
    usage("check --device", "argument"),
    usage("resolve --root {nowhere} --device b:8:99", "{nowhere}", "resolve "),
    usage("attach --device b:8:99", "--vm", "attach "),
    usage("attach --device b:8:99 --vm roomy", "--owner", "attach "),
    usage("detach", "--owner", "detach "),
    *(
        usage(f"{verb} --timeout {seconds}", f"--timeout.*{seconds}", f"{verb} ")
        for verb in ("detach", "reconcile", "watch", "vm stop")
        for seconds in ("nan", "-1", "soon")
    ),
    usage("resize {held_id} --size 0", "--size", "resize "),
    usage("vm start", "NAME", "vm start "),
    usage("vm start new --accel xen", "xen.*kvm.*tcg", "vm start "),
    usage("vm adopt new", "--qmp", "vm adopt "),
]

REQUESTS = [
    *(
        request(f"{verb} {{empty}}", "{empty}/config.json: .*No such file", "pass a directory")
        for verb in ("info", "attach --vm roomy")
    ),
    request("info {nowhere}", "{nowhere}: .*No such file", "pass a directory"),
    request("info {odd}", "{odd}/config.json: .*[Ii]s a directory", "pass a directory"),
    bundle("", "the configuration is empty.*config.json"),
    bundle("{", "not JSON: .*line 1", "pass the config.json"),
    bundle(one(), r"\$\.linux\.devices\[0\]\.major: missing.*needs major and minor"),
    bundle(one(**NUMBERED, type="x"), r"devices\[0\]\.type: 'x' .*expected b, c, u or p"),
    bundle(one(major=-1, minor=0), r"devices\[0\]\.major: .*-1 .*0\.\.4095"),
    bundle(one("/dev/../etc/passwd", **NUMBERED), r"\[0\]\.path: .*'\.\.'", "without '..'"),
    bundle(
        config(device("/dev/xvda", "8:1"), device("/dev/xvda", "8:2")),
        r"devices\[1\]\.path: /dev/xvda .*twice.*8:1.*8:2",
    ),
    request("check --device b:8", "--device b:8: .*MAJOR:MINOR", "write /dev/sdb, b:8:16"),
    request(
        "check --device x:8:0",
        "--device x:8:0: 'x' is not b, c, file, nvdimm, vfio, net, share, rng, a CDI name",
        "write /dev/sdb, b:8:16",
    ),
    request("check --device b:8:0:/dev/../x", "'..'", "without '..'"),
    request("check --device file:", "no image is named", "write file:"),
    request("check --device nvdimm:", "no image is named", "write nvdimm:"),
    request("check --device b:8:99 -o cache", "--option cache: .*KEY=VALUE"),
    request("check --device file:{free} -o cash=none", "option cash: unknown", "cache, aio"),
    request(
        "check --device file:{free} -o cache=nine",
        "option cache: 'nine' .*writeback",
        "^cache: none",
    ),
    request(
        "check --device file:{free} -o cache=writeback -o aio=native",
        "option aio: native .*cache=writeback",
        "cache=none",
    ),
    request("check --device net:", "is not complete", "write net:/"),
    *(
        request(f"check --device {words}", "is not complete", "write share:/srv/work:work")
        for words in ("share:", "share:/srv", "share:/srv:", "share::work")
    ),
    request("check --device share:fd:9999:work", "descriptor 9999 is not an open socket"),
    request("check --device rng:/dev/null -o cache=none", "option cache: unknown .*random", "max"),
    request("check --device rng:/dev/null -o period=5", "option period: .*max-bytes"),
    request(
        "check --device share:{empty}:work -o cache=x",
        "option cache: 'x' .*auto",
        "^cache: virtio-fs: auto",
    ),
    request(
        "check --device share:{empty}:work -o filesystem=virtio-9p -o cache=auto",
        "virtio-9p has no cache",
        "filesystem=virtio-fs",
    ),
    request("info --device share:/a:work --device share:/b:work", "share:work: .*twice"),
    request("check --device b:8:99 --allow mounted", "--allow mounted: ", "mounted-on-host"),
    request("check --device b:8:99 --allow all", "--allow all: ", "mounted-on-host"),
    request(
        "attach --device file:{free} --vm roomy --owner c1 -o serial=0123456789abcdef01234",
        "serial: .*20 bytes",
    ),
    request("vm adopt ../sb1 --qmp {nowhere}", "'../sb1'.*letters, digits"),
    request("vm start new --state-dir {long}", "{long}.*107 bytes", "shorter"),
    request("vm start new --room-for 3b:00", "not the address of a PCI function", "3b:00.0"),
    *(
        request(f"vm start new -- {word}", "-daemonize: another process", "outlives vmplug")
        for word in ("-daemonize", "--daemonize")
    ),
    Bad(
        command="resize {held_id} --size 512",
        status=REQUEST,
        code="not-allowed",
        says="{held} .*1048576.* would lose data",
        hint="detach it first",
    ),
]

ON_THE_HOST = [
    absent("vm start new --room-for FFFF:FF:1F.7", "no PCI function ffff:ff:1f.7", "vmplug host"),
    absent(
        "attach --device b:8:99 --vm roomy --owner c1", "no block device 8:99 .*sysfs", "ls -l"
    ),
    absent(
        "attach --device b:1:3:/dev/null --vm roomy --owner c1",
        "no block device 1:3 .*/dev/null there is char device 1:3",
        "numbers",
    ),
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
        "attach --device net:{nowhere} --vm roomy --owner c1",
        "{nowhere} is not the socket of a vhost-user backend: found nothing",
        "start the backend",
    ),
    absent(
        "attach --device share:{free}:work --vm roomy --owner c1",
        "{free} cannot be shared: found a regular file",
        "name a directory",
    ),
    absent(
        "attach --device rng:{free} --vm roomy --owner c1",
        "{free} is not a source of random numbers: found a regular file",
        "/dev/urandom",
    ),
    absent(
        "attach --device b:241:0 --vhost-user-store {nowhere} --vm roomy --owner c1",
        "vhost-user store {nowhere} does not exist",
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
        "{qcow2} .*qcow2.*no format is set",
        "format=qcow2.*--allow format-not-stated",
        "format-not-stated",
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
    connect("vm adopt new --qmp {nowhere}", "{nowhere}: No such file", "-qmp"),
    connect("vm adopt new --qmp {free}", "{free}: Connection refused", "-qmp"),
    connect("vm adopt new --qmp {far}", "{far}: No such file or directory", "-qmp"),
    connect("vm adopt new --qmp {garbage}", "{garbage}.*(greeting|speak QMP)", "-qmp"),
    connect("vm adopt new --qmp {other_json}", "{other_json}.*(greeting|speak QMP)", "-qmp"),
    connect("vm adopt new --qmp {closing}", "{closing}.*(greeting|hung up|closed)", "-qmp"),
    connect("plan --device file:{free} --vm dead", "{dead_socket}", "vmplug reconcile"),
    Bad(
        command="attach --device file:{free} --vm full --owner c1",
        status=HYPERVISOR,
        code="no-free-port",
        says="no free PCI port left",
        hint="detach something.*--ports",
    ),
    Bad(
        command="attach --device file:{free} --device file:{free2} --vm spare --owner c1",
        status=HYPERVISOR,
        code="no-free-port",
        says="no free PCI port left",
        hint="detach something",
    ),
]

IN_THE_JOURNAL = [
    *(
        state(command, "no VM 'unheard' is known", "vmplug vm list")
        for command in (
            "attach --device file:{free} --vm unheard --owner c1",
            "vm stop unheard",
        )
    ),
    state("vm start full --accel tcg", "VM full is already in the journal", "vm stop full"),
    state("vm adopt again --qmp {full_socket}", "full", "full"),
    state("vm adopt again --qmp {full_link}", "full", "full"),
    state("detach {held_id} 0123456789abcdef", "0123456789abcdef", "list", "not-attached"),
    state(
        "detach --owner nobody",
        "nothing is attached for owner .nobody.",
        "vmplug list",
        "not-attached",
    ),
    state(
        "detach --owner ctr0 --vm spare",
        "nothing is attached for owner .ctr0. in VM spare",
        "list",
        "not-attached",
    ),
    state(
        "attach --device file:{read} --vm roomy --owner c1",
        "{read} is plugged read-only, and the request is for writing",
        "detach it .*read-only",
    ),
    state(
        "attach --device file:{held} -o cache=unsafe --vm full --owner c1",
        "{held} is plugged with other options",
        "leave the options out",
    ),
    *(
        state(
            f"{command} --state-dir {{below_file}}",
            "there is no state directory {below_file}",
            "vm start or vm adopt",
            "bad-state",
        )
        for command in ("list", "attach --device file:{free} --vm roomy --owner c1")
    ),
    *(
        state(
            f"list --state-dir {{{broken}}}", f"{{{broken}}}/journal.db.*{why}", hint, "bad-state"
        )
        for broken, why, hint in (
            ("scribbled", "file is not a database", "set-aside"),
            ("cut", "malformed", "set-aside"),
            ("folder", "", "writable"),
            ("newer", "version 99", "vmplug that wrote it"),
            ("senseless", "is damaged", "set-aside"),
        )
    ),
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
            stack.enter_context(tempfile.TemporaryDirectory(prefix="vmplug-", dir=MEMORY))
        )
        vmplug = Vmplug(directory / "state")
        vms = {
            name: stack.enter_context(
                MemoryVm(directory / f"{name}.sock", root_ports=ports, scsi=ports > 1)
            )
            for name, ports in {"full": 1, "spare": 1, "roomy": 4, "dead": 4}.items()
        }
        for name, vm in vms.items():
            vmplug("vm", "adopt", name, "--qmp", vm.socket_path).answer()
        (directory / "link.sock").symlink_to(vms["full"].socket_path)
        places = {
            **make_files(directory),
            **make_journals(vmplug, directory),
            **{name: str(path) for name, path in talkers(stack, directory).items()},
            "full_socket": str(vms["full"].socket_path),
            "full_link": str(directory / "link.sock"),
            "dead_socket": str(vms["dead"].socket_path),
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
    long, far = directory / ("long" * 30), directory / ("far" * 40)
    more = {
        "blank": blank,
        "store": store,
        "long": long,
        "far": far,
        "below_file": names["free"] / "state",
    }
    return {name: str(path) for name, path in {**names, **more}.items()} | {"nowhere": NOWHERE}


def make_journals(vmplug: Vmplug, directory: Path) -> dict[str, str]:
    """State directories whose journal is damaged in several ways."""
    names = {
        name: directory / name for name in ("scribbled", "cut", "folder", "newer", "senseless")
    }
    for name, path in names.items():
        path.mkdir(mode=0o700)
        if name == "folder":
            (path / "journal.db").mkdir()
            continue
        lay_journal(path)
        assert not list(path.glob("journal.db-*")), "the journal is in one file"
    (names["scribbled"] / "journal.db").write_bytes(b"scribble" * 4096)
    os.truncate(names["cut"] / "journal.db", 5000)
    statements = {
        "newer": "PRAGMA user_version = 99",
        "senseless": "INSERT INTO device VALUES ('d', 'full', 'block:8:0', 'nonsense', '/dev/sda',"
        " 'flying', 0, 0, '{', '-', NULL, NULL, NULL, NULL, NULL)",
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
    words = {
        "garbage": b"SSH-2.0-OpenSSH_9\r\n",
        "other_json": b'{"hello": 1}\r\n',
        "closing": b"",
    }
    for name, said in words.items():
        talker = Talker(directory / name, said, stays=name != "closing")
        stack.enter_context(talker)
    return {name: directory / name for name in words}


@pytest.mark.parametrize(
    "bad", [*WORDS, *REQUESTS, *ON_THE_HOST, *IN_THE_VM, *IN_THE_JOURNAL], ids=str
)
def test_it_is_refused_in_one_sentence_and_nothing_has_changed(
    world: MemoryWorld, bad: Bad
) -> None:
    before = world.picture()
    refused(world.vmplug, bad, world.places)
    assert world.picture() == before


def test_a_sentence_begins_with_a_small_letter(vmplug: Vmplug) -> None:
    for words in (("frobnicate",), ("check", "--frobnicate"), ("resize",)):
        message, _ = sentence(vmplug(*words))
        assert message[0].islower(), message


def test_completion_knows_three_shells(vmplug: Vmplug) -> None:
    for words in (("completion",), ("completion", "tcsh")):
        message, hint = sentence(vmplug(*words))
        assert all(shell in message for shell in ("bash", "zsh", "fish"))
        assert hint == "vmplug completion --help"


def test_a_newline_in_what_was_asked_makes_no_second_line(vmplug: Vmplug, tmp_path: Path) -> None:
    image = disk_image(tmp_path / "a.img", 1, "a")
    asked = ("check", "-d", f"file:{image}:/dev/a\nb", "-o", "a\nb=c")
    for words in (("info", "no\nbundle"), asked):
        message, _ = sentence(vmplug(*words))
        assert "\n" not in message


def test_without_qemu_it_says_what_to_install(vmplug: Vmplug) -> None:
    done = vmplug("vm", "start", "new", "--accel", "tcg", env={PROGRAMS: "/nowhere"})
    message, hint = sentence(done)
    assert (done.status, message) == (HYPERVISOR, "qemu-system-x86_64 is not installed")
    assert hint == "on Debian: apt install qemu-system-x86"
    assert vmplug("vm", "list").answer() == "no VM is known\n"
    assert not list((vmplug.state_dir / "vm").iterdir())


def test_a_state_directory_that_may_not_be_written_is_told(vmplug: Vmplug) -> None:
    if os.geteuid() == 0:
        directory = "/proc/vmplug"  # nothing can be made there, not even by root
    else:
        vmplug.state_dir.mkdir(mode=0o500)
        directory = str(vmplug.state_dir)
    done = vmplug("vm", "adopt", "sb1", "--qmp", "/no/such", "--state-dir", directory)
    message, hint = sentence(done)
    assert done.status == STATE
    assert f"{directory}/journal.db" in message
    assert hint == "pass a writable --state-dir, or become root"


def test_a_bug_is_told_as_one_and_shows_its_trace_when_asked(
    vmplug: Vmplug, tmp_path: Path
) -> None:
    """A standard library module that fails at import is a failure that no verb foresees."""
    (tmp_path / "sqlite3.py").write_text("raise RuntimeError('not this one')")
    env = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = vmplug.as_process("list", env=env)
    assert (done.stdout, done.status) == ("", 1)
    assert done.stderr == (
        "vmplug: a bug of vmplug: RuntimeError: not this one\n"
        "hint: set VMPLUG_DEBUG=1 and report what it prints\n"
    )
    assert vmplug.as_process("list", "--json", env=env).error()["code"] == "bug"
    traced = vmplug.as_process("list", env={**env, "VMPLUG_DEBUG": "1"})
    assert "Traceback" in traced.stderr


def test_a_vm_known_by_two_sockets_keeps_its_disks(vmplug: Vmplug, tmp_path: Path) -> None:
    """Whether the second adoption is refused or not: what the first holds is not its remains."""
    image = disk_image(tmp_path / "a.img", 1, "a")
    sockets = [vmplug.state_dir.with_name(f"{name}.sock") for name in ("first", "second")]
    with MemoryVm(sockets[0]) as vm, MemoryVm(sockets[1], machine=vm.machine):
        vmplug("vm", "adopt", "first", "--qmp", sockets[0]).answer()
        attach(vmplug, image, "first", "ctr0")
        held = vm.names()
        vmplug("vm", "adopt", "second", "--qmp", sockets[1])
        assert vmplug("reconcile").status == 0
        assert vm.names() == held
        (hold,) = vmplug("list", "--json").json()["attachments"]
        assert (hold["vm"], hold["state"]) == ("first", "attached")


def test_one_vm_that_is_gone_keeps_no_other_from_detaching(vmplug: Vmplug, tmp_path: Path) -> None:
    sockets = {name: vmplug.state_dir.with_name(f"{name}.sock") for name in ("gone", "there")}
    with MemoryVm(sockets["gone"]) as gone, MemoryVm(sockets["there"]) as there:
        nothing = there.names()
        for name, socket in sockets.items():
            vmplug("vm", "adopt", name, "--qmp", socket).answer()
            attach(vmplug, disk_image(tmp_path / name, 1, name), name, "ctr1")
        gone.end()
        told = vmplug("detach", "--owner", "ctr1")
        assert there.names() == nothing
        assert [hold["vm"] for hold in vmplug("list", "--json").json()["attachments"]] == ["gone"]
        assert told.status == HYPERVISOR
        assert str(sockets["gone"]) in told.stderr


def test_each_vm_has_its_turn_whatever_stops_others_and_each_error_is_told(
    vmplug: Vmplug, tmp_path: Path
) -> None:
    names = ("a-plugging", "b-gone", "c-there")
    sockets = {name: vmplug.state_dir.with_name(f"{name}.sock") for name in names}
    with ExitStack() as stack:
        vms = {name: stack.enter_context(MemoryVm(path)) for name, path in sockets.items()}
        nothing = vms["c-there"].names()
        for name, socket in sockets.items():
            vmplug("vm", "adopt", name, "--qmp", socket).answer()
            attach(vmplug, disk_image(tmp_path / name, 1, name), name, "ctr1")
        with closing(sqlite3.connect(vmplug.state_dir / "journal.db")) as db, db:
            db.execute("UPDATE device SET state = 'plugging' WHERE vm = 'a-plugging'")
        vms["b-gone"].end()
        told = vmplug("detach", "--owner", "ctr1")
        assert vms["c-there"].names() == nothing
        first, *others = [line for line in told.stderr.splitlines() if line[:5] != "hint:"]
        assert (told.status, first) == (STATE, f"vmplug: {tmp_path / 'a-plugging'} is plugging")
        assert [line[:19] for line in others] == ["vmplug: VM b-gone: "]
        assert vmplug("reconcile").status == 0
        assert vmplug("list").answer() == "nothing is attached\n"


NOT_UTF8 = "\udcff"
"""The byte 0xff, as Python has it in arguments."""


def test_names_that_are_not_utf8_are_a_mistake_and_no_damage(
    vmplug: Vmplug, tmp_path: Path
) -> None:
    image = disk_image(tmp_path / "a.img", 1, "a")
    with MemoryVm(vmplug.state_dir.with_name("qmp.sock")) as vm:
        vmplug("vm", "adopt", "sb1", "--qmp", vm.socket_path).answer()
        before, names = journal_rows(vmplug.state_dir), vm.names()
        for words in (
            ("attach", "-d", f"file:{image}", "--vm", "sb1", "--owner", NOT_UTF8),
            ("attach", "-d", f"file:{image}:/dev/{NOT_UTF8}", "--vm", "sb1", "--owner", "c1"),
            ("list", "--vm", NOT_UTF8),
        ):
            refused = vmplug(*words)
            assert refused.status == REQUEST
            assert "\\xff: it is not UTF-8, and vmplug keeps names as text" in refused.stderr
            assert (journal_rows(vmplug.state_dir), vm.names()) == (before, names)
        assert vmplug("detach", "--owner", NOT_UTF8).status == STATE
        assert vmplug("reconcile").status == 0


def test_a_socket_behind_a_symlink_may_have_a_long_path(vmplug: Vmplug) -> None:
    short, link = (vmplug.state_dir.with_name(name) for name in ("qmp.sock", "link"))
    long = vmplug.state_dir.with_name("d" * 120) / "qmp.sock"
    long.parent.mkdir()
    with MemoryVm(short):
        short.rename(long)
        link.symlink_to(long)
        vmplug("vm", "adopt", "sb1", "--qmp", link).answer()
        (known,) = vmplug("vm", "list", "--json").json()["vms"]
        assert (known["qmp"], known["state"]) == (str(long), "running")
        assert vmplug("reconcile").status == 0
        assert vmplug("vm", "adopt", "sb2", "--qmp", long).status == STATE
        assert vmplug("vm", "stop", "sb1").status == 0


def test_a_working_directory_that_was_deleted_is_named(vmplug: Vmplug, tmp_path: Path) -> None:
    script = 'cd "$0" && rmdir "$0" && exec "$@"'
    for words in (("check", "-d", "file:a.img"), ("vm", "start", "sb1", "--state-dir", "s")):
        (tmp_path / "gone").mkdir()
        command = ["sh", "-c", script, str(tmp_path / "gone"), str(VMPLUG), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (HOST, "")
        assert done.stderr.splitlines()[0] == (
            "vmplug: the working directory does not exist any more"
        )
    assert vmplug("vm", "list").answer() == "no VM is known\n"


# on real QEMU, with real disks

ON_QEMU = [
    in_use(
        "attach --device b:{mounted_no}:/dev/xvda --vm roomy --owner c1",
        "/dev/xvda: {mounted} is mounted on the host at {mount_point}",
        "umount {mount_point}; or accept the risk with --allow mounted-on-host",
        "mounted-on-host",
    ),
    in_use(
        "plan --device b:{mounted_no} --vm roomy",
        "{mounted} is mounted",
        "umount",
        "mounted-on-host",
    ),
    in_use(
        "attach --device b:{locked_no} --vm roomy --owner c1",
        "{locked} is read-only, and the request is for writing",
        "request it read-only",
        "read-only-device",
    ),
    in_use(
        "attach --device file:{mounted_img} --vm roomy --owner c1",
        "{mounted_img} is behind the loop device {mounted}",
        "hand over {mounted} itself",
        "has-holders",
    ),
    in_use(
        "attach --device b:{exclusive_no} --vm roomy --owner c1",
        "{exclusive} is open exclusively",
        "fuser --verbose {exclusive}",
        "open-exclusively",
    ),
    in_use(
        "attach --device file:{foreign_img} --vm roomy --owner c1",
        "{foreign_img} is open for writing in VM 'bare', which did not get it from this journal",
        "vmplug reconcile --vm bare",
        "image-locked",
    ),
    in_use(
        "attach --device b:{held_no} --vm roomy --owner c1",
        "({held}|{held_no}) is already handed to VM '?full'?",
        "detach it from VM",
        "in-use-by-vm",
    ),
    in_use(
        "attach --device b:{free_no} --device b:{mounted_no} --vm roomy --owner c1",
        "{mounted} is mounted",
        "umount",
        "mounted-on-host",
    ),
    absent("attach --device b:{free_no} --device b:8:99 --vm roomy --owner c1", "8:99", "ls -l"),
    absent("attach --device b:1:3:/dev/null --vm roomy --owner c1", "char device 1:3", "numbers"),
    Bad(
        command="attach --device b:{free_no} --vm full --owner c1",
        status=HYPERVISOR,
        code="no-free-port",
        says="no free PCI port left",
        hint="detach something",
    ),
    Bad(
        command="attach --device b:{free_no} --vm bare --owner c1",
        status=HYPERVISOR,
        code="no-free-port",
        says="no PCI port to plug into",
        hint="--ports",
    ),
    Bad(
        command="attach --device file:{foreign_img} --allow image-locked --vm roomy --owner c1",
        status=HYPERVISOR,
        code="command-failed",
        says="QEMU refused device_add: .*lock",
        hint="another process has the disk open",
        facts={"command": "device_add", "error_class": "GenericError"},
    ),
    connect(
        "attach --device b:{free_no} --vm dead --owner c1", "{dead_socket}", "vmplug reconcile"
    ),
    connect("plan --device b:{free_no} --vm dead", "{dead_socket}", "vmplug reconcile"),
    connect("detach --owner ctr3", "{dead_socket}", "vmplug reconcile"),
    connect("resize {lost_id}", "{dead_socket}", "vmplug reconcile"),
    state("vm stop full", "VM full still has 2 attachments", "vmplug detach", "still-attached"),
    state(
        "vm adopt full --qmp {full_socket}", "VM full is already in the journal", "vm stop full"
    ),
    state("vm adopt again --qmp {full_socket}", "full", "full"),
    state(
        "attach --device b:{ro_no} --vm full --owner c1",
        "{ro} is plugged read-only, and the request is for writing",
        "detach it",
    ),
    Bad(
        command="resize {held_id} --size 1073741824",
        status=REQUEST,
        code="not-allowed",
        says="{held} .*only the host can grow it",
        hint="grow the device on the host",
    ),
]


@dataclass(frozen=True, slots=True)
class QemuWorld:
    """Real QEMUs without guests, and loop devices in every state."""

    vmplug: Vmplug
    directory: Path
    oracles: tuple[RawQmp, ...]
    places: Places

    def picture(self) -> Picture:
        """What a refusal leaves as it is."""
        return take_picture(self.vmplug.state_dir, self.oracles, self.directory)


@pytest.fixture(scope="module")
def qemu_world() -> Iterator[QemuWorld]:
    with ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="vmplug-", dir="/tmp"))
        )
        vmplug = Vmplug(directory / "state")
        places = make_loops(stack, directory)
        vms = start_vms(stack, directory, places["foreign_img"])
        for name, vm in vms.items():
            vmplug("vm", "adopt", name, "--qmp", vm.qmp_path).answer()
        places |= {
            "full_socket": str(vms["full"].qmp_path),
            "dead_socket": str(vms["dead"].qmp_path),
            "held_id": attach_loop(vmplug, places["held_no"], "full", "ctr0"),
            "ro_id": attach_loop(vmplug, places["ro_no"], "full", "ctr0", "--read-only"),
            "lost_id": attach_loop(vmplug, places["lost_no"], "dead", "ctr3"),
        }
        vms["dead"].kill()
        stack.enter_context(RawQmp.connect(vms["busy"].qmp_path))
        oracles = tuple(vm.oracle for name, vm in vms.items() if name != "dead")
        yield QemuWorld(vmplug, directory, oracles, places)


def make_loops(stack: ExitStack, directory: Path) -> dict[str, str]:
    """Loop devices by name, their numbers by NAME_no and their files by NAME_img."""
    places = {"foreign_img": str(disk_image(directory / "foreign.img", 1, "foreign"))}
    for name in ("free", "held", "lost", "ro", "locked", "exclusive", "mounted"):
        image = disk_image(directory / f"{name}.img", 8, name)
        if name == "mounted":
            subprocess.run(["mkfs.ext4", "-q", image], check=True)
        node = stack.enter_context(loop_device(image, read_only=name in {"ro", "locked"}))
        places |= {name: str(node), f"{name}_no": number_of(node), f"{name}_img": str(image)}
    holder = os.open(places["exclusive"], os.O_RDONLY | os.O_EXCL)
    stack.callback(os.close, holder)
    mount_point = directory / "mnt"
    mount_point.mkdir()
    subprocess.run(["mount", places["mounted"], mount_point], check=True)
    stack.callback(lambda: subprocess.run(["umount", mount_point], check=True))
    return places | {"mount_point": str(mount_point)}


def start_vms(stack: ExitStack, directory: Path, foreign: str) -> dict[str, GuestVm]:
    """QEMUs by name; `bare` has the image `foreign` open, which vmplug does not know."""
    ports = {"full": 2, "roomy": 3, "bare": 0, "dead": 2, "busy": 2}
    node = {"driver": "file", "node-name": "foreign", "filename": foreign}
    disk = {"driver": "virtio-blk-pci", "drive": "foreign", "id": "foreign"}
    extra = ["-blockdev", json.dumps(node), "-device", json.dumps(disk)]
    vms = {}
    for name, count in ports.items():
        logs = directory / name
        logs.mkdir()
        more = extra if name == "bare" else []
        vm = start_vm(logs, devices=root_ports(count), extra=more, guest=False)
        vms[name] = stack.enter_context(vm)
    return vms


def attach_loop(vmplug: Vmplug, number: str, vm: str, owner: str, *more: str) -> str:
    """The id of a new attachment."""
    words = ("--device", f"b:{number}", "--vm", vm, "--owner", owner, *more, "--json")
    (attachment,) = vmplug("attach", *words).json()["attachments"]
    return str(attachment["id"])


@pytest.mark.root
@pytest.mark.qemu
@pytest.mark.parametrize("bad", ON_QEMU, ids=str)
def test_on_qemu_it_is_refused_in_one_sentence_and_nothing_has_changed(
    qemu_world: QemuWorld, bad: Bad
) -> None:
    before = qemu_world.picture()
    refused(qemu_world.vmplug, bad, qemu_world.places)
    assert qemu_world.picture() == before


@pytest.mark.root
@pytest.mark.qemu
def test_a_busy_qemu_is_waited_for_and_nothing_has_changed(qemu_world: QemuWorld) -> None:
    """Both wait at the same time, as that is all they do."""
    words = "attach --device b:{free_no} --vm busy --owner c1"
    bad = connect(words, "busy with another", "for vmplug alone")
    before, places = qemu_world.picture(), qemu_world.places
    begun = [qemu_world.vmplug.begin(*said) for said in both_ways(bad, places)]
    text, told = map(ended, begun)
    told_the_same(text, told, bad, places)
    assert qemu_world.picture() == before


START = [
    Bad(
        command=f"vm start new --accel tcg {more}",
        status=HYPERVISOR,
        code="hypervisor-error",
        says=f"QEMU did not start: .*{says}",
        hint="vmplug vm start --help",
    )
    for more, says in (
        ("-- -frobnicate", "-frobnicate: invalid option"),
        ("-- -cpu max,+frobnicate", "frobnicate"),
        ("-- -chardev null,id=a -chardev null,id=a", "Duplicate ID 'a'"),
        ("--kernel {kernel}", "invalid kernel header"),
        ("--kernel {kernel} -- -cpu qemu64,+vmx", "invalid kernel header"),  # warns first
    )
]


@pytest.mark.qemu
@pytest.mark.parametrize("bad", START, ids=str)
def test_a_qemu_that_does_not_come_up_leaves_nothing(
    vmplug: Vmplug, tmp_path: Path, bad: Bad
) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_text("no kernel")
    lay_journal(vmplug.state_dir)
    before = journal_rows(vmplug.state_dir)
    refused(vmplug, bad, {"kernel": str(kernel)})
    assert journal_rows(vmplug.state_dir) == before
    assert processes_below(vmplug.state_dir) == []
    assert not list(vmplug.state_dir.glob("vm/*"))
