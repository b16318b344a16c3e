"""The virtiofsd processes of vmplug: how they are called, and their whole life on this host."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.support.daemons import VIRTIOFSD
from tests.support.vhost_user.messages import HEADER, U64, VERSION, Request
from vmplug.drivers.plug import VirtiofsdSpec
from vmplug.errors import BackendError
from vmplug.host.process import find_marked, wait_for_end
from vmplug.host.program import PROGRAM_PATH
from vmplug.host.root import HostRoot
from vmplug.host.vhost_user.virtiofsd import ask_options
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner, VirtiofsdProcess, command_line

ID, OTHER_ID = "0123456789abcdef", "fedcba9876543210"
TIMEOUT_S = 60.0
OF_C = frozenset({"-o source", "-o announce_submounts"})
OF_RUST = frozenset({"--shared-dir", "--readonly", "--announce-submounts", "--inode-file-handles"})


def daemon(
    directory: Path | str = "/srv/work",
    *,
    program: str = "/usr/libexec/virtiofsd",
    options: frozenset[str] = OF_C,
    cache: str = "auto",
    read_only: bool = False,
) -> VirtiofsdSpec:
    return VirtiofsdSpec(
        program=program,
        options=options,
        directory=str(directory),
        cache=cache,
        read_only=read_only,
    )


def real(directory: Path, *, read_only: bool = False) -> VirtiofsdSpec:
    """The host's own virtiofsd."""
    program = str(VIRTIOFSD)
    return daemon(directory, program=program, options=ask_options(program), read_only=read_only)


# The command line


def test_a_daemon_is_given_its_listener_and_its_directory() -> None:
    assert command_line(daemon(), 7) == [
        "/usr/libexec/virtiofsd",
        "--fd=7",
        *("-o", "source=/srv/work"),
        *("-o", "cache=auto"),
        *("-o", "sandbox=namespace"),
        *("-o", "announce_submounts"),
    ]
    assert command_line(daemon(options=OF_RUST), 7) == [
        "/usr/libexec/virtiofsd",
        "--fd=7",
        "--shared-dir=/srv/work",
        "--cache=auto",
        "--sandbox=namespace",
        "--announce-submounts",
        "--inode-file-handles=never",
    ]


@pytest.mark.parametrize("options", [frozenset[str](), frozenset({"--shared-dir"})])
def test_only_what_a_daemon_has_is_asked_of_it(options: frozenset[str]) -> None:
    words = command_line(daemon(options=options, read_only=True), 7)
    optional = {"submounts", "readonly", "handles"}
    assert not any(part in word for word in words for part in optional)
    assert words[0] == "unshare"


@pytest.mark.parametrize(
    ("cache", "options", "said"),
    [
        *((cache, OF_C, f"cache={cache}") for cache in ("auto", "always")),
        *((cache, OF_RUST, f"--cache={cache}") for cache in ("auto", "always", "never")),
        ("never", OF_C, "cache=none"),
    ],
)
def test_the_cache_is_handed_on(cache: str, options: frozenset[str], said: str) -> None:
    assert said in command_line(daemon(options=options, cache=cache), 7)


def test_one_that_can_is_asked_to_write_nothing() -> None:
    plain = command_line(daemon(options=OF_RUST), 7)
    words = command_line(daemon(options=OF_RUST, read_only=True), 7)
    assert words == [*plain, "--readonly"]


@pytest.mark.parametrize("options", [OF_C, OF_RUST - {"--readonly"}])
def test_another_that_must_not_write_gets_a_read_only_mount_first(options: frozenset[str]) -> None:
    plain = command_line(daemon("/sys", options=options), 7)
    unshare, mount, shell, dash_c, script, how, *rest = command_line(
        daemon("/srv/a b", options=options, read_only=True), 7
    )
    assert (unshare, mount, shell, dash_c) == ("unshare", "--mount", "sh", "-c")
    assert (how, rest) == ("bind,ro", plain)
    assert " . /sys " in script  # the working directory, by no name


@pytest.mark.parametrize("options", [OF_C, OF_RUST])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_directory_that_was_checked_is_named_by_nothing(
    options: frozenset[str], *, read_only: bool
) -> None:
    """Whoever turns its name afterwards changes nothing."""
    checked = replace(daemon("/srv/a b", options=options, read_only=read_only), file_id="inode 1")
    words = command_line(checked, 7)
    assert words[:2] == ["unshare", "--mount"]
    assert not any("/srv" in word for word in words)
    is_mounted_so = read_only and "--readonly" not in options
    assert ("bind,ro" if is_mounted_so else "rbind") in words


