"""What a test in the lab VM does to the machine that it runs on."""

import itertools
import json
import os
import re
import select
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from lab.command_line import device_properties
from lab.topology import Device

from tests.support.raw_qmp import QmpError

MONITOR_PORT = "lab.monitor"
PORTS = Path("/sys/class/virtio-ports")
PCI_DEVICES = Path("/sys/bus/pci/devices")

TIMEOUT_S = 120.0
POLL_S = 0.01


class OuterQemu:
    """The QEMU that the lab VM runs in, which adds devices to it and removes them.

    Made by `connect`, a context manager; one at a time. Nothing waits beyond its deadline.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._received = b""
        self._ids = itertools.count(time.monotonic_ns())
        self.execute("qmp_capabilities")

    @classmethod
    def connect(cls) -> Self:
        """Opens the serial port that leads to the monitor. OSError when somebody else has it."""
        (name,) = (
            path.parent.name
            for path in PORTS.glob("*/name")
            if path.read_text().strip() == MONITOR_PORT
        )
        port = os.open(f"/dev/{name}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return cls(port)
        except BaseException:
            os.close(port)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the port to the next."""
        os.close(self._port)

    def add(self, device: Device, timeout_s: float = TIMEOUT_S) -> None:
        """Plugs a device into the lab; it is in sysfs when this returns. Raises TimeoutError."""
        self.execute("device_add", driver=device.driver, **device_properties(device))
        path = PCI_DEVICES / device.bdf
        wait_until(path.exists, f"{device.qdev_id} at {device.bdf}", timeout_s)

    def remove(self, device: Device, timeout_s: float = TIMEOUT_S) -> None:
        """Takes a device out of the lab; it is not in sysfs when this returns.

        The lab's kernel may have to release it first: TimeoutError when it does not.
        """
        self.execute("device_del", id=device.qdev_id)
        path = PCI_DEVICES / device.bdf
        wait_until(
            lambda: not path.exists(), f"end of {device.qdev_id} at {device.bdf}", timeout_s
        )
        wait_until(
            lambda: device.qdev_id not in self.devices(), f"end of {device.qdev_id}", timeout_s
        )

    def devices(self) -> set[str]:
        """The ids of all devices that the lab has now."""
        return {entry["name"] for entry in self.execute("qom-list", path="/machine/peripheral")}

    def execute(self, command: str, **arguments: object) -> Any:
        """What a QMP command returns. Raises QmpError, TimeoutError.

        The monitor has one session as long as the lab lives: it greets once, and negotiates once.
        """
        number = next(self._ids)
        deadline = time.monotonic() + TIMEOUT_S
        message = {"execute": command, "arguments": arguments, "id": number}
        self._write(json.dumps(message).encode() + b"\n", deadline)
        while (answer := self._read_message(deadline)).get("id") != number:
            pass  # the greeting, an event, or the answer to somebody who did not wait for it
        error = answer.get("error")
        if error and command != "qmp_capabilities":
            raise QmpError(command, error["class"], error["desc"])
        return answer.get("return")

    def _write(self, data: bytes, deadline: float) -> None:
        while data:
            self._wait(deadline, select.POLLOUT)
            data = data[os.write(self._port, data) :]

    def _read_message(self, deadline: float) -> Mapping[str, Any]:
        while b"\n" not in self._received:
            self._wait(deadline, select.POLLIN)
            self._received += os.read(self._port, 1 << 16)
        line, _, self._received = self._received.partition(b"\n")
        message: Mapping[str, Any] = json.loads(line)
        return message

    def _wait(self, deadline: float, event: int) -> None:
        poll = select.poll()
        poll.register(self._port, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError("the lab's QEMU does not answer")


def namespace_of(bdf: str) -> Path:
    """The device node of the only namespace of an NVMe controller that has its driver.

    The kernel looks for namespaces after it has bound the driver: it is waited for. One that
    several controllers may share is `nvme2c2n1` in sysfs, and its node `nvme2n1`.
    """

    def nodes() -> list[Path]:
        found = (PCI_DEVICES / bdf / "nvme").glob("nvme*/nvme*n1")
        named = (Path("/dev") / re.sub(r"c\d+", "", path.name) for path in found)
        return [node for node in named if node.is_block_device()]

    wait_until(lambda: bool(nodes()), f"namespace of {bdf}")
    (node,) = nodes()
    return node


def wait_until(condition: Callable[[], bool], wanted: str, timeout_s: float = TIMEOUT_S) -> None:
    """Returns as soon as the condition holds: sysfs tells nobody. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {wanted} after {timeout_s:g} s")
        time.sleep(POLL_S)
