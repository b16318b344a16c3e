"""Sandbox: one VM with its manager and journal, live or restored before every step.

A restored sandbox closes its manager and opens another on the same state directory whenever it is
used: what a test sees then was in the journal or in the VM, and never in a live object.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.contract.world import MemorySide, Parts, Rows, Side, journal_rows
from tests.support.journal import lay_journal
from tests.support.lonely_host import LonelyHost
from vmplug.drivers.plug import VirtiofsdSpec
from vmplug.drivers.ports import Command
from vmplug.errors import CommandError, ProtocolError
from vmplug.host.root import HostRoot
from vmplug.hypervisor.fake.monitor import FakeMonitor
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qmp.monitor import EventReceiver, Monitor, command_error
from vmplug.hypervisor.virtiofsd import HostVirtiofsdRunner, VirtiofsdProcess
from vmplug.manager.manager import DeviceManager
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import Request

SIZE_BYTES = 1 << 20
CHANGING = frozenset(
    {
        *("blockdev-add", "blockdev-del", "object-add", "object-del", "device_add", "device_del"),
        *("chardev-add", "chardev-remove", "netdev_add", "netdev_del", "getfd", "closefd"),
        *("add-fd", "remove-fd"),
    }
)


@dataclass(frozen=True, slots=True)
class Picture:
    """Everything that an unhappy request must leave as it was."""

    rows: Rows
    parts: Parts


class SandboxRunner(HostVirtiofsdRunner):
    """Those of one sandbox; until one was started nobody looks for any in all of /proc."""

    has_started = False

    def start(self, daemon: VirtiofsdSpec, device_id: str) -> VirtiofsdProcess:
        """See VirtiofsdRunner."""
        self.has_started = True
        return super().start(daemon, device_id)

    def find(self, device_ids: Iterable[str] | None = None) -> Mapping[str, int]:
        """See VirtiofsdRunner."""
        return super().find(device_ids) if self.has_started else {}


class Sandbox:
    """A VM below a manager; `devices` is the manager, for one step.

    `served` are requests whose other end is somebody that lives longer than the sandbox.
    """

    def __init__(
        self,
        directory: Path,
        *,
        side: Side | None = None,
        vm: str = "sandbox-1",
        is_restored: bool = False,
        root: HostRoot | None = None,
        served: Sequence[Request] = (),
    ) -> None:
        self.memory = MemorySide()
        self.side: Side = side or self.memory
        self.vm = vm
        self.directory = directory
        self.state_dir = directory / "state"
        is_in_memory = isinstance(self.side, MemorySide)
        self.root = root or (LonelyHost() if is_in_memory else HostRoot("/"))
        self.served = served
        self._is_restored = is_restored
        self._daemons = SandboxRunner(f"{vm} in {directory}")
        directory.mkdir(exist_ok=True)
        lay_journal(self.state_dir)
        self._wrap: Callable[[Monitor], Monitor] = lambda monitor: monitor
        self._manager: DeviceManager | None = None

    @property
    def machine(self) -> FakeMonitor:
        """The VM in memory."""
        return self.memory.machine

    @property
    def devices(self) -> DeviceManager:
        """The manager; a new one each time when the sandbox is to be restored."""
        if self._is_restored:
            self.close()
        if self._manager is None:
            self._manager = DeviceManager.open(
                vm=self.vm,
                host=self.root,
                hypervisor=Qemu(self._wrap(self.side.monitor()), daemons=self._daemons),
                state_dir=self.state_dir,
            )
        return self._manager

    def close(self) -> None:
        """End the manager; the next step opens another."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def talk_through(self, wrap: Callable[[Monitor], Monitor]) -> None:
        """From the next step on the manager talks through what `wrap` gives."""
        self.close()
        self._wrap = wrap

    def talk_plainly(self) -> None:
        """Nothing is between the manager and the VM any more."""
        self.talk_through(lambda monitor: monitor)

    def picture(self) -> Picture:
        """The journal and the VM now, read beside the product."""
        return Picture(journal_rows(self.state_dir), self.side.parts())

    def file(self, name: str, *, size_bytes: int = SIZE_BYTES) -> Path:
        """A sparse file, made when it is not there."""
        path = self.directory / name
        if not path.exists():
            with path.open("wb") as file:
                file.truncate(size_bytes)
        return path

    def disk(
        self,
        name: str = "a.img",
        *,
        at: str | None = None,
        ro: bool = False,
        options: Mapping[str, str] | None = None,
    ) -> DeviceInfo:
        """A request for an image file."""
        return DeviceInfo(
            container_path=at or f"/dev/{name}",
            dev_type=DevType.BLOCK,
            host_path=str(self.file(name)),
            read_only=ro,
            driver_options=options or {},
        )

    def changes_sent(self) -> list[Command]:
        """Every command since the start that could change the VM in memory."""
        return [command for command in self.machine.sent if command.execute in CHANGING]

    def vmplugs(self) -> set[str]:
        """The names in the VM that vmplug gave."""
        return self.side.parts().vmplugs()


