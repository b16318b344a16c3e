"""The vhost-user backend of the test suite, with the test as front end and as driver."""

import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from tests.support.vhost_user import scsi
from tests.support.vhost_user.messages import (
    FLAG_NEED_REPLY,
    HEADER,
    MEMORY_REGION,
    MEMORY_TABLE,
    U64,
    VERSION,
    VRING_ADDRESS,
    VRING_STATE,
    Connection,
    Message,
    ProtocolError,
    Request,
    parse_header,
)
from tests.support.vhost_user.net import NET_HEADER, NetDevice, Subnet, internet_checksum
from tests.support.vhost_user.scsi import Disk, ScsiDevice
from tests.support.vhost_user.session import (
    Device,
    Talk,
    converse,
    fall_silent,
    hang_up,
    serve,
)
from tests.support.vhost_user.virtqueue import Virtqueue

BLOCK = 512
TIMEOUT_S = 60.0
MAC = bytes.fromhex("02000000beef")
GUEST_MAC = bytes.fromhex("525400aabbcc")
SUBNET = Subnet(IPv4Network("192.0.2.0/24"), MAC)


# --- messages


def test_header_is_parsed() -> None:
    header = HEADER.pack(Request.SET_OWNER, VERSION | FLAG_NEED_REPLY, 0)
    assert parse_header(header) == (Request.SET_OWNER, VERSION | FLAG_NEED_REPLY, 0)


@pytest.mark.parametrize(("flags", "length"), [(0, 0), (2, 0), (VERSION, 1 << 20)])
def test_header_of_another_protocol_is_refused(flags: int, length: int) -> None:
    with pytest.raises(ProtocolError):
        parse_header(HEADER.pack(1, flags, length))


def test_payload_of_a_wrong_length_is_refused() -> None:
    with pytest.raises(ProtocolError, match="with 3 bytes"):
        Message(request=Request.SET_FEATURES, payload=b"abc").u64()


def test_announced_descriptor_that_is_missing_is_refused() -> None:
    assert Message(request=12, payload=U64.pack(0x101)).vring_descriptor() == (1, None)
    with pytest.raises(ProtocolError, match="missing"):
        Message(request=12, payload=U64.pack(1)).vring_descriptor()


def test_memory_table_needs_a_descriptor_for_each_region() -> None:
    table = MEMORY_TABLE.pack(2, 0) + 2 * MEMORY_REGION.pack(0, 4096, 1 << 40, 0)
    message = Message(request=5, payload=table, descriptors=[100])
    with pytest.raises(ProtocolError, match="2 regions, but 1 descriptors"):
        message.memory_regions()
    message.descriptors.append(101)
    assert [region.user_address for region in message.memory_regions()] == [1 << 40] * 2


def test_connection_carries_payload_and_descriptors() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, open(os.devnull) as file:
        Connection(ours).send(Message(request=7, payload=b"word", descriptors=[file.fileno()]))
        message = Connection(theirs).receive()
        assert message is not None
        assert (message.request, message.payload) == (7, b"word")
        (descriptor,) = message.descriptors
        assert os.path.sameopenfile(descriptor, file.fileno())
        message.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_connection_that_ends() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(HEADER.pack(1, VERSION, 8) + b"half")
        with pytest.raises(ConnectionError):
            Connection(theirs).receive()
        assert Connection(theirs).receive() is None


# --- a front end and a driver


