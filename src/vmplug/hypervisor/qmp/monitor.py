"""Monitor: a QMP connection, to a real or an in-memory QEMU."""

from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from vmplug.drivers.ports import Command
from vmplug.errors import CommandError
from vmplug.hypervisor.qmp.schema import validate_reply

EventReceiver = Callable[[str, Mapping[str, Any]], None]

Talk = Generator[Command, Any, None]
"""Commands; each is answered, or its refusal raised, before the next one is requested."""

COMMAND_TIMEOUT_S = 30.0
"""QEMU answers in milliseconds; only a dead disk can delay it."""

MISSED = "missed"
"""In place of an event's name: from now on events are missed, until the next command."""


class Monitor(Protocol):
    """Commands go in, answers and events come out.

    `peer_pid` is the process at the other end, None where there is none or it is unknown. Raises
    ProtocolError when the connection is lost, or an answer makes no sense.
    """

    peer_pid: int | None = None

    @abstractmethod
    def attempt(self, commands: Sequence[Command]) -> tuple[list[Any], CommandError | None]:
        """Run commands in order until one is refused: the answers so far, and the refusal."""

    def converse(self, talk: Talk) -> None:
        """Run commands of which each depends on the answers before it.

        No other client of this monitor can send commands in between, and it keeps the turn. Raises
        what `talk` does.
        """
        with self.keep_turn():
            command = next_command(talk)
            while command:
                answers, refusal = self.attempt([command])
                answer = None if refusal else validate_reply(command, answers[0])
                command = next_command(talk, answer, refusal)

    def keep_turn(self) -> AbstractContextManager[None]:
        """Keep the turn on the socket meanwhile: QEMU 7.2 forgets fd sets when it ends."""
        return nullcontext()

    def hear_events(self) -> AbstractContextManager[None]:
        """Keep listening for events meanwhile, as long as a turn on the socket may last."""
        return nullcontext()

    @abstractmethod
    def listen(self, receive: EventReceiver) -> None:
        """Pass every event's name and data to `receive`, on any thread."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""

    def execute_all(self, commands: Sequence[Command]) -> list[Any]:
        """The answers to many commands; raises CommandError at the first that is refused."""
        answers, refusal = self.attempt(commands)
        if refusal:
            raise refusal
        return [validate_reply(*asked) for asked in zip(commands, answers, strict=True)]

    def execute(self, command: Command) -> Any:
        """The answer to one command; raises CommandError when QEMU refuses it."""
        return self.execute_all([command])[0]


def next_command(
    talk: Talk, answer: Any = None, refusal: CommandError | None = None
) -> Command | None:
    """The next command, after the answer to the last one or its refusal; None at the end."""
    try:
        return talk.throw(refusal) if refusal else talk.send(answer)
    except StopIteration:
        return None


_GROUP_OPEN = "another process has the group open, or the group is not bound to VFIO"
_NO_MORE_MEMORY = (
    "a vhost-user backend of the VM cannot map more memory regions: detach its device first"
)
_LEFT = (
    "vmplug reconcile removes what an interrupted attach left in the VM, and lists what another "
    "journal has there"
)
_HINTS = (
    (
        "is not viable",
        "vmplug check names each member with another driver, and the remedy (vmplug bind)",
    ),
    (
        "Failed to set iommu for container",
        "the IOMMU does not remap interrupts, or cannot be used: vmplug check shows which",
    ),
    ("No available IOMMU models", "modprobe vfio_iommu_type1"),
    ("error bind device fd", _GROUP_OPEN),
    ("failed to open /dev/vfio/", _GROUP_OPEN),
    ("Could not open '/dev/vfio/", _GROUP_OPEN),
    ("is already attached", "it is already in this VM; vmplug did not plug it"),
    ("used in multiple address spaces", "start the VM without a vIOMMU, or with a bridge"),
    (
        "Cannot allocate memory",
        "QEMU's limit for locked memory is too low: set LimitMEMLOCK=infinity",
    ),
    ("caching-mode", "set caching-mode=on for the vIOMMU: host devices need it"),
    (
        "lun already used by",
        "the journal has another address for the disk that is named: detach that one",
    ),
    (
        '" lock',
        "another process has the disk open: stop it, or share it (read-only or share-rw=on)",
    ),
    (",id=vmplug-", _LEFT),
    ("Duplicate", _LEFT),
    ("not available for", "another device was plugged there meanwhile; try again"),
    (
        "error getting device from group",
        "if virtual functions of it are in use, only their VF token opens it: detach them first",
    ),
    ("Permission denied", "allow QEMU's user to open the disk"),
    ("Failed to connect to", "start the backend that listens there"),
    ("cache-size' not found", "this QEMU has no DAX window for virtio-fs: leave cache-size out"),
    ("vhost backend has no free memory slots left", _NO_MORE_MEMORY),
    ("vhost backend has not enough free memory slots left", _NO_MORE_MEMORY),
    (
        "vhost backend memory slots",
        "the backend cannot map all of the VM's memory: detach a pmem device",
    ),
    ("not enough space, currently", "start the VM with a larger maxmem"),
    ("does not support hotplugging", "start the VM with root ports (vmplug vm start)"),
)
"""The remedies by a part of QEMU's error.

Where QEMU versions differ, each has a line: 7.2 first, then 10 and 11. Source: measured on these
three; errors that need real devices are from the strings of the programs.
"""


def command_error(command: Command, error_class: str, desc: str) -> CommandError:
    """QEMU's refusal, with the remedy where one is known."""
    error = CommandError(command.execute, error_class, desc)
    error.hint = next((hint for words, hint in _HINTS if words in desc), None)
    if error_class == "CommandNotFound":
        error.hint = "this QEMU is too old: vmplug needs 7.2 or later"
    return error
