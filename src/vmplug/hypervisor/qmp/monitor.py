"""Monitor: a QMP conversation, whoever holds the other end."""

from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Protocol

from vmplug.drivers.ports import Command
from vmplug.errors import CommandError
from vmplug.hypervisor.qmp.schema import validate_reply

EventReceiver = Callable[[str, Mapping[str, Any]], None]

Talk = Generator[Command, Any, None]
"""Commands; each is answered, or its refusal is raised, before the next one is asked for."""

COMMAND_TIMEOUT_S = 30.0
"""QEMU answers in milliseconds; only a dead disk can make it think."""

MISSED = "missed"
"""In the place of an event's name: from now on events are missed, until the next command."""


class Monitor(Protocol):
    """Commands go in, answers and events come out.

    `peer_pid` is the process that speaks, None where there is none or the kernel cannot say.
    Raises ProtocolError when the conversation breaks, or makes no sense.
    """

    peer_pid: int | None = None

    @abstractmethod
    def attempt(self, commands: Sequence[Command]) -> tuple[list[Any], CommandError | None]:
        """Run commands in order until one is refused: the answers so far, and the refusal."""

    def converse(self, talk: Talk) -> None:
        """Run commands of which each depends on the answers before it.

        No other client of this monitor has a word in between. Raises what `talk` does.
        """
        command = next_command(talk)
        while command:
            answers, refusal = self.attempt([command])
            answer = None if refusal else validate_reply(command, answers[0])
            command = next_command(talk, answer, refusal)

    @abstractmethod
    def listen(self, receive: EventReceiver) -> None:
        """Hand every event's name and data to `receive`, on whatever thread it comes in."""

    @abstractmethod
    def close(self) -> None:
        """End the conversation."""

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
    """What comes next, after the answer to the one before or its refusal; None at the end."""
    try:
        return talk.throw(refusal) if refusal else talk.send(answer)
    except StopIteration:
        return None


_GROUP_OPEN = "another process has the group open, or it is not bound"
_NO_MORE_MEMORY = (
    "a vhost-user backend of the VM maps no more pieces of memory: detach its device first"
)
_HINTS = (
    ("is not viable", "vmplug check names the function that another driver holds; vmplug bind"),
    (
        "Failed to set iommu for container",
        "the IOMMU does not remap interrupts, or may not be used: vmplug check says which",
    ),
    ("No available IOMMU models", "modprobe vfio_iommu_type1"),
    ("error bind device fd", _GROUP_OPEN),
    ("failed to open /dev/vfio/", _GROUP_OPEN),
    ("Could not open '/dev/vfio/", _GROUP_OPEN),
    ("is already attached", "it is in this VM already, plugged by somebody else"),
    ("used in multiple address spaces", "start the VM without an IOMMU, or with a bridge"),
    ("Cannot allocate memory", "QEMU may lock too little memory: LimitMEMLOCK=infinity"),
    ("caching-mode", "give the VM's IOMMU caching-mode=on, as devices of the host need"),
    (
        '" lock',
        "another process has the disk open: stop it, or share it (read-only or share-rw=on)",
    ),
    (",id=vmplug-", "vmplug reconcile removes what an interrupted attach left in the VM"),
    ("Duplicate", "vmplug reconcile removes what an interrupted attach left in the VM"),
    ("not available for", "something else was plugged there meanwhile; try again"),
    ("Permission denied", "QEMU's own user must be allowed to open the disk"),
    ("Failed to connect to", "start the backend that listens there"),
    ("cache-size' not found", "this QEMU has no DAX window for virtio-fs: leave cache-size out"),
    ("vhost backend has no free memory slots left", _NO_MORE_MEMORY),
    ("vhost backend has not enough free memory slots left", _NO_MORE_MEMORY),
    ("vhost backend memory slots", "the backend cannot map all of the VM's memory: detach a pmem"),
    ("not enough space, currently", "start the VM with more room for memory: a larger maxmem"),
    ("does not support hotplugging", "start the VM with root ports (vmplug vm start)"),
)
"""What to do about QEMU's words, by a piece of them.

Where QEMUs word it differently, each has a line: of 7.2 first, then of 10 and 11. Source: measured
on these three, and what cannot be provoked without devices read from their programs' strings.
"""


def command_error(command: Command, error_class: str, desc: str) -> CommandError:
    """QEMU's refusal, with the remedy where one is known."""
    error = CommandError(command.execute, error_class, desc)
    error.hint = next((hint for words, hint in _HINTS if words in desc), None)
    if error_class == "CommandNotFound":
        error.hint = "this QEMU is older than vmplug supports: it needs 7.2 or newer"
    return error