class FrontEnd:
    """A client of a backend, with a guest of one page and a driver in it."""

    RINGS = (0x000, 0x400, 0x800)
    """Where descriptors, used and available ring of queue N are, plus N * 0x100."""

    SIZE = 4
    USER_ADDRESS = 0x7F0000000000
    GUEST_ADDRESS = 0x100000
    BUFFERS = 0x1000
    MEMORY_BYTES = 0x8000

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(TIMEOUT_S)
        self.connection = Connection(connected)
        self._memory_fd = os.memfd_create("guest")
        os.ftruncate(self._memory_fd, self.MEMORY_BYTES)
        self._memory = mmap.mmap(self._memory_fd, self.MEMORY_BYTES)
        self._kicks: dict[int, int] = {}
        self._calls: dict[int, int] = {}
        self._next = self.BUFFERS

    def close(self) -> None:
        self._memory.close()
        for fd in (self._memory_fd, *self._kicks.values(), *self._calls.values()):
            os.close(fd)

    def send(self, request: int, payload: bytes = b"", *descriptors: int, flags: int = 1) -> None:
        message = Message(
            request=request, flags=flags, payload=payload, descriptors=list(descriptors)
        )
        self.connection.send(message)

    def ask(self, request: int, payload: bytes = b"", *, flags: int = 1) -> bytes:
        self.send(request, payload, flags=flags)
        message = self.connection.receive()
        assert message is not None
        assert (message.request, message.flags) == (request, 0x5)
        return message.payload

    def start(self, *queues: int) -> None:
        self.send(Request.SET_FEATURES, U64.pack(1 << 32 | 1 << 30))
        region = MEMORY_REGION.pack(self.GUEST_ADDRESS, self.MEMORY_BYTES, self.USER_ADDRESS, 0)
        self.send(Request.SET_MEM_TABLE, MEMORY_TABLE.pack(1, 0) + region, self._memory_fd)
        for queue in queues:
            self._kicks[queue] = os.eventfd(0)
            self._calls[queue] = os.eventfd(0, os.EFD_NONBLOCK)
            rings = [self.USER_ADDRESS + at + queue * 0x100 for at in self.RINGS]
            self.send(Request.SET_VRING_NUM, VRING_STATE.pack(queue, self.SIZE))
            self.send(Request.SET_VRING_BASE, VRING_STATE.pack(queue, 0))
            self.send(Request.SET_VRING_ADDR, VRING_ADDRESS.pack(queue, 0, *rings, 0))
            self.send(Request.SET_VRING_KICK, U64.pack(queue), self._kicks[queue])
            self.send(Request.SET_VRING_CALL, U64.pack(queue), self._calls[queue])
            self.send(Request.SET_VRING_ENABLE, VRING_STATE.pack(queue, 1))

    def replace_call(self, queue: int) -> None:
        """Has the driver called on another eventfd, and hears the one before no more."""
        os.close(self._calls[queue])
        self._calls[queue] = os.eventfd(0, os.EFD_NONBLOCK)
        self.send(Request.SET_VRING_CALL, U64.pack(queue), self._calls[queue])

    def kick(self, queue: int) -> None:
        """Has the device look into a queue."""
        os.eventfd_write(self._kicks[queue], 1)

    def offer(self, queue: int, request: bytes, room: int) -> int:
        """Puts two buffers into an empty queue; where the second is, for the answer."""
        at, self._next = self._next, self._next + len(request) + room
        self._memory[at : at + len(request)] = request
        table, _, available = [at + queue * 0x100 for at in self.RINGS]
        address = self.GUEST_ADDRESS + at
        descriptor = struct.Struct("<QIHH")
        descriptor.pack_into(self._memory, table, address, len(request), 1, 1)
        descriptor.pack_into(self._memory, table + 16, address + len(request), room, 2, 0)
        (index,) = struct.unpack_from("<H", self._memory, available + 2)
        struct.pack_into("<H", self._memory, available + 4 + 2 * (index % self.SIZE), 0)
        struct.pack_into("<H", self._memory, available + 2, index + 1)
        self.kick(queue)
        return at + len(request)

    def answer(self, queue: int, place: int) -> bytes:
        """What has been written into a buffer, once the device calls for it."""
        _, used, available = [at + queue * 0x100 for at in self.RINGS]
        is_answered = False
        while not is_answered:
            assert select.select([self._calls[queue]], [], [], TIMEOUT_S)[0]
            os.eventfd_read(self._calls[queue])
            taken, offered = (self._memory[at + 2 : at + 4] for at in (used, available))
            is_answered = taken == offered
        (index,) = struct.unpack_from("<H", self._memory, used + 2)
        slot = used + 4 + 8 * ((index - 1) % self.SIZE)
        _, length = struct.unpack_from("<II", self._memory, slot)
        return self._memory[place : place + length]


@contextmanager
def front_end(talk: Talk) -> Iterator[FrontEnd]:
    """A front end of a backend in a thread, which ends when the front end goes."""
    ours, theirs = socket.socketpair()

    def run() -> None:
        with theirs, suppress(ConnectionError, ProtocolError):
            talk(Connection(theirs))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        with ours, closing(FrontEnd(ours)) as made:
            yield made
    finally:
        thread.join(TIMEOUT_S)
    assert not thread.is_alive()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(bytes([block]) * BLOCK for block in range(16)))
    return path


