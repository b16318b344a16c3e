"""A tenant chooses numbers: each thing is asked once, and a request has a time to end in."""

import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from tests.contract.sandbox import Hooked
from tests.support.disks import disk_image, loop_device
from vmplug.devnum import DevNum
from vmplug.drivers.ports import Command
from vmplug.errors import PolicyError
from vmplug.host.finding import Code
from vmplug.host.kind import DeviceType
from vmplug.host.root import HostRoot
from vmplug.hypervisor.fake.monitor import FakeMonitor
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.manager.examine import CheckedRequest, examine
from vmplug.manager.manager import DeviceManager
from vmplug.oci.info import DeviceInfo, DevType
from vmplug.oci.requests import NetInfo
from vmplug.policy.rules import Policy, Rule

MANY = 40
BUDGETS_S = (1.0, 4.0, 16.0, 64.0)
"""A busy host may spend a short one before anything is plugged."""


@contextmanager
def silent_backend(path: Path) -> Iterator[list[socket.socket]]:
    """Accepts each connection, and never says a word: the connections so far."""
    taken = list[socket.socket]()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    taken.append(listener.accept()[0])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield taken
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in taken:
                connection.close()


def messages(examined: list[CheckedRequest], code: Code) -> list[str]:
    """Of the findings with that code."""
    return [f.message for request in examined for f in request.findings if f.code is code]


def test_silent_backends_are_asked_once_and_share_one_time(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    with silent_backend(first) as of_first, silent_backend(second) as of_second:
        examined = examine(
            [
                NetInfo(label=f"{path.name}{number}", socket_path=str(path))
                for path in (first, second)
                for number in range(MANY)
            ],
            HostRoot(),
        )
        assert (len(of_first), len(of_second)) == (1, 0)
    said = messages(examined, Code.BACKEND_SILENT)
    assert len(said) == 2 * MANY
    assert len({message for message in said if "does not answer" in message}) == 1
    assert sum("vmplug did not ask its backend" in message for message in said) == MANY


class Counting(HostRoot):
    """This host, which counts how often it was asked about a node: many tries are one question."""

    def __init__(self) -> None:
        super().__init__()
        self.questions = 0
        self._is_asking = False

    def open_errno(self, path: str, flags: int) -> int | None:
        answer = super().open_errno(path, flags)
        if flags & os.O_EXCL:
            self.questions += not self._is_asking
            self._is_asking = answer == errno.EBUSY
        return answer

    def read_int(self, path: str, *, base: int = 10) -> int | None:
        self._is_asking = False
        return super().read_int(path, base=base)


@pytest.mark.root
def test_a_device_that_is_held_exclusively_is_asked_for_once(tmp_path: Path) -> None:
    with loop_device(disk_image(tmp_path / "disk.img", 8, "x")) as node:
        number = DevNum(os.major(node.stat().st_rdev), os.minor(node.stat().st_rdev))

        def ask(mentions: int) -> int:
            host = Counting()
            requests = [
                DeviceInfo(container_path=f"/dev/d{n}", dev_type=DevType.BLOCK, devnum=number)
                for n in range(mentions)
            ]
            examined = examine(requests, host)
            assert len(messages(examined, Code.OPEN_EXCLUSIVELY)) == mentions
            return host.questions

        holder = os.open(node, os.O_RDONLY | os.O_EXCL)
        try:
            assert ask(MANY) == ask(1) > 0
        finally:
            os.close(holder)


@pytest.fixture
def images(tmp_path: Path) -> list[DeviceInfo]:
    return [
        DeviceInfo(
            container_path=f"/dev/xvd{name}",
            dev_type=DevType.BLOCK,
            host_path=str(disk_image(tmp_path / name, 2, name)),
        )
        for name in "abc"
    ]


def policy(request_s: float) -> Policy:
    allows = Rule(name="disks", kinds=frozenset({DeviceType.BLOCK}))
    return Policy(name="/etc/p.toml", rules=(allows,), request_s=request_s)


def managed(tmp_path: Path, qemu: Qemu, request_s: float) -> DeviceManager:
    return DeviceManager.open(
        vm="sb1",
        host=HostRoot(),
        hypervisor=qemu,
        state_dir=tmp_path / "state",
        policy=policy(request_s),
    )


def test_a_request_whose_time_is_spent_before_anything_is_plugged_changes_nothing(
    tmp_path: Path, images: list[DeviceInfo]
) -> None:
    machine = FakeMonitor()
    with closing(managed(tmp_path, Qemu(machine), 1e-9)) as devices:
        for refused in (devices.attach_all, devices.check, devices.plan):
            with pytest.raises(
                PolicyError, match="longer than the 1e-09 s that one may"
            ) as caught:
                refused(images)
            assert "/etc/p.toml: request-seconds" in (caught.value.hint or "")
        assert devices.attachments() == []
    assert not machine.nodes


def test_what_was_plugged_is_undone_when_the_time_is_spent(
    tmp_path: Path, images: list[DeviceInfo]
) -> None:
    machine, plugged = FakeMonitor(), list[str]()
    before = set(machine.devices)
    for budget_s in BUDGETS_S:

        def dawdle(command: Command, budget_s: float = budget_s) -> None:
            if command.execute == "device_add":
                plugged.append(command.arguments["id"])
                time.sleep(budget_s)  # the time itself is the matter

        with closing(managed(tmp_path, Qemu(Hooked(machine, dawdle)), budget_s)) as devices:
            with pytest.raises(PolicyError, match=f"longer than the {budget_s:g} s"):
                devices.attach_all(images)
            assert devices.attachments() == []
            assert devices.reconcile() == []
        assert not machine.nodes
        assert set(machine.devices) == before
        if plugged:
            break
    assert len(plugged) == 1


def test_a_request_within_its_time_is_done(tmp_path: Path, images: list[DeviceInfo]) -> None:
    with closing(managed(tmp_path, Qemu(FakeMonitor()), 60.0)) as devices:
        assert len(devices.attach_all(images)) == len(images)