class Killed(BaseException):
    """The process died here: nothing of it runs any more, not even what undoes."""


class Through(Monitor):
    """A monitor that passes everything on, command by command."""

    def __init__(self, inner: Monitor) -> None:
        self._inner = inner

    def attempt(self, commands: Sequence[Command]) -> tuple[list[Any], CommandError | None]:
        """See Monitor."""
        answers: list[Any] = []
        for command in commands:
            try:
                answers.append(self.answer(command))
            except CommandError as refusal:
                return answers, refusal
        return answers, None

    def answer(self, command: Command) -> Any:
        """The answer to one command."""
        return self._inner.execute(command)

    def keep_turn(self) -> AbstractContextManager[None]:
        """See Monitor."""
        return self._inner.keep_turn()

    def hear_events(self) -> AbstractContextManager[None]:
        """See Monitor."""
        return self._inner.hear_events()

    def listen(self, receive: EventReceiver) -> None:
        """See Monitor."""
        self._inner.listen(receive)

    def close(self) -> None:
        """See Monitor."""
        self._inner.close()


class Dying(Through):
    """The process is killed at its `count`-th command before it is sent.

    Or, of the commands that change the VM, before the answer of the `count`-th: where one only
    asks, that is the same death as the one before it is sent.
    """

    def __init__(self, inner: Monitor, count: int, *, is_sent: bool) -> None:
        super().__init__(inner)
        self._left = count
        self._is_sent = is_sent

    def answer(self, command: Command) -> Any:
        """See Through."""
        counts = command.execute in CHANGING or not self._is_sent
        self._left -= counts
        if self._left > 0:
            return super().answer(command)
        if self._left == 0 and self._is_sent and counts:
            super().answer(command)
        raise Killed


class Refusing(Through):
    """QEMU refuses the `count`-th command that would change it, and no other."""

    def __init__(self, inner: Monitor, count: int) -> None:
        super().__init__(inner)
        self._left = count

    def answer(self, command: Command) -> Any:
        """See Through."""
        self._left -= command.execute in CHANGING
        if self._left == 0 and command.execute in CHANGING:
            raise command_error(command, "GenericError", "refused by the test")
        return super().answer(command)


class Breaking(Through):
    """The conversation breaks at the `count`-th changing command and is whole again after it.

    QEMU has done the command or not: the product cannot know.
    """

    def __init__(self, inner: Monitor, count: int, *, is_sent: bool) -> None:
        super().__init__(inner)
        self._left = count
        self._is_sent = is_sent

    def answer(self, command: Command) -> Any:
        """See Through."""
        self._left -= command.execute in CHANGING
        if self._left != 0 or command.execute not in CHANGING:
            return super().answer(command)
        if self._is_sent:
            super().answer(command)
        raise ProtocolError("the conversation broke off")


class Hooked(Through):
    """Calls `before` with every command before it is sent."""

    def __init__(self, inner: Monitor, before: Callable[[Command], None]) -> None:
        super().__init__(inner)
        self._before = before

    def answer(self, command: Command) -> Any:
        """See Through."""
        self._before(command)
        return super().answer(command)


class Noticed(Through):
    """Calls `after` with every command after it was answered."""

    def __init__(self, inner: Monitor, after: Callable[[Command], None]) -> None:
        super().__init__(inner)
        self._after = after

    def answer(self, command: Command) -> Any:
        """See Through."""
        answer = super().answer(command)
        self._after(command)
        return answer
