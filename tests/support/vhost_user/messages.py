"""The messages of vhost-user: their numbers, their payloads, and a connection that carries them.

Source: QEMU docs/interop/vhost-user.rst, whose names these are without their VHOST_USER prefix.
"""

import os
import socket
import struct
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

HEADER = struct.Struct("<III")
U64 = struct.Struct("<Q")
VRING_STATE = struct.Struct("<II")
VRING_ADDRESS = struct.Struct("<IIQQQQ")
MEMORY_TABLE = struct.Struct("<II")
MEMORY_REGION = struct.Struct("<QQQQ")

VERSION = 0x1
VERSION_MASK = 0x3
FLAG_REPLY = 0x4
FLAG_NEED_REPLY = 0x8

VRING_INDEX_MASK = 0xFF
VRING_NOFD_MASK = 0x100

PAYLOAD_BYTES_MAX = 4096
DESCRIPTORS_MAX = 8
"""VHOST_MEMORY_BASELINE_NREGIONS: the regions that a SET_MEM_TABLE may have."""


class Request(IntEnum):
    """What a front end may ask of this backend."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18


class Feature(IntFlag):
    """Feature bits that are the same for every kind of device."""

    F_PROTOCOL_FEATURES = 1 << 30
    VIRTIO_F_VERSION_1 = 1 << 32


class ProtocolFeature(IntFlag):
    """Parts of the protocol that both sides must know."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3


class ProtocolError(Exception):
    """The front end, or the driver behind it, does what the specification forbids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRegion:
    """A piece of the guest's memory; `user_address` is its place in the front end's own."""

    guest_address: int
    size_bytes: int
    user_address: int
    mmap_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RingAddresses:
    """Where the three parts of a split virtqueue are, as the front end's own addresses."""

    descriptors: int
    used: int
    available: int


@dataclass(slots=True, kw_only=True)
class Message:
    """One message. Whoever keeps one of its descriptors takes it out; `close` closes the rest."""

    request: int
    flags: int = VERSION
    payload: bytes = b""
    descriptors: list[int] = field(default_factory=list)

    @property
    def needs_reply(self) -> bool:
        """Whether the front end waits to hear that it was done."""
        return bool(self.flags & FLAG_NEED_REPLY)

    def u64(self) -> int:
        """The payload as one number."""
        (number,) = self._unpack(U64)
        return number

    def vring_state(self) -> tuple[int, int]:
        """The index of a queue and a number for it."""
        index, number = self._unpack(VRING_STATE)
        return index, number

    def vring_addresses(self) -> tuple[int, RingAddresses]:
        """The index of a queue and where it is; flags and the log are not for this backend."""
        index, _flags, descriptors, used, available, _log = self._unpack(VRING_ADDRESS)
        return index, RingAddresses(descriptors=descriptors, used=used, available=available)

    def vring_descriptor(self) -> tuple[int, int | None]:
        """The index of a queue and its descriptor, taken out; None when there is to be none."""
        word = self.u64()
        if word & VRING_NOFD_MASK:
            return word & VRING_INDEX_MASK, None
        if not self.descriptors:
            raise ProtocolError("a descriptor was announced and is missing")
        return word & VRING_INDEX_MASK, self.descriptors.pop(0)

    def memory_regions(self) -> list[MemoryRegion]:
        """The regions of a memory table, one for each descriptor."""
        count, _padding = MEMORY_TABLE.unpack_from(self.payload.ljust(MEMORY_TABLE.size, b"\0"))
        table = self.payload[MEMORY_TABLE.size :]
        if len(table) < count * MEMORY_REGION.size or count != len(self.descriptors):
            raise ProtocolError(f"{count} regions, but {len(self.descriptors)} descriptors")
        return [
            MemoryRegion(
                guest_address=guest_address,
                size_bytes=size_bytes,
                user_address=user_address,
                mmap_offset=mmap_offset,
            )
            for guest_address, size_bytes, user_address, mmap_offset in MEMORY_REGION.iter_unpack(
                table[: count * MEMORY_REGION.size]
            )
        ]

    def close(self) -> None:
        """Closes the descriptors that nobody took."""
        while self.descriptors:
            os.close(self.descriptors.pop())

    def _unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        if len(self.payload) != layout.size:
            raise ProtocolError(f"message {self.request} with {len(self.payload)} bytes")
        return layout.unpack(self.payload)


class Connection:
    """A connected socket that carries messages."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def fileno(self) -> int:
        """For a selector."""
        return self._socket.fileno()

    def receive(self) -> Message | None:
        """The next message; None when the other side has hung up between two messages."""
        data, descriptors, flags, _ = socket.recv_fds(self._socket, HEADER.size, DESCRIPTORS_MAX)
        message = Message(request=0, descriptors=descriptors)
        try:
            if not data:
                return None
            if flags & socket.MSG_CTRUNC:
                raise ProtocolError(f"more than {DESCRIPTORS_MAX} descriptors")
            header = data + self._receive_exactly(HEADER.size - len(data))
            message.request, message.flags, length = parse_header(header)
            message.payload = self._receive_exactly(length)
        except BaseException:
            message.close()
            raise
        return message

    def send(self, message: Message) -> None:
        """Sends a message with its descriptors, which stay open."""
        header = HEADER.pack(message.request, message.flags, len(message.payload))
        socket.send_fds(self._socket, [header + message.payload], message.descriptors)

    def reply(self, request: int, payload: bytes) -> None:
        """Answers a request."""
        self.send(Message(request=request, flags=VERSION | FLAG_REPLY, payload=payload))

    def wait_hung_up(self) -> None:
        """Takes whatever comes, and answers nothing, until the other side hangs up."""
        while self._socket.recv(PAYLOAD_BYTES_MAX):
            pass  # without room for them, the kernel closes descriptors that come along

    def _receive_exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self._socket.recv(length - len(data))
            if not more:
                raise ConnectionError("hung up within a message")
            data += more
        return data


def parse_header(header: bytes) -> tuple[int, int, int]:
    """Request, flags and payload length of a message. Raises ProtocolError."""
    request, flags, length = HEADER.unpack(header)
    if flags & VERSION_MASK != VERSION:
        raise ProtocolError(f"version {flags & VERSION_MASK} of the protocol")
    if length > PAYLOAD_BYTES_MAX:
        raise ProtocolError(f"message {request} with {length} bytes")
    return request, flags, length
