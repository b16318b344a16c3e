"""Backends that are asked before QEMU is: real sockets, and other hosts' lists of them."""

import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.tree import HostTree
from tests.support.vhost_user.messages import Connection
from tests.support.vhost_user.scsi import Disk, ScsiDevice
from tests.support.vhost_user.session import converse
from vmplug.host.finding import NEVER_ALLOWED, Code
from vmplug.host.kind import DeviceType
from vmplug.host.root import HostRoot
from vmplug.host.use.questions import PATIENCE_S, Questions
from vmplug.host.vhost_user.device import Backend, VhostUserSocket
from vmplug.host.vhost_user.peer import find_file_at, find_own_file, has_hung_up, read_facts
from vmplug.host.vhost_user.probe import Failure, ask_backend, probe
from vmplug.host.vhost_user.sockets import Listener, UnixSockets

BLK, SCSI = DeviceType.VHOST_USER_BLK, DeviceType.VHOST_USER_SCSI
NET, FS = DeviceType.VHOST_USER_NET, DeviceType.VHOST_USER_FS
SERVED = (BLK, SCSI, NET)

AT_ONCE_S = 0.2
"""For a backend that will not answer anyway."""
HANG_UP_S = 0.01
TIMEOUT_S = 60.0

HEADER, U64 = struct.Struct("<III"), struct.Struct("<Q")
REPLY = 0x5
GET_FEATURES, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM = 1, 15, 17
HAS_PROTOCOL, HAS_QUEUES = 1 << 30, 1 << 0
HAS_CONFIG, HAS_MEMORY_SLOTS = 1 << 9, 1 << 15