@pytest.mark.parametrize(
    ("directory", "source"),
    [
        ("/srv/a,b", "source=/srv/a\\,b"),
        ("/srv/a\\b", "source=/srv/a\\\\b"),
        ("/srv/a\\,b", "source=/srv/a\\\\\\,b"),
        ("/srv/x,cache=always", "source=/srv/x\\,cache=always"),
        ("/srv/a b'\"$(x)", "source=/srv/a b'\"$(x)"),
    ],
)
def test_no_name_of_a_directory_is_an_option(directory: str, source: str) -> None:
    assert command_line(daemon(directory), 7)[3] == source
    assert command_line(daemon(directory, options=OF_RUST), 7)[2] == f"--shared-dir={directory}"


@given(st.text(st.characters(exclude_characters="\0"), min_size=1).map(lambda name: f"/{name}"))
def test_the_source_is_read_back_as_the_directory(directory: str) -> None:
    """As libfuse reads it: a backslash takes the next character out of its meaning."""
    arguments = command_line(daemon(directory), 7)
    assert [a for a in arguments if a.startswith("source=")] == arguments[3:4]
    read, rest = "", iter(arguments[3].removeprefix("source="))
    for character in rest:
        assert character != ","
        read += next(rest) if character == "\\" else character
    assert read == directory


# What is marked


def test_processes_are_found_by_what_they_were_given() -> None:
    variable = f"VMPLUG_TEST_{os.getpid()}"
    assert find_marked(variable) == {}
    environment = {variable: f"{ID} /run/a b", f"X{variable}": "no"}
    command = [sys.executable, "-S", "-c", "print(flush=True); input()"]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin
        assert child.stdout
        child.stdout.readline()
        assert find_marked(variable) == {child.pid: f"{ID} /run/a b"}
        child.stdin.write(b"\n")
        child.stdin.close()
        assert wait_for_end(child.pid, TIMEOUT_S)
    assert find_marked(variable) == {}


# A life, with a program that stands in for virtiofsd

_STAND_IN = """#!{python} -S
import contextlib, os, signal, socket, sys
descriptor = int(sys.argv[1].removeprefix("--fd="))
source = sys.argv[3].removeprefix("source=")
if source.endswith("deaf"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with socket.socket(fileno=descriptor) as listener:
    connection, _ = listener.accept()
    with connection:
        print("serving", source, file=sys.stderr, flush=True)
        connection.sendall(source.encode() + b"\\n")
        while (more := connection.recv(64)) or source.endswith("deaf"):
            with contextlib.suppress(BrokenPipeError):  # a daemon goes on when nobody reads it
                print(more.decode(), file=sys.stderr, flush=True)
            signal.pause() if source.endswith("deaf") else None
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "virtiofsd"
    path.write_text(_STAND_IN.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[str]:
    """A VM's name, of which no daemon is left."""
    name = f"{tmp_path}/a b/qmp.sock"
    yield name
    HostVirtiofsdRunner(name).end([ID, OTHER_ID])
    assert HostVirtiofsdRunner(name).find() == {}


def first_words(started: VirtiofsdProcess) -> str:
    """What the stand-in says first; it has its listener by then."""
    started.connection.settimeout(TIMEOUT_S)
    with started.connection.makefile() as words:
        return words.readline().rstrip("\n")


@contextmanager
def running(vm: str, made: VirtiofsdSpec, device_id: str = ID) -> Iterator[VirtiofsdProcess]:
    with HostVirtiofsdRunner(vm).start(made, device_id) as started:
        assert first_words(started) == made.directory
        yield started


def test_a_daemon_serves_the_one_connection_and_is_found_by_its_device(
    program: str, vm: str
) -> None:
    with running(vm, daemon(program=program)) as started:
        assert started.descriptor == started.connection.fileno()
        assert started.stderr_tail() == "serving /srv/work"
        daemons = HostVirtiofsdRunner(vm)
        (pid,) = daemons.find().values()
        assert daemons.find() == daemons.find([ID]) == daemons.find([ID, OTHER_ID]) == {ID: pid}
        assert daemons.find([OTHER_ID]) == daemons.find([]) == {}
        assert HostVirtiofsdRunner(f"{vm}x").find() == {}


def test_nobody_else_can_reach_it(program: str, vm: str) -> None:
    with running(vm, daemon(program=program)) as started:
        name = os.fsdecode(started.connection.getpeername())
        assert not Path(name).parent.exists()


