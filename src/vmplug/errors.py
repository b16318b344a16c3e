"""The errors of vmplug, by whose fault they are.

DeviceError
 ├ SpecError          the request is malformed; the host was not asked
 ├ HostError          the host cannot give it
 │  ├ NoSuchDevice        no device of that type and number, or no such file
 │  ├ AttributeReadError  a file below /sys, /proc or /dev could not be read or made no sense
 │  ├ BindError           a function could not be bound or created; nothing has changed
 │  └ InUse               something on the host still uses it
 ├ PolicyError        the operator's rules do not allow it
 ├ HypervisorError    the VM cannot take it or does not answer
 │  ├ ConnectError        the QMP connection could not be opened
 │  ├ ProtocolError       the connection was lost or overran its deadline
 │  ├ CommandError        QEMU refused a command
 │  ├ BackendError        the process behind a vhost-user socket failed; QEMU is as it was
 │  ├ BackendTimeout      it made QEMU overrun the deadline; nobody knows what QEMU did
 │  ├ CannotPlug          not into this VM, or not while it runs; nothing was sent
 │  ├ NoFreePort          no free place of the wanted kind
 │  ├ UnplugRefused       the guest refused to release it
 │  └ UnplugTimeout       the guest did not answer in time; the device stays "detaching"
 ├ StateError         the wrong moment for this verb
 │  ├ NotAttached
 │  ├ AmbiguousId         several attachments or devices have that id, or ids that begin so
 │  └ StillAttached
 └ StoreError         saved state unreadable, or from a newer version

The message is one sentence; `hint` is the remedy where there is one, and a traceback shows it as a
note; every other public attribute is a fact, and `facts` gives them all.
"""

import os
from typing import ClassVar

__all__ = [
    "AmbiguousId",
    "AttributeReadError",
    "BackendError",
    "BackendTimeout",
    "BindError",
    "CannotPlug",
    "CommandError",
    "ConnectError",
    "DeviceError",
    "HostError",
    "HypervisorError",
    "InUse",
    "NoFreePort",
    "NoSuchDevice",
    "NotAttached",
    "PolicyError",
    "ProtocolError",
    "SpecError",
    "StateError",
    "StillAttached",
    "StoreError",
    "UnplugRefused",
    "UnplugTimeout",
]


def counted(number: int, noun: str) -> str:
    """`1 device`, `2 devices`: for messages."""
    return f"{number} {noun}{'s' * (number != 1)}"