Talk = Callable[[socket.socket], None]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short one, as the paths of sockets may have 107 bytes only."""
    with tempfile.TemporaryDirectory("", "vmplug-", "/tmp") as path:
        yield Path(path).resolve()


@contextmanager
def backend(path: Path, talk: Talk) -> Iterator[str]:
    """A thread that talks to one client after another at `path`."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with suppress(OSError):  # shut down below
                while True:
                    connection, _ = listener.accept()
                    with connection, suppress(OSError):
                        connection.settimeout(TIMEOUT_S)
                        talk(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield str(path)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()


def speaks(
    features: int, *, protocol: int = HAS_QUEUES, queues: int = 1, answers: int = 3
) -> Talk:
    """Answers so many questions of vhost-user, and hangs up then."""
    known = {GET_FEATURES: features, GET_PROTOCOL_FEATURES: protocol, GET_QUEUE_NUM: queues}

    def talk(connection: socket.socket) -> None:
        for _ in range(answers):
            request = connection.recv(HEADER.size)
            if not request:
                return
            number, flags, size = HEADER.unpack(request)
            assert (flags, size) == (1, 0)
            connection.sendall(HEADER.pack(number, REPLY, U64.size) + U64.pack(known[number]))

    return talk


def is_silent(connection: socket.socket) -> None:
    while connection.recv(64):
        pass


def says(data: bytes) -> Talk:
    """Says that, whatever it is asked, and waits for the other to hang up."""

    def talk(connection: socket.socket) -> None:
        connection.sendall(data)
        is_silent(connection)

    return talk


def is_absent(path: Path) -> None:
    """A socket that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))


def device(kind: DeviceType, path: Path | str) -> VhostUserSocket:
    return VhostUserSocket(kind=kind, socket_path=str(path))


# What a backend answers


@pytest.mark.parametrize(
    ("features", "protocol", "queues", "expected"),
    [
        (0, 0, 9, Backend(features=0, queues=1)),
        (1 << 5, HAS_QUEUES, 9, Backend(features=1 << 5, queues=1)),
        (HAS_PROTOCOL, 0, 9, Backend(features=HAS_PROTOCOL, queues=1)),
        (HAS_PROTOCOL, 1 << 3, 9, Backend(features=HAS_PROTOCOL, queues=1)),
        (HAS_PROTOCOL, HAS_QUEUES, 9, Backend(features=HAS_PROTOCOL, queues=9)),
        (HAS_PROTOCOL, HAS_QUEUES, 0, Backend(features=HAS_PROTOCOL, queues=1)),
        (HAS_PROTOCOL, HAS_CONFIG, 9, Backend(features=HAS_PROTOCOL, queues=1, has_config=True)),
        (
            HAS_PROTOCOL,
            HAS_MEMORY_SLOTS,
            9,
            Backend(features=HAS_PROTOCOL, queues=1, has_memory_slots=True),
        ),
        (
            (1 << 64) - 1,
            (1 << 64) - 1,
            256,
            Backend((1 << 64) - 1, 256, has_config=True, has_memory_slots=True),
        ),
    ],
)
def test_features_and_queues_are_what_the_backend_says(
    directory: Path, features: int, protocol: int, queues: int, expected: Backend
) -> None:
    talk = speaks(features, protocol=protocol, queues=queues)
    with backend(directory / "s", talk) as path:
        assert probe(path) == expected
        assert probe(path) == expected  # which was hung up on, and serves the next


def test_an_answer_may_come_in_pieces(directory: Path) -> None:
    def talk(connection: socket.socket) -> None:
        connection.recv(HEADER.size)
        for byte in HEADER.pack(GET_FEATURES, REPLY, 8) + U64.pack(1 << 5):
            connection.send(bytes([byte]))
        is_silent(connection)

    with backend(directory / "s", talk) as path:
        assert probe(path) == Backend(features=1 << 5, queues=1)


@pytest.mark.parametrize("answers", [0, 1, 2])
def test_one_that_hangs_up_speaks_no_vhost_user(directory: Path, answers: int) -> None:
    talk = speaks(HAS_PROTOCOL, answers=answers)
    with backend(directory / "s", talk) as path:
        assert probe(path) is Failure.CLOSED


@pytest.mark.parametrize(
    "data",
    [
        HEADER.pack(GET_FEATURES, REPLY, 0),
        HEADER.pack(GET_FEATURES, REPLY, 4) + bytes(4),
        HEADER.pack(GET_FEATURES, REPLY, 9) + bytes(9),
        HEADER.pack(GET_FEATURES, REPLY, (1 << 32) - 1),
        HEADER.pack(GET_FEATURES, REPLY, 1 << 20) + bytes(1 << 20),
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b'{"QMP": {"version": {}, "capabilities": []}}\r\n',
    ],
)
def test_garbage_is_no_vhost_user_and_is_not_waited_for(directory: Path, data: bytes) -> None:
    with backend(directory / "s", says(data)) as path:
        began = time.monotonic()
        assert probe(path, timeout_s=TIMEOUT_S) is Failure.CLOSED
        assert time.monotonic() - began < TIMEOUT_S / 2


@pytest.mark.parametrize("data", [b"", b"\1", HEADER.pack(GET_FEATURES, REPLY, 8) + bytes(7)])
def test_one_that_says_too_little_is_silent(directory: Path, data: bytes) -> None:
    with backend(directory / "s", says(data)) as path:
        assert probe(path, timeout_s=AT_ONCE_S) is Failure.SILENT


def test_one_that_dribbles_is_silent_all_the_same(directory: Path) -> None:
    """The deadline is for the whole answer, not for each byte of it."""
    answer, sent = HEADER.pack(GET_FEATURES, REPLY, 8) + bytes(8), list[int]()

    def talk(connection: socket.socket) -> None:
        for byte in answer[:-1]:
            time.sleep(AT_ONCE_S / 2)
            connection.send(bytes([byte]))
            sent.append(byte)
        is_silent(connection)

    with backend(directory / "s", talk) as path:
        assert probe(path, timeout_s=AT_ONCE_S) is Failure.SILENT
        assert len(sent) < len(answer) - 1, "it was waited for to its last byte"


def test_one_whose_queue_is_full_is_silent(directory: Path) -> None:
    path = str(directory / "s")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        assert probe(path, timeout_s=AT_ONCE_S) is Failure.SILENT


def test_a_socket_without_a_listener_is_absent(directory: Path) -> None:
    assert probe(str(directory / "none")) is Failure.ABSENT
    is_absent(directory / "gone")
    assert probe(str(directory / "gone")) is Failure.ABSENT


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_socket_of_another_kind_speaks_no_vhost_user(directory: Path, kind: int) -> None:
    path = str(directory / "s")
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(path)
        assert probe(path, timeout_s=AT_ONCE_S) is Failure.CLOSED


# What that means for a device


def problem(
    found: VhostUserSocket, root: HostRoot | None = None, *, timeout_s: float = PATIENCE_S
) -> tuple[Code, str]:
    """The only finding, of a device that stays as it was."""
    asked, (finding,) = ask_backend(found, root or HostRoot(), Questions(timeout_s))
    assert asked == found
    assert finding.hint
    assert found.socket_path in finding.message
    return finding.code, finding.message


@pytest.mark.parametrize("kind", SERVED)
def test_a_good_backend_is_kept_with_the_device(directory: Path, kind: DeviceType) -> None:
    with backend(
        directory / "s", speaks(HAS_PROTOCOL, protocol=HAS_QUEUES | HAS_CONFIG, queues=6)
    ) as path:
        asked, findings = ask_backend(device(kind, path), HostRoot())
    assert findings == []
    assert asked._replace(backend=None) == device(kind, path)
    assert asked.backend
    assert asked.backend.features == HAS_PROTOCOL


@pytest.mark.parametrize(
    ("kind", "said", "request_queues"),
    [(BLK, 6, 6), (NET, 6, 6), (SCSI, 6, 4), (SCSI, 3, 1), (SCSI, 1, 1), (BLK, 0, 1)],
)
def test_a_scsi_controller_counts_two_queues_that_are_not_for_requests(
    directory: Path, kind: DeviceType, said: int, request_queues: int
) -> None:
    """Source: virtio specification, 5.6.2: controlq and eventq come first."""
    with backend(
        directory / "s", speaks(HAS_PROTOCOL, protocol=HAS_QUEUES | HAS_CONFIG, queues=said)
    ) as path:
        asked, _ = ask_backend(device(kind, path), HostRoot())
    assert asked.backend
    assert asked.backend.queues == request_queues


def test_a_whole_backend_answers_like_the_few_words_above(directory: Path) -> None:
    with (directory / "disk").open("w+b") as image:
        image.truncate(1 << 20)
        disk = Disk(image.fileno(), serial="s", writable=True)

        def talk(connection: socket.socket) -> None:
            connection.settimeout(None)
            converse(Connection(connection), ScsiDevice(disk))

        with backend(directory / "s", talk) as path:
            asked, findings = ask_backend(device(SCSI, path), HostRoot())
            assert (asked.backend and asked.backend.queues, findings) == (1, [])
            assert ask_backend(device(SCSI, path), HostRoot()) == (asked, findings)


@pytest.mark.parametrize("kind", [*SERVED, FS])
def test_an_absent_backend_is_told_and_never_allowed(directory: Path, kind: DeviceType) -> None:
    path = directory / "s"
    is_absent(path)
    code, message = problem(device(kind, path))
    assert (code, message) == (
        Code.NO_BACKEND,
        f"{path} cannot be used: no process listens on it",
    )
    assert code in NEVER_ALLOWED


@pytest.mark.parametrize("kind", SERVED)
def test_one_that_hangs_up_is_told_with_whom_to_look_at(directory: Path, kind: DeviceType) -> None:
    with backend(directory / "s", lambda _: None) as path:
        asked, (finding,) = ask_backend(device(kind, path), HostRoot())
    assert asked.backend is None
    assert finding.code is Code.BACKEND_SILENT
    assert "does not speak vhost-user" in finding.message
    assert f"process {os.getpid()}" in finding.hint


def test_a_silent_one_is_told_and_never_allowed(directory: Path) -> None:
    with backend(directory / "s", is_silent) as path:
        code, message = problem(device(BLK, path), timeout_s=AT_ONCE_S)
    assert code is Code.BACKEND_SILENT
    assert "does not answer" in message
    assert code in NEVER_ALLOWED


@pytest.mark.parametrize("features", [1 << 5, 1 << 9 | HAS_PROTOCOL])
def test_another_kinds_backend_is_not_given_to_a_scsi_controller(
    directory: Path, features: int
) -> None:
    with backend(directory / "s", speaks(features)) as path:
        code, message = problem(device(SCSI, path))
        assert ask_backend(device(NET, path), HostRoot())[1] == []
    assert code is Code.WRONG_BACKEND
    assert f"process {os.getpid()}" in message
    assert "does not serve a vhost-user-scsi-pci device" in message


@pytest.mark.parametrize("kind", [*SERVED, FS])
def test_one_that_serves_somebody_is_left_alone(directory: Path, kind: DeviceType) -> None:
    talked: list[socket.socket] = []

    def talk(connection: socket.socket) -> None:
        talked.append(connection)
        connection.sendall(b"!")
        is_silent(connection)

    with backend(directory / "s", talk) as path:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            assert client.recv(1) == b"!"
            assert UnixSockets(HostRoot()).is_connected(path)
            code, message = problem(device(kind, path))
        assert code is Code.BACKEND_BUSY
        assert f"process {os.getpid()} already serves a client on {path}" in message
    assert len(talked) == 1


def test_one_that_was_just_asked_is_not_taken_to_serve_somebody(directory: Path) -> None:
    """It may take a moment to notice that it was hung up on."""

    def talk(connection: socket.socket) -> None:
        speaks(HAS_PROTOCOL, protocol=HAS_QUEUES | HAS_CONFIG)(connection)
        is_silent(connection)
        time.sleep(HANG_UP_S)

    with backend(directory / "s", talk) as path:
        for _ in range(3):
            asked, findings = ask_backend(device(BLK, path), HostRoot())
            assert asked.backend
            assert findings == []


def test_a_client_that_has_hung_up_is_served_no_more_though_the_backend_sleeps(
    directory: Path,
) -> None:
    talking, may_go_on = threading.Event(), threading.Event()

    def talk(connection: socket.socket) -> None:
        talking.set()
        assert may_go_on.wait(TIMEOUT_S)

    with backend(directory / "s", talk) as path:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            assert talking.wait(TIMEOUT_S)
            assert UnixSockets(HostRoot()).is_connected(path)
        assert not UnixSockets(HostRoot()).is_connected(path)
        may_go_on.set()


def test_one_that_has_not_taken_its_client_yet_serves_nobody(directory: Path) -> None:
    path = str(directory / "s")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen(4)
        client.connect(path)
        assert UnixSockets(HostRoot()).is_listening(path)
        assert not UnixSockets(HostRoot()).is_connected(path)


def test_the_kernel_says_of_all_sockets_at_once_what_it_says_of_each(directory: Path) -> None:
    path = str(directory / "s")
    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as client,
        socket.socket(socket.AF_UNIX) as other,
    ):
        listener.bind(path)
        listener.listen(4)
        client.connect(path)
        other.connect(path)
        with listener.accept()[0] as served, listener.accept()[0] as left:
            other.close()
            known = read_facts()
            ends = [os.fstat(one.fileno()).st_ino for one in (listener, client, served, left)]
            assert set(ends) <= known.keys()
            assert [find_own_file(e, known) for e in ends] == [find_own_file(e) for e in ends]
            assert find_own_file(ends[0], known) == find_file_at(path)
            hung_up = [has_hung_up(end, known) for end in ends]
            assert hung_up == [has_hung_up(end) for end in ends]
            assert hung_up[2:] == [False, True]


def test_a_share_is_never_connected_to(directory: Path) -> None:
    path = str(directory / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        assert ask_backend(device(FS, path), HostRoot()) == (device(FS, path), [])
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_of_another_host_nothing_is_said(tree: HostTree) -> None:
    tree.unix_socket("/run/s", 100).process(7, "virtiofsd", "socket:[100]")
    for kind in (*SERVED, FS):
        assert ask_backend(device(kind, "/run/s"), tree.root) == (device(kind, "/run/s"), [])


# A virtiofsd, which serves one connection in its life

_VIRTIOFSD = """
import os, socket, sys
with open("/proc/self/comm", "w") as comm:
    comm.write("virtiofsd")
os.chdir(sys.argv[1])
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[2])
    listener.listen(1)
    print("listening", flush=True)
    sys.stdin.read()
    listener.settimeout(0)
    try:
        listener.accept()
        print("connected to")
    except BlockingIOError:
        print("left alone")