def test_a_daemon_inherits_only_what_it_needs(program: str, vm: str) -> None:
    with ExitStack() as stack:
        ours = stack.enter_context(tempfile.TemporaryFile())
        os.set_inheritable(ours.fileno(), True)  # noqa: FBT003  its own word
        stack.enter_context(running(vm, daemon(program=program)))
        (pid,) = HostVirtiofsdRunner(vm).find().values()
        variables = Path(f"/proc/{pid}/environ").read_bytes().rstrip(b"\0").split(b"\0")
        assert {v.partition(b"=")[0] for v in variables} == {
            b"PATH",
            b"LC_ALL",
            b"VMPLUG_DEVICE",
            b"VMPLUG_DIRECTORY",
        }
        assert b"PATH=" + PROGRAM_PATH.encode() in variables
        assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
        opened = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
        assert not any(f"/#{os.fstat(ours.fileno()).st_ino}" in name for name in opened)


def test_it_is_no_child_and_in_no_group_of_this_process(program: str, vm: str) -> None:
    """It outlives vmplug, and a signal to its group never reaches vmplug's own."""
    with running(vm, daemon(program=program)):
        (pid,) = HostVirtiofsdRunner(vm).find().values()
        assert os.getpgid(pid) == os.getsid(pid) != os.getpgrp()
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def test_it_ends_by_itself_when_its_client_hangs_up(program: str, vm: str) -> None:
    with running(vm, daemon(program=program)):
        (pid,) = HostVirtiofsdRunner(vm).find().values()
    assert wait_for_end(pid, TIMEOUT_S)
    assert HostVirtiofsdRunner(vm).find() == {}


def test_only_the_daemons_of_the_devices_that_were_named_are_ended(program: str, vm: str) -> None:
    with (
        running(vm, daemon(program=program), ID),
        running(vm, daemon("/srv/b", program=program), OTHER_ID),
    ):
        daemons = HostVirtiofsdRunner(vm)
        pids = daemons.find()
        HostVirtiofsdRunner(f"{vm}x").end([ID, OTHER_ID])
        daemons.end([])
        assert daemons.find() == pids
        daemons.end([ID])
        assert daemons.find() == {OTHER_ID: pids[OTHER_ID]}
        daemons.end([ID, OTHER_ID])
        assert daemons.find() == {}
        daemons.end([ID, OTHER_ID])


def test_all_daemons_of_a_device_are_ended_each_for_itself(program: str, vm: str) -> None:
    """The second was started though the first had not ended yet; they are in two groups."""
    with (
        running(vm, daemon(program=program)) as first,
        running(vm, daemon("/srv/deaf", program=program)) as second,
    ):
        HostVirtiofsdRunner(vm, grace_s=0.1).end([ID])
        assert HostVirtiofsdRunner(vm).find() == {}
        for started in (first, second):
            assert hung_up(started.connection)


def test_a_daemon_that_does_not_stop_in_time_is_killed(program: str, vm: str) -> None:
    with running(vm, daemon("/srv/deaf", program=program)):
        (pid,) = HostVirtiofsdRunner(vm).find().values()
        began = time.monotonic()
        HostVirtiofsdRunner(vm, grace_s=0.1).end([ID])
        assert 0.1 < time.monotonic() - began < TIMEOUT_S
        assert wait_for_end(pid, 0)