class DeviceError(Exception):
    """The base of every vmplug error; `code` is a stable word for programs."""

    code: ClassVar[str] = "device-error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self._hint = hint
        if hint:
            self.add_note(f"hint: {hint}")

    @property
    def hint(self) -> str | None:
        """The remedy, None where there is none."""
        return self._hint

    @hint.setter
    def hint(self, hint: str | None) -> None:
        others = self.notes
        self._hint = hint
        if hasattr(self, "__notes__"):
            del self.__notes__
        for note in (*([f"hint: {hint}"] if hint else []), *others):
            self.add_note(note)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was noted beside the hint: further errors, for example."""
        notes: list[str] = getattr(self, "__notes__", [])
        return tuple(note for note in notes if note != f"hint: {self._hint}")

    @property
    def facts(self) -> dict[str, object]:
        """The attributes of this error beside its message and hint."""
        others = {"message", "_hint", "__notes__"}
        return {name: value for name, value in vars(self).items() if name not in others}


class SpecError(DeviceError):
    """The request is malformed: `where` is a JSON path (`$.mounts[0].source`) or an option."""

    code = "bad-request"

    def __init__(self, where: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(f"{where}: {message}", hint=hint)
        self.where = where


class HostError(DeviceError):
    """The host cannot give the device."""

    code = "host-error"


class NoSuchDevice(HostError):
    """No device of that type and number; `found` is what is in its place, None for nothing."""

    code = "no-such-device"

    def __init__(
        self, wanted: str, message: str, *, found: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.wanted = wanted
        self.found = found


class AttributeReadError(HostError):
    """A host file could not be read (`errno` says why) or held nonsense (`errno` is None)."""

    code = "unreadable"

    def __init__(self, path: str, errno: int | None = None, *, why: str | None = None) -> None:
        reason = why or (os.strerror(errno) if errno is not None else "malformed")
        super().__init__(f"cannot read {path}: {reason}")
        self.path = path
        self.errno = errno


class BindError(HostError):
    """The kernel did not carry out a step; `device` is a BDF or an mdev's UUID.

    `step` is what was tried (`driver_override`, `unbind`, `drivers_probe`, ...). `errno` is the
    kernel's answer, None when it accepted the write and did nothing.
    """

    code = "bind-failed"

    def __init__(
        self,
        device: str,
        step: str,
        message: str,
        *,
        errno: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.device = device
        self.step = step
        self.errno = errno


class InUse(HostError):
    """The device may not be handed over; `codes` are the findings of `check` that say so."""

    code = "in-use"

    def __init__(
        self, host_path: str, message: str, *, codes: tuple[str, ...], hint: str | None
    ) -> None:
        super().__init__(message, hint=hint)
        self.host_path = host_path
        self.codes = codes


class PolicyError(DeviceError):
    """The operator's rules, or vmplug's own, do not allow it."""

    code = "not-allowed"


class HypervisorError(DeviceError):
    """The VM cannot take the device or does not answer."""

    code = "hypervisor-error"


class ConnectError(HypervisorError):
    """The QMP connection on `socket` could not be opened."""

    code = "cannot-connect"

    def __init__(self, socket: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.socket = socket


class ProtocolError(HypervisorError):
    """The QMP connection was lost or overran its deadline; QEMU may have run the command."""

    code = "connection-lost"


class BackendError(HypervisorError):
    """The process behind the vhost-user socket `socket` failed; QEMU is as it was."""

    code = "backend-failed"

    def __init__(self, socket: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.socket = socket


class BackendTimeout(ProtocolError):
    """The process behind `socket` kept QEMU waiting past the deadline.

    QEMU does nothing else until that process answers or ends.
    """

    code = "backend-silent"

    def __init__(self, socket: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.socket = socket


class CannotPlug(HypervisorError):
    """This VM cannot take it, whatever is free; `reason` is a stable word. Nothing was sent."""

    code = "cannot-plug"

    def __init__(self, reason: str, message: str, *, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


class CommandError(HypervisorError):
    """QEMU refused `command`; `error_class` and `desc` are QEMU's own words."""

    code = "command-failed"

    def __init__(self, command: str, error_class: str, desc: str) -> None:
        super().__init__(f"QEMU refused {command}: {desc}")
        self.command = command
        self.error_class = error_class
        self.desc = desc


class NoFreePort(HypervisorError):
    """The VM has no free place of the wanted kind."""

    code = "no-free-port"


class UnplugRefused(HypervisorError):
    """The guest refused to release the device at `qom_path`."""

    code = "unplug-refused"

    def __init__(self, qom_path: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.qom_path = qom_path


class UnplugTimeout(HypervisorError):
    """The guest did not release these devices in time; they stay "detaching"."""

    code = "unplug-timeout"

    def __init__(self, ids: tuple[str, ...], message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.ids = ids


CLOSED = "closed"
"""The state of a connection that another thread has closed."""


class StateError(DeviceError):
    """The wrong moment: the object is in `state`, the verb needs `required`."""

    code = "wrong-state"

    def __init__(
        self, message: str, *, state: str, required: str, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.state = state
        self.required = required


def is_closed(error: DeviceError) -> bool:
    """Whether it is that of a connection which another thread has closed."""
    return isinstance(error, StateError) and error.state == CLOSED


class NotAttached(StateError):
    """Nothing of that name is attached."""

    code = "not-attached"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, state="absent", required="attached", hint=hint)


class AmbiguousId(StateError):
    """`name` means several attachments, those with these `ids`."""

    code = "ambiguous-id"

    def __init__(self, name: str, message: str, *, ids: tuple[str, ...], hint: str) -> None:
        super().__init__(message, state="ambiguous", required="one attachment", hint=hint)
        self.name = name
        self.ids = ids


class StillAttached(StateError):
    """Devices are still attached."""

    code = "still-attached"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, state="attached", required="no attachments", hint=hint)


class StoreError(DeviceError):
    """The saved state at `path` is unreadable, locked, or from a newer version."""

    code = "bad-state"

    def __init__(self, path: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.path = path
