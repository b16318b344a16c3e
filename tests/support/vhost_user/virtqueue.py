"""The guest's memory, and split virtqueues in it, on a little-endian host.

Source: Virtual I/O Device (VIRTIO) 1.2, section 2.7.
"""

import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from tests.support.vhost_user.messages import MemoryRegion, ProtocolError, RingAddresses

WORD_BYTES = 2
DESCRIPTOR = struct.Struct("<QIHH")
USED_ELEMENT = struct.Struct("<II")

VIRTQ_DESC_F_NEXT = 1
VIRTQ_DESC_F_WRITE = 2

INDEX_OFFSET = 2
"""Both rings begin with 16 bits of flags and 16 bits of index, which counts without end."""

RING_OFFSET = 4

ONE_EVENT = (1).to_bytes(8, "little")


class MappedRegion:
    """A region of the guest's memory, mapped here."""

    def __init__(self, region: MemoryRegion, descriptor: int) -> None:
        try:
            self._mapped = mmap.mmap(descriptor, region.mmap_offset + region.size_bytes)
        except (OSError, ValueError) as error:
            raise ProtocolError(f"cannot map {region}: {error}") from error
        self._bytes = memoryview(self._mapped)[region.mmap_offset :]
        self._words = self._bytes.cast("H")
        self.region = region

    def close(self) -> None:
        """Unmaps it."""
        self._words.release()
        self._bytes.release()
        self._mapped.close()

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the region."""
        return self._bytes[offset : offset + length].tobytes()

    def write(self, offset: int, data: bytes) -> None:
        """Writes bytes of the region."""
        self._bytes[offset : offset + len(data)] = data

    def read_word(self, offset: int) -> int:
        """16 bits at an even offset, at once: the guest may be writing them.

        The struct module would read each byte for itself, and clear both before it writes.
        """
        return self._words[offset // 2]

    def write_word(self, offset: int, word: int) -> None:
        """Writes 16 bits at an even offset, at once: the guest may be reading them."""
        self._words[offset // 2] = word


class GuestMemory:
    """What the front end has shared of the guest's memory; nothing until `replace`."""

    def __init__(self) -> None:
        self._regions: list[MappedRegion] = []

    def replace(self, regions: Sequence[MemoryRegion], descriptors: Sequence[int]) -> None:
        """Maps these regions instead of those before; the descriptors stay the caller's."""
        self.close()
        for region, descriptor in zip(regions, descriptors, strict=True):
            self._regions.append(MappedRegion(region, descriptor))

    def close(self) -> None:
        """Unmaps everything."""
        while self._regions:
            self._regions.pop().close()

    def read(self, guest_address: int, length: int) -> bytes:
        """Bytes at an address of the guest."""
        mapped, offset = self._at_guest_address(guest_address, length)
        return mapped.read(offset, length)

    def write(self, guest_address: int, data: bytes) -> None:
        """Writes bytes at an address of the guest."""
        mapped, offset = self._at_guest_address(guest_address, len(data))
        mapped.write(offset, data)

    def at_user_address(self, user_address: int, length: int) -> tuple[MappedRegion, int]:
        """The region, and the offset in it, of an address of the front end."""
        for mapped in self._regions:
            offset = user_address - mapped.region.user_address
            if 0 <= offset <= mapped.region.size_bytes - length:
                return mapped, offset
        raise ProtocolError(f"no memory at {user_address:#x} of the front end")

    def _at_guest_address(self, guest_address: int, length: int) -> tuple[MappedRegion, int]:
        for mapped in self._regions:
            offset = guest_address - mapped.region.guest_address
            if 0 <= offset <= mapped.region.size_bytes - length:
                return mapped, offset
        raise ProtocolError(f"no memory at {guest_address:#x} of the guest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """What the driver has put into a queue at once: bytes to read, and room to answer in.

    `room` has guest addresses with lengths.
    """

    head: int
    request: bytes
    room: tuple[tuple[int, int], ...]

    @property
    def room_bytes(self) -> int:
        """How long the answer may be."""
        return sum(length for _, length in self.room)


class Virtqueue:
    """One queue of a device. It owns its eventfds: `kick` by the driver, `call` to the driver.

    `next_available` counts the chains that were taken, modulo 2**16.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.size = 0
        self.addresses: RingAddresses | None = None
        self.next_available = 0
        self.is_enabled = False
        self.kick: int | None = None
        self.call: int | None = None

    @property
    def is_running(self) -> bool:
        """Whether the device may take something out."""
        is_placed = self.size > 0 and self.addresses is not None
        return is_placed and self.is_enabled and self.kick is not None

    def set_kick(self, descriptor: int | None) -> None:
        """Takes over another descriptor and closes the one before."""
        _close(self.kick)
        self.kick = descriptor

    def set_call(self, descriptor: int | None) -> None:
        """Takes over another descriptor and closes the one before.

        The new one is written to at once. Chains that were answered through the old one may not
        have reached the driver: QEMU lets a queue run before it hands over the descriptor that
        the driver listens to.
        """
        _close(self.call)
        self.call = descriptor
        if descriptor is not None:
            os.write(descriptor, ONE_EVENT)

    def close(self) -> None:
        """Stops the queue and closes its descriptors."""
        self.set_kick(None)
        self.set_call(None)

    def pop(self) -> Chain | None:
        """The next chain; None when the queue is empty or does not run."""
        if not self.is_running or self.addresses is None:
            return None
        available_bytes = RING_OFFSET + WORD_BYTES * self.size
        ring, start = self._memory.at_user_address(self.addresses.available, available_bytes)
        if ring.read_word(start + INDEX_OFFSET) == self.next_available:
            return None
        slot = self.next_available % self.size
        head = ring.read_word(start + RING_OFFSET + WORD_BYTES * slot)
        self.next_available = (self.next_available + 1) % (1 << 16)
        return self._chain(head, self.addresses)

    def push(self, chain: Chain, answer: bytes = b"") -> None:
        """Gives a chain back with an answer, cut to its room, and tells the driver.

        The driver is always told, though it may not want to be: to read its wish after the index
        was written takes a memory barrier, which Python has not.
        """
        assert self.addresses is not None, "a chain came out of a queue without addresses"
        written = self._scatter(chain, answer)
        used_bytes = RING_OFFSET + USED_ELEMENT.size * self.size
        ring, start = self._memory.at_user_address(self.addresses.used, used_bytes)
        index = ring.read_word(start + INDEX_OFFSET)
        place = start + RING_OFFSET + USED_ELEMENT.size * (index % self.size)
        ring.write(place, USED_ELEMENT.pack(chain.head, written))
        ring.write_word(start + INDEX_OFFSET, (index + 1) % (1 << 16))
        if self.call is not None:
            os.write(self.call, ONE_EVENT)

    def _chain(self, head: int, addresses: RingAddresses) -> Chain:
        table_bytes = DESCRIPTOR.size * self.size
        table, start = self._memory.at_user_address(addresses.descriptors, table_bytes)
        request = b""
        room: list[tuple[int, int]] = []
        index = head
        for _ in range(self.size):
            if index >= self.size:
                break
            descriptor = table.read(start + DESCRIPTOR.size * index, DESCRIPTOR.size)
            address, length, flags, index = DESCRIPTOR.unpack(descriptor)
            if flags & VIRTQ_DESC_F_WRITE:
                room.append((address, length))
            else:
                request += self._memory.read(address, length)
            if not flags & VIRTQ_DESC_F_NEXT:
                return Chain(head=head, request=request, room=tuple(room))
        raise ProtocolError("a chain of descriptors without an end")

    def _scatter(self, chain: Chain, answer: bytes) -> int:
        written = 0
        for address, length in chain.room:
            part = answer[written : written + length]
            self._memory.write(address, part)
            written += len(part)
        return written


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)
