"""A network device with a whole subnet behind it, whose every address answers ARP and ping.

Source: Virtual I/O Device (VIRTIO) 1.2, section 5.1; RFC 826, RFC 792.
"""

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from tests.support.vhost_user.virtqueue import Virtqueue

VIRTIO_NET_F_MAC = 1 << 5

RECEIVE_QUEUE = 0
TRANSMIT_QUEUE = 1

NET_HEADER = struct.Struct("<BBHHHHH")
"""virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers."""

PLAIN_HEADER = NET_HEADER.pack(0, 0, 0, 0, 0, 0, 1)

ETHERNET = struct.Struct(">6s6sH")
ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_ARP = 0x0806

ARP = struct.Struct(">HHBBH6s4s6s4s")
ARP_FOR_IPV4 = (1, ETHERTYPE_IPV4, 6, 4)
ARP_REQUEST = 1
ARP_REPLY = 2

IPV4 = struct.Struct(">BBHHHBBH4s4s")
IPV4_SOURCE = slice(12, 16)
IPV4_TARGET = slice(16, 20)
IPPROTO_ICMP = 1
IPV4_FRAGMENT_MASK = 0x3FFF
"""More fragments to come, or an offset: a part of a packet only."""

ICMP_ECHO_REQUEST = 8
ICMP_ECHO_REPLY = 0


@dataclass(frozen=True, slots=True)
class Subnet:
    """Stations that share one MAC address and have every address of a network."""

    network: IPv4Network
    mac: bytes

    def answer(self, frame: bytes) -> bytes | None:
        """The Ethernet frame that answers a frame; None when nobody would answer."""
        if len(frame) < ETHERNET.size:
            return None
        destination, source, ethertype = ETHERNET.unpack_from(frame)
        packet = frame[ETHERNET.size :]
        answer = None
        if ethertype == ETHERTYPE_ARP:
            answer = self._answer_arp(packet)
        elif ethertype == ETHERTYPE_IPV4 and destination == self.mac:
            answer = self._answer_ipv4(packet)
        return answer and ETHERNET.pack(source, self.mac, ethertype) + answer

    def _answer_arp(self, packet: bytes) -> bytes | None:
        if len(packet) < ARP.size:
            return None
        *kind, operation, sender_mac, sender, _, target = ARP.unpack_from(packet)
        if tuple(kind) != ARP_FOR_IPV4 or operation != ARP_REQUEST:
            return None
        # Who asks for its own address, or without having one, asks whether it is free.
        if not self._has(target) or sender in {target, bytes(4)}:
            return None
        return ARP.pack(*ARP_FOR_IPV4, ARP_REPLY, self.mac, target, sender_mac, sender)

    def _answer_ipv4(self, packet: bytes) -> bytes | None:
        if len(packet) < IPV4.size:
            return None
        version_length, _, length, _, fragment, _, protocol, *_ = IPV4.unpack_from(packet)
        header_bytes = (version_length & 0xF) * 4
        echo = packet[header_bytes:length]  # behind it there may be padding
        if protocol != IPPROTO_ICMP or fragment & IPV4_FRAGMENT_MASK or len(echo) < 8:
            return None
        source, target = packet[IPV4_SOURCE], packet[IPV4_TARGET]
        if not self._has(target) or echo[0] != ICMP_ECHO_REQUEST or internet_checksum(echo):
            return None
        # The addresses trade places, which leaves the header's checksum right.
        before, options = packet[: IPV4_SOURCE.start], packet[IPV4_TARGET.stop : header_bytes]
        return before + target + source + options + _echo_reply(echo)

    def _has(self, address: bytes) -> bool:
        station = IPv4Address(address)
        return station in self.network and station not in {
            self.network.network_address,
            self.network.broadcast_address,
        }


class NetDevice:
    """The device in front of a subnet: one pair of queues."""

    features = VIRTIO_NET_F_MAC
    queue_num = 1
    virtqueues = 2

    def __init__(self, subnet: Subnet) -> None:
        self._subnet = subnet

    def serve(self, index: int, queues: list[Virtqueue]) -> None:
        """Answers the frames that were sent; an answer for which there is no buffer is lost."""
        if index != TRANSMIT_QUEUE:
            return
        while chain := queues[TRANSMIT_QUEUE].pop():
            queues[TRANSMIT_QUEUE].push(chain)
            answer = self._subnet.answer(chain.request[NET_HEADER.size :])
            if answer and (buffer := queues[RECEIVE_QUEUE].pop()):
                queues[RECEIVE_QUEUE].push(buffer, PLAIN_HEADER + answer)


def internet_checksum(data: bytes) -> int:
    """The checksum of RFC 1071; 0 over data that has its right checksum in it."""
    padded = data + bytes(len(data) % 2)
    total = sum(int.from_bytes(padded[at : at + 2], "big") for at in range(0, len(padded), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def _echo_reply(echo_request: bytes) -> bytes:
    rest = echo_request[4:]
    checksum = internet_checksum(bytes([ICMP_ECHO_REPLY, 0, 0, 0]) + rest)
    return struct.pack(">BBH", ICMP_ECHO_REPLY, 0, checksum) + rest