"""


@contextmanager
def virtiofsd(directory: Path, name: str) -> Iterator[int]:
    """A process of that name, which must not be connected to; it binds `name` below there."""
    command = [sys.executable, "-S", "-c", _VIRTIOFSD, str(directory), name]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "listening\n"
        try:
            yield process.pid
        finally:
            process.stdin.close()
            said = process.stdout.readline()
    assert said == "left alone\n"


@pytest.mark.parametrize("is_relative", [False, True])
def test_a_virtiofsd_is_known_by_its_name_and_not_asked(
    directory: Path, *, is_relative: bool
) -> None:
    path = directory / "fs.sock"
    root = HostRoot()
    with virtiofsd(directory, "fs.sock" if is_relative else str(path)) as pid:
        assert UnixSockets(root).find_listener(str(path)) == Listener(pid=pid, name="virtiofsd")
        assert UnixSockets(root).find_listener(str(path), name="virtiofsd") == Listener(
            pid=pid, name="virtiofsd"
        )
        assert UnixSockets(root).find_listener(str(path), name="virtiofs") is None
        for kind in SERVED:
            code, message = problem(device(kind, path))
            assert code is Code.WRONG_BACKEND
            assert message.startswith(f"virtiofsd, process {pid}, which listens on {path}")
        assert ask_backend(device(FS, path), root)[1] == []


@pytest.mark.parametrize("name", ["link/fs.sock", "real/../link/fs.sock", "./real/fs.sock"])
def test_a_virtiofsd_may_have_bound_its_socket_by_a_detour(directory: Path, name: str) -> None:
    """As /var/run/fs.sock, where /var/run leads to /run."""
    (directory / "real").mkdir()
    (directory / "link").symlink_to("real")
    path = directory / "real" / "fs.sock"
    with virtiofsd(directory, f"{directory}/{name}") as pid:
        assert UnixSockets(HostRoot()).find_listener(str(path)) == Listener(
            pid=pid, name="virtiofsd"
        )
        assert ask_backend(device(FS, path), HostRoot())[1] == []
        assert problem(device(SCSI, path))[0] is Code.WRONG_BACKEND


@pytest.mark.parametrize("kind", [*SERVED, FS])
def test_a_decoy_of_any_user_does_not_make_a_socket_look_used_or_served(
    directory: Path, kind: DeviceType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative name may be anywhere; an absolute one is that of another mount namespace."""
    path = directory / "s"
    (directory / "other").mkdir()
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))  # the file stays, and nobody listens
    monkeypatch.chdir(directory / "other")
    with (
        socket.socket(socket.AF_UNIX) as decoy,
        socket.socket(socket.AF_UNIX) as client,
        virtiofsd(directory / "other", "../other/s"),
    ):
        (directory / "other" / "s").unlink()
        decoy.bind("s")
        decoy.listen()
        client.connect("s")
        with decoy.accept()[0]:
            assert problem(device(kind, path))[0] is Code.NO_BACKEND