@pytest.fixture
def disk(image: Path) -> Iterator[Disk]:
    with closing(Disk.open(image, serial="SN 7")) as opened:
        yield opened


NET = NetDevice(SUBNET)


def test_features_are_honest(disk: Disk) -> None:
    expected: list[tuple[Device, int, int]] = [(NET, 1 << 5, 1), (ScsiDevice(disk), 0, 3)]
    for device, features, queue_num in expected:
        with front_end(partial(converse, device=device)) as front:
            assert front.ask(Request.GET_FEATURES) == U64.pack(1 << 32 | 1 << 30 | features)
            assert front.ask(Request.GET_PROTOCOL_FEATURES) == U64.pack(0b1001)
            assert front.ask(Request.GET_QUEUE_NUM) == U64.pack(queue_num)


def test_acknowledges_when_asked_to() -> None:
    with front_end(partial(converse, device=NET)) as front:
        assert front.ask(Request.SET_OWNER, flags=VERSION | FLAG_NEED_REPLY) == U64.pack(0)
        assert front.ask(99, flags=VERSION | FLAG_NEED_REPLY) != U64.pack(0)
        front.send(99)
        front.send(Request.SET_OWNER)
        assert front.ask(Request.GET_QUEUE_NUM) == U64.pack(1)


def test_nonsense_ends_the_connection() -> None:
    with front_end(partial(converse, device=NET)) as front:
        front.send(Request.SET_VRING_NUM, VRING_STATE.pack(2, 4))
        assert front.connection.receive() is None


@pytest.mark.parametrize("answers", [0, 2])
def test_silent_backend_answers_only_so_many(answers: int) -> None:
    with front_end(partial(fall_silent, device=NET, after=answers)) as front:
        for _ in range(answers):
            front.ask(Request.GET_FEATURES)
        front.connection._socket.settimeout(0.05)
        with pytest.raises(TimeoutError):
            front.ask(Request.GET_FEATURES)


def test_backend_that_hangs_up() -> None:
    with front_end(hang_up) as front:
        assert front.connection.receive() is None


