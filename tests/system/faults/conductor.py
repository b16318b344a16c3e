"""Conductor: sits on a VM's QMP socket, sees every step of a process, and spoils one of them.

It is one loop in one thread, so that forking is safe and the order of steps is theirs.
"""

import json
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from tests.system.faults.machine import Link, Machine, Message, Reader
from tests.system.faults.process import GO, REFUSE, Answer, Process
from tests.system.faults.steps import GUEST, OWN, Fault, Step, StepKind
from vmplug.address import device_id_of
from vmplug.hypervisor.fake.monitor import Guest

CHANGING = frozenset(
    {
        *("blockdev-add", "blockdev-del", "object-add", "object-del", "device_add", "device_del"),
        *("chardev-add", "chardev-remove", "netdev_add", "netdev_del", "getfd", "closefd"),
        *("add-fd", "remove-fd", "block_resize"),
    }
)
DEADLINE_S = 120.0
"""For one process; the product's own deadlines are well below it."""


class Plan(NamedTuple):
    """One fault at one step."""

    step: Step
    fault: Fault


class Host(Protocol):
    """What a fault can do to the host."""

    def spoil(self, fault: Fault) -> None:
        """Let the backend die, the device go, the disk be full, the journal be wrong."""


class Conductor:
    """Serves one process after another; `steps` are those of the last one.

    `has_fired` is whether the planned fault has come.
    """

    def __init__(self, path: Path, machine: Machine, host: Host) -> None:
        self.path = path
        self._machine = machine
        self._host = host
        self._client: Reader | None = None
        self._link: Link | None = None
        self._from_vm: Reader | None = None
        self._waiting: deque[Message] = deque()
        self._begin(None, is_counting=False)
        self.listen()

    def listen(self) -> None:
        """Take clients, as a QEMU that has just started does."""
        self.path.unlink(missing_ok=True)
        self._listener: socket.socket | None = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()

    def close(self) -> None:
        """Hang up on everybody, and take nobody any more."""
        self._hang_up()
        if self._listener:
            self._listener.close()
            self._listener = None

    def serve(
        self,
        process: Process,
        plan: Plan | None = None,
        *,
        lead: Callable[[Answer], str] = lambda _: GO,
    ) -> Answer | None:
        """Until the process has ended: what it answered, None when it was killed.

        `lead` gives the word for each thing that the process asks which is no step.
        """
        self._begin(plan, is_counting=plan is None)
        self._process, self._lead = process, lead
        self._answer: Answer | None = None
        deadline = time.monotonic() + DEADLINE_S
        try:
            while not self._turn(deadline):
                pass
        finally:
            process.reap()
            self._hang_up()
        return self._answer

    def _begin(self, plan: Plan | None, *, is_counting: bool) -> None:
        self.steps: list[Step] = []
        self._seen: Counter[tuple[StepKind, str]] = Counter()
        self.has_fired = False
        self._plan = plan
        self._is_on = False
        self._is_silent = False
        self._is_asking = False
        del is_counting

    def _turn(self, deadline: float) -> bool:
        """Whether the process has ended; else one thing was done."""
        process, client = self._process, self._client
        readers: list[int | socket.socket] = [process.line, process.pidfd]
        if self._listener and not (client or self._is_silent):
            readers.append(self._listener)
        readers += [r.connection for r in (client, self._from_vm) if r]
        ready = select.select(readers, [], [], max(0.0, deadline - time.monotonic()))[0]
        if not ready:
            process.kill()
            self._answer = {
                "bug": (process.words.read_text())[-3000:]
                + f"it still runs after {DEADLINE_S:g} s"
            }
            return True
        if process.line in ready:
            if data := process.line.recv(1 << 16):
                self._on_word(json.loads(data))
                return False
            return True
        if self._from_vm and self._from_vm.connection in ready:
            self._on_vm()
        elif client and client.connection in ready:
            self._on_client(client)
        elif self._listener in ready:
            self._accept()
        else:
            return process.pidfd in ready
        return False

    # what the process says

    def _on_word(self, message: Answer) -> None:
        word = GO
        if "begin" in message:
            kind, name = message["begin"]
            fault = self._fault_at(StepKind(kind), name)
            if fault is Fault.KILLED_BEFORE:
                self._process.kill()
                return
            if fault is Fault.REFUSED:
                word = REFUSE
            self._end_fault = fault
        elif "end" in message:
            if self._end_fault is Fault.KILLED_AFTER:
                self._process.kill()
                return
        elif "ended" in message:
            self._answer = message["ended"]
        elif message.get("on"):
            self._is_on = True
        else:
            word = self._lead(message)
        with suppress(BrokenPipeError):
            self._process.line.send(word.encode())

    def _fault_at(self, kind: StepKind, name: str) -> Fault | None:
        """Count a step; the fault that is planned for it, if the conductor has not seen to it."""
        if not self._is_on:
            return None
        if kind is StepKind.QUERIES and self._is_asking:
            return None
        if kind is not StepKind.EVENT:
            self._is_asking = kind is StepKind.QUERIES and name != "qmp_capabilities"
        self._seen[kind, name] += 1
        step = Step(kind, name, self._seen[kind, name])
        self.steps.append(step)
        if self.has_fired or self._plan is None or self._plan.step != step:
            return None
        self.has_fired = True
        fault = self._plan.fault
        if fault is Fault.QEMU_DIES:
            self._machine.die()
            self.close()
        elif fault in GUEST:
            self._machine.guest(Guest.REFUSES if fault is Fault.GUEST_REFUSES else Guest.SILENT)
            if fault is Fault.NOTED_WRONG:
                self._host.spoil(fault)
        elif fault in {Fault.BACKEND_DIES, Fault.DEVICE_GONE, Fault.DISK_FULL, *OWN}:
            self._host.spoil(fault)
        return fault

    # QMP

    def _accept(self) -> None:
        assert self._listener
        client, _ = self._listener.accept()
        self._client = Reader(client)
        self._link = self._machine.link()
        self._from_vm = Reader(self._link.connection)

    def _hang_up(self) -> None:
        if self._client:
            self._client.connection.close()
            self._client.close_descriptors()
        if self._link:
            self._link.close()
        self._client = self._link = self._from_vm = None
        self._waiting.clear()

    def _on_client(self, client: Reader) -> None:
        requests = client.read()
        if requests is None:
            self._hang_up()
            return
        for request in requests:
            if not self._is_silent and self._link:
                self._on_request(client, request)

    def _on_request(self, client: Reader, request: Message) -> None:
        execute = request["execute"]
        kind = StepKind.COMMAND if execute in CHANGING else StepKind.QUERIES
        name = _label(request) if execute in CHANGING else execute
        match self._fault_at(kind, name):
            case Fault.KILLED_BEFORE:
                self._process.kill()
            case Fault.KILLED_AFTER:
                self._do(request)
                self._process.kill()
            case Fault.REFUSED:
                error = {"class": "GenericError", "desc": "refused by the test"}
                same = {key: request[key] for key in request.keys() & {"id"}}
                client.close_descriptors()
                self._tell({"error": error, **same})
            case Fault.LOST_BEFORE:
                self._hang_up()
            case Fault.LOST_AFTER:
                self._do(request)
                self._hang_up()
            case Fault.SILENT:
                self._do(request)
                self._is_silent = True
            case Fault.QEMU_DIES:
                pass
            case _:
                self._send(request)

    def _send(self, request: Message) -> None:
        assert self._client
        assert self._link
        descriptors, self._client.descriptors = self._client.descriptors, []
        self._link.send(request, descriptors)

    def _do(self, request: Message) -> None:
        """Let the VM do it, and keep its answer."""
        self._send(request)
        assert self._from_vm
        while True:
            for message in self._from_vm.read() or []:
                if "event" not in message and "QMP" not in message:
                    return

    def _on_vm(self) -> None:
        assert self._from_vm
        messages = self._from_vm.read()
        if messages is None:
            self._hang_up()
        for message in messages or []:
            if not self._is_silent and self._client:
                self._on_message(message)

    def _on_message(self, message: Message) -> None:
        device = message.get("data", {}).get("device", "")
        if message.get("event") != "DEVICE_DELETED" or not device_id_of(device):
            self._tell(message)
            return
        match self._fault_at(StepKind.EVENT, f"DEVICE_DELETED{_part(device)}"):
            case Fault.KILLED_BEFORE:
                self._process.kill()
            case Fault.KILLED_AFTER:
                self._tell(message)
                self._process.kill()
            case Fault.LOST_BEFORE:
                self._hang_up()
            case Fault.LOST_AFTER:
                self._tell(message)
                self._hang_up()
            case Fault.SILENT:
                self._is_silent = True
            case Fault.QEMU_DIES:
                pass
            case _:
                self._tell(message)

    def _tell(self, message: Message) -> None:
        assert self._client
        with suppress(BrokenPipeError):
            self._client.connection.sendall(json.dumps(message).encode() + b"\r\n")


def _label(request: Message) -> str:
    arguments = request.get("arguments", {})
    named = (arguments.get(key) for key in ("id", "node-name", "fdname"))
    return str(request["execute"]) + _part(next(filter(None, named), ""))


def _part(name: str) -> str:
    """Which part of a device a name is of: ` limit`; nothing for the device itself."""
    return " " + name.split("-", 2)[2] if name.count("-") > 1 else ""
