"""QMP: single commands, and what becomes of their answers and events."""

import json
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tests.kata.host import DISK, add_device, request
from tests.kata.machine import Machine
from tests.kata.terms import Terms, commands
from tests.kata.vector import (
    Adapter,
    Answer,
    Case,
    attempt,
    error_of,
    kind_of,
)
from tests.support.tree import HostTree
from vmplug.address import device_id_of
from vmplug.drivers.ports import Command
from vmplug.errors import CommandError
from vmplug.host.finding import Code
from vmplug.hypervisor.fake.monitor import FakeMonitor
from vmplug.hypervisor.qmp.client import QmpMonitor
from vmplug.oci.requests import NetInfo, ShareInfo

_FILE = {"ContainerPath": "/x", "DevType": "b", "Major": -1, "Minor": 0, "HostPath": "/disk.img"}


def _katas(case: Case) -> dict[str, Any]:
    said = [dict(command) for command in case.expected["commands"] or ()]
    return {"commands": commands(said), "error": kind_of(case.expected["error"])}


def _said(machine: Machine, *executed: str) -> Terms:
    """What was said of these commands, with Kata's words for names and files."""
    terms = commands(machine.changes)
    for _, facts in terms:
        file = facts.get("file", {})
        if file.get("filename") == _FILE["HostPath"]:
            file["filename"] = "<regular file>"
    return [term for term in terms if term[0] in executed]


def _blockdev_add(case: Case) -> Answer:
    """The asynchronous I/O is Kata's: native."""
    direct = case.input.get("direct", True)
    assert not case.input.get("no_flush", False)
    assert case.input.get("driver", "file") == "file"
    tree = HostTree(case.path)
    if case.input.get("File") != "<missing>":
        add_device(tree, _FILE)
    machine = Machine(case, tree)
    options = {"aio": "native", "cache": "none" if direct else "writeback"}
    info = request(_FILE, driver_options=options)
    error = error_of(machine.try_attach(info, allow=[Code.NO_DIRECT_IO]))
    return Answer({"commands": _said(machine, "blockdev-add"), "error": error}, _katas(case))


def _scsi_add(case: Case) -> Answer:
    tree = HostTree(case.path)
    add_device(tree, DISK)
    index = case.input.get("scsi_id", 0) << 8 | case.input.get("lun", 0)
    machine = Machine(case, tree, ports=0, used_scsi=index)
    driver = case.input.get("driver", "virtio-scsi")
    info = request(DISK, driver_options={"block-driver": driver, "share-rw": "on"})
    error = error_of(machine.try_attach(info))
    return Answer({"commands": _said(machine, "device_add"), "error": error}, _katas(case))


def _seed_add(case: Case) -> Answer:
    tree = HostTree(case.path)
    add_device(tree, DISK)
    machine = Machine(case, tree)
    assert case.input["shared"]
    assert case.input["queues"] == 2
    machine.attach(request(DISK, driver_options={"share-rw": "on"}))
    said = machine.changes[-1].arguments
    return Answer({key: said.get(key) for key in case.expected}, dict(case.expected))


def _chardev_add(case: Case) -> Answer:
    """That of a network; what it is connected to is Kata's, below the root."""
    case.input.skip("ours is drawn", "id")
    case.input.skip("ours never listens", "server", "wait")
    (command,) = case.expected["commands"]
    word = command["arguments"]["backend"]["data"]["addr"]["data"]["path"]
    assert case.input.get("path", word) == word
    path = f"/{word.lstrip('/')}"
    machine = Machine(case, HostTree(case.path).node(path, "s"))
    options = {"reconnect": str(case.input["reconnect"])}
    info = NetInfo(label="eth0", socket_path=path, driver_options=options)
    error = error_of(machine.try_attach(info))
    return Answer({"commands": _said(machine, "chardev-add"), "error": error}, _katas(case))


def _chardev_remove(case: Case) -> Answer:
    """That of a share."""
    case.input.skip("ours is drawn", "id")
    machine = Machine(case, HostTree(case.path).node("/vu/s", "s"))
    error = machine.try_detach(machine.attach(ShareInfo(tag="work", source="/vu/s")))
    return Answer({"commands": _said(machine, "chardev-remove"), "error": error}, _katas(case))


