"""Users of a network card that give it no address and build nothing on it."""

import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from lab import topology
from tests.lab.blocks import run
from tests.support.checking import WRITING
from vmplug.errors import InUse
from vmplug.host.block.usage import read_usage
from vmplug.host.check.device import check_device
from vmplug.host.finding import Code, Finding, Severity
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.host.root import HostRoot
from vmplug.journal.journal import Journal
from vmplug.manager.binding.binder import Binder

CARD = f"/sys/bus/pci/devices/{topology.NIC}"
BPF_CALL, PROG_LOAD, OBJ_PIN, LINK_CREATE = 321, 5, 6, 28
"""Source: arch/x86/entry/syscalls/syscall_64.tbl; enum bpf_cmd in include/uapi/linux/bpf.h."""
PROG_TYPE_XDP, ATTACH_XDP, XDP_PASS = 6, 37, 2
AF_PPPOX, PX_PROTO_OE, ETHER = 24, 0, b"\x02\0\0\0\0\x01"
libc = ctypes.CDLL(None, use_errno=True)


def bpf(command: int, words: bytes) -> int:
    """A call of bpf(2); the descriptor, or 0."""
    number = int(libc.syscall(BPF_CALL, command, ctypes.create_string_buffer(words, 128), 128))
    if number < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return number


def program() -> int:
    """A program of XDP that passes everything: `r0 = XDP_PASS; exit`."""
    code = struct.pack("<BBhi", 0xB7, 0, 0, XDP_PASS) + struct.pack("<BBhi", 0x95, 0, 0, 0)
    text, licence = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"GPL")
    places = (ctypes.addressof(text), ctypes.addressof(licence))
    return bpf(PROG_LOAD, struct.pack("<IIQQ", PROG_TYPE_XDP, len(code) // 8, *places))


@contextmanager
def kept_program(interface: str) -> Iterator[str]:
    """A process keeps it, as one with AF_XDP sockets does."""
    loaded = program()
    index = int(Path(f"/sys/class/net/{interface}/ifindex").read_text())
    kept = bpf(LINK_CREATE, struct.pack("<IIII", loaded, index, ATTACH_XDP, 0))
    try:
        yield "an XDP program"
    finally:
        os.close(kept)
        os.close(loaded)


@contextmanager
def left_program(interface: str) -> Iterator[str]:
    """It stays when its process ends."""
    pinned, loaded = Path("/sys/fs/bpf/lab"), program()
    if not pinned.parent.is_mount():
        run("mount", "-t", "bpf", "bpf", pinned.parent)
    name = ctypes.create_string_buffer(os.fsencode(pinned))
    bpf(OBJ_PIN, struct.pack("<QII", ctypes.addressof(name), loaded, 0))
    run("ip", "link", "set", interface, "xdp", "pinned", pinned)
    os.close(loaded)
    pinned.unlink()
    yield "an XDP program"


@contextmanager
def pppoe(interface: str) -> Iterator[str]:
    """What pppd makes when the other end has given it a number."""
    run("modprobe", "pppoe")
    end = libc.socket(AF_PPPOX, 1, PX_PROTO_OE)
    name = struct.pack("<HIH6s16s", AF_PPPOX, PX_PROTO_OE, 1 << 8, ETHER, interface.encode())
    assert libc.connect(end, name, len(name)) == 0, os.strerror(ctypes.get_errno())
    try:
        yield "a PPPoE connection"
    finally:
        os.close(end)


@contextmanager
def netconsole(interface: str) -> Iterator[str]:
    """The kernel logs through it, by addresses that no interface has."""
    run("modprobe", "netconsole")
    target = Path("/sys/kernel/config/netconsole/lab$1")
    target.mkdir()
    words = {"dev_name": interface, "local_ip": "192.0.2.1", "remote_ip": "192.0.2.2"}
    for name, word in {**words, "enabled": "1"}.items():
        (target / name).write_text(word)
    yield "a console of the kernel (netconsole)"
    target.rmdir()


Use = Callable[[str], AbstractContextManager[str]]


@pytest.fixture
def interface() -> Iterator[str]:
    (name,) = os.listdir(f"{CARD}/net")
    run("ip", "link", "set", name, "up")
    yield name
    (after,) = os.listdir(f"{CARD}/net")
    run("ip", "link", "set", after, "down")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal.open(tmp_path / "state") as store:
        yield store


def bound_and_returned(journal: Journal) -> None:
    group = find_vfio_device(topology.NIC, HostRoot())
    Binder(journal, HostRoot()).bind(group)
    Binder(journal, HostRoot()).unbind(find_vfio_device(topology.NIC, HostRoot()))


def refusal(journal: Journal) -> InUse:
    driver = os.readlink(f"{CARD}/driver")
    with pytest.raises(InUse) as caught:
        Binder(journal, HostRoot()).bind(find_vfio_device(topology.NIC, HostRoot()))
    assert caught.value.codes == (Code.NETWORK_IN_USE,)
    assert os.readlink(f"{CARD}/driver") == driver
    assert journal.bindings.all() == []
    return caught.value


@pytest.mark.parametrize("use", [left_program, netconsole])
def test_a_card_is_in_use_until_the_remedy_frees_it(
    interface: str, journal: Journal, use: Use
) -> None:
    with use(interface) as what:
        refused = refusal(journal)
        assert f"{interface}, which has {what}" in refused.message
        assert refused.hint
        remedy = refused.hint.partition("first: ")[2].partition("; or accept")[0]
        subprocess.run(["sh", "-ec", remedy], check=True)
        bound_and_returned(journal)


@pytest.mark.parametrize(
    ("use", "remedy"),
    [(kept_program, "end the process that keeps the program"), (pppoe, "end its pppd")],
)
def test_a_card_is_free_when_the_process_has_ended_that_uses_it(
    interface: str, journal: Journal, use: Use, remedy: str
) -> None:
    with use(interface) as what:
        refused = refusal(journal)
        assert f"{interface}, which has {what}" in refused.message
        assert (refused.hint or "").startswith(remedy)
    bound_and_returned(journal)


TAKER = """\
import socket, sys
taker = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x300)
taker.bind((sys.argv[1], 3))
print(flush=True)
input()
"""


def test_a_process_that_takes_packets_is_mentioned_and_keeps_nothing(
    interface: str, journal: Journal
) -> None:
    host = HostRoot()

    def mentioned() -> list[Finding]:
        group = find_vfio_device(topology.NIC, host)
        found = check_device(group, WRITING, usage=read_usage(host), claims=(), root=host)
        return [finding for finding in found if finding.code is Code.OPEN_BY_PROCESS]

    assert mentioned() == []
    command = [sys.executable, "-c", TAKER, interface]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        (finding,) = mentioned()
        assert finding.severity is Severity.WARNING
        assert f"{interface}, of which process {process.pid} (python" in finding.message
        bound_and_returned(journal)
        process.kill()
    assert mentioned() == []
