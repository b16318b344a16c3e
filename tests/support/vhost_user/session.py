"""One front end's conversation with a device, and two ways of behaving badly in it."""

import logging
import os
import selectors
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, Protocol

from tests.support.vhost_user.messages import (
    U64,
    VRING_STATE,
    Connection,
    Feature,
    Message,
    ProtocolError,
    ProtocolFeature,
    Request,
)
from tests.support.vhost_user.virtqueue import GuestMemory, Virtqueue

Talk = Callable[[Connection], None]
"""What is done with a front end that has connected; returns when it is over."""

ACCEPTED = U64.pack(0)
REFUSED = U64.pack(1)

logger = logging.getLogger(__name__)


class Device(Protocol):
    """A kind of device."""

    @property
    def features(self) -> int:
        """The feature bits of this kind."""

    @property
    def queue_num(self) -> int:
        """What GET_QUEUE_NUM is answered with; of network devices, pairs are counted."""

    @property
    def virtqueues(self) -> int:
        """How many virtqueues it has."""

    def serve(self, index: int, queues: list[Virtqueue]) -> None:
        """Answers whatever the driver has put into the queue of this index."""


class Session:
    """A conversation with one front end, and all it has handed over.

    Drivers of virtio before 1.0 are not served. That writes to the guest's memory are seen in
    their order is left to the processor: x86 keeps it.
    """

    def __init__(self, connection: Connection, device: Device) -> None:
        self._connection = connection
        self._device = device
        self._memory = GuestMemory()
        self._queues = [Virtqueue(self._memory) for _ in range(device.virtqueues)]
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ)
        self._answers: dict[int, Callable[[Message], bytes]] = {
            Request.GET_FEATURES: self._get_features,
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.GET_QUEUE_NUM: self._get_queue_num,
            Request.GET_VRING_BASE: self._get_vring_base,
        }
        self._orders: dict[int, Callable[[Message], None]] = {
            Request.SET_FEATURES: self._set_features,
            Request.SET_PROTOCOL_FEATURES: _ignore,
            Request.SET_OWNER: _ignore,
            Request.RESET_OWNER: _ignore,
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: _ignore,
            Request.SET_VRING_ENABLE: self._set_vring_enable,
        }

    def close(self) -> None:
        """Gives back the memory and every descriptor; the connection is the caller's."""
        for queue in self._queues:
            queue.close()
        self._memory.close()
        self._selector.close()

    def run(self, messages: int | None = None) -> None:
        """Serves until the front end hangs up or, unless None, so many messages were handled."""
        while messages is None or messages > 0:
            if self._serve_until_message():
                message = self._connection.receive()
                if message is None:
                    return
                try:
                    self._handle(message)
                    self._watch_queues()
                finally:
                    message.close()
                if messages is not None:
                    messages -= 1

    def _serve_until_message(self) -> bool:
        """Waits until something comes, and serves the queues that were kicked.

        Whether there is a message.
        """
        ready = [key for key, _ in self._selector.select()]
        kicked = [key for key in ready if key.data is not None]
        for key in kicked:
            with suppress(BlockingIOError):
                os.read(key.fd, 8)
            self._device.serve(key.data, self._queues)
        return len(kicked) < len(ready)

    def _watch_queues(self) -> None:
        """Listens for the kicks of queues that run; those that come before stay to be heard."""
        for index, queue in enumerate(self._queues):
            if queue.kick is None:
                continue
            is_watched = queue.kick in self._selector.get_map()
            if queue.is_running and not is_watched:
                self._selector.register(queue.kick, selectors.EVENT_READ, index)
            elif is_watched and not queue.is_running:
                self._selector.unregister(queue.kick)

    def _handle(self, message: Message) -> None:
        name = _name(message.request)
        logger.debug("%s %s", name, message.payload.hex())
        if answer := self._answers.get(message.request):
            self._connection.reply(message.request, answer(message))
            return
        order = self._orders.get(message.request)
        if order is None:
            logger.warning("%s is not known here, ignoring", name)
        else:
            order(message)
        if message.needs_reply:
            self._connection.reply(message.request, ACCEPTED if order else REFUSED)

    def _get_features(self, _: Message) -> bytes:
        every_device = Feature.VIRTIO_F_VERSION_1 | Feature.F_PROTOCOL_FEATURES
        return U64.pack(self._device.features | every_device)

    def _get_protocol_features(self, _: Message) -> bytes:
        return U64.pack(ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK)

    def _get_queue_num(self, _: Message) -> bytes:
        return U64.pack(self._device.queue_num)

    def _get_vring_base(self, message: Message) -> bytes:
        """Stops the queue. All it had taken has been answered: nothing is done in between."""
        index, _ = message.vring_state()
        queue = self._queue(index)
        self._replace_kick(index, None)
        queue.close()
        return VRING_STATE.pack(index, queue.next_available)

    def _set_features(self, message: Message) -> None:
        if not message.u64() & Feature.F_PROTOCOL_FEATURES:
            for queue in self._queues:
                queue.is_enabled = True  # there will be no SET_VRING_ENABLE

    def _set_mem_table(self, message: Message) -> None:
        self._memory.replace(message.memory_regions(), message.descriptors)

    def _set_vring_num(self, message: Message) -> None:
        index, size = message.vring_state()
        self._queue(index).size = size

    def _set_vring_addr(self, message: Message) -> None:
        index, addresses = message.vring_addresses()
        self._queue(index).addresses = addresses

    def _set_vring_base(self, message: Message) -> None:
        index, base = message.vring_state()
        self._queue(index).next_available = base

    def _set_vring_kick(self, message: Message) -> None:
        index, descriptor = message.vring_descriptor()
        self._replace_kick(index, descriptor)

    def _set_vring_call(self, message: Message) -> None:
        index, descriptor = message.vring_descriptor()
        self._queue(index).set_call(descriptor)

    def _set_vring_enable(self, message: Message) -> None:
        index, is_enabled = message.vring_state()
        self._queue(index).is_enabled = bool(is_enabled)

    def _replace_kick(self, index: int, descriptor: int | None) -> None:
        """Takes over a queue's kick; without one, the queue does not run."""
        queue = self._queue(index)
        if queue.kick is not None and queue.kick in self._selector.get_map():
            self._selector.unregister(queue.kick)
        queue.set_kick(descriptor)

    def _queue(self, index: int) -> Virtqueue:
        if index >= len(self._queues):
            raise ProtocolError(f"no queue {index}")
        return self._queues[index]


def converse(connection: Connection, device: Device) -> None:
    """Is a good backend until the front end hangs up."""
    session = Session(connection, device)
    try:
        session.run()
    finally:
        session.close()


def fall_silent(connection: Connection, device: Device, after: int) -> None:
    """Handles so many messages well, then none, and keeps the connection open."""
    session = Session(connection, device)
    try:
        session.run(after)
        connection.wait_hung_up()
    finally:
        session.close()


def hang_up(_: Connection) -> None:
    """Closes the connection without a word."""


def serve(listener: socket.socket, talk: Talk) -> NoReturn:
    """Talks to one front end after another; whoever comes meanwhile waits."""
    while True:
        connected, _ = listener.accept()
        with connected:
            try:
                talk(Connection(connected))
            except (ConnectionError, ProtocolError) as error:
                logger.warning("the front end is dropped: %s", error)


def _ignore(_: Message) -> None:
    pass


def _name(request: int) -> str:
    return Request(request).name if request in Request.__members__.values() else str(request)