# The list of sockets, on other hosts


@pytest.mark.parametrize("path", ["/run/s", "/run/a b/s", "/run/ s", "/run/ü", "/run/s "])
def test_a_listener_is_found_by_the_path_that_it_bound(tree: HostTree, path: str) -> None:
    tree.unix_socket("@abstract", 1).unix_socket(path, 2).unix_socket("/run/other", 3)
    tree.process(7, "other", "socket:[3]").process(8, "backend", "/dev/null", "socket:[2]")
    assert UnixSockets(tree.root).is_listening(path)
    assert not UnixSockets(tree.root).is_connected(path)
    assert UnixSockets(tree.root).find_listener(path) == Listener(pid=8, name="backend")
    assert str(UnixSockets(tree.root).find_listener(path)) == "backend, process 8"


@pytest.mark.parametrize(
    "bound", ["/run/t", "/run/s/t", "/s", "@/run/s", "@s", "/run/S", "/other/s", "t"]
)
def test_other_paths_are_other_sockets(tree: HostTree, bound: str) -> None:
    tree.unix_socket(bound, 2).process(8, "backend", "socket:[2]")
    assert not UnixSockets(tree.root).is_listening("/run/s")
    assert UnixSockets(tree.root).find_listener("/run/s") is None


@pytest.mark.parametrize("bound", ["s", "./s", "run/s", "../s"])
def test_a_relative_name_may_be_anywhere(tree: HostTree, bound: str) -> None:
    tree.unix_socket(bound, 2).process(8, "backend", "socket:[2]")
    assert UnixSockets(tree.root).find_listener("/run/s") == Listener(pid=8, name="backend")