def test_what_it_prints_later_is_kept_until_its_share_is_gone(
    program: str, vm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it has died: by then somebody wants to know why."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with HostVirtiofsdRunner(vm).start(daemon(program=program), ID) as started:
        first_words(started)
        client = started.connection.dup()  # as QEMU has one
    with client:
        client.sendall(b"no space left")
    marked = [pid for pid, mark in find_marked("VMPLUG_DEVICE").items() if mark.endswith(vm)]
    assert all(wait_for_end(pid, TIMEOUT_S) for pid in marked)
    (log,) = tmp_path.glob(f"vmplug-{ID}-*/virtiofsd.log")
    assert log.read_text() == "serving /srv/work\nno space left\n"
    assert log.parent.stat().st_mode & 0o777 == 0o700
    HostVirtiofsdRunner(vm).end([OTHER_ID])
    assert log.exists()
    HostVirtiofsdRunner(vm).end([ID])
    assert not log.parent.exists()


def test_the_keeper_of_its_output_is_not_taken_for_it(program: str, vm: str) -> None:
    with HostVirtiofsdRunner(vm).start(daemon(program=program), ID) as started:
        first_words(started)
        client = started.connection.dup()
    with client:
        runner = HostVirtiofsdRunner(vm)
        (pid,) = runner.find().values()
        assert runner.find([ID]) == {ID: pid}
        os.kill(pid, signal.SIGKILL)
        assert wait_for_end(pid, TIMEOUT_S)
        assert runner.find() == {}


def test_without_room_for_its_output_the_share_works_as_well(
    program: str, vm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HostVirtiofsdRunner(vm).start(daemon(program=program), ID) as started:
        first_words(started)
        client = started.connection.dup()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with client:
        client.sendall(b"nobody reads this")
        (pid,) = HostVirtiofsdRunner(vm).find().values()
        client.shutdown(socket.SHUT_WR)
        assert wait_for_end(pid, TIMEOUT_S)


def test_a_log_that_another_vmplug_removes_meanwhile_is_gone(
    vm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / f"vmplug-{ID}-x"
    directory.mkdir()
    list_entries = os.scandir

    def lose_after_listing(path: str) -> nullcontext[list["os.DirEntry[str]"]]:
        with list_entries(path) as entries:
            found = list(entries)
        directory.rmdir()
        return nullcontext(found)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", lose_after_listing)
        HostVirtiofsdRunner(vm).end([ID])
    assert not directory.exists()


_BEGIN_AND_END = """
import sys
from vmplug.drivers.plug import VirtiofsdSpec
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner
daemons = HostVirtiofsdRunner(sys.argv[1])
daemon = VirtiofsdSpec(
    program=sys.argv[2], options=frozenset(), directory="/", cache="auto", read_only=False
)
for _ in range(50):
    with daemons.start(daemon, "0123456789abcdef"):
        daemons.end(["0123456789abcdef"])
print("done")
"""


def test_ending_a_new_daemon_ends_no_other_process(program: str, vm: str) -> None:
    """For a moment it is a copy of what starts it, which is in vmplug's group."""
    command = [sys.executable, "-c", _BEGIN_AND_END, vm, program]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, start_new_session=True
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_program_that_cannot_run_is_reported_with_its_own_message(
    tmp_path: Path, vm: str
) -> None:
    """What runs it is no child of ours, so its words come after it was started."""
    with HostVirtiofsdRunner(vm).start(daemon(program=str(tmp_path / "none")), ID) as started:
        started.connection.settimeout(TIMEOUT_S)
        assert hung_up(started.connection)
        assert "none" in started.stderr_tail()
    assert HostVirtiofsdRunner(vm).find() == {}


def hung_up(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:  # it never took the connection
        return True


def test_when_none_can_be_started_nothing_is_left(vm: str) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    directory = "/" + "x" * (1 << 20)  # more than an argument may have
    with pytest.raises(BackendError, match="Argument list too long") as caught:
        HostVirtiofsdRunner(vm).start(daemon(directory), ID)
    assert caught.value.socket == "/usr/libexec/virtiofsd"
    assert "/usr/libexec/virtiofsd cannot be started on /x" in caught.value.message
    assert caught.value.hint
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert HostVirtiofsdRunner(vm).find() == {}


def test_closing_gives_back_what_was_opened(program: str, vm: str) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with running(vm, daemon(program=program)):
        assert len(os.listdir("/proc/self/fd")) > descriptors
    assert len(os.listdir("/proc/self/fd")) == descriptors


# A life, with the real one


def ask_features(connection: socket.socket) -> int:
    """The first word of vhost-user; virtiofsd must have begun to answer it."""
    connection.settimeout(TIMEOUT_S)
    connection.sendall(HEADER.pack(Request.GET_FEATURES, VERSION, 0))
    answer = b""
    while len(answer) < HEADER.size + U64.size:
        more = connection.recv(64)
        assert more
        answer += more
    number, _, size = HEADER.unpack_from(answer)
    assert (number, size) == (Request.GET_FEATURES, U64.size)
    return int(U64.unpack_from(answer, HEADER.size)[0])


needs_virtiofsd = pytest.mark.skipif(not VIRTIOFSD.exists(), reason="needs a virtiofsd")


@needs_virtiofsd
def test_the_real_one_says_how_it_takes_a_directory() -> None:
    options = ask_options(str(VIRTIOFSD))
    assert "--fd" in options
    assert len({"--shared-dir", "-o source"} & options) == 1
    assert {"--announce-submounts", "-o announce_submounts"} & options


def test_a_program_that_cannot_be_run_has_no_options(tmp_path: Path) -> None:
    assert ask_options(str(tmp_path / "none")) == frozenset()


_END = """
mount -t tmpfs -o ro none /tmp
mount -t tmpfs -o ro none /var/tmp
cd /proc
exec "$0" -c "$1"
"""
_PYTHON = "from vmplug.hypervisor.virtiofsd import *; HostVirtiofsdRunner('/qmp').end(['1'])"


@pytest.mark.root
def test_a_share_goes_where_no_directory_for_temporary_files_is_left() -> None:
    """As when all of them are full: its log cannot be looked for."""
    command = ["unshare", "--mount", "sh", "-ec", _END, sys.executable, _PYTHON]
    said = subprocess.run(
        command, env=os.environ | {"TMPDIR": "/proc"}, capture_output=True, text=True, check=False
    )
    assert (said.returncode, said.stderr) == (0, "")


@pytest.mark.root
@needs_virtiofsd
@pytest.mark.parametrize("read_only", [False, True], ids=["rw", "ro"])
@pytest.mark.parametrize("name", ["plain", "a b", "a,b", "back\\slash", "x,cache=always"])
def test_a_real_virtiofsd_is_started_found_and_ended(
    tmp_path: Path, vm: str, name: str, *, read_only: bool
) -> None:
    directory = tmp_path / name
    directory.mkdir()
    made = real(directory, read_only=read_only)
    daemons = HostVirtiofsdRunner(vm)
    with daemons.start(made, ID) as started:
        assert ask_features(started.connection), started.stderr_tail()
        (pid,) = daemons.find([ID]).values()
        assert HostRoot().read_text(f"/proc/{pid}/comm") == "virtiofsd\n"
        daemons.end([ID])
        assert wait_for_end(pid, 0)
    assert daemons.find() == {}
    assert not os.path.ismount(directory)  # the read-only mount was in a namespace of its own


@pytest.mark.root
@needs_virtiofsd
def test_a_real_virtiofsd_ends_when_its_client_hangs_up(tmp_path: Path, vm: str) -> None:
    with HostVirtiofsdRunner(vm).start(real(tmp_path), ID) as started:
        assert ask_features(started.connection), started.stderr_tail()
        pids = [p for p, mark in find_marked("VMPLUG_DEVICE").items() if mark == f"{ID} {vm}"]
        assert pids
    assert all(wait_for_end(pid, TIMEOUT_S) for pid in pids)
    assert HostVirtiofsdRunner(vm).find() == {}


@pytest.mark.root
@needs_virtiofsd
def test_a_directory_that_has_gone_is_told_in_its_words(tmp_path: Path, vm: str) -> None:
    with HostVirtiofsdRunner(vm).start(real(tmp_path / "none"), ID) as started:
        started.connection.settimeout(TIMEOUT_S)
        assert hung_up(started.connection)
        assert started.stderr_tail()
    assert HostVirtiofsdRunner(vm).find() == {}


@pytest.mark.root
@needs_virtiofsd
def test_a_directory_that_has_gone_before_it_is_mounted_is_told_at_once(
    tmp_path: Path, vm: str
) -> None:
    made = daemon(tmp_path / "none", program=str(VIRTIOFSD), options=OF_C, read_only=True)
    with pytest.raises(BackendError, match="No such file"):
        HostVirtiofsdRunner(vm).start(made, ID)
    assert HostVirtiofsdRunner(vm).find() == {}


@pytest.mark.root
@needs_virtiofsd
@pytest.mark.parametrize("read_only", [False, True], ids=["rw", "ro"])
def test_the_mount_of_a_real_virtiofsd_takes_writes_unless_only_a_mount_refuses_them(
    tmp_path: Path, vm: str, *, read_only: bool
) -> None:
    """One with --readonly refuses them itself, which tests/qemu/test_shares.py tries."""
    (tmp_path / "file").write_text("x")
    made = real(tmp_path, read_only=read_only)
    with HostVirtiofsdRunner(vm).start(made, ID) as started:
        assert ask_features(started.connection), started.stderr_tail()
        pids = [p for p, mark in find_marked("VMPLUG_DEVICE").items() if mark == f"{ID} {vm}"]
        shown = [path for pid in pids if (path := Path(f"/proc/{pid}/root/file")).exists()]
        assert shown
        for path in shown:
            is_mounted_so = read_only and "--readonly" not in made.options
            assert bool(os.statvfs(path).f_flag & os.ST_RDONLY) is is_mounted_so
    assert (tmp_path / "file").read_text() == "x"


def test_without_a_temporary_directory_there_is_no_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(BackendError, match="No such file or directory") as caught:
        HostVirtiofsdRunner("here").start(daemon(tmp_path), ID)
    assert "TMPDIR" in (caught.value.hint or "")