def test_one_client_after_another_and_a_bad_one_between(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    talk = partial(converse, device=NET)
    thread = threading.Thread(target=serve_until_shut_down, args=(listener, talk))
    thread.start()
    for words in (b"", b"nonsense....", HEADER.pack(1, VERSION, 0), b""):
        with socket.socket(socket.AF_UNIX) as client, closing(FrontEnd(client)) as front:
            client.connect(str(tmp_path / "s"))
            if words:
                client.sendall(words)
            else:
                assert front.ask(Request.GET_QUEUE_NUM) == U64.pack(1)
    listener.shutdown(socket.SHUT_RDWR)
    thread.join(TIMEOUT_S)
    listener.close()
    assert not thread.is_alive()


def serve_until_shut_down(listener: socket.socket, talk: Talk) -> None:
    with suppress(OSError):
        serve(listener, talk)


def test_scsi_through_the_queues(disk: Disk) -> None:
    with front_end(partial(converse, device=ScsiDevice(disk))) as front:
        front.start(0, 1, 2)
        for _ in range(6):  # more often than the queue is long
            place = front.offer(2, scsi_request(b"\x28\0\0\0\0\x03\0\0\x01"), 108 + 2 * BLOCK)
            answer = front.answer(2, place)
            assert answer[:12] == struct.pack("<IIHBB", 0, BLOCK, 0, scsi.GOOD, 0)
            assert answer[108:] == b"\x03" * BLOCK
        place = front.offer(2, scsi_request(b"\x28\0\0\0\0\x10\0\0\x01"), 108 + BLOCK)
        answer = front.answer(2, place)
        assert answer[:12] == struct.pack("<IIHBB", 18, BLOCK, 0, scsi.CHECK_CONDITION, 0)
        assert answer[12:108].rstrip(b"\0") == scsi.sense_data(5, 0x2100).rstrip(b"\0")
        assert front.ask(Request.GET_VRING_BASE, VRING_STATE.pack(2, 0)) == VRING_STATE.pack(2, 7)
        assert front.ask(Request.GET_VRING_BASE, VRING_STATE.pack(1, 0)) == VRING_STATE.pack(1, 0)


def test_scsi_write_and_control_through_the_queues(disk: Disk, image: Path) -> None:
    with front_end(partial(converse, device=ScsiDevice(disk))) as front:
        front.start(0, 2)
        write = scsi_request(b"\x2a\0\0\0\0\x02\0\0\x01") + b"w" * BLOCK
        front.answer(2, front.offer(2, write, 108))
        assert image.read_bytes()[2 * BLOCK : 3 * BLOCK] == b"w" * BLOCK
        assert front.answer(0, front.offer(0, struct.pack("<II8sQ", 0, 1, b"", 0), 1)) == b"\0"
        assert front.answer(0, front.offer(0, struct.pack("<I8sI", 1, b"", 0), 5)) == bytes(5)


def test_scsi_has_one_target(disk: Disk) -> None:
    with front_end(partial(converse, device=ScsiDevice(disk))) as front:
        front.start(2)
        place = front.offer(2, scsi_request(b"\x12\0\0\0\x24", target=1), 108 + 36)
        assert front.answer(2, place)[11] == scsi.VIRTIO_SCSI_S_BAD_TARGET


def scsi_request(cdb: bytes, *, target: int = 0) -> bytes:
    lun = bytes([1, target, 0x40, 0, 0, 0, 0, 0])
    return struct.pack("<8sQBBB32s", lun, 0, 0, 0, 0, cdb)


def test_net_through_the_queues() -> None:
    header = bytes(NET_HEADER.size)
    with front_end(partial(converse, device=NET)) as front:
        front.start(0, 1)
        place = front.offer(0, b"", 2048)
        front.offer(1, header + arp_request("192.0.2.9"), 1)
        answer = front.answer(0, place)
        assert answer[:12] == header[:10] + b"\x01\0"
        assert answer[12:] == SUBNET.answer(arp_request("192.0.2.9"))
        front.offer(1, header + arp_request("192.0.2.10"), 1)  # no buffer for the answer
        assert front.ask(Request.GET_VRING_BASE, VRING_STATE.pack(0, 0)) == VRING_STATE.pack(0, 1)


def test_driver_hears_an_answer_given_while_its_eventfd_is_replaced(disk: Disk) -> None:
    """QEMU kicks a queue first, and then says which eventfd the driver listens to."""
    is_serving, gate = threading.Event(), threading.Event()

    class SlowDevice(ScsiDevice):
        def serve(self, index: int, queues: list[Virtqueue]) -> None:
            is_serving.set()
            assert gate.wait(TIMEOUT_S)
            super().serve(index, queues)

    with front_end(partial(converse, device=SlowDevice(disk))) as front:
        front.start(2)
        front.kick(2)
        assert is_serving.wait(TIMEOUT_S)
        front.replace_call(2)
        place = front.offer(2, scsi_request(b"\x28\0\0\0\0\x03\0\0\x01"), 108 + BLOCK)
        gate.set()
        assert front.answer(2, place)[108:] == b"\x03" * BLOCK


def test_nothing_stays_open_after_a_client(disk: Disk) -> None:
    before = os.listdir("/proc/self/fd")
    with front_end(partial(converse, device=ScsiDevice(disk))) as front:
        front.start(0, 1, 2)
        front.send(Request.SET_VRING_ERR, U64.pack(0), front._memory_fd)
    assert os.listdir("/proc/self/fd") == before


# --- SCSI


def execute(disk: Disk, cdb: str, data_out: bytes = b"", lun: int = 0) -> bytes:
    """The data of a command, in hexadecimal, that is expected to end well."""
    answer = disk.execute(lun, bytes.fromhex(cdb).ljust(32, b"\0"), data_out)
    assert (answer.status, answer.sense) == (scsi.GOOD, b"")
    return answer.data


def sense_of(disk: Disk, cdb: str, data_out: bytes = b"", lun: int = 0) -> tuple[int, int]:
    """The sense key, and the additional code with its qualifier, of a command that fails."""
    answer = disk.execute(lun, bytes.fromhex(cdb).ljust(32, b"\0"), data_out)
    assert answer.status == scsi.CHECK_CONDITION
    assert answer.data == b""
    assert answer.sense[0] == 0x70
    assert len(answer.sense) == 18 == answer.sense[7] + 8
    return answer.sense[2], int.from_bytes(answer.sense[12:14], "big")


def test_inquiry(disk: Disk) -> None:
    data = execute(disk, "12 00 00 00 ff 00")
    assert data[:8] == bytes.fromhex("00 00 05 02 1f 00 00 02")
    assert data[8:] == b"VMPLUG  TEST DISK       1   "
    assert execute(disk, "12 00 00 00 05 00") == data[:5]


def test_vital_product_data(disk: Disk) -> None:
    assert execute(disk, "12 01 00 00 ff 00") == bytes.fromhex("00 00 0002 00 80")
    assert execute(disk, "12 01 80 00 ff 00") == bytes.fromhex("00 80 0004") + b"SN 7"


def test_capacity(disk: Disk, image: Path) -> None:
    assert execute(disk, "25") == struct.pack(">II", 15, BLOCK)
    assert execute(disk, "9e10 0000000000000000 00000020") == struct.pack(">QI20x", 15, BLOCK)
    with image.open("ab") as file:
        file.truncate(3 << 40)
    assert execute(disk, "25") == struct.pack(">II", 0xFFFFFFFF, BLOCK)
    assert execute(disk, "9e10 0000000000000000 0000000c") == struct.pack(
        ">QI", (3 << 31) - 1, BLOCK
    )


def test_mode_sense(disk: Disk, image: Path) -> None:
    page = bytes.fromhex("08 12 04").ljust(20, b"\0")
    assert execute(disk, "1a 00 08 00 ff") == bytes.fromhex("17 00 00 00") + page
    assert execute(disk, "1a 00 3f 00 04") == bytes.fromhex("17 00 00 00")
    assert execute(disk, "5a 00 3f 00000000 00ff") == bytes.fromhex("001a 00 00 0000 0000") + page
    assert execute(disk, "1a 00 48 00 ff")[4:] == b"\x08\x12".ljust(20, b"\0")
    with closing(Disk.open(image, serial="", writable=False)) as read_only:
        assert execute(read_only, "1a 00 3f 00 04") == bytes.fromhex("17 00 80 00")
        assert sense_of(read_only, "2a 00 00000000 00 0001", bytes(BLOCK)) == (7, 0x2700)


@pytest.mark.parametrize(
    ("cdb", "first", "count"),
    [
        ("08 000003 02", 3, 2),
        ("28 00 00000003 00 0002", 3, 2),
        ("28 00 00000003 00 0000", 3, 0),
        ("88 00 0000000000000003 00000002", 3, 2),
    ],
)
def test_read(disk: Disk, cdb: str, first: int, count: int) -> None:
    expected = b"".join(bytes([block]) * BLOCK for block in range(first, first + count))
    assert execute(disk, cdb) == expected


@pytest.mark.parametrize(
    "cdb", ["0a 000003 02", "2a 00 00000003 00 0002", "8a 00 0000000000000003 00000002"]
)
def test_write(disk: Disk, image: Path, cdb: str) -> None:
    before = image.read_bytes()
    data = os.urandom(2 * BLOCK)
    execute(disk, cdb, data + b"behind it")
    execute(disk, "35")
    execute(disk, "91")
    assert image.read_bytes() == before[: 3 * BLOCK] + data + before[5 * BLOCK :]


@pytest.mark.parametrize(
    ("cdb", "sense"),
    [
        ("28 00 00000010 00 0001", (5, 0x2100)),
        ("28 00 0000000f 00 0002", (5, 0x2100)),
        ("08 000000 00", (5, 0x2100)),  # 0 means 256 blocks
        ("8a 00 ffffffffffffffff 00000001", (5, 0x2100)),
        ("2a 00 00000000 00 0001", (5, 0x2400)),  # without its data
        ("12 00 80 00 ff", (5, 0x2400)),
        ("12 01 83 00 ff", (5, 0x2400)),
        ("1a 00 1c 00 ff", (5, 0x2400)),
        ("1a 00 c8 00 ff", (5, 0x3900)),
        ("9e 12", (5, 0x2400)),
        ("42", (5, 0x2000)),  # UNMAP
    ],
)
def test_refused_commands_have_their_sense_code(
    disk: Disk, image: Path, cdb: str, sense: tuple[int, int]
) -> None:
    before = image.read_bytes()
    assert sense_of(disk, cdb) == sense
    assert image.read_bytes() == before


def test_a_driver_gets_an_answer_to_every_other_command(disk: Disk) -> None:
    assert execute(disk, "00") == b""
    assert execute(disk, "1b") == b""
    assert execute(disk, "03 00 00 00 12") == bytes.fromhex("70 00 00 00000000 0a").ljust(
        18, b"\0"
    )
    assert execute(disk, "a0 00 00 000000 00000010") == struct.pack(">IIQ", 8, 0, 0)


def test_another_lun_is_not_there(disk: Disk) -> None:
    assert execute(disk, "12 00 00 00 24", lun=1)[0] == 0x7F
    assert execute(disk, "a0 00 00 000000 00000010", lun=1)[:4] == struct.pack(">I", 8)
    assert sense_of(disk, "00", lun=1) == (5, 0x2500)


# --- network


def arp_request(target: str, sender: str = "192.0.2.2", operation: int = 1) -> bytes:
    addresses = GUEST_MAC + packed(sender) + bytes(6) + packed(target)
    return (
        b"\xff" * 6
        + GUEST_MAC
        + struct.pack(">HHHBBH", 0x806, 1, 0x800, 6, 4, operation)
        + (addresses)
    )


def echo_request(
    target: str, data: bytes = b"payload", *, fragment: int = 0, kind: int = 8
) -> bytes:
    unsummed = struct.pack(">BBHHH", kind, 0, 0, 7, 1) + data
    icmp = unsummed[:2] + struct.pack(">H", internet_checksum(unsummed)) + unsummed[4:]
    header = ipv4_header(20 + len(icmp), fragment, packed("192.0.2.2") + packed(target))
    return MAC + GUEST_MAC + b"\x08\x00" + header + icmp


def ipv4_header(length: int, fragment: int, addresses: bytes) -> bytes:
    start = struct.pack(">BBHHHBB", 0x45, 0, length, 1, fragment, 64, 1)
    checksum = internet_checksum(start + b"\0\0" + addresses)
    return start + struct.pack(">H", checksum) + addresses


def packed(address: str) -> bytes:
    return IPv4Address(address).packed


def test_checksum_is_that_of_rfc_1071() -> None:
    data = bytes.fromhex("0001 f203 f4f5 f6f7")  # the example in its section 3
    assert internet_checksum(data) == 0xFFFF ^ 0xDDF2
    assert internet_checksum(b"\x01") == 0xFFFF ^ 0x0100


@pytest.mark.parametrize("target", ["192.0.2.1", "192.0.2.254"])
def test_any_address_answers_arp(target: str) -> None:
    answer = SUBNET.answer(arp_request(target))
    reply = struct.pack(">HHHBBH", 0x806, 1, 0x800, 6, 4, 2)
    addresses = MAC + packed(target) + GUEST_MAC + packed("192.0.2.2")
    assert answer == GUEST_MAC + MAC + reply + addresses


@pytest.mark.parametrize(
    "frame",
    [
        arp_request("198.51.100.1"),
        arp_request("192.0.2.0"),
        arp_request("192.0.2.255"),
        arp_request("192.0.2.2"),  # it tells its own address
        arp_request("192.0.2.2", sender="0.0.0.0"),  # it asks whether the address is free
        arp_request("192.0.2.1", operation=2),
        arp_request("192.0.2.1")[:-1],
    ],
)
def test_other_arp_packets_get_no_answer(frame: bytes) -> None:
    assert SUBNET.answer(frame) is None


@pytest.mark.parametrize("data", [b"", b"odd", b"even", os.urandom(1400)])
def test_any_address_answers_ping(data: bytes) -> None:
    request = echo_request("192.0.2.77", data)
    answer = SUBNET.answer(request + bytes(18))  # padded, as short frames are
    assert answer is not None
    assert answer[:14] == GUEST_MAC + MAC + b"\x08\x00"
    assert answer[26:34] == packed("192.0.2.77") + packed("192.0.2.2")
    assert internet_checksum(answer[14:34]) == 0
    assert answer[34:36] == b"\0\0"
    assert internet_checksum(answer[34:]) == 0
    assert answer[38:] == request[38:]


@pytest.mark.parametrize(
    "frame",
    [
        echo_request("198.51.100.1"),
        echo_request("192.0.2.255"),
        echo_request("192.0.2.1", kind=0),
        echo_request("192.0.2.1", fragment=0x2000),
        b"\xff" * 6 + echo_request("192.0.2.1")[6:],
        echo_request("192.0.2.1")[:-1] + b"?",  # a wrong checksum
        echo_request("192.0.2.1")[:30],
        MAC + GUEST_MAC + b"\x86\xdd" + bytes(40),
        b"short",
        b"",
    ],
)
def test_other_ip_packets_get_no_answer(frame: bytes) -> None:
    assert SUBNET.answer(frame) is None
