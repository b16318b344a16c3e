"""What QEMU answers is believed as far as it has the shape that it must have."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Queue
from typing import Any

import pytest
from msgspec.structs import replace

from tests.support.says import AGREED, GREETING, Says
from vmplug.drivers.ports import Command
from vmplug.errors import CommandError, ConnectError, ProtocolError
from vmplug.hypervisor.fake.backends import Refused
from vmplug.hypervisor.fake.monitor import FakeHypervisor, FakeMonitor
from vmplug.hypervisor.qemu.qom import qom_get, qom_list
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.hypervisor.qmp.client import QmpMonitor
from vmplug.hypervisor.qmp.monitor import EventReceiver, Monitor
from vmplug.hypervisor.qmp.schema import validate_reply
from vmplug.hypervisor.qmp.wire import MESSAGE_BYTES_MAX

# Shapes


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (qom_list("/machine"), None),
        (qom_list("/machine"), {}),
        (qom_list("/machine"), [None]),
        (qom_list("/machine"), [{"name": "a"}]),
        (qom_list("/machine"), [{"name": 1, "type": "x"}]),
        (qom_list("/machine"), [{"name": "a", "type": "b"}] * 20_000),
        (qom_get("/machine", "type"), 3),
        (qom_get("/x", "type"), {}),
        (qom_get("/x", "addr"), -1),
        (qom_get("/x", "addr"), 256),
        (qom_get("/x", "addr"), "0x10"),
        (qom_get("/x", "parent_bus"), None),
        (qom_get("/x", "bus_nr"), 256),
        (qom_get("/x", "scsi-id"), -1),
        (qom_get("/x", "lun"), 1 << 32),
        (qom_get("/x", "dev_id"), "fe.9.0001"),
        (qom_get("/x", "dev_id"), "fe.0.00001"),
        (qom_get("/x", "child[0]"), ["/machine"]),
        (qom_get("/machine", "memory"), {"slots": 1 << 40}),
        (Command("query-memory-devices", {}), [{"type": "nvdimm"}]),
        (Command("query-memory-devices", {}), [{"type": "nvdimm", "data": {"slot": "1"}}]),
        (Command("query-memdev", {}), [{"id": "m"}]),
        (Command("query-kvm", {}), {"enabled": "yes"}),
        (Command("query-accelerators", {}), {"enabled": True}),
        (Command("query-command-line-options", {}), [{"option": "chardev"}]),
        (Command("query-memory-size-summary", {}), {"base-memory": -1}),
        (Command("query-blockstats", {}), [{"node-name": 1}]),
        (Command("query-chardev", {}), [{"label": "x"}]),
        (Command("query-status", {}), {"status": 1}),
        (qom_get("/x", "dev_id"), "\udc80"),
    ],
)
def test_a_malformed_answer_is_an_error(command: Command, answer: object) -> None:
    with pytest.raises(ProtocolError, match=f"answer to {command.execute} makes no sense") as no:
        validate_reply(command, answer)
    assert no.value.hint


def test_additions_of_a_later_qemu_are_ignored() -> None:
    entry = {"name": "x", "type": "y", "description": "z"}
    assert validate_reply(qom_list("/"), [entry]) == [{"name": "x", "type": "y"}]
    assert validate_reply(qom_get("/x", "new-property"), {"any": "thing"}) == {"any": "thing"}


class Answering(Monitor):
    """A VM in memory that answers one command in its own way."""

    def __init__(self, machine: FakeMonitor, asked: str, answer: object) -> None:
        self._machine, self._asked, self._answer = machine, asked, answer

    def attempt(self, commands: Sequence[Command]) -> tuple[list[Any], CommandError | None]:
        answers, refusal = self._machine.attempt(commands)
        said = zip(commands, answers, strict=False)
        return [self._answer if c.execute == self._asked else a for c, a in said], refusal

    def listen(self, receive: EventReceiver) -> None:
        receive("DEVICE_DELETED", {"device": ["vmplug-0123456789abcdef"]})
        receive("DEVICE_DELETED", {})
        self._machine.listen(receive)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("query-memdev", [1]),
        ("qom-list", [{"name": "rp0"}]),
        ("qom-get", []),
        ("query-cpus-fast", None),
        ("query-cpus-fast", ["cpu"]),
        ("query-cpus-fast", [{"cpu-index": 0, "thread-id": "../1"}]),
    ],
)
def test_an_offer_is_not_made_of_nonsense(asked: str, answer: object) -> None:
    machine = FakeHypervisor().monitor
    devices = dict(machine.devices)
    with pytest.raises(ProtocolError, match=f"answer to {asked}"):
        Qemu(Answering(machine, asked, answer)).offer()
    assert machine.devices == devices


@dataclass(slots=True)
class Later(FakeMonitor):
    """A QEMU that has no query-kvm any more."""

    accelerator: str = "tcg"

    def _query_kvm(self) -> dict[str, object]:
        raise Refused("The command query-kvm has not been found", "CommandNotFound")

    def _query_accelerators(self) -> dict[str, object]:
        return {"enabled": self.accelerator, "present": ["kvm", "tcg"]}


@pytest.mark.parametrize(("accelerator", "kvm"), [("kvm", True), ("tcg", False)])
def test_kvm_is_known_without_the_old_question_for_it(accelerator: str, *, kvm: bool) -> None:
    offer = Qemu(Later(accelerator=accelerator)).offer()
    assert offer == replace(FakeHypervisor().offer(), kvm=kvm)


# Bytes


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\n",
        b"[]\n",
        b"\xff\xfe\n",
        b'{"QMP": 1}\n',
        b'{"QMP": {}}\n',
        b"[" * 10_000 + b"\n",
        b'{"QMP": "' + b"x" * (MESSAGE_BYTES_MAX + 1) + b'"}\n',
    ],
)
def test_a_server_without_qmp_is_not_a_vm(said: bytes) -> None:
    with Says(said) as path, pytest.raises((ConnectError, ProtocolError)):
        status(path)


@pytest.mark.parametrize("said", [b'{"error": {}}\n', b"\xff\n", b"{}\n", AGREED + b"[]\n"])
def test_a_server_that_fails_after_its_greeting_is_not_a_vm(said: bytes) -> None:
    with Says(GREETING, said) as path, pytest.raises((ConnectError, ProtocolError)):
        status(path)


def status(path: str) -> object:
    monitor = QmpMonitor.connect(path)
    try:
        return monitor.execute(Command("query-status", {}))
    finally:
        monitor.close()


@pytest.mark.parametrize(
    "said",
    [
        b"\xff\xfe\n",
        b"null\n",
        b"{}\n{",
        b'{"id": []}\n',
        b'{"id": {}, "error": 1}\n',
        b'{"id": 1}\n',
        b'{"id": 1, "error": 1}\n',
        b'{"id": 1, "error": {"class": 1, "desc": 2}}\n',
        b'{"id": 1, "return": []}\n',
        b'{"id": 1, "return": {"status": null}}\n',
        b'{"a":' + b"[" * 10_000 + b"\n",
        b'{"a": "' + b"x" * (MESSAGE_BYTES_MAX + 1) + b'"}\n',
    ],
)
def test_nonsense_closes_the_connection(said: bytes) -> None:
    """And `close`, and the next command, tell nobody's own error either."""
    with Says(GREETING, AGREED, said) as path:
        monitor = QmpMonitor.connect(path)
        for _ in range(2):
            with pytest.raises((ConnectError, ProtocolError)):
                monitor.execute(Command("query-status", {}))
        monitor.close()


def test_a_long_answer_is_an_answer() -> None:
    answer = {"status": "x" * (MESSAGE_BYTES_MAX - 100)}
    said = json.dumps({"id": 1, "return": answer}).encode() + b"\n"
    with Says(GREETING, AGREED, said) as path:
        assert status(path) == answer


_EVENTS: list[dict[str, object]] = [{"data": 1}, {"data": []}, {"data": {"device": "d1"}}]


def test_events_that_say_nothing_do_not_end_those_that_do() -> None:
    events = b"".join(
        json.dumps({"event": "DEVICE_DELETED", **rest}).encode() + b"\n" for rest in _EVENTS
    )
    answer = b'{"id": 1, "return": {"status": "running"}}\n'
    heard: Queue[object] = Queue()
    with Says(GREETING, AGREED, events + answer) as path:
        monitor = QmpMonitor.connect(path)
        monitor.listen(lambda event, data: heard.put((event, dict(data))))
        monitor.execute(Command("query-status", {}))
        assert heard.get(timeout=60) == ("DEVICE_DELETED", {"device": "d1"})
        monitor.close()