def test_a_path_through_a_link_is_the_same_socket(tree: HostTree) -> None:
    tree.file("/run/x").link("/var/run", "../run").unix_socket("/var/run/s", 2)
    tree.process(8, "virtiofsd", "socket:[2]")
    assert UnixSockets(tree.root).is_listening("/run/s")
    assert UnixSockets(tree.root).find_listener("/run/s") == Listener(pid=8, name="virtiofsd")


def test_a_connection_has_its_listeners_path(tree: HostTree) -> None:
    tree.unix_socket("/run/s", 2).unix_socket("/run/s", 3, listens=False)
    tree.process(8, "backend", "socket:[2]", "socket:[3]")
    assert UnixSockets(tree.root).is_listening("/run/s")
    assert UnixSockets(tree.root).is_connected("/run/s")


def test_a_connection_alone_is_no_listener(tree: HostTree) -> None:
    tree.unix_socket("/run/s", 3, listens=False).process(8, "backend", "socket:[3]")
    assert UnixSockets(tree.root).is_connected("/run/s")
    assert not UnixSockets(tree.root).is_listening("/run/s")
    assert UnixSockets(tree.root).find_listener("/run/s") is None


def test_of_several_processes_the_one_of_the_name_is_found(tree: HostTree) -> None:
    tree.unix_socket("/run/s", 2)
    tree.process(10, "sh", "socket:[2]").process(9, "virtiofsd", "socket:[2]")
    assert UnixSockets(tree.root).find_listener("/run/s", name="virtiofsd") == Listener(
        pid=9, name="virtiofsd"
    )
    assert UnixSockets(tree.root).find_listener("/run/s", name="vhost") is None