class _Told(FakeMonitor):
    """Emits at a `device_del` what it was told to, or at the next command after it."""

    at_once: Sequence[str] = ()
    later: Sequence[str] = ()
    _due: Sequence[str] = ()

    def attempt(self, commands: Sequence[Command]) -> tuple[list[Any], CommandError | None]:
        due, self._due = self._due, ()
        self._tell(due)
        return super().attempt(commands)

    def _device_del(self, id: str) -> dict[str, Any]:  # noqa: A002  QMP's word
        assert id in self.devices
        self._tell(self.at_once)
        self._due = self.later
        return {}

    def _tell(self, events: Sequence[str]) -> None:
        (name,) = (name for name in self.devices if device_id_of(name)) if events else ("",)
        for text in events:
            event = json.loads(text.replace("vfio-a0", name))
            if event["data"].get("device") == name:
                del self.devices[name]
            for receive in self._receivers:
                receive(event["event"], event["data"])


def _device_del(case: Case) -> Answer:
    assert case.input["id"] == "vfio-a0"
    timeout_s = case.setup["timeout_ms"] / 1000
    tree = HostTree(case.path)
    add_device(tree, DISK)
    machine = Machine(case, tree)
    monitor = _Told()
    machine.monitor = monitor
    machine.restart()
    hold = machine.attach(request(DISK))
    if "replies" in case.setup:
        event, answer = case.setup["replies"][0].split("\n")
        assert json.loads(answer) == {"return": {}}
        monitor.at_once = [event]
    else:
        monitor.later = case.setup["events_after_reply"]["0"]
    began = time.monotonic()
    error = error_of(attempt(lambda: machine.manager.detach(hold.id, timeout_s=timeout_s)))
    timed_out = time.monotonic() - began >= timeout_s
    ours = {"commands": _said(machine, "device_del"), "error": error, "timed_out": timed_out}
    return Answer(ours, {**_katas(case), "timed_out": case.expected["timed_out"]})


def _answered(case: Case) -> Answer:
    """A QEMU that gives Kata's reply to the one command that it is sent."""
    (reply,) = case.setup["replies"]
    (command,) = case.expected["commands"]
    path = str(case.path / "qmp.sock")
    server = _Server(path, json.loads(reply))
    case.at_end.callback(server.close)
    monitor = QmpMonitor.connect(path, timeout_s=10)
    case.at_end.callback(monitor.close)
    sent = Command(command["execute"], command["arguments"])
    error = error_of(attempt(lambda: monitor.execute(sent)))
    return Answer({"commands": commands(server.received), "error": error}, _katas(case))


class _Server:
    """A QMP server for one client and one command."""

    def __init__(self, path: str, reply: Mapping[str, Any]) -> None:
        self.received: list[Mapping[str, Any]] = []
        self._reply = reply
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        """A client that waits for each answer sends one message at a time."""
        connection, _ = self._listener.accept()
        with connection:
            connection.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\n')
            while message := connection.recv(1 << 16):
                command = json.loads(message)
                answer: Mapping[str, Any] = {"return": {}}
                if command["execute"] != "qmp_capabilities":
                    self.received.append(command)
                    answer = self._reply
                known = {"id": command["id"]} if "id" in command else {}
                connection.sendall(json.dumps({**answer, **known}).encode() + b"\n")

    def close(self) -> None:
        self._thread.join()
        self._listener.close()


ADAPTERS: dict[str, Adapter] = {
    "govmm ExecutePCIDeviceAdd (seed)": _seed_add,
    "govmm QMP.ExecuteBlockdevAdd": _blockdev_add,
    "govmm QMP.ExecuteBlockdevAddWithCache": _blockdev_add,
    "govmm QMP.ExecuteBlockdevAddWithDriverCache": _blockdev_add,
    "govmm QMP.ExecuteCharDevUnixSocketAdd": _chardev_add,
    "govmm QMP.ExecuteChardevDel": _chardev_remove,
    "govmm QMP.ExecuteDeviceDel": _device_del,
    "govmm QMP.ExecuteSCSIDeviceAdd": _scsi_add,
    "govmm QMP.executeCommand": _answered,
}