def test_a_listener_whose_process_cannot_be_seen_has_no_name(tree: HostTree) -> None:
    tree.unix_socket("/run/s", 2).process(8, "other", "socket:[22]")
    assert UnixSockets(tree.root).is_listening("/run/s")
    assert UnixSockets(tree.root).find_listener("/run/s") is None


def test_all_sockets_of_a_request_are_found_in_one_look(
    tree: HostTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        tree.unix_socket(f"/run/s{number}", 100 + number, listens=False)
    tree.process(8, "backend", *(f"socket:[{100 + number}]" for number in range(8)))
    read, read_text = list[str](), HostRoot.read_text

    def count(root: HostRoot, path: str) -> str | None:
        read.append(path)
        return read_text(root, path)

    monkeypatch.setattr(HostRoot, "read_text", count)
    sockets = UnixSockets(tree.root)
    found = [sockets.find_server(f"/run/s{number}") for number in range(8)]
    assert [server and server.pid for server in found] == [8] * 8
    assert [sockets.is_connected(f"/run/s{number}") for number in range(8)] == [True] * 8
    assert len(read) == len(set(read)), "each file is read once"


@pytest.mark.parametrize("table", ["", "Num RefCount Protocol Flags Type St Inode Path\n"])
def test_a_host_without_sockets_has_no_listeners(tree: HostTree, table: str) -> None:
    assert not UnixSockets(tree.root).is_listening("/run/s")
    tree.file("/proc/net/unix", table)
    assert not UnixSockets(tree.root).is_listening("/run/s")
    assert UnixSockets(tree.root).find_listener("/run/s") is None


def test_sockets_without_a_name_are_passed_over(directory: Path) -> None:
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs), socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{directory}")
        abstract.listen()
        assert not UnixSockets(HostRoot()).is_listening(str(directory))
